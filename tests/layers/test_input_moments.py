"""What enters the layers: against the inputs themselves, and without a trace on the model or the random numbers."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.layers import input_moments as moments_module
from rankdyna_trainer.layers.input_moments import input_moments, parts_that_fit
from rankdyna_trainer.layers.targets import find_targets

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES))


def targets(model: nn.Module) -> dict[str, Any]:
    return dict(find_targets(model, RankDynaConfig(param_ratio=0.5)))


def padded(lengths: list[int]) -> dict[str, Tensor]:
    width = max(lengths)
    ids = torch.randint(1, 50, (len(lengths), width))
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long()}


def alone(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each row as a batch of its own, without padding."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        rows.append({"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]})
    return rows


def inputs_of(model: PreTrainedModel, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().flatten(0, -2)))
    for batch in batches:
        model.eval()(**batch)
    handle.remove()
    return torch.cat(seen).double()


def test_padding_is_left_out() -> None:
    model, batch = bert(), padded([3, 7, 5])
    moments = input_moments(model, targets(model), [batch])
    for name, moment in moments.items():
        x = inputs_of(model, name, alone(batch))
        torch.testing.assert_close(moment, x.T @ x, atol=1e-3, rtol=1e-4)
    assert moments.keys() == targets(model).keys()


def test_layers_with_one_input_share_a_moment() -> None:
    model = bert()
    moments = input_moments(model, targets(model), [padded([4, 4]), padded([2, 6])])
    first = "bert.encoder.layer.0.attention.self"
    assert moments[f"{first}.query"] is moments[f"{first}.key"] is moments[f"{first}.value"]
    assert moments[f"{first}.query"] is not moments["bert.encoder.layer.1.attention.self.query"]


def test_sums_are_in_float32_where_the_model_runs_in_half_precision() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(64, 16)

    def run(batch: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(batch)

    moment = input_moments(model, {"0": model[0]}, [x], run)["0"]
    torch.testing.assert_close(moment, x.double().t() @ x.double(), rtol=1e-6, atol=1e-4)


def test_a_layer_that_is_called_again_adds_up() -> None:
    model = AlbertForSequenceClassification(
        AlbertConfig(vocab_size=50, embedding_size=8, max_position_embeddings=16, **SIZES | {"num_hidden_layers": 3})
    )
    (name,) = [name for name in targets(model) if name.endswith("ffn")]
    batch = padded([5, 5])
    moment = input_moments(model, {name: targets(model)[name]}, [batch])[name]
    x = inputs_of(model, name, [batch])
    assert len(x) == 3 * 10
    torch.testing.assert_close(moment, x.T @ x, atol=1e-3, rtol=1e-4)


def test_an_encoder_decoder_has_padding_of_its_own_on_each_side() -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )
    # Both sides are of the same width, so that their masks could be taken for each other.
    sources, lengths = padded([6, 3]), [2, 6]
    labels = torch.randint(1, 50, (2, 6)).masked_fill(torch.arange(6) >= torch.tensor(lengths)[:, None], -100)
    moments = input_moments(model, targets(model), [sources | {"labels": labels}])
    rows = [row | {"labels": label[label != -100][None]} for row, label in zip(alone(sources), labels, strict=True)]
    for name, moment in moments.items():
        x = inputs_of(model, name, rows)
        torch.testing.assert_close(moment, x.T @ x, atol=1e-3, rtol=1e-3, msg=name)


def test_nothing_is_left_behind() -> None:
    model, batch = bert().train(), padded([4, 2])
    model.bert.encoder.eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def noisy() -> Any:
        torch.rand(3), np.random.rand(3), random.random()
        yield batch

    input_moments(model, targets(model), noisy())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_that_no_batch_reaches_have_none() -> None:
    model = bert()
    assert input_moments(model, targets(model), []) == {}


def test_layers_are_looked_at_in_parts_that_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {name: nn.Linear(size, 4) for name, size in {"a": 10, "b": 10, "c": 30, "d": 10, "e": 10}.items()}
    assert parts_that_fit(layers) == [["a", "b", "c", "d", "e"]] and parts_that_fit({}) == []
    # Moments in float64 of two inputs of 10; one of 30 is alone, though it is more.
    monkeypatch.setattr(moments_module, "BYTES_AT_ONCE", 2 * 8 * 10**2)
    assert parts_that_fit(layers) == [["a", "b"], ["c"], ["d", "e"]]
    assert parts_that_fit(layers, room=0) == parts_that_fit(layers, room=1) == [[name] for name in layers]
    assert parts_that_fit(layers, room=10**9) == [[*layers]]


def test_a_batch_that_is_no_mapping_is_refused() -> None:
    model = bert()
    with pytest.raises(TypeError, match="A batch must be a mapping from the model's arguments to tensors"):
        input_moments(model, targets(model), [torch.zeros(2)])
