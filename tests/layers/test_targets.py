import math

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from support.networks import BERT_MATRICES, Block, Network, damaged, make_gpt2, singular_groups, targets
from torch import nn
from transformers import BertForSequenceClassification, GPT2LMHeadModel

from rankdyna_trainer import LowRankLinear, RankDynaConfig, SingularGroupLinear, inject_singular_groups

CONFIG = RankDynaConfig(rank_ratio=0.5)


class QuantizedLinear(nn.Linear):
    """Holds what the quantizers of transformers put into a linear layer: numbers of one byte."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...] = (6, 6)) -> None:
        super().__init__(6, 6)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


def test_default_targets_of_bert(tiny_bert: BertForSequenceClassification, caplog: pytest.LogCaptureFixture) -> None:
    """All linear layers of the blocks, in their order; no embedding, pooler or classifier."""
    assert targets(tiny_bert) == [f"bert.encoder.layer.{i}.{matrix}" for i in range(2) for matrix in BERT_MATRICES]
    assert not caplog.records


def test_default_targets_of_a_plain_module() -> None:
    assert targets(Network(Block(), Block())) == ["blocks.0.proj", "blocks.1.proj"]


def test_default_targets_of_gpt2() -> None:
    model = GPT2LMHeadModel(make_gpt2())
    matrices = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert targets(model) == [f"transformer.h.{i}.{matrix}" for i in range(2) for matrix in matrices]


@pytest.mark.parametrize(
    ("choices", "found"),
    [
        (
            {"target_modules": ["query", "classifier"]},
            ["0.attention.self.query", "1.attention.self.query", "classifier"],
        ),
        ({"target_modules": ["0.output.dense"]}, ["0.output.dense"]),
        ({"target_modules": r".*layer\.1\..*(query|value)"}, ["1.attention.self.query", "1.attention.self.value"]),
        (
            {"exclude_modules": ["attention.self.key", "dense"]},
            [f"{i}.attention.self.{matrix}" for i in range(2) for matrix in ("query", "value")],
        ),
        (
            {"target_modules": ["query", "value"], "exclude_modules": r".*\.0\..*"},
            ["1.attention.self.query", "1.attention.self.value"],
        ),
        (
            {"target_modules": "all-linear", "exclude_modules": r".*\.layer\.0\..*"},
            [f"1.{matrix}" for matrix in BERT_MATRICES] + ["bert.pooler.dense"],
        ),
    ],
)
def test_chosen_targets(
    tiny_bert: BertForSequenceClassification, choices: dict[str, object], found: list[str]
) -> None:
    assert [name.removeprefix("bert.encoder.layer.") for name in targets(tiny_bert, **choices)] == found


def test_all_linear_is_all_but_the_output_layer() -> None:
    assert targets(Network(Block()), target_modules="all-linear") == ["blocks.0.proj", "head"]
    model = GPT2LMHeadModel(make_gpt2())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # not tied, yet the output layer
    assert targets(model, target_modules="all-linear") == targets(model)


def test_nothing_matches(tiny_bert: BertForSequenceClassification) -> None:
    message = (
        r"No layer to compress matches target_modules=\['c_attn'\] and exclude_modules=None.*"
        r"linear layers are: bert\.encoder\.layer\.0\.attention\.self\.query, .*bert\.pooler\.dense, classifier\."
    )
    with pytest.raises(ValueError, match=message):
        inject_singular_groups(tiny_bert, RankDynaConfig(rank_ratio=0.5, target_modules=["c_attn"]))


def test_no_linear_layer_at_all() -> None:
    with pytest.raises(ValueError, match="The model's linear layers are: none"):
        inject_singular_groups(nn.Sequential(nn.Conv1d(3, 3, 1)), CONFIG)


def test_all_that_matches_is_left_alone() -> None:
    model = Network(Block()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"Left alone: {'frozen \(requires_grad=False\)': \['blocks.0.proj'\]}"):
        inject_singular_groups(model, CONFIG)


def test_a_layer_of_rank_zero_is_nothing_to_train_beside_frozen_ones() -> None:
    model = Network(Block(), Block())
    model.blocks[0].proj = LowRankLinear(*reversed(model.blocks[0].proj.weight.shape), rank=0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Left alone: {'frozen \(requires_grad=False\)': \['blocks.1.proj'\]}"):
        inject_singular_groups(model, CONFIG)


@pytest.mark.parametrize("target_modules", ["all-linear", ["lm_head", "c_fc"], r".*(lm_head|mlp\.c_fc)"])
def test_output_layer_tied_to_the_embedding_stays_tied(target_modules: object) -> None:
    model = GPT2LMHeadModel(make_gpt2())
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5, target_modules=target_modules))  # type: ignore[arg-type]
    assert isinstance(model.transformer.h[1].mlp.c_fc, SingularGroupLinear)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    "layer",
    [
        QuantizedLinear(torch.int8),
        QuantizedLinear(torch.uint8, (18, 1)),
        QuantizedLinear(torch.float8_e4m3fn),
    ],
)
def test_quantized_layer_is_refused_by_name(layer: nn.Module) -> None:
    model = Network(Block(), Block(layer))
    with pytest.raises(
        ValueError, match=r"blocks\.1\.proj is a QuantizedLinear that holds a quantized weight \(Parameter of"
    ):
        inject_singular_groups(model, CONFIG)
    assert not singular_groups(model)
    assert targets(model, exclude_modules=["1.proj"]) == ["blocks.0.proj"]


def test_quantized_layer_that_is_no_target() -> None:
    model = Network(Block())
    model.head = QuantizedLinear(torch.int8)
    assert targets(model) == ["blocks.0.proj"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_damaged_weight_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=r"The weight of blocks\.1\.proj has inf or nan"):
        inject_singular_groups(damaged(value), CONFIG)


def test_model_of_peft_is_refused(tiny_bert: BertForSequenceClassification) -> None:
    adapter = LoraConfig(target_modules=["query"])
    with pytest.raises(ValueError, match=r"wrapped by peft.*merge_and_unload"):
        inject_singular_groups(get_peft_model(tiny_bert, adapter), CONFIG)


def test_model_with_adapters_inside_is_refused(tiny_bert: BertForSequenceClassification) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["query"]), tiny_bert)
    with pytest.raises(ValueError, match=r"wrapped by peft.*merge_and_unload"):
        inject_singular_groups(tiny_bert, CONFIG)


def test_model_in_groups_is_refused(tiny_bert: BertForSequenceClassification) -> None:
    inject_singular_groups(tiny_bert, CONFIG)
    message = (
        r"already has singular groups \(bert.encoder.layer.0.attention.self.query, ... of 12 layers\).*Call compact"
    )
    with pytest.raises(ValueError, match=message):
        inject_singular_groups(tiny_bert, CONFIG)


def test_a_single_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="single linear layer"):
        inject_singular_groups(nn.Linear(4, 4), RankDynaConfig(rank_ratio=0.5, target_modules="all-linear"))
