"""
RankDyna on one page: Algorithm 1 of Hua et al., Findings of EMNLP 2023, in the paper's symbols.

It is slow and obvious, and shares no code with the library, which the tests hold against it. A
weight W is `(out, in)`, and l_W = min(out, in). Groups are dimension 0: `u (l_W, out)`,
`sigma (l_W,)`, `v (l_W, in)`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

# --- A sum of singular groups: eq. 5 ---


class SingularGroups:
    """The groups phi_k = (u_k, sigma_k, v_k) of one W: which remain, and their smoothed scores."""

    def __init__(self, W: Tensor) -> None:
        U, sigma, Vt = torch.linalg.svd(W.detach(), full_matrices=False)
        self.u, self.sigma, self.v = (part.clone().requires_grad_() for part in (U.T, sigma, Vt))
        self.remain = torch.ones(len(sigma), dtype=torch.bool)
        self.I_bar = torch.zeros_like(sigma)
        self.shape = tuple(W.shape)

    def W(self) -> Tensor:
        """The sum of sigma_k u_k v_k^T: a removed group adds nothing, and so gets no gradient."""
        return torch.einsum("k,ko,ki->oi", self.sigma * self.remain, self.u, self.v)

    def PQ(self) -> tuple[Tensor, Tensor]:
        """P of the columns sigma_k u_k and Q of the rows v_k, which replace W at the end."""
        u, sigma, v = (part.detach()[self.remain] for part in (self.u, self.sigma, self.v))
        return u.T * sigma, v


# --- Importance: eq. 9 to 11 ---


def S(theta: Tensor) -> Tensor:
    """Eq. 10, its first term (section 4.5.2): |theta dL/dtheta| of each number."""
    assert theta.grad is not None
    return (theta * theta.grad).detach().abs()


def importance(phi: SingularGroups) -> Tensor:
    """Eq. 9: I(phi_k), the sum over all numbers of a group."""
    return S(phi.sigma) + S(phi.u).sum(dim=1) + S(phi.v).sum(dim=1)


def smooth(I_bar: Tensor, I_t: Tensor, beta: float) -> Tensor:
    """Eq. 11: the scores before this step, and those of this step."""
    return beta * I_bar + (1 - beta) * I_t


# --- Budget: eq. 12, 3 and 4 ---


def R(t: int, R_0: int, R_T: int, t0: int, t1: int, T: int) -> int:
    """Eq. 12, corrected so that R(t0) = R(0) and R(T - t1) = R(T)."""
    if t >= T - t1:  # cool-down
        return R_T
    if t <= t0:  # warm-up
        return R_0
    return R_T + math.ceil((R_0 - R_T) * (1 - Fraction(t - t0, T - t0 - t1)) ** 3)


def initial_budget(phis: Sequence[SingularGroups]) -> int:
    """Eq. 3: R(0), the sum of l_W."""
    return sum(min(phi.shape) for phi in phis)


def final_budget(c: float, R_0: int) -> int:
    """Eq. 4: R(T) = ceil(c R(0)), for the decimal number that c is written as."""
    return math.ceil(Fraction(str(c)) * R_0)


# --- Which groups remain: section 3.5 ---


def best_first(phis: Sequence[SingularGroups], scores: list[Tensor]) -> list[tuple[int, int]]:
    """(W, k) of each group that remains, the highest score first; equal ones by W, then by k."""
    groups = []
    for W, phi in enumerate(phis):
        groups += [(W, k) for k in range(len(phi.remain)) if phi.remain[k]]
    return sorted(groups, key=lambda group: -scores[group[0]][group[1]].item())


def keep_best(phis: Sequence[SingularGroups], R_t: int) -> list[Tensor]:
    """The R(t) best groups of all that remain, as a mask for each W."""
    kept = [torch.zeros_like(phi.remain) for phi in phis]
    for W, k in best_first(phis, [phi.I_bar for phi in phis])[:R_t]:
        kept[W][k] = True
    return kept


# --- Algorithm 1 ---

RANKS = (initial_budget, final_budget, keep_best)  # another unit has its own three


def rankdyna(
    phis: Sequence[SingularGroups],
    gradients: Callable[[], object],
    optimizer_step: Callable[[], object],
    *,
    c: float,
    t0: int,
    t1: int,
    T: int,
    beta: float = 0.85,
    scope: str = "global",
    unit: tuple[Callable, Callable, Callable] = RANKS,
) -> Iterator[int]:
    """
    Train for T steps, and remove groups in place. After each step it yields the budget R(t).

    `gradients` computes those of the next batch, `optimizer_step` moves all that is trained. The
    matrices share one budget, or with the scope "local" each has its own (section 4.5.1): then
    R(t) is the sum.
    """
    initial, final, keep = unit
    pools = [phis] if scope == "global" else [[phi] for phi in phis]
    R_0 = [initial(pool) for pool in pools]
    for t in range(1, T + 1):
        gradients()
        for phi in phis:
            phi.I_bar = smooth(phi.I_bar, importance(phi), beta)
        optimizer_step()  # eq. 6 to 8: u, sigma and v
        R_t = [R(t, r, final(c, r), t0, t1, T) for r in R_0]
        for pool, budget in zip(pools, R_t, strict=True):
            for phi, mask in zip(pool, keep(pool, budget), strict=True):
                phi.remain = mask
        yield sum(R_t)
