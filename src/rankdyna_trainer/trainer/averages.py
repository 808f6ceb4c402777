"""What others hold of a model that is compressed: averages of it, reference models that follow it, its parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback, TrainingArguments

from ..config import RankDynaConfig
from ..layers.auto_map import are_of_one_class
from ..layers.dense import expects_groups
from ..layers.notices import AboveProgressBars
from ..layers.singular_group import SingularGroupLinear

if TYPE_CHECKING:
    from transformers import Trainer

logger = AboveProgressBars(logging.getLogger(__name__))

# Of a list that a callback keeps: what it notes in each step may be long.
LOOKED_AT = 1000
CURE = (
    "Set fixed_shapes=True in the RankDynaConfig: all tensors then keep their names and shapes until the model is "
    "compacted."
)


def check_reference_model(args: TrainingArguments, config: RankDynaConfig) -> None:
    """
    Check that no reference model is to follow the model while its tensors change.

    Raises:
        ValueError: trl's `sync_ref_model` is set without `fixed_shapes`.
    """
    if getattr(args, "sync_ref_model", False) and not config.fixed_shapes:
        raise ValueError(
            "sync_ref_model=True mixes the model into a reference model, tensor by tensor, but layers that are "
            f"compressed get other tensors. {CURE} The reference model needs the same ones: call "
            "inject_singular_groups(model, config) before the trainer is made, and give it "
            "ref_model=copy.deepcopy(model)."
        )


def check_averages(trainer: Trainer, model: nn.Module, config: RankDynaConfig) -> None:
    """
    Check that no other callback averages the model, or keeps its parameters, while its tensors change.

    Args:
        trainer: with the callbacks.
        model: that is compressed.
        config: the choices.

    Raises:
        ValueError: one holds a copy of the model, or parameters of its target layers, without `fixed_shapes`; or, with
            it, a copy of other tensors; or is trl's `BEMACallback`.
    """
    if any(type(callback).__name__ == "BEMACallback" for callback in trainer.callback_handler.callbacks):
        raise ValueError(
            "trl's BEMACallback keeps its average in a dense model, which cannot take singular groups. Average with "
            "torch.optim.swa_utils.AveragedModel in a callback of your own, with fixed_shapes=True."
        )
    held = list(_held(trainer))
    if not held:  # almost always, and this is asked for in each step
        return
    parts = set(model.modules())
    targets = [part for part in parts if isinstance(part, SingularGroupLinear) or expects_groups(part)]
    exchanged = {id(parameter) for layer in targets for parameter in layer.parameters()}
    for callback, name, value in held:
        if not isinstance(value, nn.Module):
            if id(value) in exchanged and not config.fixed_shapes:
                raise ValueError(
                    f"{name} keeps parameters of layers that are compressed, in whose place others come. {CURE}"
                )
        elif _follows(callback, value, parts, model):
            if not config.fixed_shapes:
                raise ValueError(
                    f"{name} is a copy of the model that is compressed. Averaged with it, tensor by tensor, it would "
                    f"break when layers are exchanged or cut. {CURE} A copy that only serves for comparison can be "
                    "made before the Trainer."
                )
            if [p.shape for p in value.parameters()] != [p.shape for p in model.parameters()]:
                raise ValueError(
                    f"{name} has other tensors than the model: it was made before the singular groups. Make it of the "
                    "Trainer's model, such as in on_train_begin; or call inject_singular_groups(model, config) before "
                    "both are made, and then copy.deepcopy(model)."
                )


def warn_of_other_models(trainer: Trainer, model: nn.Module) -> None:
    """Tell of models of the same class in other callbacks: whether they are averages cannot be seen."""
    parts = set(model.modules())
    for callback, name, value in _held(trainer):
        same = isinstance(value, nn.Module) and are_of_one_class(value, model) and value not in parts
        if same and not _follows(callback, value, parts, model):
            logger.warning(
                "%s is another %s. If it is an average of the model (EMA), make it in on_train_begin, with "
                "fixed_shapes=True: its tensors are not those of a model that is compressed.",
                name,
                type(model).__name__,
            )


def _held(trainer: Trainer) -> Iterator[tuple[TrainerCallback, str, Any]]:
    """The modules and tensors that callbacks have as attributes, or in lists and dictionaries, each with its name."""
    for callback in trainer.callback_handler.callbacks:
        for name, value in vars(callback).items():
            several = value.values() if isinstance(value, Mapping) else value
            values = several if isinstance(value, (list, tuple, set, Mapping)) else [value]
            for one in islice(values, LOOKED_AT):
                if isinstance(one, (nn.Module, Tensor)):
                    yield callback, f"{type(callback).__name__}.{name}", one


def _follows(callback: TrainerCallback, held: nn.Module, parts: set[nn.Module], model: nn.Module) -> bool:
    """Whether a module is no part of the model, nor a wrapper around it, but a copy, or one that follows it."""
    if not parts.isdisjoint(held.modules()):
        return False
    return (
        type(callback).__name__ == "SyncRefModelCallback"  # of trl
        or (isinstance(held, AveragedModel) and are_of_one_class(held.module, model))
        or any(isinstance(module, SingularGroupLinear) or expects_groups(module) for module in held.modules())
    )
