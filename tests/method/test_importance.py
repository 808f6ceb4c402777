import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rankdyna_trainer import SingularGroupLinear
from rankdyna_trainer.method.checks import check_weights
from rankdyna_trainer.method.group_fisher import GroupFisher
from rankdyna_trainer.method.importance import gradients_are_finite, group_scores, smooth_importance, step_scores

RANK = 4
SECOND = pytest.mark.parametrize("second", [False, True])


def make_layer(dtype: torch.dtype = torch.float32, rank: int = RANK) -> SingularGroupLinear:
    """A layer `(5, 6)` with gradients, all of them at least 0.1."""
    layer = SingularGroupLinear(*(torch.randn(rank, *size).to(dtype) for size in ((5,), (), (6,))))
    for factor in layer.factors().values():
        factor.grad = (torch.randn_like(factor) + 0.1 * torch.randn_like(factor).sign()).to(dtype)
    return layer


class TwoLayers(nn.Module):
    """Two layers with singular groups and one of another kind, with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = make_layer(), make_layer(), nn.Linear(6, 3)
        for parameter in self.other.parameters():
            parameter.grad = torch.randn_like(parameter)

    def finite(self, second: bool = False) -> Tensor:
        layers = (self.first, self.second)
        scores = group_scores(layers, [diagonal_of(layer) for layer in layers] if second else None)
        return gradients_are_finite(self, scores)


def diagonal_of(layer: SingularGroupLinear) -> dict[str, Tensor]:
    """Some numbers of both signs, in the shapes of the factors."""
    return {name: torch.sin(10 * factor.detach()).float() for name, factor in layer.factors().items()}


@SECOND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_score_is_the_sum_over_the_numbers_of_a_group(second: bool, dtype: torch.dtype) -> None:
    layer = make_layer(dtype)
    diagonal = diagonal_of(layer)
    (scores,) = group_scores([layer], [diagonal] if second else None)
    assert (scores.shape, scores.dtype) == ((RANK,), torch.float32)
    for k in range(RANK):
        numbers = [
            number
            for name, factor in layer.factors().items()
            for number in zip(*(t[k].flatten().tolist() for t in (factor, factor.grad, diagonal[name])), strict=True)
        ]
        assert len(numbers) == 5 + 1 + 6
        expected = sum(abs(theta * g + second * theta**2 * h / 2) for theta, g, h in numbers)
        assert scores[k].item() == pytest.approx(expected, rel=1e-5)


def test_first_order_score_is_the_change_of_the_loss_without_each_number() -> None:
    """A loss that is linear in the output is linear in each single number, so the first order is all of eq. 10."""
    layer = SingularGroupLinear(*(torch.randn(RANK, *size, dtype=torch.float64) for size in ((5,), (), (6,))))
    x, direction = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)

    def loss() -> Tensor:
        return (layer(x) * direction).sum()

    loss().backward()
    changes = torch.zeros(RANK, dtype=torch.float64)
    with torch.no_grad():
        for factor in layer.factors().values():
            for k in range(RANK):
                for theta in factor[k].view(-1):
                    value = theta.item()
                    whole = loss()
                    theta.zero_()
                    changes[k] += (whole - loss()).abs()
                    theta.fill_(value)
    torch.testing.assert_close(group_scores([layer])[0], changes.float())


@SECOND
def test_score_without_gradients(second: bool) -> None:
    layer = make_layer()
    diagonal = [diagonal_of(layer)] if second else None
    (of_all_factors,) = group_scores([layer], diagonal)
    layer.u.grad = layer.v.grad = None
    (of_sigma,) = group_scores([layer], diagonal)
    assert (of_sigma > 0).all() and (of_sigma < of_all_factors).all()
    layer.sigma.grad = None
    assert torch.equal(group_scores([layer], diagonal)[0], torch.zeros(RANK))


@SECOND
def test_score_of_no_groups(second: bool) -> None:
    layer = make_layer(rank=0)
    assert group_scores([layer], [diagonal_of(layer)] if second else None)[0].shape == (0,)


def test_smoothing_over_steps() -> None:
    layer, beta = make_layer(), 0.85
    steps = torch.rand(6, RANK)
    importance = layer.importance
    for scores in steps:
        smooth_importance([layer], [scores], beta, torch.tensor(True))
    weights = torch.tensor([(1 - beta) * beta**age for age in reversed(range(6))])
    torch.testing.assert_close(layer.importance, weights @ steps)
    assert layer.importance is importance


def test_smoothing_without_memory() -> None:
    layer = make_layer()
    for scores in (torch.rand(RANK), torch.arange(4.0)):
        smooth_importance([layer], [scores], 0.0, torch.tensor(True))
    assert torch.equal(layer.importance, torch.arange(4.0))


@SECOND
def test_finite_gradients(second: bool) -> None:
    finite = TwoLayers().finite(second)
    assert finite.shape == () and finite.dtype == torch.bool and finite


@pytest.mark.parametrize("score", ["first_order", "fisher"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["first.u", "first.sigma", "second.v", "second.sigma", "other.weight", "other.bias"])
def test_gradient_that_is_not_finite_changes_no_score(name: str, value: float, score: str) -> None:
    model = TwoLayers()
    layers = (model.first, model.second)
    for layer in layers:
        layer.importance.uniform_()
    before = [layer.importance.clone() for layer in layers]
    model.get_parameter(name).grad.view(-1)[-1] = value

    scores = step_scores(layers, GroupFisher(layers) if score == "fisher" else None)
    finite = gradients_are_finite(model, scores)
    assert not finite
    smooth_importance(layers, scores, 0.85, finite)
    assert all(torch.equal(layer.importance, old) for layer, old in zip(layers, before, strict=True))


def test_overflow_is_seen_in_a_group_of_zeros() -> None:
    """0 * inf is nan: a removed group does not hide an overflow."""
    model = TwoLayers()
    model.first.u.data[2] = 0
    model.first.u.grad[2, 0] = math.inf
    assert not model.finite()


def test_float16_gradient_with_a_norm_that_overflows_is_finite() -> None:
    model = TwoLayers()
    model.other.half()
    model.other.weight.grad = torch.full((3, 6), 60000.0, dtype=torch.float16)
    assert torch.isinf(torch.linalg.vector_norm(model.other.weight.grad))
    assert model.finite()
    model.other.weight.grad[0, 0] = math.inf
    assert not model.finite()


def test_float16_factors_with_scores_beyond_float16_are_finite() -> None:
    layer = make_layer(torch.float16)
    layer.sigma.data.fill_(1000)
    layer.sigma.grad.fill_(1000)
    assert gradients_are_finite(layer, group_scores([layer]))
    assert group_scores([layer])[0].min() > 1e6


@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_sparse_gradient(value: float) -> None:
    model = TwoLayers()
    model.embedding = nn.Embedding(10, 2, sparse=True)
    (model.embedding(torch.tensor([3, 3, 7])) * value).sum().backward()
    assert model.embedding.weight.grad.is_sparse
    assert bool(model.finite()) == math.isfinite(value)


def test_sparse_gradient_of_no_rows() -> None:
    model = TwoLayers()
    model.embedding = nn.Embedding(10, 2, sparse=True)
    model.embedding(torch.zeros(0, dtype=torch.long)).sum().backward()
    assert model.embedding.weight.grad.is_sparse
    assert model.finite()


def test_empty_and_missing_gradients_are_finite() -> None:
    model = TwoLayers()
    model.first = make_layer(rank=0)
    model.other.weight.grad = None
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.empty.grad = torch.zeros(0, 3)
    assert model.finite()


def test_scores_where_fsdp2_shards_a_layer_that_took_no_part_or_has_no_rows_here(process_group: None) -> None:
    layers = [make_layer(), make_layer(), make_layer(rank=0)]
    expected = group_scores(layers)
    mesh = init_device_mesh("cpu", (1,))
    for layer in layers:
        for name, factor in layer.factors().items():
            sharded = nn.Parameter(distribute_tensor(factor.detach(), mesh, [Shard(0)]))
            sharded.grad = distribute_tensor(factor.grad, mesh, [Shard(0)])
            setattr(layer, name, sharded)
    for found, score in zip(group_scores(layers), expected, strict=True):
        assert torch.equal(found, score)
    (of_none,) = group_scores(layers[2:])
    assert of_none.shape == (0,) and not isinstance(of_none, DTensor)
    for factor in layers[1].factors().values():
        factor.grad = None
    found = group_scores(layers)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], torch.zeros(RANK))


def test_whole_numbers_of_a_quantized_layer_are_finite() -> None:
    model = TwoLayers()
    model.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    check_weights(model, 1)
    model.other.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="at step 1 the model's weights have inf or nan"):
        check_weights(model, 1)
