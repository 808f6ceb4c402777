"""The tools that people already use, each with a compacted model; at the end a table of the largest differences."""

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from reproduction.markdown import table
from support.damage import compacted
from tasks import tiny_tasks
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from rankdyna_trainer import rank_report

# Without it OpenVINO tells nobody that it was used.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

Differs = Callable[[str, Tensor, Tensor, float], None]


def dense_classifier() -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tiny_tasks.WORDS), max_position_embeddings=40, initializer_range=0.2, **sizes)
    return BertForSequenceClassification(config)


@pytest.fixture
def make_compacted() -> Callable[[str], PreTrainedModel]:
    """A compacted model of one layer, of a kind of `tiny_tasks` or a `"classifier"`, with ranks of every form."""

    def make(kind: str) -> PreTrainedModel:
        model = compacted(dense_classifier() if kind == "classifier" else tiny_tasks.model(kind, layers=1))
        report = rank_report(model)
        assert set(report["form"]) == {"low rank", "dense"} and {0, 3, 5} <= set(report["rank"])
        return model

    return make


@pytest.fixture
def inputs_of() -> Callable[..., dict[str, Tensor]]:
    """Random tokens for a model; the second half of the last row is padding, unless there is only one row."""

    def inputs(model: PreTrainedModel, rows: int = 2, tokens: int = 10) -> dict[str, Tensor]:
        ids = torch.randint(4, len(tiny_tasks.WORDS), (rows, tokens))
        mask = torch.ones_like(ids)
        mask[1:][-1:, tokens // 2 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids[:, : tokens // 2].clone()
        return batch

    return inputs


@pytest.fixture
def assert_differs_less(record_property: Callable[[str, Any], None]) -> Differs:
    """Checks the largest difference that a tool makes, and notes it for the table."""

    def check(tool: str, actual: Tensor, expected: Tensor, limit: float) -> None:
        assert actual.shape == expected.shape and expected.numel()
        difference = (actual.float() - expected.float()).abs().max().item()
        record_property("company", [tool, version(tool), difference])
        assert difference <= limit

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    differences: dict[tuple[str, str, str], float] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "company":
                tool, tool_version, difference = value
                key = (tool, tool_version, report.nodeid.removeprefix("tests/company/"))
                differences[key] = max(difference, differences.get(key, 0.0))
    if differences:
        rows = [(*key, f"{difference:.1e}") for key, difference in sorted(differences.items())]
        headers = ("tool", "version", "test", "largest difference")
        terminalreporter.section("tools with a compacted model")
        terminalreporter.write(table(headers, rows))
