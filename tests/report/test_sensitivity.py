import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.networks import make_albert
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.baselines import svd, whitened_svd
from rankdyna_trainer.layers.dense import dense_weight
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.report.sensitivity import (
    ALL_LAYERS,
    ALL_OTHERS,
    COLUMNS,
    layer_sensitivity,
    middle_ratio,
    standing_out,
    unique_endings,
)

Batch = dict[str, Tensor]
RATIOS = (0.5, 0.2)


@pytest.fixture
def batches() -> list[Batch]:
    """10 rows in batches of 4, 4 and 2, some of them padded, for two classes."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in (4, 4, 2):
        mask = torch.ones(size, 9, dtype=torch.long)
        mask[0, 6:] = 0
        tokens, labels = (torch.randint(1, 62, (size, 9), generator=generator), torch.arange(size) % 2)
        made.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": labels})
    return made


def gpt2(model_class: Any = GPT2ForSequenceClassification) -> nn.Module:
    """Its layers are `Conv1D`."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, pad_token_id=0)
    model: nn.Module = model_class(config).eval()
    return model


def loss(model: nn.Module, batches: list[Batch]) -> float:
    """The mean over rows."""
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in batches]
    return float(np.average(losses, weights=[len(batch["labels"]) for batch in batches]))


def truncated(model: nn.Module, names: list[str], ratio: float, batches: list[Batch]) -> nn.Module:
    """With each of the layers as `whitened_svd` makes it where all others are dense."""
    smaller = copy.deepcopy(model)
    for name in names:
        config = RankDynaConfig(param_ratio=ratio, target_modules=[name])
        layer = whitened_svd(copy.deepcopy(model), config, batches).get_submodule(name)
        parent, _, attribute = name.rpartition(".")
        setattr(smaller.get_submodule(parent), attribute, layer)
    return smaller


@pytest.mark.parametrize("family", ["bert", "gpt2", "albert", "language model"])
def test_it_is_the_loss_of_what_whitened_svd_makes(family: str, tiny_bert: nn.Module, batches: list[Batch]) -> None:
    """The layers of ALBERT are called by each of its blocks."""
    made: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: tiny_bert,
        "gpt2": gpt2,
        "albert": make_albert,
        "language model": lambda: gpt2(GPT2LMHeadModel),
    }
    model = made[family]()
    if family == "language model":
        batches = [batch | {"labels": batch["input_ids"]} for batch in batches]
    costs = layer_sensitivity(model, iter(batches), RATIOS)
    assert list(costs.columns) == COLUMNS
    names = list(find_targets(model, RankDynaConfig(param_ratio=0.5)))
    assert list(costs.index[: 2 * (len(names) + 1)]) == [
        (name, ratio) for name in (*names, ALL_LAYERS) for ratio in RATIOS
    ]
    dense = loss(model, batches)
    for name, ratio in costs.index[: 2 * (len(names) + 1)]:
        smaller = truncated(model, names if name == ALL_LAYERS else [name], ratio, batches)
        row = costs.loc[(name, ratio)]
        assert row["loss"] == pytest.approx(loss(smaller, batches), abs=1e-6)
        assert row["increase"] == pytest.approx(row["loss"] - dense, abs=1e-7)
        saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in smaller.parameters())
        assert row["dense_parameters"] - row["parameters"] == saved


def test_the_standard_error_is_that_of_the_mean_over_rows(tiny_bert: nn.Module, batches: list[Batch]) -> None:
    rows = [{name: values[i : i + 1] for name, values in batch.items()} for batch in batches for i in range(2)]
    costs = layer_sensitivity(tiny_bert, rows, [0.2])
    smaller = truncated(tiny_bert, list(find_targets(tiny_bert, RankDynaConfig(param_ratio=0.2))), 0.2, rows)
    apart = [loss(smaller, [row]) - loss(tiny_bert, [row]) for row in rows]
    expected = np.std(apart, ddof=1) / np.sqrt(len(rows))
    assert costs.loc[(ALL_LAYERS, 0.2), "standard_error"] == pytest.approx(expected, rel=1e-3)


def test_the_model_is_left_as_it_was(
    tiny_bert: nn.Module, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bert.train()
    tiny_bert.bert.encoder.layer[0].eval()
    before, modules = copy.deepcopy(tiny_bert.state_dict()), dict(tiny_bert.named_modules())
    modes = [module.training for module in modules.values()]

    def assert_untouched() -> None:
        assert dict(tiny_bert.named_modules()) == modules
        assert [module.training for module in modules.values()] == modes
        after = tiny_bert.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        assert not any(module._forward_pre_hooks for module in modules.values())
        assert all(parameter.grad is None for parameter in tiny_bert.parameters())

    layer_sensitivity(tiny_bert, batches, RATIOS)
    assert_untouched()

    forward, calls = type(tiny_bert).forward, []

    def interrupted(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 20:  # some layer is truncated then
            raise KeyboardInterrupt
        return forward(*arguments, **named)

    monkeypatch.setattr(type(tiny_bert), "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer_sensitivity(tiny_bert, batches, RATIOS)
    assert_untouched()


def test_what_saves_nothing_costs_nothing(tiny_bert: nn.Module, batches: list[Batch]) -> None:
    costs = layer_sensitivity(tiny_bert, batches, [1, 0.2], target_modules=["query"])
    assert [ratio for _, ratio in costs.index[:2]] == [1, 0.2]
    whole = costs.xs(1, level="param_ratio")
    assert (whole["increase"] == 0).all() and (whole["parameters"] == whole["dense_parameters"]).all()
    assert (whole["rank"] == [32, 32, 64]).all()


def test_a_ratio_at_which_nothing_is_left(tiny_bert: nn.Module, batches: list[Batch]) -> None:
    costs = layer_sensitivity(tiny_bert, batches, [0.01], target_modules=["query"])
    assert (costs["rank"] == 0).all() and (costs["parameters"] == 0).all()
    with torch.no_grad():
        for block in tiny_bert.bert.encoder.layer:
            block.attention.self.query.weight.zero_()
    assert costs.loc[(ALL_LAYERS, 0.01), "loss"] == pytest.approx(loss(tiny_bert, batches), abs=1e-6)


def test_the_layer_that_matters_stands_out(tiny_bert: nn.Module) -> None:
    """All others have so few groups that none is lost, and the labels are what the model says."""
    needed = "bert.encoder.layer.0.intermediate.dense"
    with torch.no_grad():
        for name, layer in find_targets(tiny_bert, RankDynaConfig(param_ratio=0.5)).items():
            weight = dense_weight(layer)
            weight.copy_(torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1]) / 5)
            if name == needed:
                weight.copy_(torch.randn_like(weight))
        tiny_bert.bert.pooler.dense.weight *= 20
        tokens = torch.randint(1, 62, (128, 9))
        tiny_bert.classifier.weight *= 100
        tiny_bert.classifier.bias -= tiny_bert(input_ids=tokens).logits.mean(0)
        labels = tiny_bert(input_ids=tokens).logits.argmax(-1)
    batches = [{"input_ids": tokens[i : i + 16], "labels": labels[i : i + 16]} for i in range(0, 128, 16)]
    costs = layer_sensitivity(tiny_bert, batches, [0.5, 0.3, 0.2])
    assert middle_ratio(costs) == 0.3
    assert standing_out(costs) == [needed]
    endings = unique_endings([needed], [name for name, _ in tiny_bert.named_modules()])
    assert endings == ["0.intermediate.dense"]
    spared = RankDynaConfig(param_ratio=0.3, exclude_modules=endings)
    assert find_targets(tiny_bert, RankDynaConfig(param_ratio=0.3)).keys() - find_targets(
        tiny_bert, spared
    ).keys() == {needed}
    smaller = truncated(tiny_bert, list(find_targets(tiny_bert, spared)), 0.3, batches)
    assert costs.loc[(ALL_OTHERS, 0.3), "loss"] == pytest.approx(loss(smaller, batches), abs=1e-5)
    assert list(costs.index.unique("layer"))[-2:] == [ALL_LAYERS, ALL_OTHERS]


def make_costs(increases: dict[str, float], error: float = 1e-3, size: int = 1000) -> pd.DataFrame:
    rows = [[8, size, size // 2, 1.0 + increase, increase, error] for increase in increases.values()]
    index = pd.MultiIndex.from_tuples([(name, 0.5) for name in increases], names=["layer", "param_ratio"])
    return pd.DataFrame(rows, index, COLUMNS)


@pytest.mark.parametrize(
    ("increases", "error", "expected"),
    [
        ({"a": 0.1, "b": 0.1, "c": 0.29, "d": 0.5, "e": 0.1}, 1e-3, ["d"]),
        ({"a": 0.1, "b": 0.1, "c": 0.4, "d": 0.5, "e": 0.1}, 1e-3, ["d", "c"]),
        ({"a": 0.1, "b": 0.1, "c": 0.4, "d": 0.5, "e": 0.1}, 0.15, ["d"]),  # the other may be chance
        ({"a": -0.1, "b": -0.1, "c": 0.02, "d": 0.001, "e": -0.1}, 1e-3, ["c"]),
        ({"a": -1e-7, "b": 1e-8, "c": 0.009, "d": 1e-7, "e": 1e-8}, 1e-9, []),  # a loss of 1 hardly changes
        ({"a": 0.1, "b": 0.1, "c": 0.1}, 1e-3, []),
        ({"a": 0.1, "b": 0.1, "c": 0.1, ALL_LAYERS: 5.0}, 1e-3, []),
    ],
)
def test_which_layers_stand_out(increases: dict[str, float], error: float, expected: list[str]) -> None:
    assert standing_out(make_costs(increases, error)) == expected


def test_a_large_layer_may_cost_more() -> None:
    costs = make_costs({"a": 0.1, "b": 0.1, "c": 0.5})
    costs.loc[("c", 0.5), ["dense_parameters", "parameters"]] = [2000, 1000]
    assert standing_out(costs) == []
    costs.loc[("c", 0.5), "parameters"] = 2000  # and one that saves nothing is none to exclude
    assert standing_out(costs) == []


def test_endings_are_as_short_as_they_can_be() -> None:
    names = ["h.0.attn", "h.0.mlp", "h.1.attn", "h.10.attn", "attn"]
    assert unique_endings(["h.0.mlp", "h.0.attn", "h.1.attn"], names) == ["mlp", "0.attn", "1.attn"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"param_ratios": []}, "param_ratios is empty"),
        ({"param_ratios": [0.5, 1.5]}, r"must be in \(0, 1\]"),
        ({"target_modules": ["nothing"]}, "No layer to compress matches"),
    ],
)
def test_choices_that_do_not_fit(
    choices: dict[str, Any], message: str, tiny_bert: nn.Module, batches: list[Batch]
) -> None:
    with pytest.raises(ValueError, match=message):
        layer_sensitivity(tiny_bert, batches, **choices)


def test_rows_that_do_not_fit(tiny_bert: nn.Module, batches: list[Batch]) -> None:
    with pytest.raises(ValueError, match="gave 1 batches with rows"):
        layer_sensitivity(tiny_bert, batches[:1])
    unlabelled = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    with pytest.raises(ValueError, match="returned no loss for a batch with input_ids"):
        layer_sensitivity(tiny_bert, unlabelled)
    with pytest.raises(TypeError, match="A batch must be a mapping"):
        layer_sensitivity(tiny_bert, [torch.ones(2)] * 2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="already compressed"):
        layer_sensitivity(svd(tiny_bert, RankDynaConfig(rank_ratio=0.2)), batches)
