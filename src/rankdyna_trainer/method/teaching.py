"""A teacher for a model in training: its part of the loss is added where the model computes its own."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_utils import PreTrainedModel

from ..config import RankDynaConfig
from ..layers.architecture import blocks, has_encoder
from ..layers.hooks import Hook
from .distillation import Target, hidden_loss, logits_loss
from .model_outputs import first_tensor, loss_of, rows_with_labels, rows_without_padding, same_logits, with_loss

# The number of a block, and how often it was called before: a block may be shared, as in ALBERT.
States = dict[tuple[int, int], Tensor]


class Teaching:
    """
    Adds a teacher's loss to that of a model, whoever calls the model and takes its loss:

    `(1 - a) * task + a * logits + b * hidden`

    with `a` the `teacher_weight`, `b` the `hidden_weight`, and the losses of `rankdyna_trainer.method.distillation`.
    Nothing changes in evaluation mode. Where the model divides its loss by `num_items_in_batch`, so that several
    batches add up to one mean, the teacher's are divided alike. In a loop of one's own, make it after the
    [`RankDyna`], which takes off what a run that was given up has left.

    Args:
        model: a model of `transformers`, in training.
        teacher: of the same architecture, of which layers may be compressed or not; it is put into evaluation mode.
        config: of which `teacher_weight`, `teacher_temperature` and `hidden_weight` count.

    Attributes:
        is_learnt_from: whether a backward pass came through the loss that has the teacher's part.

    Raises:
        TypeError: one of the two is no model of `transformers`.
        ValueError: they differ in the number of blocks, in widths, in the vocabulary or in the number of labels.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, config: RankDynaConfig) -> None:
        check_teacher(model, teacher)
        self.teacher: Any = teacher.eval().requires_grad_(False)
        self._weight, self._temperature = config.teacher_weight, config.teacher_temperature
        self._hidden_weight = config.hidden_weight
        self._in_decoder = _decoder_blocks(model)
        self._student_states: States | None = None
        self._teacher_states: States = {}
        self._autocast: tuple[str, torch.dtype] | None = None
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._handles = [
            model.register_forward_pre_hook(Hook(self._begin), with_kwargs=True),
            model.register_forward_hook(Hook(self._add), with_kwargs=True),
        ]
        for number, block in enumerate(blocks(model)):
            self._handles.append(block.register_forward_hook(Hook(self._noting(number))))
        for number, block in enumerate(blocks(teacher)):
            self._handles.append(block.register_forward_hook(Hook(self._noting_taught(number))))
        self.is_learnt_from = False
        self._model: Any = model
        self._loss = _watch_loss(model, self.release)

    def release(self) -> None:
        """Take the teacher off the model."""
        for handle in self._handles:
            handle.remove()
        self._loss.release(self._model)

    def take_parts(self) -> dict[str, float]:
        """The means of the three parts of the loss since they were last asked for; none if there were no steps."""
        parts = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return parts

    def _begin(self, model: nn.Module, inputs: Any, named: Mapping[str, Any]) -> None:
        self._student_states = {} if model.training and torch.is_grad_enabled() else None
        self._loss.called = self._loss.divided = False

    def _noting(self, number: int) -> Callable[..., None]:
        def note(block: nn.Module, inputs: Any, output: Any) -> None:
            states = self._student_states
            if states is None:  # evaluation, or what gradient checkpointing computes again
                return
            if not torch.is_grad_enabled():
                raise ValueError(
                    "A teacher needs the hidden states of the model with their gradients, which reentrant gradient "
                    'checkpointing does not give: set gradient_checkpointing_kwargs={"use_reentrant": False}.'
                )
            state = first_tensor(output)
            device = state.device.type
            self._autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
            states[_next(states, number)] = state

        return note

    def _noting_taught(self, number: int) -> Callable[..., None]:
        def note(block: nn.Module, inputs: Any, output: Any) -> None:
            self._teacher_states[_next(self._teacher_states, number)] = first_tensor(output)

        return note

    def _add(self, model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
        states, self._student_states = self._student_states, None
        if states is None:
            return None
        task = loss_of(output)
        if task is None:
            raise ValueError(
                f"{type(model).__name__} returned no loss to which the teacher's could be added: the batches need "
                "labels, and a loss that is computed outside of the model (label smoothing, compute_loss_func, a "
                "Trainer with losses of its own) cannot have a teacher."
            )
        taught = self._ask(inputs, named)
        valid = rows_with_labels(named, self._loss.is_of_next_token)
        logits = self._of_logits(model, output, taught, valid)
        hidden = self._of_hidden_states(states, named) if states else torch.zeros_like(logits)  # all left out
        self._teacher_states = {}
        self._note_parts({"task_loss": task, "teacher_logits_loss": logits, "teacher_hidden_loss": hidden})
        taught_loss = self._weight * logits + self._hidden_weight * hidden
        if valid is not None and self._loss.divided:
            taught_loss = taught_loss * (valid.sum() / named["num_items_in_batch"])
        loss = (1 - self._weight) * task + taught_loss
        if torch.compiler.is_compiling():  # which keeps no hook of a tensor: nothing can be told then
            self.is_learnt_from = True
        else:
            loss.register_hook(self._note_backward)  # type: ignore[no-untyped-call]
        return with_loss(output, loss)

    def _note_backward(self, gradient: Tensor) -> None:
        self.is_learnt_from = True

    def _of_logits(self, model: nn.Module, output: Any, taught: Any, valid: Tensor | None) -> Tensor:
        losses = []
        for name, student in same_logits(output, taught).items():
            everything = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
            rows = valid if valid is not None and valid.shape == everything.shape else everything
            losses.append(logits_loss(student, taught[name], self._temperature, rows, _target(model, student)))
        return torch.stack(losses).mean()

    def _of_hidden_states(self, states: States, named: Mapping[str, Any]) -> Tensor:
        losses = []
        for key, state in states.items():
            tokens = rows_without_padding(named, state, self._in_decoder[key[0]])
            losses.append(hidden_loss(state, self._teacher_states[key], tokens))
        return torch.stack(losses).mean()

    def _note_parts(self, parts: Mapping[str, Tensor]) -> None:
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._count += 1

    @torch.no_grad()
    def _ask(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        self._teacher_states = {}
        named = {name: value for name, value in named.items() if name != "num_items_in_batch"} | {"return_dict": True}
        if not self.teacher.config.is_encoder_decoder:  # such a one makes its decoder's inputs of the labels
            named.pop("labels", None)
        precision: AbstractContextManager[Any] = nullcontext()
        if self._autocast is not None:
            precision = torch.autocast(self._autocast[0], self._autocast[1])
        with precision:
            return self.teacher(*inputs, **named)


class _WatchedLoss:
    """
    The loss function of a model, which notes whether it was called, and was to divide by the items of several batches.
    A copy of the model has its own loss function.
    """

    def __init__(self, own: Callable[..., Any], was_set: bool, give_up: Callable[[], None]) -> None:
        self.own, self.was_set, self.give_up = own, was_set, give_up
        self.called = self.divided = False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.called, self.divided = True, named.get("num_items_in_batch") is not None
        return self.own(*arguments, **named)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., Any]]]:
        return _itself, (self.own,)

    @property
    def is_of_next_token(self) -> bool:
        """Whether the last loss was one for which a label is compared with the logits of the token before it."""
        return self.called and self.own is LOSS_MAPPING["ForCausalLM"]

    def release(self, model: Any) -> None:
        """Give the model its own loss function back."""
        del model._loss_function
        if self.was_set:
            model.loss_function = self.own


def _itself(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _watch_loss(model: Any, give_up: Callable[[], None]) -> _WatchedLoss:
    """A model whose loss is no function of its own never calls it, and never divides."""
    if isinstance(vars(model).get("_loss_function"), _WatchedLoss):  # of a run that was given up
        model._loss_function.give_up()
    was_set = "_loss_function" in vars(model)
    known = was_set or model.loss_type in LOSS_MAPPING
    watched = _WatchedLoss(model.loss_function if known else LOSS_MAPPING["ForCausalLM"], was_set, give_up)
    model.loss_function = watched
    return watched


def check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """
    Check that a teacher can teach a model.

    Raises:
        TypeError: one of the two is no model of `transformers`.
        ValueError: they differ in the number of blocks, in widths, in the vocabulary or in the number of labels.
    """
    for role, one in (("model", model), ("teacher", teacher)):
        if not isinstance(one, PreTrainedModel):
            raise TypeError(
                f"A teacher is for models of transformers, whose blocks and losses are known: the {role} is a "
                f"{type(one).__name__}."
            )
    sizes = {role: _sizes(one) for role, one in (("model", model), ("teacher", teacher))}
    different = [name for name in sizes["model"] if sizes["model"][name] != sizes["teacher"][name]]
    if different:
        found = "; ".join(f"{name}: {sizes['model'][name]} and {sizes['teacher'][name]}" for name in different)
        raise ValueError(
            f"The teacher does not fit the model ({found}, of the model and the teacher): it must be a model of the "
            "same architecture and sizes, fine-tuned on the same task."
        )
    if not blocks(model):
        raise ValueError(f"A {type(model).__name__} has no repeated blocks whose hidden states could be taught.")


def _sizes(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config()
    return {
        "blocks": len(blocks(model)),
        "hidden size": getattr(config, "hidden_size", None),
        "vocabulary": getattr(config, "vocab_size", None),
        "labels": model.config.num_labels,
    }


def _target(model: Any, logits: Tensor) -> Target:
    if model.config.problem_type == "regression" or logits.shape[-1] == 1:
        return "numbers"
    return "labels" if model.config.problem_type == "multi_label_classification" else "classes"


def _next(states: States, number: int) -> tuple[int, int]:
    """The key of a block's next call."""
    call = 0
    while (number, call) in states:
        call += 1
    return number, call


def _decoder_blocks(model: Any) -> list[bool]:
    """For each block whether it belongs to the decoder of an encoder-decoder."""
    in_encoder = set(model.get_encoder().modules()) if has_encoder(model) else set(blocks(model))
    return [block not in in_encoder for block in blocks(model)]
