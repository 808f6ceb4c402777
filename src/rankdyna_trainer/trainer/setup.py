"""What is done to a `Trainer` when it is made, so that it compresses its model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import RankDynaConfig
from ..layers.injection import inject_singular_groups
from ..layers.singular_group import SingularGroupLinear

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback


def inject_once(model: nn.Module, config: RankDynaConfig) -> nn.Module:
    """[`inject_singular_groups`] for a model that a user may have injected already."""
    if not any(isinstance(module, SingularGroupLinear) for module in model.modules()):
        inject_singular_groups(model, config)
    return model


def inject_in_model_init(trainer: Trainer, config: RankDynaConfig) -> None:
    """Let each model that the `Trainer` makes anew, for a trial or a second run, have singular groups."""
    if trainer.model_init is not None:
        trainer.model_init = _injecting(trainer.model_init, config)


def move_to_front(callback: TrainerCallback, trainer: Trainer) -> None:
    """Call this callback first: the trackers of `report_to` stand before it, and would log without its numbers."""
    callbacks = trainer.callback_handler.callbacks
    callbacks.remove(callback)
    callbacks.insert(0, callback)


def _injecting(model_init: Callable[..., nn.Module], config: RankDynaConfig) -> Callable[..., nn.Module]:
    @functools.wraps(model_init)  # which also keeps the number of arguments, by which the Trainer chooses the call
    def injected(*args: Any) -> nn.Module:
        return inject_once(model_init(*args), config)

    return injected
