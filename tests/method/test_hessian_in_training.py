"""The estimate beside the training of a model: it changes nothing, and says where it cannot be."""

import copy
import pickle
from typing import Any

import pytest
import torch
from support.hessians import flatten, make_attention
from support.networks import layers_of
from support.reference_network import build_dense, make_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from rankdyna_trainer import RankDyna, RankDynaConfig, compact, inject_singular_groups
from rankdyna_trainer.layers.hooks import release
from rankdyna_trainer.method import hessian
from rankdyna_trainer.method.hessian import HessianDiagonal, hessian_diagonal, random_signs

STEPS = 30
CONFIG = RankDynaConfig(
    rank_ratio=0.2, importance_score="second_order", rank_warmup_steps=0.1, rank_cooldown_steps=0.4
)


def test_training_is_what_it_is_without_it() -> None:
    """The same gradients with the same dropout, and the same random numbers afterwards."""
    model, x = make_attention(dropout=0.5), torch.randn(64, 4, dtype=torch.float64)
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
    model = make_attention()
    model.form = form
    watch = HessianDiagonal(model, layers_of(model))
    output = model(torch.randn(5, 4, dtype=torch.float64))
    {"mapping": lambda: output["loss"], "tuple": lambda: output[0], "tensor": lambda: output}[form]().backward()
    assert flatten(watch.take()).any()


def test_only_training_forwards_with_gradients_are_looked_at() -> None:
    model, x = make_attention(), torch.randn(5, 4, dtype=torch.float64)
    HessianDiagonal(model, layers_of(model))
    model.form = "none"
    with torch.no_grad():
        model(x)
    model.eval()(x)


def test_a_loss_that_is_not_there_or_not_used() -> None:
    model, x = make_attention(), torch.randn(5, 4, dtype=torch.float64)
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
    model = make_attention()
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
        rankdyna._cutting._state_has_groups = False  # as under DDP
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
