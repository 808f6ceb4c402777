"""Against the whole Hessian of a tiny model in float64."""

import itertools
from typing import Any

import pytest
import torch
from support.hessians import factors_of, flatten, hadamard, make_attention, use_signs, whole_hessian
from support.networks import layers_of
from torch import Tensor, nn

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
from rankdyna_trainer.method import hessian
from rankdyna_trainer.method.hessian import HessianDiagonal, hessian_diagonal, random_signs
from rankdyna_trainer.method.importance import step_scores


def test_an_estimate_is_the_signs_times_the_hessian_times_the_signs() -> None:
    model, x = make_attention(), torch.randn(5, 4, dtype=torch.float64)
    _, whole = whole_hessian(model, x=x)
    watch = HessianDiagonal(model, layers_of(model))
    for step in range(3):
        model.zero_grad()
        model(x)["loss"].backward()
        seed = hessian.random.Random(f"{step} 0 0").getrandbits(32)
        z = torch.cat([signs.flatten() for signs in random_signs(factors_of(model).values(), seed)])
        found = watch.take()
        assert all(values.dtype == torch.float64 for diagonal in found for values in diagonal.values())
        torch.testing.assert_close(flatten(found), z * (whole @ z))


def test_the_mean_of_the_estimates_is_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact over the rows of a Hadamard matrix, of which any two columns are orthogonal."""
    model, x = make_attention(), torch.randn(5, 4, dtype=torch.float64)
    _, whole = whole_hessian(model, x=x)
    watch = HessianDiagonal(model, layers_of(model))
    estimates = []
    for row in hadamard(len(whole)):
        use_signs(monkeypatch, row)
        model.zero_grad()
        model(x)["loss"].backward()
        estimates.append(flatten(watch.take()))
    assert len(estimates) > len(whole) > 20
    torch.testing.assert_close(torch.stack(estimates).mean(0), whole.diagonal())


def test_the_mean_over_all_signs_is_the_diagonal() -> None:
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def loss(theta: Tensor) -> Tensor:
        return (theta.prod() + theta.sin().sum()).exp()

    whole = torch.autograd.functional.hessian(loss, theta)
    estimates = []
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        gradients, (estimate,) = hessian_diagonal(loss(theta), [theta], [torch.tensor(signs, dtype=torch.float64)])
        torch.testing.assert_close(gradients[0], torch.autograd.grad(loss(theta), theta)[0])
        estimates.append(estimate)
    torch.testing.assert_close(torch.stack(estimates).mean(0), whole.diagonal())


def test_score_with_the_exact_diagonal() -> None:
    """Where the Hessian is diagonal, each estimate is exact: the score is eq. 10 by brute force."""
    model = inject_singular_groups(
        nn.Sequential(nn.Linear(1, 1)).double(), RankDynaConfig(1.0, target_modules="all-linear")
    )
    layer = layers_of(model)[0]
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.uniform_(0.5, 2)
    del layer.bias
    layer.bias = None

    class Separate(nn.Module):
        """A loss in which no two numbers meet."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self) -> Tensor:
            return sum(factor.pow(k).sum() for k, factor in enumerate(layer.factors().values(), start=1))

    model = Separate()
    watch = HessianDiagonal(model, [layer])
    model().backward()
    expected = sum(
        (theta * k * theta ** (k - 1) + theta**2 * k * (k - 1) * theta ** (k - 2) / 2).abs().sum()
        for k, theta in enumerate(layer.factors().values(), start=1)
    )
    torch.testing.assert_close(step_scores([layer], watch)[0], expected.detach().float().view(1))


def test_score_with_the_mean_of_the_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make_attention(), torch.randn(5, 4, dtype=torch.float64)
    names, whole = whole_hessian(model, x=x)
    watch = HessianDiagonal(model, layers_of(model))
    rows = hadamard(len(whole))
    for row in rows:  # an accumulation with other signs in each pass
        use_signs(monkeypatch, row)
        (model(x)["loss"] / len(rows)).backward()
    diagonal = whole.diagonal().split([factor.numel() for factor in factors_of(model).values()])
    expected = {name.rpartition(".")[0]: 0.0 for name in names}
    for values, (name, theta) in zip(diagonal, factors_of(model).items(), strict=True):
        score = (theta * theta.grad + theta**2 * values.view_as(theta) / 2).abs()
        expected[name.rpartition(".")[0]] += score.detach().unsqueeze(-1).flatten(1).sum(1)
    for scores, other in zip(step_scores(layers_of(model), watch), expected.values(), strict=True):
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, other.float())


@pytest.mark.parametrize("factor", [1.0, 0.1, 1024.0])
def test_what_is_done_to_the_gradients_is_done_to_the_diagonal(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulation with passes of unlike weights, a loss scaler, and clipping."""
    model = make_attention()
    parts = torch.randn(2, 5, 4, dtype=torch.float64)
    hessians = [whole_hessian(model, x=x)[1] for x in parts]
    z = hadamard(len(hessians[0]))[5]
    use_signs(monkeypatch, z)
    watch = HessianDiagonal(model, layers_of(model))
    for weight, x in zip((0.75, 0.25), parts, strict=True):
        loss = model(x)["loss"]
        loss *= weight  # in place, as the Trainer does
        (65536 * loss).backward()
    for parameter in model.parameters():
        parameter.grad *= factor / 65536
    expected = factor * z * ((0.75 * hessians[0] + 0.25 * hessians[1]) @ z)
    torch.testing.assert_close(flatten(watch.take()), expected)


class OwnSquare(torch.autograd.Function):
    """With a backward pass of its own that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


def test_a_differentiable_function_of_the_users_own() -> None:
    x, signs = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.ones(4, dtype=torch.float64)
    _, (found,) = hessian_diagonal(OwnSquare.apply(x).square().sum(), [x], [signs])
    torch.testing.assert_close(found, 12 * x.detach().square())
