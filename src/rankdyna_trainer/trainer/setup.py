"""What is done to a `Trainer` when it is made, so that it compresses its model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ..checkpoint.resuming import check_same_model, missing_tensors
from ..checkpoint.self_contained import choose_self_contained
from ..checkpoint.step_record import RECORD_NAME, check_record
from ..config import RankDynaConfig
from ..layers.distributed import is_distributed
from ..layers.injection import expect_groups, inject_singular_groups
from ..layers.singular_group import SingularGroupLinear
from ..method.dense_phase import hand_over_to_groups

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

logger = logging.getLogger(__name__)


def prepare_model(
    model: nn.Module, config: RankDynaConfig, args: TrainingArguments, optimizer: Optimizer | None = None
) -> nn.Module:
    """
    Give a model singular groups, unless a user has injected it already, and the code that loads it, if that is wanted.

    Unless `group_basis="weights"`, it stays dense until near the end of the warm-up, if no wrapper or user will hold
    its parameters, which are exchanged then; otherwise it begins with the groups of its weights.

    Args:
        model: dense, or injected.
        config: the choices.
        args: of the `Trainer`.
        optimizer: that the user made for the model: it follows a checkpoint that has groups.

    Raises:
        ValueError: the optimizer is of the dense model, whose layers are exchanged at once; or the groups can be those
            of the inputs only later, and are to be fixed now.
    """
    choose_self_contained(model, config.self_contained)
    if any(isinstance(module, SingularGroupLinear) for module in model.modules()):
        return model
    if config.fixed_shapes and config.group_basis == "activations":
        raise ValueError(
            "With fixed_shapes=True a Trainer begins with the groups of the weights. For "
            'group_basis="activations" call inject_singular_groups(model, config, batches) with a few hundred rows '
            "before the Trainer is made, or leave group_basis out."
        )
    held = is_distributed() or args.n_gpu > 1 or args.fsdp or config.fixed_shapes
    if config.group_basis != "weights" and not held:
        return expect_groups(model, config, None if optimizer is None else partial(hand_over_to_groups, optimizer))
    if optimizer is not None:
        raise ValueError(
            "The optimizer in optimizers=(optimizer, ...) holds the weights in whose place singular groups come now. "
            "Let the Trainer make it (optimizer_cls_and_kwargs chooses which), or call "
            "inject_singular_groups(model, config) first and build the optimizer from that model."
        )
    return inject_singular_groups(model, replace(config, group_basis="weights"))


def prepare_in_model_init(trainer: Trainer, choose: Callable[[Mapping[str, Any]], RankDynaConfig]) -> None:
    """
    [`prepare_model`] for each model that the `Trainer` makes anew, for a trial or a second run.

    Args:
        trainer: with a `model_init`, or without.
        choose: from what a trial chooses to the choices of its run.
    """
    if trainer.model_init is None:
        return
    make = trainer.call_model_init

    def prepared(trial: Any = None) -> nn.Module:
        chosen = trial if isinstance(trial, Mapping) else {}
        if trial is not None and not isinstance(trial, Mapping):
            chosen = trainer.hp_space(trial)  # one of optuna, of which the Trainer will ask the same once more
        return prepare_model(make(trial), choose(chosen), trainer.args)

    trainer.call_model_init = prepared


def check_before_loading(trainer: Trainer) -> None:
    """Let a `Trainer` that resumes look at the checkpoint before it loads it, or anything of its optimizer."""
    load = trainer._load_from_checkpoint

    def checked(resume_from_checkpoint: str, *arguments: Any, **named: Any) -> None:
        check_same_model(resume_from_checkpoint, trainer.model)
        load(resume_from_checkpoint, *arguments, **named)
        if missing_tensors(resume_from_checkpoint, trainer.model):
            return  # which is said when the rest is known
        if not check_record(resume_from_checkpoint, trainer.args.world_size):
            logger.warning(
                "%s has no %s, which the run that wrote it leaves last: whether its files are of one step cannot be "
                "seen.",
                resume_from_checkpoint,
                RECORD_NAME,
            )

    trainer._load_from_checkpoint = checked


def config_of_trial(config: RankDynaConfig, chosen: Mapping[str, Any]) -> RankDynaConfig:
    """
    The choices of a run with what a trial of a hyperparameter search chooses, which may name fields of the config.

    Raises:
        TypeError, ValueError: a value is none that the config takes.
    """
    names = {field.name for field in fields(RankDynaConfig)} & chosen.keys()
    return replace(config, **{name: chosen[name] for name in names}) if names else config


def move_to_front(callback: TrainerCallback, trainer: Trainer) -> None:
    """Call this callback first: the trackers of `report_to` stand before it, and would log without its numbers."""
    callbacks = trainer.callback_handler.callbacks
    callbacks.remove(callback)
    callbacks.insert(0, callback)
