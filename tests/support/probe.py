"""A callback that looks on."""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from support.networks import layers_of

Row = dict[str, torch.Tensor]


class Probe(TrainerCallback):
    """Sees each batch that reaches the model in training, and the groups' widths and ranks after each step."""

    def __init__(self) -> None:
        self.batches: list[list[Row]] = []
        self.widths: list[list[int]] = []
        self.ranks: list[list[int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.hook = model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, model: nn.Module, args: Any, inputs: Row) -> None:
        if model.training:
            self.batches[-1].append(inputs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.batches.append([])

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.widths.append([layer.width for layer in layers_of(model)])
        self.ranks.append([layer.rank for layer in layers_of(model)])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.hook.remove()
