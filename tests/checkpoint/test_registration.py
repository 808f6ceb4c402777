"""What an import of the package loads, and when the format is known to transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rankdyna_trainer

# What nobody needs who only loads a compacted model.
RunFresh = Callable[..., subprocess.CompletedProcess[str]]
OF_TRAINING = ("peft", "pandas", "matplotlib", "datasets", "rich", "typer", "transformers.trainer")


def run_new(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def modules_after(program: str, run: RunFresh = run_new) -> set[str]:
    """What a process has imported once it has run a program."""
    done = run(program + "\nimport json, sys\nprint(json.dumps(list(sys.modules)))")
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_import_itself_loads_nothing_but_a_few_modules_of_its_own() -> None:
    loaded = modules_after("import rankdyna_trainer") - modules_after("import importlib.machinery, typing")
    assert {name for name in loaded if name.startswith("rankdyna_trainer")} == {
        "rankdyna_trainer",
        "rankdyna_trainer.checkpoint",
        "rankdyna_trainer.checkpoint.registration",
        "rankdyna_trainer.options",
        "rankdyna_trainer.version",
    }
    assert not {name.partition(".")[0] for name in loaded} & {"torch", "transformers", *OF_TRAINING}


@pytest.mark.slow
def test_a_compacted_model_is_loaded_whenever_the_package_was_imported(checkpoint: Path, run_fresh: RunFresh) -> None:
    """Before transformers, and after its models."""
    imports = ["import rankdyna_trainer", "import transformers.modeling_utils", "from transformers import AutoModel"]
    # Older versions of transformers import pandas and rich themselves.
    by_transformers = modules_after("\n".join(imports[1:]), run_fresh)
    load = f"model = AutoModel.from_pretrained({str(checkpoint)!r})"
    low_rank = 'assert any(type(module).__name__ == "LowRankLinear" for module in model.modules())'
    for first in (imports, imports[::-1]):
        loaded = modules_after("\n".join([*first, load, low_rank]), run_fresh)
        assert not (loaded - by_transformers) & set(OF_TRAINING)


@pytest.mark.slow
def test_a_failed_import_of_transformers_is_repeated(checkpoint: Path, run_fresh: RunFresh) -> None:
    program = f"""
import sys
import rankdyna_trainer
sys.modules["safetensors"] = None
try:
    import transformers.modeling_utils
except ImportError:
    del sys.modules["safetensors"]
else:
    raise AssertionError
from transformers import AutoModel
AutoModel.from_pretrained({str(checkpoint)!r})
"""
    assert "rankdyna_trainer.checkpoint.loader" in modules_after(program, run_fresh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "layers.low_rank",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("checkpoint.loader", "layers.architecture", "checkpoint.integrity")
        ),
    ],
)
def test_any_module_may_be_the_first(module: str, checkpoint: Path, run_fresh: RunFresh) -> None:
    """That of transformers which registers the format is imported in the middle of it."""
    lines = [f"import rankdyna_trainer.{module}", "from transformers import AutoModel"]
    assert "rankdyna_trainer.checkpoint.loader" in modules_after(
        "\n".join([*lines, f"AutoModel.from_pretrained({str(checkpoint)!r})"]), run_fresh
    )


def test_all_names_are_there() -> None:
    assert {*rankdyna_trainer.__all__} <= {*dir(rankdyna_trainer)}
    for name in rankdyna_trainer.__all__:
        assert getattr(rankdyna_trainer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'RankDynaTrainer'"):
        rankdyna_trainer.RankDynaTrainer  # noqa: B018
