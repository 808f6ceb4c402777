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
    student, teacher = student[valid].float(), teacher[valid].float()
    if not len(student):
        return student.sum()
    if target == "numbers":
        return F.mse_loss(student, teacher)
    student, teacher = student / temperature, teacher / temperature
    if target == "labels":
        soft = teacher.sigmoid()
        least = F.binary_cross_entropy_with_logits(teacher, soft)
        return temperature**2 * (F.binary_cross_entropy_with_logits(student, soft) - least)
    logs = teacher.log_softmax(dim=-1)
    return temperature**2 * F.kl_div(student.log_softmax(dim=-1), logs, reduction="batchmean", log_target=True)


def hidden_loss(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """
    The squared error of a hidden state, relative to the mean square of the teacher's.

    Args:
        student: `(..., features)`.
        teacher: likewise.
        valid: `(...)`, true where a token counts; all of them if `None`.
    """
    if valid is not None:
        student, teacher = student[valid], teacher[valid]
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
