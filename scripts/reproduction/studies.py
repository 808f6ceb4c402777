"""
What figures 1 and 4 look at: fine-tuning in singular groups, step by step.

Both studies train as the `Trainer` does by default (AdamW without weight decay, the learning rate falling linearly to
0, gradients clipped at 1), so that what they see is what happens in the runs of the tables.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import get_linear_schedule_with_warmup

from rankdyna_trainer import RankDyna, RankDynaConfig, SingularGroupLinear, inject_singular_groups
from rankdyna_trainer.method.importance import gradients_are_finite, smooth_importance, step_scores
from rankdyna_trainer.method.removal import remove_groups

from .matrices import MATRIX_ENDINGS, Matrix, matrices_of

REMOVED_FROM = ("W_q", "W_k", "W_v", "W_f1")
WATCHED = ("W_o", "W_f2")

Batches = Iterable[Mapping[str, Tensor]]


def importance_positions(
    model: nn.Module,
    batches: Batches,
    steps: int,
    removal_step: int | None,
    *,
    learning_rate: float = 1e-4,
    groups: Sequence[int] = (1, 10, 40, 70),
    removed_part: float = 0.8,
    block: int | None = None,
    beta: float = 0.85,
    endings: Mapping[str, tuple[str, ...]] = MATRIX_ENDINGS,
) -> dict[str, Any]:
    """
    Figure 1: where a few singular groups stand among all groups of their matrix, by importance, at each step.

    Args:
        model: fine-tuned and dense; it is trained on, in singular groups, in place.
        batches: with labels, one a step.
        steps: how many optimizer steps.
        removal_step: after this one the least important groups of W_q, W_k, W_v and W_f1 are removed, in all blocks;
            `None` for never.
        learning_rate: of the first step.
        groups: which ones, by their place at the first step, beginning with 1; those that a matrix has.
        removed_part: of each of these matrices' groups, rounded.
        block: whose W_o and W_f2 are watched, by number; by default the middle one (the later of two).
        beta: of eq. 11.
        endings: the matrix types, by the endings of their layers' names.

    Returns:
        For each watched type its `layer`, how many `groups` it has, their `positions` (for a chosen group, at each
        step, its place among the groups, where 1 is the most important, divided by their number), and the `movement`:
        from the second step on, how far a group of the matrix moved since the step before, on average over all of
        them. `removed` has for each layer how many groups were.

    Raises:
        ValueError: a matrix type is not found; there are fewer batches than steps.
    """
    config = RankDynaConfig(rank_ratio=1.0, importance_beta=beta)
    matrices = matrices_of(model, config, endings)
    inject_singular_groups(model, config)
    layers = {matrix: _groups_of(model, matrix.name) for matrix in matrices}
    chosen_block, watched = _watched(layers, block)
    places: dict[Matrix, list[Tensor]] = {matrix: [] for matrix in watched}
    removed: dict[str, int] = {}
    optimizer = AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)

    def score() -> None:
        _update_importance(model, beta)
        for matrix, layer in watched.items():
            places[matrix].append(_places(layer.importance))

    def remove(step: int) -> None:
        if step == removal_step:
            removed.update(_remove_least_important(layers, removed_part, optimizer))

    train(model, optimizer, batches, steps, score, remove)
    found = {matrix.type: {"layer": matrix.name} | _course(places[matrix], groups) for matrix in watched}
    choices = {"steps": steps, "removal_step": removal_step, "removed_part": removed_part, "block": chosen_block}
    return choices | {"matrices": found, "removed": removed}


def kept_groups(
    model: nn.Module,
    batches: Batches,
    config: RankDynaConfig,
    steps: int,
    layers: Sequence[str] | None = None,
    *,
    learning_rate: float = 1e-4,
) -> dict[str, Any]:
    """
    Figure 4: which of some matrices' singular groups a RankDyna run keeps.

    Args:
        model: dense; it is trained and compressed in place.
        batches: with labels, one a step.
        config: of the run.
        steps: how many optimizer steps it has.
        layers: names of the matrices; by default the value matrices of all blocks.
        learning_rate: of the first step.

    Returns:
        For each of `layers` its `singular_values` before the first step, largest first, and the `kept` groups, by
        their place among these, beginning with 0; and the `ranks` of all target layers.

    Raises:
        ValueError: a matrix type is not found; there are fewer batches than steps.
    """
    if layers is None:
        value = {"W_v": MATRIX_ENDINGS["W_v"]}
        layers = [matrix.name for matrix in matrices_of(model, config, value)]
    inject_singular_groups(model, config)
    watched = {name: _groups_of(model, name) for name in layers}
    sigmas = {name: layer.sigma.detach().clone() for name, layer in watched.items()}
    by_size = {name: (_places(sigma) - 1).tolist() for name, sigma in sigmas.items()}
    optimizer = AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    rankdyna = RankDyna(model, config, optimizer, total_steps=steps)

    def remove(step: int) -> None:
        if rankdyna.meets_final_budget:
            rankdyna.enforce_budget(step)
            return
        before = {name: _rows(layer) for name, layer in watched.items()}
        rankdyna.enforce_budget(step)
        # Now and then removed groups are cut out of the tensors, and the others get new numbers: their values tell.
        for name, layer in watched.items():
            number = dict(zip(before[name], by_size[name], strict=True))
            by_size[name] = [number[row] for row in _rows(layer)]

    train(model, optimizer, batches, steps, rankdyna.update_importance, remove)
    ranks = {name: module.rank for name, module in model.named_modules() if isinstance(module, SingularGroupLinear)}
    found = {
        name: {"singular_values": sigmas[name].sort(descending=True).values.tolist(), "kept": sorted(by_size[name])}
        for name in layers
    }
    return {"steps": steps, "layers": found, "ranks": ranks}


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    steps: int,
    score: Callable[[], None],
    remove: Callable[[int], None],
) -> None:
    """Train as the `Trainer` does, with `score` before each optimizer step, and `remove` after it with its number."""
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    device = next(model.parameters()).device
    model.train()
    step = 0
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        score()
        optimizer.step()
        remove(step)
        schedule.step()
        optimizer.zero_grad()
    if step < steps:
        raise ValueError(f"{steps} steps need as many batches: there are only {step}.")


def _groups_of(model: nn.Module, name: str) -> SingularGroupLinear:
    layer = model.get_submodule(name)
    if not isinstance(layer, SingularGroupLinear):
        raise ValueError(f"{name} is not among the layers that this run compresses.")
    return layer


def _watched(
    layers: Mapping[Matrix, SingularGroupLinear], block: int | None
) -> tuple[str, dict[Matrix, SingularGroupLinear]]:
    """The name of a block, by default of the middle one, and its W_o and W_f2."""
    blocks = list(dict.fromkeys(matrix.block for matrix in layers))
    chosen = blocks[len(blocks) // 2 if block is None else block]
    return chosen, {m: layer for m, layer in layers.items() if m.block == chosen and m.type in WATCHED}


def _update_importance(model: nn.Module, beta: float) -> None:
    """Smooth the scores of this step, as a run does."""
    layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
    scores = step_scores(layers)
    finite = gradients_are_finite(model, scores)
    smooth_importance(layers, scores, beta, finite)


def _remove_least_important(
    layers: Mapping[Matrix, SingularGroupLinear], part: float, optimizer: Optimizer
) -> dict[str, int]:
    """Remove this part of the groups of each W_q, W_k, W_v and W_f1; returns how many they are, by layer."""
    removed = {}
    for matrix, layer in layers.items():
        if matrix.type in REMOVED_FROM:
            removed[matrix.name] = round(part * layer.width)
            remove_groups(layer, _places(layer.importance) <= layer.width - removed[matrix.name], optimizer)
            layer.leave_out_removed()
    return removed


def _course(places: Sequence[Tensor], groups: Sequence[int]) -> dict[str, Any]:
    """What is told of a matrix whose groups had these places at each step."""
    first, count = places[0].tolist(), len(places[0])
    positions = torch.stack(list(places)).double() / count
    return {
        "groups": count,
        "positions": {str(k): positions[:, first.index(k)].tolist() for k in groups if k <= count},
        "movement": positions.diff(dim=0).abs().mean(dim=1).tolist(),
    }


def _places(values: Tensor) -> Tensor:
    """For each value its place, largest first, beginning with 1."""
    places = torch.empty_like(values, dtype=torch.long)
    places[values.argsort(descending=True, stable=True)] = torch.arange(1, len(values) + 1, device=values.device)
    return places


def _rows(layer: SingularGroupLinear) -> list[bytes]:
    """The remaining groups' `u_k`, to the bit: no two of a matrix are alike."""
    return [row.numpy().tobytes() for row in layer.u.detach()[layer.remaining].float().cpu()]
