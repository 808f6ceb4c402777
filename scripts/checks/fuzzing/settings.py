"""The random settings of a case: what a user chooses, and how the loop goes."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_optimizer
import torch
import transformers
from lion_pytorch import Lion
from torch import nn
from torch.optim import Optimizer

Parameters = list[nn.Parameter]


def _muon(parameters: Parameters) -> Optimizer:
    matrices = [[p for p in parameters if (p.ndim == 2) == is_matrix] for is_matrix in (True, False)]
    return pytorch_optimizer.Muon(
        [
            {"params": matrices[0], "lr": 1e-3, "use_muon": True},
            {"params": matrices[1], "lr": 1e-3, "use_muon": False},
        ]
    )


OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-3),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-4),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "Adafactor of transformers": lambda p: transformers.Adafactor(p, lr=1e-3, relative_step=False),
    "Lion": lambda p: Lion(p, lr=1e-4),
    "Muon": _muon,
    "schedule-free": lambda p: pytorch_optimizer.ScheduleFreeAdamW(p, lr=1e-3),
    "CAME": lambda p: pytorch_optimizer.CAME(p, lr=1e-3),
    "SOAP": lambda p: pytorch_optimizer.SOAP(p, lr=1e-3, precondition_frequency=2),
    "Shampoo": lambda p: pytorch_optimizer.ScalableShampoo(p, lr=1e-3, preconditioning_compute_steps=2),
}
ONLY_SINGLE = ("SOAP", "Shampoo", "Muon", "CAME")  # their own linear algebra is that of float32


@dataclass
class Settings:
    """
    Attributes:
        config: the arguments of the `RankDynaConfig`.
        optimizer: its name.
        steps: of the run.
        stops_at: the step after which the run is over: the last one, or an earlier one.
        micro_batches: whose gradients are added up.
        route: when the groups are made: `"inject"`, `"inject with batches"`, `"dense at first"`.
        overflows: the steps at which a gradient is inf, and the optimizer skipped.
        without_gradients: the steps at which some factors have no gradient.
        resumes_at: the step after which the state is loaded into a new model, which has to compute the same.
        finishes: whether the run ends with `RankDyna.finish`, or with `compact`.
        mistake: of the user, or none.
    """

    config: dict[str, Any]
    optimizer: str
    steps: int
    stops_at: int
    micro_batches: int
    route: str
    overflows: set[int]
    without_gradients: set[int]
    resumes_at: int
    finishes: bool
    mistake: str | None


MISTAKEN: dict[str | None, dict[str, Any]] = {
    "no such layer": {"target_modules": ["nowhere"]},
    "no step to fall in": {"rank_warmup_steps": 10, "rank_cooldown_steps": 10},
}
MISTAKES = (*map(str, MISTAKEN), "optimizer too early", "weight of nan", "all frozen", "in groups")


def random_settings(draw: random.Random, dtype: str) -> Settings:
    """Settings of which most are possible."""
    steps = draw.randint(6, 14)
    names = [name for name in OPTIMIZERS if dtype == "float32" or name not in ONLY_SINGLE]
    every = range(1, steps + 1)
    mistake = draw.choice(MISTAKES) if draw.random() < 0.06 else None
    route = "inject" if mistake else draw.choice(["inject", "inject", "inject with batches", "dense at first"])
    return Settings(
        config=random_config(draw, route) | MISTAKEN.get(mistake, {}),
        optimizer=draw.choice(names),
        steps=steps,
        stops_at=steps if draw.random() < 0.85 else draw.randint(1, steps),
        micro_batches=draw.choice([1, 1, 2]),
        route=route,
        overflows={draw.choice(every)} if draw.random() < 0.2 else set(),
        without_gradients=set(draw.sample(every, 2)) if draw.random() < 0.3 else set(),
        resumes_at=draw.choice(every),
        finishes=draw.random() < 0.7,
        mistake=mistake,
    )


def random_config(draw: random.Random, route: str) -> dict[str, Any]:
    """Arguments for the `RankDynaConfig`."""
    config: dict[str, Any] = {
        draw.choice(["rank_ratio", "param_ratio"]): draw.choice([0.05, 0.1, 0.2, 0.33, 0.5, 0.6, 0.75, 0.9, 1.0]),
        "rank_multiple_of": draw.choice([1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4, 8]),
        "rank_scope": draw.choice(["global", "global", "local"]),
        "block_floor": draw.choice([0.0, 0.25, 0.25, 0.6, 1.0]),
        "importance_score": draw.choice(["first_order", "first_order", "second_order", "fisher"]),
        "importance_beta": draw.choice([0.0, 0.5, 0.85]),
        "rank_update_interval": draw.choice([None, 1, 2, 3]),
        "rank_warmup_steps": draw.choice([0, 1, 2, 0.2, "auto"]),
        "rank_cooldown_steps": draw.choice([0, 1, 2, 0.3, 0.6]),
        "target_modules": draw.choice([None, None, "all-linear", "all-linear", r".*", r".*[01]\..*"]),
        "exclude_modules": draw.choice([None, None, ["up", "2", "key", "fc2"], r".*head.*"]),
    }
    if route == "inject with batches":
        config["group_basis"] = "activations"
    elif draw.random() < 0.3 and route == "inject":
        config["group_basis"] = "weights"
    return config
