"""What the baselines share, and what they leave on a model."""

import copy
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification

from rankdyna_trainer import LowRankLinear, RankDynaConfig, compact, inject_singular_groups, merge, rank_report
from rankdyna_trainer.baselines import fwsvd, svd, tfwsvd, whitened_svd
from rankdyna_trainer.baselines.fisher import fisher_information
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.method.budget import uniform_rank
from rankdyna_trainer.report.tables import compression_summary

Batch = dict[str, Tensor]
Baseline = Callable[[nn.Module, RankDynaConfig], nn.Module]

CONFIG = RankDynaConfig(rank_ratio=0.2)
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(params=["svd", "fwsvd", "tfwsvd", "whitened"])
def baseline(request: pytest.FixtureRequest, batches: list[Batch]) -> Baseline:
    """Each of them, with data where it wants some."""
    methods: dict[str, Any] = {
        "svd": svd,
        "fwsvd": partial(fwsvd, dataloader=batches),
        "tfwsvd": partial(tfwsvd, dataloader=batches),
        "whitened": partial(whitened_svd, dataloader=batches),
    }
    return methods[request.param]


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


sizes, ratios = st.integers(1, 60), st.integers(1, 100).map(lambda percent: percent / 100)


@given(out_features=sizes, in_features=sizes, ratio=ratios, multiple=st.integers(1, 9))
def test_rank_of_a_rank_ratio(out_features: int, in_features: int, ratio: float, multiple: int) -> None:
    config = RankDynaConfig(rank_ratio=ratio, rank_multiple_of=multiple)
    rank = uniform_rank(config, out_features, in_features)
    full = min(out_features, in_features)
    wanted = next(k for k in range(full + 1) if k >= Fraction(str(ratio)) * full)
    if wanted < full:
        wanted = max(k for k in range(0, wanted + 1, multiple))
    holds_more = wanted * (out_features + in_features) > out_features * in_features
    assert rank == (full if holds_more else wanted)


@given(out_features=sizes, in_features=sizes, ratio=ratios, multiple=st.integers(1, 9))
def test_rank_of_a_param_ratio(out_features: int, in_features: int, ratio: float, multiple: int) -> None:
    config = RankDynaConfig(param_ratio=ratio, rank_multiple_of=multiple)
    rank = uniform_rank(config, out_features, in_features)
    budget = Fraction(str(ratio)) * out_features * in_features
    if ratio == 1:
        assert rank == min(out_features, in_features)
    else:
        assert rank == max(
            k
            for k in range(0, min(out_features, in_features) + 1, multiple)
            if k * (out_features + in_features) <= budget
        )


def test_ratio_of_decimals() -> None:
    """`0.07 * 100` is a little more than 7."""
    assert uniform_rank(RankDynaConfig(rank_ratio=0.07), 100, 300) == 7
    assert uniform_rank(RankDynaConfig(param_ratio=0.29), 100, 100) == 14  # 0.29 * 10000 is a little less than 2900


def test_budget_is_that_of_local_rankdyna(tiny_bert: BertForSequenceClassification, baseline: Baseline) -> None:
    report = rank_report(baseline(tiny_bert, RankDynaConfig(param_ratio=0.3)))
    assert set(report["form"]) == {"low rank"}
    assert (report["parameters"] <= 0.3 * report["dense_parameters"]).all()
    one_more = report["parameters"] + report["out_features"] + report["in_features"]
    assert (one_more > 0.3 * report["dense_parameters"]).all()


def test_saved_loaded_reported_and_merged(
    model: nn.Module, baseline: Baseline, batches: list[Batch], tmp_path: Path
) -> None:
    dense = copy.deepcopy(model)
    # 0.55 of 32 groups are 18: more than 16, where P and Q of 32 x 32 hold more, and less than 21, as for 32 x 64.
    baseline(model, RankDynaConfig(rank_ratio=0.55))
    report = rank_report(model)
    assert set(zip(report["form"], report["rank"], strict=True)) >= {("low rank", 18), ("dense", 32)}
    summary = compression_summary(model)
    assert summary.all_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert summary.dense_all_parameters == sum(parameter.numel() for parameter in dense.parameters())
    record = model.config.rankdyna
    assert record["ranks"] == report[report["form"] == "low rank"]["rank"].to_dict()
    assert record["dense"] == report[report["form"] == "dense"]["rank"].to_dict()

    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded, batches[0]), logits(model, batches[0]))
    assert rank_report(loaded).equals(report)
    base = AutoModel.from_pretrained(tmp_path / "saved")
    assert sum(isinstance(module, LowRankLinear) for module in base.modules()) == len(record["ranks"])

    merge(model).save_pretrained(tmp_path / "stock")
    stock = type(dense).from_pretrained(tmp_path / "stock").eval()
    torch.testing.assert_close(logits(stock, batches[0]), logits(loaded, batches[0]))


def test_layer_that_stays_dense_keeps_its_weight(model: nn.Module, baseline: Baseline, batches: list[Batch]) -> None:
    before = logits(model, batches[0])
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    baseline(model, RankDynaConfig(rank_ratio=0.9))
    assert set(rank_report(model)["form"]) == {"dense"}
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert torch.equal(logits(model, batches[0]), before)


def test_rank_zero(tiny_bert: BertForSequenceClassification, baseline: Baseline, tmp_path: Path) -> None:
    bias = tiny_bert.get_submodule(QUERY).bias.detach().clone()
    baseline(tiny_bert, RankDynaConfig(param_ratio=0.04))  # 40 of 1024 numbers, where one group has 64
    layer = tiny_bert.get_submodule(QUERY)
    assert layer.rank == 0 and torch.equal(layer(torch.randn(5, 32)), bias.expand(5, 32))
    tiny_bert.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.get_submodule(QUERY).rank == 0


def test_rank_is_a_multiple(tiny_bert: BertForSequenceClassification, baseline: Baseline) -> None:
    baseline(tiny_bert, RankDynaConfig(rank_ratio=0.4, rank_multiple_of=4))  # 13 groups
    assert set(rank_report(tiny_bert)["rank"]) == {12}


def test_only_the_chosen_layers_are_replaced(tiny_bert: BertForSequenceClassification, baseline: Baseline) -> None:
    config = RankDynaConfig(rank_ratio=0.2, target_modules=["query", "dense"], exclude_modules=["1.output.dense"])
    key = tiny_bert.bert.encoder.layer[0].attention.self.key
    baseline(tiny_bert, config)
    assert tiny_bert.bert.encoder.layer[0].attention.self.key is key
    names = list(rank_report(tiny_bert).index)
    assert QUERY in names and "bert.encoder.layer.1.output.dense" not in names
    assert all(name.endswith(("query", "dense")) for name in names)


def test_result_can_be_trained(
    tiny_bert: BertForSequenceClassification, baseline: Baseline, batches: list[Batch]
) -> None:
    """The second round of fine-tuning."""
    tiny_bert.train()
    baseline(tiny_bert, CONFIG)
    assert all(module.training for module in tiny_bert.modules())
    assert all(parameter.grad is None for parameter in tiny_bert.parameters())
    optimizer = torch.optim.AdamW(tiny_bert.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = tiny_bert(**batches[0]).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in tiny_bert.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_model_inside_of_a_plain_module(tiny_bert: BertForSequenceClassification) -> None:
    svd(nn.ModuleDict({"encoder": tiny_bert}), CONFIG)
    assert QUERY in tiny_bert.config.rankdyna["ranks"]


def damaged(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        model.get_submodule(QUERY).weight[3, 4] = value
    return model


def bad_models(model: nn.Module) -> dict[str, tuple[object, object, type[Exception], str]]:
    """By what is wrong: a model, a config, and what is raised."""
    none = RankDynaConfig(rank_ratio=0.2, target_modules=["nothing_like_it"])
    sizes = RankDynaConfig(rank_ratio=[0.5, 0.2])
    blocks = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(8, 8, device="meta"))]))
    return {
        "no model": (CONFIG, CONFIG, TypeError, "takes a model and a RankDynaConfig.*got a RankDynaConfig and"),
        "no config": (model, 0.2, TypeError, "got a BertForSequenceClassification and a float"),
        "sizes": (model, sizes, ValueError, r"has one size: give rank_ratio one number \(got \[0.5, 0.2\]\)"),
        "no target": (model, none, ValueError, r"No layer to compress matches target_modules=\['nothing_like_it'\]"),
        "nan": (damaged(copy.deepcopy(model), float("nan")), CONFIG, ValueError, f"weight of {QUERY} has inf or nan"),
        "meta": (blocks, CONFIG, ValueError, r"weight of 0\.0\.0 has no values \(device meta\)"),
        "a layer": (nn.Linear(4, 4), CONFIG, ValueError, "The model is a single linear layer"),
        "peft": (get_peft_model(copy.deepcopy(model), LoraConfig()), CONFIG, ValueError, "wrapped by peft"),
        "injected": (inject_singular_groups(copy.deepcopy(model), CONFIG), CONFIG, ValueError, "already has singular"),
        "compacted": (
            compact(inject_singular_groups(copy.deepcopy(model), CONFIG)),
            CONFIG,
            ValueError,
            "already compressed",
        ),
    }


@pytest.mark.parametrize(
    "wrong", ["no model", "no config", "sizes", "no target", "nan", "meta", "a layer", "peft", "injected", "compacted"]
)
def test_bad_model_or_config(wrong: str, tiny_bert: BertForSequenceClassification, baseline: Baseline) -> None:
    model, config, exception, message = bad_models(tiny_bert)[wrong]
    with pytest.raises(exception, match=message):
        baseline(model, config)


@pytest.mark.parametrize("method", [fwsvd, tfwsvd])
def test_model_is_left_as_it_was_when_the_data_is_bad(
    method: Callable[..., nn.Module], tiny_bert: BertForSequenceClassification, batches: list[Batch]
) -> None:
    before, modules = logits(tiny_bert, batches[0]), list(tiny_bert.modules())
    with pytest.raises(ValueError, match="returned no loss"):
        method(tiny_bert, CONFIG, [batches[0], {"input_ids": batches[0]["input_ids"]}])
    assert list(tiny_bert.modules()) == modules
    assert torch.equal(logits(tiny_bert, batches[0]), before)
    assert not hasattr(tiny_bert.config, "rankdyna")


@pytest.mark.parametrize("method", [fwsvd, tfwsvd])
def test_fisher_information_instead_of_data(
    method: Callable[..., nn.Module], tiny_bert: BertForSequenceClassification, batches: list[Batch]
) -> None:
    fisher = fisher_information(tiny_bert, find_targets(tiny_bert, CONFIG), batches)
    names = list(fisher)
    once, reused = copy.deepcopy(tiny_bert), copy.deepcopy(tiny_bert)
    method(once, CONFIG, batches)
    method(reused, CONFIG, fisher)
    assert torch.equal(logits(once, batches[0]), logits(reused, batches[0]))
    assert list(fisher) == names  # it is not used up


@pytest.mark.parametrize("wrong", ["missing", "shape", "negative", "nan", "a batch"])
def test_bad_fisher_information(wrong: str, tiny_bert: BertForSequenceClassification, batches: list[Batch]) -> None:
    fisher: dict[str, torch.Tensor] = fisher_information(tiny_bert, find_targets(tiny_bert, CONFIG), batches)
    values = fisher[QUERY]
    if wrong == "missing":
        del fisher[QUERY]
    elif wrong == "a batch":
        fisher = dict(batches[0])
    else:
        fisher[QUERY] = {"shape": values[1:], "negative": -values, "nan": values * torch.nan}[wrong]
    modules = list(tiny_bert.modules())
    with pytest.raises(ValueError, match=r"The Fisher information (has no tensor for|of .*query must be)"):
        fwsvd(tiny_bert, CONFIG, fisher)
    assert list(tiny_bert.modules()) == modules


def test_factors_beyond_the_precision(tiny_bert: BertForSequenceClassification) -> None:
    with torch.no_grad():
        tiny_bert.get_submodule(QUERY).weight.fill_(60000)  # a row of 32 of them is longer than float16 can hold
    model, modules = tiny_bert.half(), list(tiny_bert.modules())
    with pytest.raises(ValueError, match=f"P or Q of {QUERY} exceeds torch.float16: load the model in float32"):
        svd(model, CONFIG)
    assert list(model.modules()) == modules
