"""The factors that a server joins, against the layers that they come from."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rankdyna_trainer import LowRankLinear
from rankdyna_trainer.layers.served import WEIGHT, P, Q, ServedFactors

INPUTS = 12
SIZES = (16, 8, 8)


def layers_of(ranks: Sequence[int | None], inputs: int = INPUTS) -> list[nn.Linear | LowRankLinear]:
    """One for each size, as a checkpoint has them; `None` stands for a dense one."""
    layers: list[nn.Linear | LowRankLinear] = []
    for size, rank in zip(SIZES, ranks, strict=True):
        layer = nn.Linear(inputs, size, False) if rank is None else LowRankLinear(inputs, size, rank, bias=False)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        layers.append(layer.eval())
    return layers


def loaded(factors: ServedFactors, layers: Sequence[nn.Module]) -> ServedFactors:
    for part, layer in enumerate(layers):
        for name, tensor in layer.state_dict().items():
            factors.load(name, part, tensor)
    assert factors.missing() == []
    return factors


@pytest.mark.parametrize("ranks", [(3, 5, 2), (0, 3, 4), (None, 2, 0), (0, 0, 0), (None, None, 1), (4, 4, 4)])
@torch.no_grad()
def test_joined_layers_compute_what_each_does(ranks: Sequence[int | None]) -> None:
    layers = layers_of(ranks)
    factors = loaded(ServedFactors(SIZES, ranks, INPUTS, torch.float32), layers)
    x = torch.randn(2, 7, INPUTS)
    assert_close(factors(x), torch.cat([layer(x) for layer in layers], -1))
    held = sum(parameter.numel() for parameter in factors.parameters())
    assert held == sum(parameter.numel() for layer in layers for parameter in layer.parameters())


@torch.no_grad()
def test_matrices_that_a_server_transposes_as_it_reads_them() -> None:
    layers = layers_of((3, 5, 0))
    factors = ServedFactors(SIZES, (3, 5, 0), INPUTS, torch.float32)
    for part, layer in enumerate(layers):
        for name, tensor in layer.state_dict().items():
            factors.load(name, part, tensor.t() if tensor.dim() == 2 else tensor)
    x = torch.randn(2, 7, INPUTS)
    assert_close(factors(x), torch.cat([layer(x) for layer in layers], -1))


@pytest.mark.parametrize("ranks", [(3, 5, 2), (None, 2, 0)])
@torch.no_grad()
def test_outputs_shared_by_processes(ranks: Sequence[int | None]) -> None:
    layers = layers_of(ranks)
    x = torch.randn(5, INPUTS)
    outputs = []
    for shard in range(4):
        # Of the second and third part there are two pieces only, which two processes each have.
        factors = ServedFactors((4, 4, 4), ranks, INPUTS, torch.float32, shard, 4)
        outputs.append(loaded(factors, layers)(x).split(4, -1))
    for part, layer in enumerate(layers):
        pieces = [output[part] for output in outputs]
        assert_close(torch.cat(pieces if part == 0 else pieces[::2], -1), layer(x))
        assert part == 0 or torch.equal(pieces[0], pieces[1])


@pytest.mark.parametrize("rank", [3, 0, None])
@torch.no_grad()
def test_inputs_shared_by_processes(rank: int | None) -> None:
    layer = layers_of([rank, 0, 0])[0]
    x = torch.randn(5, INPUTS)
    total: Tensor = torch.zeros(5, SIZES[0])
    for shard in range(3):
        factors = loaded(ServedFactors(SIZES[:1], [rank], 4, torch.float32, shard, 3), [layer])
        total += factors(x[:, shard * 4 : shard * 4 + 4])
    assert_close(total, layer(x))


@pytest.mark.parametrize(
    ("rank", "end", "shape", "message"),
    [
        (3, P, (16, 4), r"the p.weight of shape \(16, 4\) does not give \(16, 3\), as rank 3 wants it"),
        (3, Q, (3, 24), r"the q.weight of shape \(3, 24\) does not give \(3, 12\)"),
        (3, WEIGHT, (16, 12), r"there is no weight of shape \(16, 12\) in a layer of rank 3"),
        (None, P, (16, 3), r"there is no p.weight of shape \(16, 3\) in a layer of full rank"),
        (0, Q, (3, 12), r"there is no q.weight of shape \(3, 12\) in a layer of rank 0"),
        (None, WEIGHT, (2,), r"the weight of shape \(2,\) does not give \(16, 12\)"),
    ],
)
def test_tensors_of_other_ranks_are_refused(rank: int | None, end: str, shape: tuple[int, ...], message: str) -> None:
    factors = ServedFactors(SIZES[:1], [rank], INPUTS, torch.float32)
    with pytest.raises(ValueError, match=message):
        factors.load(end, 0, torch.zeros(shape))


def test_what_was_not_loaded_is_known() -> None:
    factors = ServedFactors(SIZES, [3, None, 0], INPUTS, torch.float32)
    factors.load(P, 0, torch.zeros(16, 3))
    assert factors.missing() == [(0, Q), (1, WEIGHT)]
