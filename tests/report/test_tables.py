import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, BertForSequenceClassification

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups, merge, rank_report
from rankdyna_trainer.report.tables import CompressionSummary, compression_summary, peak_memory

COLUMNS = ["out_features", "in_features", "full_rank", "rank", "dense_parameters", "parameters", "form"]
CONFIG = RankDynaConfig(rank_ratio=0.5, target_modules=["query", "0.output.dense", "1.attention.self.key"])
LAYER = "bert.encoder.layer"
# 3 * 64 numbers; 30 * 96, which is more than the dense 2048; none; 16 * 64, as many as the dense 1024
EXPECTED = {
    f"{LAYER}.0.attention.self.query": [32, 32, 32, 3, 1024, 192, "low rank"],
    f"{LAYER}.0.output.dense": [32, 64, 32, 30, 2048, 2048, "dense"],
    f"{LAYER}.1.attention.self.query": [32, 32, 32, 0, 1024, 0, "low rank"],
    f"{LAYER}.1.attention.self.key": [32, 32, 32, 16, 1024, 1024, "low rank"],
}
TARGET, DENSE_TARGET = 192 + 2048 + 0 + 1024, 1024 + 2048 + 1024 + 1024


def keep(model: nn.Module, name: str, rank: int) -> None:
    layer = model.get_submodule(name)
    layer.set_remaining(torch.arange(layer.width) < rank)


@pytest.fixture
def trained_bert(tiny_bert: BertForSequenceClassification) -> BertForSequenceClassification:
    inject_singular_groups(tiny_bert, CONFIG)
    for name, rank in zip(EXPECTED, (3, 30, 0, 16), strict=True):
        keep(tiny_bert, name, rank)
    return tiny_bert


def dense_parameters(model: BertForSequenceClassification) -> int:
    return sum(parameter.numel() for parameter in type(model)(model.config).parameters())


def test_report_in_training(trained_bert: BertForSequenceClassification) -> None:
    report = rank_report(trained_bert)
    assert list(report.columns) == COLUMNS
    assert report.index.name == "layer"
    expected = {name: [*row[:-1], "singular groups"] for name, row in EXPECTED.items()}
    assert {name: list(row) for name, row in report.iterrows()} == expected


def test_report_of_the_compacted_model(trained_bert: BertForSequenceClassification) -> None:
    report = rank_report(compact(trained_bert))
    assert list(report.columns) == COLUMNS
    assert {name: list(row) for name, row in report.iterrows()} == EXPECTED
    assert list(report.index) == list(EXPECTED)


def test_report_before_any_removal(tiny_bert: BertForSequenceClassification) -> None:
    report = rank_report(inject_singular_groups(tiny_bert, CONFIG))
    assert (report["rank"] == report["full_rank"]).all()
    assert (report["parameters"] == report["dense_parameters"]).all()
    summary = compression_summary(tiny_bert)
    assert summary.target_ratio == summary.all_ratio == 1


@pytest.mark.parametrize("compacted", [False, True])
def test_summary_counts_by_hand(trained_bert: BertForSequenceClassification, compacted: bool) -> None:
    dense_all = dense_parameters(trained_bert)
    if compacted:
        compact(trained_bert)
    summary = compression_summary(trained_bert)
    assert summary == CompressionSummary(
        target_parameters=TARGET,
        dense_target_parameters=DENSE_TARGET,
        all_parameters=dense_all - DENSE_TARGET + TARGET,
        dense_all_parameters=dense_all,
        layers=4,
        layers_at_rank_zero=1,
        layers_kept_dense=1,
    )
    assert summary.target_ratio == TARGET / DENSE_TARGET == 0.6375
    assert summary.all_ratio == (dense_all - DENSE_TARGET + TARGET) / dense_all
    if compacted:
        assert summary.all_parameters == sum(parameter.numel() for parameter in trained_bert.parameters())


def test_summary_does_not_depend_on_the_cut() -> None:
    """Removed groups that are still in the tensors, as under DDP, are not counted."""
    masked = nn.Sequential(SingularGroupLinear(torch.rand(8, 10), torch.rand(8), torch.rand(8, 9)), nn.Linear(10, 2))
    masked[0].set_remaining(torch.arange(8) < 2)
    cut = nn.Sequential(SingularGroupLinear(torch.rand(2, 10), torch.rand(2), torch.rand(2, 9)), nn.Linear(10, 2))
    assert compression_summary(masked) == compression_summary(cut)
    assert compression_summary(cut).all_parameters == 2 * 19 + 22
    assert compression_summary(cut).dense_all_parameters == 90 + 22


def test_shared_layers_are_counted_once() -> None:
    sizes = {"embedding_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    model = AlbertForSequenceClassification(AlbertConfig(vocab_size=64, num_attention_heads=2, **sizes))
    dense_all = sum(parameter.numel() for parameter in model.parameters())
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5, target_modules=["query"]))
    (name,) = rank_report(model).index
    keep(model, name, 2)
    for report in (compression_summary(model), compression_summary(compact(model))):
        assert (report.layers, report.target_parameters, report.dense_target_parameters) == (1, 64, 256)
        assert (report.all_parameters, report.dense_all_parameters) == (dense_all - 192, dense_all)


def test_report_of_a_model_inside_of_a_plain_module(trained_bert: BertForSequenceClassification) -> None:
    model = nn.ModuleDict({"encoder": trained_bert})
    compact(model)
    report = rank_report(model)
    assert {name: list(row) for name, row in report.iterrows()} == {f"encoder.{n}": row for n, row in EXPECTED.items()}


def test_report_of_a_plain_module_has_the_layers_that_were_kept_dense() -> None:
    model = nn.Sequential(
        *(SingularGroupLinear(torch.rand(8, 10), torch.rand(8), torch.rand(8, 10)) for _ in range(2))
    )
    model[0].set_remaining(torch.arange(8) < 2)
    before = compression_summary(model)
    assert before.layers_kept_dense == 1
    assert compression_summary(compact(model)) == before


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
def test_peak_memory_is_what_the_system_counts() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 25_000_000)  # 100 MB more than ever before
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    counted = int(lines["VmHWM"].split()[0]) * 1024
    after = peak_memory(torch.device("cpu"))
    del held
    assert after == pytest.approx(counted, rel=0.05) and after >= before + 100_000_000
    assert peak_memory(torch.device("cpu")) >= after


def test_peak_memory_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 + device.index)
    assert peak_memory(torch.device("cuda", 1)) == 8
    kilobytes = peak_memory(torch.device("cpu"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory(torch.device("cpu")) == pytest.approx(kilobytes / 1024, rel=0.5)
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory(torch.device("cpu")) is None


def test_nothing_to_report(trained_bert: BertForSequenceClassification) -> None:
    stock = nn.Sequential(nn.Linear(2, 2))
    for model in (stock, merge(compact(trained_bert))):
        for report in (rank_report, compression_summary):
            with pytest.raises(ValueError, match=f"This {type(model).__name__} has no compressed layers to report"):
                report(model)
