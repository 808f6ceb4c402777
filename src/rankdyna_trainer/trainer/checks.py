"""What a `Trainer` must not ask for when it compresses a model, as far as it is known before the first step."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from ..checkpoint.resuming import check_whole
from ..checkpoint.run_state import RUN_KEY
from ..config import RankDynaConfig
from ..layers.distributed import is_distributed
from ..options import shown
from .calling_trainer import resumed_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer

# A shorter run is a trial.
FEWEST_STEPS = 20
HALVES = {torch.bfloat16, torch.float16}

logger = logging.getLogger(__name__)


def check_module(model: object, trainer: Trainer | None) -> None:
    """
    Check that there is a model to compress.

    Raises:
        TypeError: it is no module, but perhaps holds some.
    """
    if isinstance(model, nn.Module):
        return
    kind, trainer_kind = type(model).__name__, "Trainer" if trainer is None else type(trainer).__name__
    parts = [name for name, part in getattr(model, "__dict__", {}).items() if isinstance(part, nn.Module)]
    advice = (
        f"Its {' and '.join(parts)} {'is one' if len(parts) == 1 else 'are some'}: compress model.{parts[0]} with a "
        "Trainer of its own before, or at once with rankdyna_trainer.baselines, and put it back."
        if parts
        else "Compress the module in it with a Trainer of its own, or at once with rankdyna_trainer.baselines."
    )
    raise TypeError(
        f"The model of this {trainer_kind} is a {kind}, which is no torch.nn.Module: the RankDynaCallback has no "
        f"layers to compress. {advice}"
    )


def check_backend(args: TrainingArguments) -> None:
    """
    Check that a callback will see the gradients of single parameters.

    Raises:
        ValueError: DeepSpeed or FSDP1 is to be used.
    """
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "RankDyna cannot run under DeepSpeed, which steps inside of backward, where no callback sees the "
            "gradients. Use DDP or FSDP: remove the deepspeed argument, or run accelerate config anew."
        )
    if args.fsdp and args.fsdp_plugin_args["fsdp_version"] != 2:
        raise ValueError(
            "RankDyna cannot run under FSDP1, which flattens the groups into one vector. Use FSDP2: leave the version "
            'out of fsdp_config, or set it to 2 (got {"version": 1}).'
        )


def check_single(trainer: Trainer, callback_class: type[TrainerCallback]) -> None:
    """
    Check that a model is compressed by one callback.

    Raises:
        ValueError: the `Trainer` has another one of this class.
    """
    if sum(isinstance(callback, callback_class) for callback in trainer.callback_handler.callbacks) > 1:
        raise ValueError("The Trainer has two RankDynaCallbacks, which would compress one model: give it one.")


def check_best_model(trainer: Trainer, model: nn.Module) -> None:
    """
    Check that the best checkpoint can be loaded at the end, where it is asked for.

    Raises:
        ValueError: a trainer for wrapped models would do so in its own way, which finds no layers for singular groups.
    """
    from transformers import Trainer

    own_way = type(trainer)._load_best_model is not Trainer._load_best_model
    if trainer.args.load_best_model_at_end and own_way and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(trainer).__name__} cannot load the best checkpoint of a {type(model).__name__} with singular "
            "groups at the end of training. Set load_best_model_at_end=False: the last model is saved."
        )


def check_further_training(model: nn.Module, optimizer: Optimizer) -> None:
    """
    Check that a model which was compacted by a run can be trained on by the same `Trainer`, and say that it is.

    Raises:
        ValueError: the optimizer does not hold the compacted model's parameters, or several processes train it.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    stale = {id(parameter) for parameter in optimizer.state} - held
    if is_distributed() or stale or not trained <= held:
        raise ValueError(
            "The model is compacted already, but this Trainer's optimizer, or the wrapper that joins its processes, "
            "still holds singular groups. To train the model on, load it from the output_dir into a new Trainer, "
            "without the RankDynaCallback."
        )
    logger.warning("The model is compacted already: it is trained on at the ranks that it has.")


def warn_of_little_hope(model: nn.Module, state: TrainerState) -> None:
    """Say at the start of a run what will be wrong with its model at the end, in process 0."""
    if not state.is_world_process_zero:
        return
    if state.max_steps < FEWEST_STEPS:
        logger.warning(
            "This run has %d steps, in which no model learns its task or recovers from what is removed: it only shows "
            "that all works. Raise num_train_epochs or max_steps, to some hundreds of steps at least.",
            state.max_steps,
        )
    halves = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} & HALVES
    if halves:
        logger.warning(
            "The weights that are trained are in %s, in which small updates are rounded away. Load the model with "
            "dtype=torch.float32, and leave the speed to bf16=True of the TrainingArguments.",
            " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves)),
        )


def check_resumed(state: TrainerState, args: TrainingArguments, model: nn.Module, run: dict[str, Any]) -> None:
    """Compare the run with the one that wrote the checkpoint, of which the state was loaded, and note it there."""
    # A stateful callback would be handed its notes only if the user asks for it.
    saved = state.stateful_callbacks.get(RUN_KEY)
    if saved is not None and not isinstance(saved, dict):
        raise ValueError(
            f"trainer_state.json of the checkpoint is damaged: what it says of {RUN_KEY} is {shown(saved)}. Copy it "
            "again, or resume from another checkpoint."
        )
    if state.global_step and saved is None:
        raise ValueError(
            f"The checkpoint of step {state.global_step} was written without the RankDynaCallback, so that it cannot "
            "be resumed with it. Start anew, without resume_from_checkpoint; the model may be loaded from it."
        )
    # The same factors in another place; the same weights with or without the code that loads them.
    run = {name: value for name, value in run.items() if name not in ("factorization_cache", "self_contained")}
    # A checkpoint that does not name an option was written before there was one, when these were as in the paper.
    defaults = {field.name: field.default for field in fields(RankDynaConfig)}
    defaults |= {"group_basis": "weights", "block_floor": 0.0}
    differences = [
        f"{name} was {shown(was)} and is {shown(value)}"
        for name, value in run.items()
        if saved and (was := saved.get(name, defaults.get(name))) != value
    ]
    if differences:
        raise ValueError(
            f"The checkpoint of step {state.global_step} belongs to another run: {'; '.join(differences)}. Resume "
            "with the same values, or start anew without resume_from_checkpoint."
        )
    if saved and saved.get("save_only_model"):
        raise ValueError(
            f"The checkpoint of step {state.global_step} was written with save_only_model=True: without the state of "
            "the optimizer the run cannot go on as if it had not been stopped. Resume from a whole one, or start anew."
        )
    checkpoint = resumed_checkpoint()
    if state.global_step and checkpoint is not None:
        check_whole(checkpoint, model, args.process_index if args.world_size > 1 else None)
    state.stateful_callbacks[RUN_KEY] = run | {"save_only_model": args.save_only_model}
