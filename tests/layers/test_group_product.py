import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from rankdyna_trainer.layers.group_product import group_product

SHAPES = [(5, 5), (3, 7), (7, 3)]
BATCHES = [(), (4,), (2, 3)]
MANY, FEW = 1.0, 0.2
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def arguments(
    shape: tuple[int, int], batch: tuple[int, ...], part: float = MANY, dtype: torch.dtype = torch.float64
) -> Five:
    """`x`, `u`, `sigma`, `v` and a bias, all of which want gradients."""
    out_features, in_features = shape
    rank = max(1, int(part * min(shape)))
    sizes = [(*batch, in_features), (rank, out_features), (rank,), (rank, in_features), (out_features,)]
    x, u, sigma, v, bias = (torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes)
    return x, u, sigma, v, bias


@pytest.mark.parametrize(("shape", "batch", "through_weight"), [*itertools.product(SHAPES, BATCHES, [True, False])])
def test_first_and_second_derivatives_are_those_of_finite_differences(
    shape: tuple[int, int], batch: tuple[int, ...], through_weight: bool
) -> None:
    x, u, sigma, v, bias = arguments(shape, batch)
    assert gradcheck(lambda *given: group_product(*given, through_weight), (x, u, sigma, v, bias))
    assert gradgradcheck(lambda *given: group_product(*given, None, through_weight), (x, u, sigma, v))


def graph_of(x: Tensor, u: Tensor, sigma: Tensor, v: Tensor, bias: Tensor, through_weight: bool) -> Tensor:
    """The operations as autograd takes them down by itself."""
    p = (u * sigma[:, None]).t()
    linear = torch.nn.functional.linear
    return linear(x, p @ v, bias) if through_weight else linear(linear(x, v), p, bias)


@pytest.mark.parametrize(("through_weight", "autocast"), [*itertools.product([True, False], [True, False])])
@pytest.mark.parametrize("batch", [(40,), (4, 10)])
def test_a_step_is_that_of_the_graph_to_the_last_bit(
    batch: tuple[int, ...], through_weight: bool, autocast: bool
) -> None:
    given = arguments((24, 16), batch, dtype=torch.float32)
    outputs, gradients = [], []
    for product in (graph_of, group_product):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(product(*given, through_weight))
        gradients.append(torch.autograd.grad(outputs[-1].float().square().sum(), given))
    assert torch.equal(*outputs)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("through_weight", [True, False])
def test_nothing_but_the_arguments_is_kept_of_many_groups(through_weight: bool) -> None:
    given = arguments((24, 16), (4, 10))
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        output = group_product(*given, through_weight)
    assert output.grad_fn is not None
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in given[:4]}


def test_of_few_groups_nothing_is_computed_twice() -> None:
    given = arguments((20, 30), (4, 10), FEW)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        group_product(*given, False)
    assert (40, len(given[2])) in {tuple(tensor.shape) for tensor in kept}, "v^T x is computed again"


def test_what_wants_no_gradient_gets_none() -> None:
    x, u, sigma, v, bias = arguments((5, 5), (4,))
    group_product(x.detach(), u.detach(), sigma, v.detach(), bias.detach(), False).sum().backward()
    assert sigma.grad is not None and {x.grad, u.grad, v.grad, bias.grad} == {None}


def test_each_row_by_itself() -> None:
    x, u, sigma, v, bias = arguments((5, 5), (4,))

    def loss(row: Tensor, u: Tensor) -> Tensor:
        return group_product(row, u, sigma, v, bias, False).square().sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=1), (0, None))(x, u)
    for row, gradient in zip(x, found, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(row, u), u)[0])


@pytest.mark.parametrize("batch", BATCHES)
def test_the_output_may_be_changed_in_place(batch: tuple[int, ...]) -> None:
    given = arguments((5, 5), batch)
    changed, kept = (
        torch.autograd.grad(output.sum(), given)
        for output in (group_product(*given, False).mul_(2.0), 2.0 * group_product(*given, False))
    )
    assert all(torch.equal(*pair) for pair in zip(changed, kept, strict=True))


@pytest.mark.parametrize("through_weight", [True, False])
def test_a_trace_can_be_saved(through_weight: bool, tmp_path: Path) -> None:
    given = arguments((5, 5), (2, 3))
    traced = torch.jit.trace(lambda *tensors: group_product(*tensors, through_weight), given)
    traced.save(str(tmp_path / "traced.pt"))
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(*given), group_product(*given, through_weight))


@pytest.mark.parametrize("through_weight", [True, False])
def test_compiled_in_one_graph(through_weight: bool) -> None:
    given = arguments((5, 5), (2, 3))
    compiled = torch.compile(group_product, backend="aot_eager", fullgraph=True)
    found, expected = (
        torch.autograd.grad(product(*given, through_weight).square().sum(), given)
        for product in (compiled, group_product)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
