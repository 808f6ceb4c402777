"""The teacher of a `Trainer`'s model: where it comes from, and which runs cannot have one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import RankDynaConfig
from ..method.teaching import check_teacher

if TYPE_CHECKING:
    from transformers import Trainer


def load_teacher(model: Any, config: RankDynaConfig, given: nn.Module | None) -> nn.Module | None:
    """
    The teacher of a run, checked against the model.

    Args:
        model: which it is to teach.
        config: whose `teacher` is a folder or a name on the Hub.
        given: by the user, as a model.

    Returns:
        `None` if there is to be none.

    Raises:
        TypeError: one of the two is no model of `transformers`.
        ValueError: both a name and a model are given; the teacher does not fit, or lacks weights, such as its head.
        OSError: the teacher cannot be read.
    """
    if given is not None and config.teacher is not None:
        raise ValueError(f"Give one teacher: got the model {type(given).__name__} and {config.teacher!r}.")
    teacher = given
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
