"""
What a Trainer does by default against Algorithm 1 of `reference.py`, extended in the same plain way: dense until the
groups are made, groups in the metric of the inputs, and a floor for each block.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from reference import RANKS, SingularGroups, rankdyna
from support.reference_network import ReferenceNetwork, build_dense, make_batches, sgd
from support.reference_parameters import PARAMETERS
from torch import Tensor, nn

from rankdyna_trainer import RankDynaConfig, rank_report

from .test_reference import train

STEPS, BATCH = 30, 16  # 480 rows, all of which are looked at
WARMUP, LEARNING, COOLDOWN = 16, 9, 8  # 7 steps score the groups before the first removal
RATE = 0.1
BLOCKS = [[0, 1, 2], [3, 4], [5, 6, 7]]

Choose = Callable[[Sequence[SingularGroups], int], list[Tensor]]


class NetworkOfInputs(ReferenceNetwork):
    """The groups are those of W S^(1/2), with S^(1/2) by its eigenvalues."""

    def __init__(self, dense: nn.Module, x: Tensor) -> None:
        super().__init__(dense)
        for phi, bias in zip(self.phis.values(), self.biases, strict=True):
            W = phi.W().detach()
            C = x.T @ x / len(x)
            values, vectors = torch.linalg.eigh(C / C.diagonal().mean() + 1e-3 * torch.eye(len(C)))
            U, sigma, Vt = torch.linalg.svd(W @ (vectors * values.sqrt()) @ vectors.T, full_matrices=False)
            v = Vt @ (vectors / values.sqrt()) @ vectors.T
            length = v.norm(dim=1)
            for factor, new in ((phi.u, U.T), (phi.sigma, sigma * length), (phi.v, v / length[:, None])):
                factor.data = new.contiguous()
            x = torch.tanh(x @ W.T + bias.detach())


def train_dense(dense: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
    """By gradients that are clipped together to a norm of 1."""
    parameters = list(dense.parameters())
    for batch in batches:
        gradients = torch.autograd.grad(dense(**batch)["loss"], parameters)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= RATE * gradient * min(1.0, 1.0 / (norm + 1e-6))


def with_floor(initial: Callable[..., int], keep: Choose, floor: float) -> Choose:
    """First the best of each block, up to the floor's part of its share; then the best of all that are left."""

    def keep_best(phis: Sequence[SingularGroups], R_t: int) -> list[Tensor]:
        before = [phi.I_bar for phi in phis]
        for block in BLOCKS:
            inside = [phis[W] for W in block]
            least = math.floor(Fraction(str(floor)) * R_t * initial(inside) / initial(phis))
            for W, mask in zip(block, keep(inside, least), strict=True):
                phis[W].I_bar = torch.where(mask, math.inf, before[W])
        kept = keep(phis, R_t)
        for phi, I_bar in zip(phis, before, strict=True):
            phi.I_bar = I_bar
        return kept

    return keep_best


@pytest.mark.parametrize("floor", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["rank", "param"])
def test_same_ranks_and_weights_as_the_equations(kind: str, floor: float, tmp_path: Path) -> None:
    batches = make_batches(1, STEPS, BATCH)
    dense = build_dense(0)
    train_dense(dense, batches[:LEARNING])
    network = NetworkOfInputs(dense, torch.cat([batch["x"] for batch in batches]))
    phis, following = list(network.phis.values()), iter(batches[LEARNING:])
    initial, final, keep = {"rank": RANKS, "param": PARAMETERS}[kind]
    steps = rankdyna(
        phis,
        lambda: network.backward(next(following), 1.0),
        sgd(network.parameters, RATE),
        c=0.3,
        t0=WARMUP - LEARNING,
        t1=COOLDOWN,
        T=STEPS - LEARNING,
        unit=(initial, final, with_floor(initial, keep, floor)),
    )
    expected = [tuple(int(phi.remain.sum()) for phi in phis) for _ in steps]

    config = RankDynaConfig(
        **{f"{kind}_ratio": 0.3}, rank_warmup_steps=WARMUP, rank_cooldown_steps=COOLDOWN, block_floor=floor
    )
    model = build_dense(0)
    trainer, ranks = train(model, batches, config, tmp_path, optim="sgd", learning_rate=RATE)
    assert ranks == [()] * (LEARNING - 1) + [expected[0]] + expected
    assert list(rank_report(model).index) == list(network.phis)
    for name, phi in network.phis.items():
        p, q = phi.PQ()
        layer = model.get_submodule(name)
        found = layer.weight if isinstance(layer, nn.Linear) else layer.to_dense_weight()
        torch.testing.assert_close(found, p @ q, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.classifier.weight, network.head[0].detach(), rtol=0, atol=1e-6)
    # The last block would have fewer groups without its floor.
    assert sum(expected[-1][W] for W in BLOCKS[-1]) == {"rank": (5, 7), "param": (3, 4)}[kind][floor > 0]
    assert trainer.state.global_step == STEPS
