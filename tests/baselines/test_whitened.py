import copy
import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankdyna_trainer import LowRankLinear, RankDynaConfig, rank_report
from rankdyna_trainer.baselines import svd, whitened_svd
from rankdyna_trainer.layers import input_moments as moments_module
from rankdyna_trainer.layers.targets import find_targets

Batch = dict[str, Tensor]
CONFIG = RankDynaConfig(rank_ratio=0.2)


class Layers(nn.Module):
    """Layers side by side, each with an input of its own, by its number: without one it is not called."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(i, o)) for o, i in shapes)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {name: self.blocks[int(name[1:])](x) for name, x in inputs.items()}


def leaning(rows: int, mixing: Tensor) -> Tensor:
    """Inputs of which some directions are longer than others."""
    return torch.randn(rows, len(mixing)) @ mixing


def product(layer: nn.Module) -> NDArray[np.float64]:
    assert isinstance(layer, LowRankLinear)
    return layer.p.weight.detach().double().numpy() @ layer.q.weight.detach().double().numpy()


@torch.no_grad()
@pytest.mark.parametrize("ratio", [{"rank_ratio": 0.3}, {"param_ratio": 0.3}])
def test_less_of_the_outputs_is_lost_than_by_svd(ratio: dict[str, float]) -> None:
    torch.manual_seed(1)
    shapes = [tuple(torch.randint(8, 40, (2,)).tolist()) for _ in range(20)]
    mixings = [torch.randn(into, into) * torch.logspace(0, -1, into)[:, None] for _, into in shapes]
    seen, fresh = ({f"x{i}": leaning(400, mixing) for i, mixing in enumerate(mixings)} for _ in range(2))
    model, config = Layers(*shapes), RankDynaConfig(**ratio)
    outputs = model(**fresh)
    whitened, plain = whitened_svd(copy.deepcopy(model), config, [seen]), svd(copy.deepcopy(model), config)
    assert rank_report(whitened)["rank"].equals(rank_report(plain)["rank"])
    lost = [
        {name: float((output - outputs[name]).norm() / outputs[name].norm()) for name, output in each(**fresh).items()}
        for each in (whitened, plain)
    ]
    assert all(lost[0][name] < lost[1][name] for name in outputs)
    assert sum(lost[0].values()) < 0.8 * sum(lost[1].values())


def test_a_weight_of_the_rank_that_is_left_is_kept() -> None:
    model = Layers((20, 30), (30, 20))
    with torch.no_grad():
        for block in model.blocks:
            block[0].weight.copy_(torch.randn(len(block[0].weight), 4) @ torch.randn(4, block[0].in_features))
    inputs = {"x0": leaning(50, torch.randn(30, 30)), "x1": leaning(50, torch.randn(20, 20))}
    before = model(**inputs)
    after = whitened_svd(model, CONFIG, [inputs])(**inputs)  # a fifth of 20
    for name, output in before.items():
        torch.testing.assert_close(after[name], output, rtol=1e-4, atol=1e-4 * float(output.detach().abs().max()))


def test_a_layer_that_the_data_does_not_reach_is_factored_as_by_svd(caplog: pytest.LogCaptureFixture) -> None:
    model = Layers((20, 30), (20, 30), (20, 30))
    plain = svd(copy.deepcopy(model), CONFIG)
    with caplog.at_level(logging.WARNING):
        whitened_svd(model, CONFIG, [{"x0": torch.randn(9, 30)}, {"x2": torch.randn(9, 30)}])
    for number, alike in enumerate([False, True, False]):
        layer, other = model.blocks[number][0], plain.blocks[number][0]
        assert torch.equal(layer.p.weight, other.p.weight) == torch.equal(layer.q.weight, other.q.weight) == alike
    assert "No input of 1 layers was seen, or it was not finite (blocks.1.0, ...)" in caplog.text


def test_labels_are_not_needed(tiny_bert: nn.Module, batches: list[Batch]) -> None:
    labelled = whitened_svd(copy.deepcopy(tiny_bert), CONFIG, batches)
    texts = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    whitened_svd(tiny_bert, CONFIG, texts)
    assert all(torch.equal(one, two) for one, two in zip(tiny_bert.parameters(), labelled.parameters(), strict=True))


def test_a_large_model_is_looked_at_in_parts(
    tiny_bert: nn.Module, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = whitened_svd(copy.deepcopy(tiny_bert), CONFIG, batches)
    monkeypatch.setattr(moments_module, "BYTES_AT_ONCE", 3 * 8 * 64**2)
    assert len(moments_module.parts_that_fit(find_targets(tiny_bert, CONFIG))) > 1
    whitened_svd(tiny_bert, CONFIG, (batch for batch in batches))  # which can be read only once
    assert all(torch.equal(one, two) for one, two in zip(tiny_bert.parameters(), at_once.parameters(), strict=True))


def unreadable() -> Iterator[Batch]:
    yield {"input_ids": torch.arange(4)[None]}
    raise OSError("the disk is gone")


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize(
    ("data", "exception", "message"),
    [
        ([], ValueError, "No batch of the dataloader told anything about a target layer: it is empty"),
        ([torch.ones(2, 3)], TypeError, "A batch must be a mapping from the model's arguments to tensors"),
        (unreadable, OSError, "the disk is gone"),
    ],
)
def test_a_model_that_is_refused_is_left_as_it_was(
    data: object,
    exception: type[Exception],
    message: str,
    parts: bool,
    tiny_bert: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if parts:
        monkeypatch.setattr(moments_module, "BYTES_AT_ONCE", 1)
    tiny_bert.train()
    modules, before = list(tiny_bert.modules()), copy.deepcopy(tiny_bert.state_dict())
    with pytest.raises(exception, match=message):
        whitened_svd(tiny_bert, CONFIG, data() if callable(data) else data)
    assert list(tiny_bert.modules()) == modules and all(module.training for module in modules)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_bert.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    assert not hasattr(tiny_bert.config, "rankdyna")


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="or what enters them is not finite"):
        whitened_svd(Layers((20, 30)), CONFIG, [{"x0": torch.full((3, 30), torch.inf)}])
