import copy
import math
import pickle
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from support.networks import (
    Block,
    FalconLinear,
    Network,
    damaged,
    make_albert,
    make_gpt2,
    relative_change,
    singular_groups,
    targets,
)
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups
from rankdyna_trainer.layers import injection
from rankdyna_trainer.layers.injection import expect_groups
from rankdyna_trainer.layers.targets import find_targets

CONFIG = RankDynaConfig(rank_ratio=0.5)
IN_THE_METRIC = RankDynaConfig(rank_ratio=0.5, group_basis="activations")


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "albert": (make_albert, lambda: {"input_ids": torch.arange(12).reshape(2, 6)}),
    "gpt2": (
        lambda: GPT2ForSequenceClassification(make_gpt2()).eval(),
        lambda: {"input_ids": torch.arange(1, 7).reshape(1, 6)},
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ).eval(),
        lambda: {"input_ids": torch.arange(6).reshape(1, 6), "decoder_input_ids": torch.arange(5).reshape(1, 5)},
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_model_computes_what_it_did_before(family: str) -> None:
    make_model, make_inputs = MODELS[family]
    model, inputs = make_model(), make_inputs()
    before = model(**inputs).logits
    found = targets(model)
    assert inject_singular_groups(model, CONFIG) is model
    assert singular_groups(model) == found
    assert relative_change(before, model(**inputs).logits) < 1e-5


@torch.no_grad()
def test_large_weights_keep_the_outputs(tiny_bert: BertForSequenceClassification) -> None:
    """Errors of a decomposition grow with the weights: a trained model has larger ones than a new one."""
    for parameter in tiny_bert.parameters():
        parameter.mul_(5)
    inputs = {"input_ids": torch.randint(64, (4, 16)), "attention_mask": torch.ones(4, 16).tril(8)}
    before = tiny_bert(**inputs).logits
    inject_singular_groups(tiny_bert, CONFIG)
    assert len(singular_groups(tiny_bert)) == 12
    assert relative_change(before, tiny_bert(**inputs).logits) < 1e-5


def test_each_layer_takes_over_what_it_replaces(tiny_bert: BertForSequenceClassification) -> None:
    tiny_bert.train()
    tiny_bert.bert.encoder.layer[1].output.dense.eval()
    tiny_bert.bfloat16()
    dense = find_targets(tiny_bert, CONFIG)
    inject_singular_groups(tiny_bert, CONFIG)
    for name, old in dense.items():
        new = tiny_bert.get_submodule(name)
        assert isinstance(new, SingularGroupLinear)
        assert new.bias is old.bias
        assert new.training == old.training == (name != "bert.encoder.layer.1.output.dense")
        assert (new.out_features, new.in_features) == tuple(old.weight.shape)
        assert new.rank == new.full_rank and new.original_class is nn.Linear
        assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
        assert new.importance.dtype == torch.float32 and not new.importance.any()
    assert type(tiny_bert.classifier) is nn.Linear


def test_layer_without_a_bias() -> None:
    model = Network(Block(nn.Linear(6, 6, bias=False)))
    inject_singular_groups(model, CONFIG)
    assert model.blocks[0].proj.bias is None


def test_conv1d_is_turned_around() -> None:
    layer = Conv1D(5, 6)
    nn.init.normal_(layer.bias)
    model = Network(Block(nn.Sequential(layer, nn.Linear(5, 6))))
    x = torch.randn(3, 6)
    before = model(x)
    inject_singular_groups(model, CONFIG)
    new = model.blocks[0].proj[0]
    assert (new.in_features, new.out_features, new.original_class) == (6, 5, Conv1D)
    torch.testing.assert_close(model(x), before)


def test_random_states_are_left_alone(tiny_bert: BertForSequenceClassification) -> None:
    tiny_bert.bert.encoder.layer[0].output.dense.__class__ = FalconLinear  # which is tried out
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    inject_singular_groups(tiny_bert, CONFIG)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_albert_has_its_shared_layers_once() -> None:
    model = make_albert()
    found = targets(model)
    assert len(found) == 6 and len({name.rpartition(".")[2] for name in found}) == 6
    inject_singular_groups(model, CONFIG)
    factors = [name for name, _ in model.named_parameters() if name.endswith("sigma")]
    assert factors == [f"{name}.sigma" for name in found]


def test_shared_layer_is_counted_once_and_replaced_in_all_places() -> None:
    shared = nn.Linear(6, 6)
    model = Network(Block(shared), Block(), Block(shared))
    assert targets(model) == ["blocks.0.proj", "blocks.1.proj"]
    x = torch.randn(3, 6)
    before = model(x)
    inject_singular_groups(model, CONFIG)
    assert isinstance(model.blocks[0].proj, SingularGroupLinear)
    assert model.blocks[2].proj is model.blocks[0].proj is not model.blocks[1].proj
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("kept", ["all", "blocks.0.", "blocks.2."])
@pytest.mark.parametrize("later", [False, True])
def test_a_shared_layer_in_training_is_loaded_from_any_of_its_names(kept: str, later: bool) -> None:
    # state_dict has a shared layer under each of its names, safetensors files under one of them.
    def make() -> nn.Module:
        shared = nn.Linear(6, 6)
        return Network(Block(shared), Block(), Block(shared))

    model = inject_singular_groups(make(), CONFIG)
    groups = model.blocks[0].proj
    groups.set_remaining(torch.arange(6) < 2)
    for factor in groups.factors().values():
        factor.data[2:] = 0
    other = "blocks.2." if kept == "blocks.0." else "blocks.0." if kept == "blocks.2." else "none"
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(other)}
    resumed = (expect_groups if later else inject_singular_groups)(make(), CONFIG)
    missing, unexpected = resumed.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith(other) for name in missing)
    assert resumed.blocks[0].proj is resumed.blocks[2].proj and resumed.blocks[0].proj.rank == 2
    x = torch.randn(3, 6)
    torch.testing.assert_close(resumed(x), compact(model)(x))


def test_tied_layers_stay_tied(caplog: pytest.LogCaptureFixture) -> None:
    model = Network(Block(), Block(), Block())
    model.blocks[2].proj.weight = model.blocks[0].proj.weight
    inject_singular_groups(model, CONFIG)
    assert singular_groups(model) == ["blocks.1.proj"]
    assert model.blocks[2].proj.weight is model.blocks[0].proj.weight
    assert [record.getMessage() for record in caplog.records] == [
        "RankDyna leaves layers alone: 2 tied to another layer (blocks.0.proj, ...)."
    ]


def test_damaged_weight_leaves_the_model_as_it_was() -> None:
    model = damaged(math.nan)
    with pytest.raises(ValueError, match="has inf or nan"):
        inject_singular_groups(model, CONFIG)
    assert not singular_groups(model)


def test_singular_values_beyond_the_dtype_name_the_layer() -> None:
    layer = nn.Linear(400, 400, bias=False, dtype=torch.float16)
    nn.init.constant_(layer.weight, 300.0)
    with pytest.raises(ValueError, match=r"blocks\.0\.proj exceed torch\.float16"):
        inject_singular_groups(Network(Block(layer)), CONFIG)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("batches", [1, 3])
@torch.no_grad()
def test_groups_in_the_metric_of_the_inputs_keep_the_outputs(family: str, batches: int) -> None:
    make_model, make_inputs = MODELS[family]
    model, inputs = make_model(), make_inputs()
    before, found = model(**inputs).logits, targets(model)
    plain = inject_singular_groups(copy.deepcopy(model), CONFIG)
    inject_singular_groups(model, IN_THE_METRIC, [inputs] * batches)
    assert singular_groups(model) == found
    assert relative_change(before, model(**inputs).logits) < 1e-5
    assert all(relative_change(plain.get_submodule(name).v, model.get_submodule(name).v) > 0.1 for name in found), (
        "the groups are those of the weights"
    )


def test_the_metric_needs_batches() -> None:
    model = Network(Block())
    with pytest.raises(ValueError, match=r'group_basis="activations" needs to see what enters.*give inject_singular'):
        inject_singular_groups(model, IN_THE_METRIC)
    assert not singular_groups(model)


def test_layers_that_no_batch_reaches_keep_the_groups_of_their_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = Network(Block(), Block())
    plain = inject_singular_groups(copy.deepcopy(model), CONFIG)
    inject_singular_groups(model, IN_THE_METRIC, [])
    for name in singular_groups(plain):
        assert torch.equal(model.get_submodule(name).v, plain.get_submodule(name).v)
    assert [record.getMessage() for record in caplog.records] == [
        "No input of 2 layers was seen, or it was not finite (blocks.0.proj, ...): their groups are those of the "
        "weights alone."
    ]


@pytest.mark.parametrize("held", [1, 2**31])
def test_layers_are_factored_in_parts_whose_moments_fit_into_memory(
    tiny_bert: BertForSequenceClassification, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    passes = 0

    def batches() -> Iterator[dict[str, Tensor]]:
        nonlocal passes
        passes += 1
        yield inputs

    class Again:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return batches()

    inputs = {"input_ids": torch.randint(64, (4, 16))}
    before = tiny_bert(**inputs).logits
    monkeypatch.setattr("rankdyna_trainer.layers.input_moments.BYTES_AT_ONCE", held)
    found = find_targets(tiny_bert, IN_THE_METRIC)
    injection.inject_targets(
        tiny_bert, IN_THE_METRIC, found, lambda layers: injection.input_moments(tiny_bert, layers, Again())
    )
    assert passes == (12 if held == 1 else 1)
    assert relative_change(before, tiny_bert(**inputs).logits) < 1e-5


def test_refactoring_in_place_keeps_the_weights_and_forgets_the_scores() -> None:
    model = Network(Block(), Block())
    rows = [{"x": torch.randn(20, 6) * torch.arange(1, 7)}]
    injected = inject_singular_groups(copy.deepcopy(model), IN_THE_METRIC, rows)
    inject_singular_groups(model, CONFIG)
    tensors = dict(model.named_parameters())
    for name in singular_groups(model):
        model.get_submodule(name).importance.fill_(1.0)
    before = model(**rows[0])
    injection.refactor_groups(model, lambda layers: injection.input_moments(model, layers, rows))
    torch.testing.assert_close(model(**rows[0]), before)
    assert all(parameter is tensors[name] for name, parameter in model.named_parameters())
    for name in singular_groups(model):
        layer, other = model.get_submodule(name), injected.get_submodule(name)
        torch.testing.assert_close(layer.sigma, other.sigma, rtol=1e-3, atol=1e-5)
        assert not layer.importance.any()


@pytest.mark.parametrize("prepare", [expect_groups, inject_singular_groups])
def test_a_prepared_model_can_be_pickled(prepare: Callable[..., nn.Module]) -> None:
    model = prepare(Network(Block()), CONFIG)
    x = torch.randn(3, 6)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
