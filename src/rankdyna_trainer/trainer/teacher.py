"""The teacher of a `Trainer`'s model: where it comes from, and which runs cannot have one."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import RankDynaConfig
from ..layers.compaction import compact_and_tell
from ..layers.distributed import is_sharded, unsharded_copy
from ..layers.hooks import release
from ..layers.singular_group import SingularGroupLinear
from ..method.teaching import Teaching, check_teacher
from ..report.card import is_hub_id
from ..report.staging import staging_folder
from .calling_trainer import calling_trainer, output_dir, resumed_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from ..method.algorithm import RankDyna

# What is given as a teacher's name for the model as it is in its warm-up, and the folder that keeps it.
SELF = "self"
FOLDER = "rankdyna_teacher"
# A file in each such folder that says that a run made it.
OWN = ".rankdyna-teacher"


class RunTeacher:
    """
    The teacher of a run, if it has one.

    Args:
        config: whose `teacher` is a folder, a name on the Hub, or `"self"`.
        given: by the user, as a model, instead.

    Attributes:
        config: as given, or of a trial.
    """

    def __init__(self, config: RankDynaConfig, given: nn.Module | None = None) -> None:
        self.config = config
        self._given = given
        self._loaded: nn.Module | None = None
        self._model: Any = None
        self._args: Any = None
        self._teaching: Teaching | None = None

    @property
    def name(self) -> str | None:
        """Who it is, in words that name no local folder; `None` if there is none."""
        chosen = self.config.teacher
        if chosen == SELF:
            return "the model itself, as it was in its warm-up"
        if chosen is not None and is_hub_id(chosen) and not os.path.exists(chosen):
            return chosen
        return None if chosen is None and self._given is None else "a fine-tuned model of the same sizes"

    @property
    def folder(self) -> str | None:
        """Where it was loaded from, if that is a folder of this machine."""
        chosen = self.config.teacher or getattr(getattr(self._given, "config", None), "_name_or_path", None)
        return chosen if chosen and chosen != SELF and os.path.isdir(chosen) else None

    def check(self, model: nn.Module, trainer: Trainer | None) -> None:
        """
        Load the teacher, and check that it and the `Trainer` fit the model.

        Raises:
            TypeError, ValueError, OSError: as [`load_teacher`] and [`check_loss`].
        """
        if self.config.teacher is None and self._given is None:
            return
        self._loaded = load_teacher(model, self.config, self._given)
        if trainer is not None:
            check_loss(trainer)

    def begin(self, model: nn.Module, args: TrainingArguments, rankdyna: RankDyna) -> None:
        """
        Let the teacher teach; that of the run itself, as soon as there is one.

        Args:
            model: in training.
            args: of the `Trainer`.
            rankdyna: of the run, which tells when the model becomes its own teacher.

        Raises:
            ValueError: the run has no warm-up to learn in, or its teacher is lost.
            FileExistsError: the teacher's folder would replace one of the user's.
        """
        self._model, self._args = model, args
        if self.config.teacher == SELF:
            if not rankdyna.schedule.warmup_steps:
                raise ValueError(
                    'teacher="self" is the model at the end of the warm-up: set rank_warmup_steps above 0.'
                )
            if args.should_save:
                check_place(output_dir(args))
            if not rankdyna.learning:
                self._teach(find_teacher(model, resumed_checkpoint(), output_dir(args)))
        elif self._loaded is not None:
            self._teach(self._loaded)

    def check_learnt_from(self) -> None:
        """
        Check, after a backward pass, that it was one of the loss with the teacher's part.

        Raises:
            ValueError: the `Trainer` trains on another loss than the one that the model returns.
        """
        if self._teaching is None or self._teaching.is_learnt_from:
            return
        trainer = calling_trainer()
        raise ValueError(
            f"{'The training loop' if trainer is None else type(trainer).__name__} does not train on the loss that "
            "the model returns, in which the teacher's is: let compute_loss return it, or add to it, or leave the "
            "teacher out."
        )

    def end_warmup(self) -> None:
        """Make the model as it is now the teacher of the rest of the run, with `teacher="self"`."""
        if self.config.teacher == SELF:
            teacher = teacher_of_run(self._model)
            if self._args.should_save:
                keep_teacher(teacher, output_dir(self._args))
            self._teach(teacher)

    def save(self, step: int) -> None:
        """Put the teacher of the run itself into the checkpoint that was just written."""
        if self.config.teacher == SELF and self._teaching is not None and self._args.should_save:
            keep_teacher(self._teaching.teacher, Path(output_dir(self._args)) / f"checkpoint-{step}")

    def take_parts(self) -> dict[str, float]:
        """The parts of the loss since they were last asked for."""
        return {} if self._teaching is None else self._teaching.take_parts()

    def end(self) -> None:
        """Take the teacher off the model, and forget that of the run itself."""
        if self._teaching is None:
            return
        self._teaching.release()
        self._teaching = None
        if self.config.teacher == SELF and self._args.should_save:
            folder = Path(output_dir(self._args)) / FOLDER
            if (folder / OWN).is_file():
                shutil.rmtree(folder, ignore_errors=True)

    def _teach(self, teacher: nn.Module) -> None:
        self._teaching = Teaching(self._model, teacher.to(self._args.device), self.config)


def load_teacher(model: Any, config: RankDynaConfig, given: nn.Module | None) -> nn.Module | None:
    """
    The teacher of a run, checked against the model.

    Args:
        model: which it is to teach.
        config: whose `teacher` is a folder or a name on the Hub.
        given: by the user, as a model.

    Returns:
        `None` if there is to be none, or not yet.

    Raises:
        TypeError: one of the two is no model of `transformers`.
        ValueError: both a name and a model are given; the teacher does not fit, or lacks weights, such as its head.
        OSError: the teacher cannot be read.
    """
    if given is not None and config.teacher is not None:
        raise ValueError(f"Give one teacher: got the model {type(given).__name__} and {config.teacher!r}.")
    teacher = given
    if config.teacher == SELF:
        check_teacher(model, model)
        return None
    if config.teacher is not None:
        teacher, found = type(model).from_pretrained(config.teacher, dtype=model.dtype, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(
                f"The teacher {config.teacher} has no {min(found['missing_keys'])}, and could only teach what is "
                f"random: give a {type(model).__name__} that was fine-tuned on the task."
            )
    if teacher is None:
        return None
    if teacher is model:
        raise ValueError("The teacher is the model itself: give a copy, copy.deepcopy(model).")
    check_teacher(model, teacher)
    return teacher


def check_loss(trainer: Trainer) -> None:
    """
    Check that the loss is computed where a teacher's can be added.

    Raises:
        ValueError: the `Trainer` computes it outside of the model.
    """
    if trainer.args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={trainer.args.label_smoothing_factor} lets the Trainer compute the loss, to "
            "which a teacher's cannot be added. Leave it out: a teacher's logits are smooth labels already."
        )
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise ValueError(
            "compute_loss_func lets the Trainer compute the loss, to which a teacher's cannot be added. Leave it out, "
            "or let the model compute its loss."
        )


def teacher_of_run(model: nn.Module) -> nn.Module:
    """The model as it is now, for `teacher="self"`: a copy without singular groups, which is not trained."""
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    teacher = unsharded_copy(model) if sharded else copy.deepcopy(model)
    release(teacher)
    if any(isinstance(module, SingularGroupLinear) for module in teacher.modules()):
        compact_and_tell(teacher, lambda layer, replacement: None)
    elif "_rankdyna_weight_conversions" in vars(teacher):
        teacher._weight_conversions = teacher.__dict__.pop("_rankdyna_weight_conversions")
    return teacher.eval().requires_grad_(False)


def keep_teacher(teacher: Any, directory: str | Path) -> None:
    """
    Save the teacher of a run in a folder of its own, whole or not at all.

    Args:
        teacher: from [`teacher_of_run`].
        directory: of a checkpoint, or of the run.
    """
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    with staging_folder(place) as staging:
        teacher.save_pretrained(staging / FOLDER)
        (staging / FOLDER / OWN).touch()
        if (place / FOLDER).exists():
            os.replace(place / FOLDER, staging / "old")
        os.replace(staging / FOLDER, place / FOLDER)


def check_place(directory: str | Path) -> None:
    """
    Check that the teacher of a run can be kept in a folder.

    Raises:
        FileExistsError: something of the user's has the name of the teacher's folder there.
    """
    folder = Path(directory) / FOLDER
    if os.path.lexists(folder) and not (folder / OWN).is_file():
        raise FileExistsError(
            f'{folder} is not of a run, and with teacher="self" the run keeps its teacher in a folder of this name: '
            "move it away, or give another output_dir."
        )


def find_teacher(model: Any, *directories: str | Path | None) -> nn.Module:
    """
    The teacher that a run kept, which is resumed.

    Args:
        model: which it teaches.
        directories: where it may be, the best place first.

    Raises:
        ValueError: it is in none of them.
    """
    for directory in directories:
        if directory is not None and (Path(directory) / FOLDER / "config.json").is_file():
            teacher: nn.Module = type(model).from_pretrained(Path(directory) / FOLDER, dtype=model.dtype)
            return teacher.eval().requires_grad_(False)
    raise ValueError(
        f'The run has teacher="self", but its checkpoint has no folder {FOLDER}, in which the teacher is: copy the '
        "whole checkpoint, or resume from another one."
    )
