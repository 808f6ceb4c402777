"""What candidates that the library does not have change in a run: callbacks in the place of RankDyna's own."""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from rankdyna_trainer import RankDynaCallback, RankDynaConfig
from rankdyna_trainer.layers.decomposition import in_float64
from rankdyna_trainer.layers.factorization import factorize_product
from rankdyna_trainer.layers.singular_group import SingularGroupLinear, singular_group_layers
from rankdyna_trainer.method.schedule import RankBudgetSchedule

# How many steps pass until vectors are made orthonormal again.
INTERVAL = 50
# The weight of the past in the smoothed uncertainty, as in PLATON.
UNCERTAINTY_BETA = 0.95
# Under these names AdamW keeps its moments.
FIRST, SECOND = "exp_avg", "exp_avg_sq"
# Under these names scores stand in the optimizer's state while groups are removed, and so are removed with them.
MEAN, UNCERTAINTY = "smoothed importance", "smoothed uncertainty"

State = MutableMapping[Tensor, dict[str, Any]]


class ScaledUpdates(RankDynaCallback):
    """
    RankDyna whose optimizer moves some factors by a multiple of its own update.

    AdamW does not depend on the scale of the gradients, so that this is a multiple of the learning rate.

    Args:
        multiples: by factor, `u`, `sigma` or `v`.
        config: the choices.
        options: of [`RankDynaCallback`].
    """

    def __init__(self, multiples: Mapping[str, float], config: RankDynaConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._multiples = multiples
        self._before: list[tuple[Tensor, Tensor, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Keep the factors as they are; a model that is dense yet has none."""
        super().on_pre_optimizer_step(args, state, control, **rest)
        self._before = [
            (layer.factors()[name].detach(), layer.factors()[name].detach().clone(), multiple)
            for layer in singular_group_layers(rest["model"]).values()
            for name, multiple in self._multiples.items()
        ]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Multiply the update, before groups are removed."""
        for factor, before, multiple in self._before:
            factor.lerp_(before, 1 - multiple)  # a multiple of 1 changes no bit
        self._before = []
        super().on_optimizer_step(args, state, control, **rest)


class OrthonormalVectors(RankDynaCallback):
    """
    RankDyna that decomposes the products of the groups anew, every [`INTERVAL`] steps of the cool-down.

    It waits for the cool-down since the groups of a product are others than those in the metric of the inputs, which
    the budget is to choose from. There nothing is removed any more: scores stay where they were, by position.
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Remove groups, if any are still to be removed; otherwise make the vectors orthonormal when it is time."""
        super().on_optimizer_step(args, state, control, **rest)
        cooling_down = self._rankdyna is not None and self._rankdyna.meets_final_budget
        if cooling_down and (state.global_step + 1) % INTERVAL == 0:
            for layer in singular_group_layers(rest["model"]).values():
                if layer.rank:
                    make_orthonormal(layer, rest["optimizer"].state)


@torch.no_grad()
def make_orthonormal(layer: SingularGroupLinear, states: State) -> None:
    """
    Give a layer the singular groups of its weight, largest first, in the same tensors, and AdamW their moments.

    With `G` the gradient of the weight, those of `u_k`, `v_k` and `sigma_k` are `sigma_k G v_k`, `sigma_k G^T u_k` and
    `u_k^T G v_k`. New groups are mixtures of the old ones, so that first moments of theirs are mixtures of the old
    moments: exactly, but for what the factors moved meanwhile. Second moments are mixed by the squares of the same
    numbers, as if the gradients of two groups, and of two numbers, had nothing to do with each other.

    Args:
        layer: of which at least one group remains.
        states: the optimizer's, in which a factor may have none yet.
    """
    remaining = layer.remaining
    u, sigma, v = (in_float64(factor[remaining]) for factor in layer.factors().values())
    new_u, new_sigma, new_v = factorize_product(u.t() * sigma, v)
    to_u = _mixture(new_v, sigma.unsqueeze(1) * v)  # takes `sigma_k G v_k` to `G v_k` of the new groups
    to_v = _mixture(new_u, sigma.unsqueeze(1) * u)
    for key, power in ((FIRST, 1), (SECOND, 2)):
        if any(key not in states.get(factor, {}) for factor in layer.factors().values()):
            continue
        of_u, of_sigma, of_v = (states[factor][key] for factor in layer.factors().values())
        along_u = to_u**power @ in_float64(of_u[remaining])
        along_v = to_v**power @ in_float64(of_v[remaining])
        scale = new_sigma.unsqueeze(1) ** power
        of_u[remaining] = (scale * along_u).to(of_u)
        of_v[remaining] = (scale * along_v).to(of_v)
        of_sigma[remaining] = (new_u**power * along_u).sum(dim=1).to(of_sigma)
    for factor, new in zip(layer.factors().values(), (new_u, new_sigma, new_v), strict=True):
        factor[remaining] = new.to(factor)


def _mixture(new: Tensor, old: Tensor) -> Tensor:
    """The `(rank, rank)` numbers by which `old` rows are mixed to `new` ones of the same span."""
    return new @ old.t() @ torch.linalg.pinv(old @ old.t(), hermitian=True)


class WithoutDropout(RankDynaCallback):
    """RankDyna that trains singular groups without dropout, as models that are too small to learn by heart."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Switch it off as soon as there are groups."""
        super().on_optimizer_step(args, state, control, **rest)
        if singular_group_layers(rest["model"]):
            for module in rest["model"].modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0


class FallingRates(RankDynaCallback):
    """RankDyna whose learning rate falls to nothing in a line at each of several sizes but the last."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Take the step at a part of its rate."""
        super().on_pre_optimizer_step(args, state, control, **rest)
        groups = rest["optimizer"].param_groups
        self._rates = [group["lr"] for group in groups]
        part = 1.0 if self._rankdyna is None else part_of_rate(self._rankdyna.schedule, state.global_step)
        for group in groups:
            group["lr"] *= part

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Leave the rate as the scheduler set it."""
        for group, rate in zip(rest["optimizer"].param_groups, self._rates, strict=True):
            group["lr"] = rate
        super().on_optimizer_step(args, state, control, **rest)


def part_of_rate(schedule: RankBudgetSchedule, step: int) -> float:
    """The part of the learning rate at which the step after `step` finished ones is taken."""
    number = schedule.station_at(step)
    if number is None or number == schedule.sizes - 1 or step == schedule.stations[number].left:
        return 1.0
    station = schedule.stations[number]
    return (station.left - step) / (station.left - station.reached)


class UncertainScores(RankDynaCallback):
    """
    RankDyna that removes groups by `I_bar U_bar`, as PLATON (Zhang et al., ICML 2022) does with single weights.

    As the library's score is, the uncertainty is one number for each group. It is in no checkpoint.
    """

    def __init__(self, config: RankDynaConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._uncertainty: dict[SingularGroupLinear, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Smooth the scores, and then how far those of this step are from them."""
        before = {layer: layer.importance.clone() for layer in singular_group_layers(rest["model"]).values()}
        super().on_pre_optimizer_step(args, state, control, **rest)
        for layer, old in before.items():
            smoothed = self._uncertainty.get(layer, torch.zeros_like(old))
            self._uncertainty[layer] = smooth_uncertainty(smoothed, old, layer.importance, self.config.importance_beta)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Remove groups by the product. Whatever the optimizer knows of `sigma` is cut as the groups are."""
        states: State = rest["optimizer"].state
        layers, self._uncertainty = self._uncertainty, {}
        for layer, uncertainty in layers.items():
            states[layer.sigma] |= {MEAN: layer.importance, UNCERTAINTY: uncertainty}
            layer.importance = layer.importance * uncertainty
        super().on_optimizer_step(args, state, control, **rest)
        for layer in layers:
            of_sigma = states[layer.sigma]
            layer.importance, self._uncertainty[layer] = of_sigma.pop(MEAN), of_sigma.pop(UNCERTAINTY)


def smooth_uncertainty(smoothed: Tensor, before: Tensor, after: Tensor, beta: float) -> Tensor:
    """
    `U_bar` after a step: `0.95 U_bar + 0.05 |I - I_bar|`.

    Args:
        smoothed: `U_bar` before it, `(width,)`.
        before: `I_bar` before it, `(width,)`.
        after: `I_bar` after it, `beta I_bar + (1 - beta) I`, `(width,)`: of which `|I - I_bar|` follows.
        beta: the weight of the past in `I_bar`.
    """
    distance = (after - before).abs() * (beta / (1 - beta))
    return UNCERTAINTY_BETA * smoothed + (1 - UNCERTAINTY_BETA) * distance
