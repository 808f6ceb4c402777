"""
The loss of a student beside its teacher: of logits (Hinton et al., 2015), and of hidden states after each block, as
CoFi (Xia et al., ACL 2022) and TinyBERT (Jiao et al., Findings of EMNLP 2020) have it. Pure: tensors in, numbers out.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Target = Literal["classes", "labels", "numbers"]


def logits_loss(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor, target: Target) -> Tensor:
    """
    How far the logits are from the teacher's, as a mean over the rows that count.

    For classes `T^2 KL(softmax(teacher / T) || softmax(student / T))`; for several labels at once the same for each
    of them alone; for numbers the squared error.

    Args:
        student: `(..., classes)`.
        teacher: likewise.
        temperature: `T`.
        valid: `(...)`, true where a row counts.
        target: what the last dimension is.
    """
    student, teacher = _or_zero(student, valid), _or_zero(teacher, valid)
    if target == "numbers":
        losses = (student - teacher).square().mean(dim=-1)
    else:
        student, teacher = student / temperature, teacher / temperature
        if target == "labels":
            soft = teacher.sigmoid()
            of_labels = [
                F.binary_cross_entropy_with_logits(logits, soft, reduction="none") for logits in (student, teacher)
            ]
            losses = (of_labels[0] - of_labels[1]).mean(dim=-1)
        else:
            logs = teacher.log_softmax(dim=-1)
            losses = F.kl_div(student.log_softmax(dim=-1), logs, reduction="none", log_target=True).sum(dim=-1)
        losses = temperature**2 * losses
    return losses.sum() / valid.sum().clamp(min=1)


def hidden_loss(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """
    The squared error of a hidden state, relative to the mean square of the teacher's.

    Args:
        student: `(..., features)`.
        teacher: likewise.
        valid: `(...)`, true where a token counts; all of them if `None`.
    """
    if valid is not None:
        student, teacher = _or_zero(student, valid), _or_zero(teacher, valid)
    else:
        student, teacher = _exact(student), _exact(teacher)
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def _or_zero(rows: Tensor, valid: Tensor) -> Tensor:
    """
    Zeros in the place of the rows that do not count, whatever they hold: they add nothing then. How many they are is
    known on the device alone: to take them out, it would have to be waited for.
    """
    return _exact(torch.where(valid.unsqueeze(-1), rows, 0))


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
