"""Layers that are no targets, though they are linear and in a block, and what the log says of them."""

import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from support.networks import BERT_MATRICES, Block, FalconLinear, Network, relative_change, singular_groups, targets
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, MixtralConfig, MixtralForCausalLM

from rankdyna_trainer import RankDynaConfig, compact, inject_singular_groups, rank_report

CONFIG = RankDynaConfig(rank_ratio=0.5)


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


class PairLinear(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(input), input


class TwoInputLinear(nn.Linear):
    def forward(self, input: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) * gate


def test_frozen_layers_are_left_alone(
    tiny_bert: BertForSequenceClassification, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_bert.bert.encoder.layer[0].requires_grad_(False)
    tiny_bert.bert.encoder.layer[1].output.dense.bias.requires_grad_(False)  # only the weight counts
    inject_singular_groups(tiny_bert, CONFIG)
    assert singular_groups(tiny_bert) == [f"bert.encoder.layer.1.{matrix}" for matrix in BERT_MATRICES]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "6 frozen (requires_grad=False) (bert.encoder.layer.0.attention.self.query, ...)" in record.getMessage()


class AttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.proj = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attention(x, x, x, need_weights=False)[0])


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.proj = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.layer(x))


@pytest.mark.parametrize(
    ("make_block", "untouched"),
    [
        (AttentionBlock, ["attention.out_proj"]),
        (TransformerBlock, ["layer.self_attn.out_proj", "layer.linear1", "layer.linear2"]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_layers_that_torch_reads_are_left_alone(
    make_block: type[nn.Module], untouched: list[str], training: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = Network(make_block(), make_block()).train(training)
    x = torch.randn(2, 3, 6)
    with torch.no_grad():  # in evaluation torch takes its fast path, which reads the weights
        before = model(x)
        inject_singular_groups(model, CONFIG)
        torch.testing.assert_close(model(x), before)
    assert singular_groups(model) == ["blocks.0.proj", "blocks.1.proj"]
    assert [record.getMessage() for record in caplog.records] == [
        f"RankDyna leaves layers alone: {2 * len(untouched)} read by their parent instead of called "
        f"(blocks.0.{untouched[0]}, ...)."
    ]


class CastingBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.proj.weight.dtype))


class HelperBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


def test_layer_of_which_only_the_dtype_is_read_is_a_target(caplog: pytest.LogCaptureFixture) -> None:
    model = Network(CastingBlock())
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    inject_singular_groups(model, CONFIG)
    assert singular_groups(model) == ["blocks.0.proj"]
    torch.testing.assert_close(model(x), before)
    assert not caplog.records


def test_layer_that_a_helper_method_reads_is_left_alone() -> None:
    model = Network(HelperBlock(), Block())
    x = torch.randn(3, 6)
    before = model(x)
    inject_singular_groups(model, CONFIG)
    assert singular_groups(model) == ["blocks.1.proj"]
    torch.testing.assert_close(model(x), before)


def test_experts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_local_experts": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=8, **sizes, **heads))
    experts = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    if not experts:  # transformers 4 has a linear layer for each matrix of an expert
        assert sum(".experts." in name for name in targets(model)) == 2 * 3 * 3
        return
    assert all(".self_attn." in name for name in targets(model))
    (record,) = caplog.records
    assert f"{len(experts)} 3-dimensional weights, as of a mixture of experts ({experts[0]}, " in record.getMessage()


def test_convolutions_and_parameters_outside_of_the_blocks_are_no_experts(caplog: pytest.LogCaptureFixture) -> None:
    model = Network(Block(nn.Sequential(nn.Conv1d(6, 6, 1), nn.Linear(6, 6))))
    model.positions = nn.Parameter(torch.zeros(1, 4, 6))
    assert targets(model) == ["blocks.0.proj.1"]
    assert not caplog.records


def test_one_log_line_tells_of_all_that_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = Network(Block(), Block(), Block(), HelperBlock(), Block(ScaledLinear(6, 6)), Block())
    model.blocks[0].proj.requires_grad_(False)
    model.blocks[2].proj.weight = model.blocks[1].proj.weight
    model.blocks[5].experts = nn.Parameter(torch.zeros(2, 6, 6))
    assert targets(model) == ["blocks.5.proj"]
    (record,) = caplog.records
    assert record.getMessage() == (
        "RankDyna leaves layers alone: 1 frozen (requires_grad=False) (blocks.0.proj, ...); "
        "2 tied to another layer (blocks.1.proj, ...); 1 read by their parent instead of called (blocks.3.proj, ...); "
        "1 of a class with another forward (blocks.4.proj, ...); "
        "1 3-dimensional weights, as of a mixture of experts (blocks.5.experts, ...)."
    )


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [
        (torch.float32, True),
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ],
)
def test_subclass_with_the_function_of_linear_is_a_target(dtype: torch.dtype, bias: bool) -> None:
    layer = FalconLinear(6, 6, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    model = Network(Block(layer)).to(dtype)
    x = torch.randn(3, 6).to(dtype)
    before = model(x)
    inject_singular_groups(model, CONFIG)
    assert model.blocks[0].proj.original_class is FalconLinear
    assert relative_change(before, model(x)) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("other_class", [ScaledLinear, PairLinear, TwoInputLinear])
def test_subclass_with_another_function_is_left_alone(
    other_class: type[nn.Linear], caplog: pytest.LogCaptureFixture
) -> None:
    assert targets(Network(Block(other_class(6, 6)), Block())) == ["blocks.1.proj"]
    assert "1 of a class with another forward (blocks.0.proj, ...)" in caplog.text


def test_subclass_that_cannot_be_judged_yet_is_left_alone() -> None:
    layer = ScaledLinear(6, 6, bias=False)
    nn.init.zeros_(layer.weight)
    assert targets(Network(Block(layer), Block())) == ["blocks.1.proj"]


def test_layers_with_hooks_or_a_parametrization_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    hooked, plain, normed = nn.Linear(6, 6), nn.Linear(6, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    assert targets(Network(Block(hooked), Block(plain), Block(normed))) == ["blocks.1.proj"]
    assert "2 with hooks, a parametrization or a forward of their own (blocks.0.proj, ...)" in caplog.text


def test_trying_out_a_layer_leaves_the_random_numbers_alone() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, training=True)

    model = Network(Block(Noisy(6, 6)), Block(nn.Linear(6, 6)))
    before = torch.get_rng_state()
    assert targets(model) == ["blocks.1.proj"]
    assert torch.equal(torch.get_rng_state(), before)


def replaced_forward(layer: nn.Linear) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


HUNG_ON: dict[str, Callable[[nn.Linear], object]] = {
    "forward": replaced_forward,
    "accelerate's hook": lambda layer: add_hook_to_module(layer, ModelHook()),
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "hook of the weight": lambda layer: layer.weight.register_hook(lambda gradient: 0 * gradient),
    "hook of the bias": lambda layer: layer.bias.register_hook(lambda gradient: 0 * gradient),
    "post-accumulate hook": lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda weight: None),
}


@pytest.mark.parametrize("kind", HUNG_ON)
def test_a_layer_on_which_something_hangs_stays_what_it_is(
    kind: str, tiny_bert: BertForSequenceClassification, caplog: pytest.LogCaptureFixture
) -> None:
    name = "bert.encoder.layer.0.intermediate.dense"
    layer = tiny_bert.get_submodule(name)
    HUNG_ON[kind](layer)
    inject_singular_groups(tiny_bert, CONFIG)
    assert tiny_bert.get_submodule(name) is layer and len(singular_groups(tiny_bert)) == 11
    (record,) = caplog.records
    assert f"1 with hooks, a parametrization or a forward of their own ({name}, ...)" in record.getMessage()


class SharedUnderTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.keep = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.keep(self.first(x)))


def test_a_shared_layer_is_excluded_under_any_of_its_names_and_a_target_under_any() -> None:
    def chosen(targets: str | list[str], exclude: list[str] | None) -> list[str]:
        config = RankDynaConfig(rank_ratio=0.5, target_modules=targets, exclude_modules=exclude)
        return singular_groups(inject_singular_groups(SharedUnderTwoNames(), config))

    assert chosen("all-linear", ["keep"]) == chosen("all-linear", ["first"]) == ["other"]
    assert chosen(["keep"], None) == chosen(["first"], ["other"]) == ["first"]


@pytest.mark.parametrize("sizes", [(6, 0), (0, 6), (0, 0)])
def test_a_layer_without_outputs_or_inputs_is_left_alone(
    sizes: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a layer without numbers
        empty = nn.Linear(*sizes)
    model = Network(Block(), Block())
    model.blocks[1].add_module("empty", empty)
    with caplog.at_level(logging.WARNING):
        assert targets(model) == ["blocks.0.proj", "blocks.1.proj"]
    assert "1 without outputs or inputs (blocks.1.empty, ...)" in caplog.text
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5))
    assert model.blocks[1].empty is empty and len(rank_report(compact(model))) == 2
