"""With how many groups a layer begins, and that they are the best: beside brute force on real small models."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import Block, Network, make_gpt2, singular_groups
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rankdyna_trainer import LowRankLinear, RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups
from rankdyna_trainer.layers.dense import dense_weight
from rankdyna_trainer.layers.injection import expect_groups
from rankdyna_trainer.layers.input_moments import input_moments
from rankdyna_trainer.layers.start import first_groups, start_rank
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.layers.whitening import EPSILON


def make_llama() -> LlamaForCausalLM:
    """With grouped queries, a gated feed-forward layer, and the output layer tied to the embedding."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_decoder() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    return GPT2LMHeadModel(make_gpt2()).eval()


DECODERS: dict[str, Callable[[], nn.Module]] = {"llama": make_llama, "gpt2": make_decoder}
BATCHES = [{"input_ids": torch.arange(start, start + 12).reshape(2, 6)} for start in (0, 20, 40)]


@settings(max_examples=200, deadline=None)
@given(
    out=st.integers(1, 60),
    into=st.integers(1, 60),
    ratio=st.sampled_from([1.0, 0.7, 0.29, 0.07]),
    multiple=st.integers(1, 5),
)
def test_the_rank_is_the_most_that_there_is_room_for(out: int, into: int, ratio: float, multiple: int) -> None:
    config = RankDynaConfig(param_ratio=0.01, start_ratio=ratio, rank_multiple_of=multiple)
    room = Fraction(str(ratio)) * out * into
    fitting = [rank for rank in range(min(out, into) + 1) if rank * (out + into + 1) <= room]
    multiples = [rank for rank in fitting if rank and rank % multiple == 0]
    assert start_rank(config, out, into) == max(multiples or fitting)
    assert start_rank(RankDynaConfig(param_ratio=0.01), out, into) == min(out, into)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_a_layer_begins_with_the_best_groups_in_the_metric(family: str, ratio: float) -> None:
    """What is left out is the least error that so many groups can have, from the singular values of `W S^(1/2)`."""
    dense, model = DECODERS[family](), DECODERS[family]()
    before = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    targets = find_targets(dense, RankDynaConfig(param_ratio=0.3))
    moments = input_moments(dense, targets, BATCHES)
    inject_singular_groups(model, RankDynaConfig(param_ratio=0.3, start_ratio=ratio), BATCHES)
    assert singular_groups(model) == list(targets)
    for name, layer in targets.items():
        weight = dense_weight(layer).detach().double()
        groups = model.get_submodule(name)
        assert isinstance(groups, SingularGroupLinear)
        assert sum(factor.numel() for factor in groups.factors().values()) <= ratio * weight.numel()
        metric = moments[name] / moments[name].diagonal().mean() + EPSILON * torch.eye(len(moments[name]))
        values, vectors = torch.linalg.eigh(metric)
        root = (vectors * values.sqrt()) @ vectors.t()
        least = torch.linalg.svdvals(weight @ root)[groups.rank :].square().sum()
        error = (weight - groups.to_dense_weight().double()) @ root
        assert error.square().sum().item() == pytest.approx(least.item(), rel=1e-4)
    others = {name: p for name, p in model.named_parameters() if not name.endswith((".u", ".sigma", ".v"))}
    assert all(torch.equal(parameter, before[name]) for name, parameter in others.items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]


@pytest.mark.parametrize("family", DECODERS)
def test_of_weights_the_largest_singular_values_are_kept(family: str) -> None:
    dense, model = DECODERS[family](), DECODERS[family]()
    config = RankDynaConfig(param_ratio=0.3, start_ratio=0.7, group_basis="weights")
    inject_singular_groups(model, config)
    for name, layer in find_targets(dense, config).items():
        weight = dense_weight(layer).detach()
        groups = model.get_submodule(name)
        assert isinstance(groups, SingularGroupLinear)
        values = torch.linalg.svdvals(weight)
        torch.testing.assert_close(groups.sigma.detach(), values[: groups.rank], rtol=1e-4, atol=1e-5)
        error = (weight - groups.to_dense_weight()).square().sum().item()
        assert error == pytest.approx(values[groups.rank :].square().sum().item(), rel=1e-3)


def test_nothing_of_the_groups_left_out_is_held() -> None:
    u, sigma, v = torch.randn(6, 4), torch.randn(6), torch.randn(6, 5)
    kept = first_groups((u, sigma, v), 2)
    assert all(torch.equal(few, factor[:2]) for few, factor in zip(kept, (u, sigma, v), strict=True))
    assert [few.untyped_storage().nbytes() for few in kept] == [4 * 2 * 4, 4 * 2, 4 * 2 * 5]
    assert first_groups((u, sigma, v), 6)[0] is u


def test_a_layer_that_was_compressed_before_keeps_its_groups() -> None:
    model = inject_singular_groups(Network(Block(), Block()), RankDynaConfig(param_ratio=0.5))
    first, second = (model.blocks[i].proj for i in (0, 1))
    first.set_remaining(torch.arange(6) < 1)
    second.set_remaining(torch.arange(6) < 2)
    compact(model)
    assert isinstance(model.blocks[0].proj, LowRankLinear)
    product = model.blocks[1].proj.p.weight @ model.blocks[1].proj.q.weight
    # Of 36 parameters a group holds 13.
    inject_singular_groups(model, RankDynaConfig(param_ratio=0.1, start_ratio=0.4))
    assert [layer.proj.rank for layer in model.blocks] == [1, 1]
    values = torch.linalg.svdvals(product.detach())
    torch.testing.assert_close(model.blocks[1].proj.sigma.detach(), values[:1], rtol=1e-4, atol=1e-6)


def test_half_precision_keeps_its_dtype() -> None:
    model = make_llama().bfloat16()
    inject_singular_groups(model, RankDynaConfig(param_ratio=0.3, start_ratio=0.7), BATCHES)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prepare", [inject_singular_groups, expect_groups])
def test_refusals(prepare: Callable[[nn.Module, RankDynaConfig], nn.Module]) -> None:
    with pytest.raises(
        ValueError,
        match=r"start_ratio=0\.3 has no room for a singular group of 2 layers \(blocks\.0\.proj, \.\.\.\): one of "
        r"this layer holds 13 of its 36 parameters",
    ):
        prepare(Network(Block(), Block()), RankDynaConfig(param_ratio=0.1, start_ratio=0.3))
    with pytest.raises(
        ValueError,
        match=r"start_ratio=1\.0 begins with 4 of the 12 singular groups of the model, fewer than the 5 that "
        r"rank_ratio=0\.4 keeps\. Give a larger start_ratio, a smaller rank_ratio, or param_ratio",
    ):
        prepare(Network(Block(), Block()), RankDynaConfig(rank_ratio=[0.4, 0.1], start_ratio=1.0))
    local = RankDynaConfig(rank_ratio=0.4, start_ratio=1.0, rank_scope="local")
    with pytest.raises(ValueError, match=r"2 of the 6 singular groups of blocks\.0\.proj, fewer than the 3"):
        prepare(Network(Block(), Block()), local)
    third = RankDynaConfig(rank_ratio=math.floor(100 / 3) / 100, start_ratio=1.0)
    assert prepare(Network(Block(), Block()), third) is not None


def test_the_model_computes_with_the_groups_that_it_has() -> None:
    model = Network(Block(), Block())
    inject_singular_groups(model, RankDynaConfig(param_ratio=0.3, start_ratio=0.8))
    layer = model.blocks[0].proj
    x = torch.randn(5, 6)
    expected: Tensor = x @ layer.to_dense_weight().t() + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert layer.rank == layer.initial_rank == layer.width == 2
