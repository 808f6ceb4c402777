"""Against the whole Hessian of a tiny model in float64."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from support.reference_network import build_dense, make_batches
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import AdamW

from rankdyna_trainer import RankDyna, RankDynaConfig, compact, inject_singular_groups
from rankdyna_trainer.layers.hooks import release
from rankdyna_trainer.layers.singular_group import SingularGroupLinear
from rankdyna_trainer.method import hessian
from rankdyna_trainer.method.hessian import HessianDiagonal, hessian_diagonal, random_signs
from rankdyna_trainer.method.importance import step_scores

STEPS = 30
CONFIG = RankDynaConfig(
    rank_ratio=0.2, importance_score="second_order", rank_warmup_steps=0.1, rank_cooldown_steps=0.4
)


class Attention(nn.Module):
    """Two layers with attention and dropout between them; it returns the loss as the settings say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(4, 2), nn.Linear(2, 3), nn.Dropout(0.5)
        self.form = "mapping"

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.first(x)).unsqueeze(1)
        x = self.dropout(F.scaled_dot_product_attention(x, 2 * x, x).squeeze(1))
        loss = torch.tanh(self.second(x)).square().mean()
        return {"mapping": {"loss": loss}, "tuple": (loss, x), "tensor": loss, "none": {"logits": x}}[self.form]


def make(dropout: float = 0.0) -> Attention:
    model = Attention().double()
    model.dropout.p = dropout
    inject_singular_groups(model, RankDynaConfig(rank_ratio=1.0, target_modules="all-linear"))
    return model


def layers_of(model: nn.Module) -> list[SingularGroupLinear]:
    return [module for module in model.modules() if isinstance(module, SingularGroupLinear)]


def factors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("u", "sigma", "v")}


def whole_hessian(model: nn.Module, **inputs: Tensor) -> tuple[list[str], Tensor]:
    """All second derivatives by the numbers of the factors `(numbers, numbers)`, by the model alone."""
    model = copy.deepcopy(model)
    factors = factors_of(model)
    sizes = [factor.numel() for factor in factors.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        given = {name: part.view_as(f) for part, (name, f) in zip(parts, factors.items(), strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional_call(model, given, kwargs=inputs)["loss"]

    flat = torch.cat([factor.detach().flatten() for factor in factors.values()])
    return list(factors), torch.autograd.functional.hessian(loss, flat)


def flatten(diagonals: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([values.flatten() for diagonal in diagonals for values in diagonal.values()])


def use_signs(monkeypatch: pytest.MonkeyPatch, flat: Tensor) -> None:
    def signs(tensors: list[Tensor], seed: int) -> list[Tensor]:
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    monkeypatch.setattr(hessian, "random_signs", signs)


def hadamard(size: int) -> Tensor:
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows[:, :size]


def test_an_estimate_is_the_signs_times_the_hessian_times_the_signs() -> None:
    model, x = make(), torch.randn(5, 4, dtype=torch.float64)
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
    model, x = make(), torch.randn(5, 4, dtype=torch.float64)
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
    model, x = make(), torch.randn(5, 4, dtype=torch.float64)
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
    model = make()
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


def test_training_is_what_it_is_without_it() -> None:
    """The same gradients with the same dropout, and the same random numbers afterwards."""
    model, x = make(dropout=0.5), torch.randn(64, 4, dtype=torch.float64)
    plain = copy.deepcopy(model)
    watch = HessianDiagonal(model, layers_of(model))
    after = []
    for each in (model, plain):
        torch.manual_seed(3)
        each(x)["loss"].backward()
        after.append(torch.rand(3))
    assert torch.equal(*after)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert flatten(watch.take()).any()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("form", ["mapping", "tuple", "tensor"])
def test_forms_of_the_loss(form: str) -> None:
    model = make()
    model.form = form
    watch = HessianDiagonal(model, layers_of(model))
    output = model(torch.randn(5, 4, dtype=torch.float64))
    {"mapping": lambda: output["loss"], "tuple": lambda: output[0], "tensor": lambda: output}[form]().backward()
    assert flatten(watch.take()).any()


def test_only_training_forwards_with_gradients_are_looked_at() -> None:
    model, x = make(), torch.randn(5, 4, dtype=torch.float64)
    HessianDiagonal(model, layers_of(model))
    model.form = "none"
    with torch.no_grad():
        model(x)
    model.eval()(x)


def test_a_loss_that_is_not_there_or_not_used() -> None:
    model, x = make(), torch.randn(5, 4, dtype=torch.float64)
    watch = HessianDiagonal(model, layers_of(model))
    model.form = "none"
    with pytest.raises(ValueError, match=r'needs the loss that Attention returns, .* or use importance_score="first'):
        model(x)
    assert torch.backends.cuda.flash_sdp_enabled()
    model.form = "tuple"
    model(x)[1].sum().backward()
    with pytest.raises(ValueError, match="found no loss of the model in the backward pass"):
        watch.take()


def test_an_exception_in_the_model_restores_the_attention_kernels() -> None:
    model = make()
    HessianDiagonal(model, layers_of(model))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            model(torch.randn(5, 3, dtype=torch.float64))
        assert torch.backends.cuda.flash_sdp_enabled()


class Once(torch.autograd.Function):
    """With no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


def test_an_operation_without_second_derivatives() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": Once.apply(self.layer(x)).square().sum()}

    model = inject_singular_groups(Model(), RankDynaConfig(rank_ratio=1.0, target_modules="all-linear"))
    HessianDiagonal(model, layers_of(model))
    with pytest.raises(ValueError, match=r"second derivatives.* with once_differentiable.*attn_implementation"):
        model(torch.randn(5, 4))


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.inner(x)).unsqueeze(1)
            return F.scaled_dot_product_attention(x, 2 * x, x).squeeze(1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.checkpointed = nn.Linear(4, 4), Block(), False

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = torch.tanh(self.first(x))
            if self.checkpointed:
                x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=reentrant)
            else:
                x = self.block(x)
            return {"loss": x.square().mean()}

    model = inject_singular_groups(Model(), RankDynaConfig(rank_ratio=1.0, target_modules="all-linear"))
    found, x = [], torch.randn(5, 4)
    for checkpointed in (False, True):
        model.checkpointed = checkpointed
        model.zero_grad()
        release(model)
        watch = HessianDiagonal(model, layers_of(model))
        if reentrant and checkpointed:
            with pytest.raises(ValueError, match=r'use_reentrant=True.*\{"use_reentrant": False\}'):
                model(x)
        else:
            model(x)["loss"].backward()
            found.append(flatten(watch.take()))
        assert torch.backends.cuda.flash_sdp_enabled()
    if not reentrant:
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("cut", [True, False])
def test_through_a_run_with_removals(cut: bool) -> None:
    """The smoothed scores at each step, from the estimates for the same signs on a model without hooks."""
    model = inject_singular_groups(build_dense(0), CONFIG)
    rankdyna = RankDyna(model, CONFIG, AdamW(model.parameters(), lr=0.005), STEPS)
    if not cut:
        rankdyna._cuts = False  # as under DDP
    for step, batch in enumerate(make_batches(1, STEPS), start=1):
        plain = copy.deepcopy(model)
        layers = layers_of(plain)
        factors = [factor for layer in layers for factor in layer.factors().values()]
        seed = hessian.random.Random(f"{step - 1} 0 0").getrandbits(32)
        gradients, diagonal = hessian_diagonal(plain(**batch)["loss"], factors, random_signs(factors, seed))
        model(**batch)["loss"].backward()
        before = [layer.importance.clone() for layer in rankdyna.layers]
        rankdyna.update_importance()
        for layer, old in zip(rankdyna.layers, before, strict=True):
            scores = torch.zeros(layer.width, dtype=torch.float64)
            for theta in layer.factors().values():
                g, h = gradients.pop(0), diagonal.pop(0)
                scores += (theta * g + theta**2 * h / 2).abs().detach().unsqueeze(-1).flatten(1).sum(1)
            torch.testing.assert_close(layer.importance, 0.85 * old + 0.15 * scores.float())
            assert not layer.importance[~layer.remaining].any()
        rankdyna.optimizer.step()
        rankdyna.enforce_budget(step)
        rankdyna.optimizer.zero_grad()
    assert rankdyna.meets_final_budget


def test_no_trace_is_left() -> None:
    model = inject_singular_groups(build_dense(0), CONFIG)
    optimizer = AdamW(model.parameters())
    first = RankDyna(model, CONFIG, optimizer, STEPS)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    second = RankDyna(model, CONFIG, optimizer, STEPS)
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())
    batch = make_batches(1, 1)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(**batch)["loss"].backward()
        assert not second._curvature._sums
    model(**batch)["loss"].backward()
    assert second._curvature._sums and not first._curvature._sums
    rankdyna_free = copy.deepcopy(model)
    compact(rankdyna_free)
    second.finish(STEPS)
    for each in (model, rankdyna_free):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in each.modules())
        assert not any(module._forward_hooks_always_called for module in each.modules())


def test_a_compiled_model_is_refused() -> None:
    model = inject_singular_groups(build_dense(0), CONFIG)
    with pytest.raises(ValueError, match=r'importance_score="second_order" cannot be used with torch\.compile'):
        RankDyna(model, CONFIG, AdamW(model.parameters()), STEPS, compiled=True)
