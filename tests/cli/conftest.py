import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.damage import compacted
from support.training_runs import Folders, stopped_run
from tasks import tiny_tasks
from transformers import BertForSequenceClassification, PreTrainedModel
from typer.testing import CliRunner

from rankdyna_trainer.cli import app


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("folders")
    tokenizer = tiny_tasks.tokenizer()
    dense = BertForSequenceClassification(tiny_tasks.model("bert").config)
    dense.save_pretrained(root / "dense")
    training, run = stopped_run(dense, root / "run", tokenizer=tokenizer)
    model = compacted(BertForSequenceClassification.from_pretrained(root / "dense"))
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(root / "compacted")
    for folder in ("dense", "compacted"):
        tokenizer.save_pretrained(root / folder)
    return Folders(root / "dense", root / "compacted", training, run)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="rankdyna")


@pytest.fixture(scope="session")
def rankdyna() -> Callable[..., str]:
    """Runs a command that has to succeed, and gives its standard output."""

    def run(*arguments: object) -> str:
        result = invoke(*arguments)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="session")
def document(rankdyna: Callable[..., str]) -> Callable[..., Any]:
    """Runs a command with --json: on standard output there must be one document, and nothing else."""
    return lambda *arguments: json.loads(rankdyna(*arguments, "--json"))


@pytest.fixture(scope="session")
def refusal() -> Callable[..., str]:
    """Runs a command that has to fail with this exit code, and gives its message of one line."""

    def run(code: int, *arguments: object) -> str:
        result = invoke(*arguments)
        assert result.exit_code == code, (result.stdout, result.stderr)
        assert isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        *_, last = result.stderr.splitlines()
        assert last.startswith("Error: ")
        assert sum("Error" in line for line in result.stderr.splitlines()) == 1
        return last

    return run


@pytest.fixture
def logits() -> Callable[[Any], torch.Tensor]:
    """What a model of these folders computes."""

    def compute(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(4, 12).unsqueeze(0)).logits

    return compute
