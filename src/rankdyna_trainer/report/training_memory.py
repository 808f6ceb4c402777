"""What a step of training holds in memory, told by a model's shapes before any weight is there."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

# Of each number that is trained: the two moments of Adam in float32, or in 8 bits with a scale for each 256 of them.
ADAM, ADAM_OF_8_BITS = 8.0, 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class TrainingMemory:
    """
    Bytes.

    Attributes:
        weights: parameters and buffers of the model.
        gradients: of those that are trained.
        optimizer: what it keeps of them between two steps.
        step: the most that forward and backward pass hold together beside weights and optimizer: what the layers
            keep for the backward pass, and the gradients that are there by then.
    """

    weights: int
    gradients: int
    optimizer: int
    step: int

    @property
    def peak(self) -> int:
        """All that is held at the worst moment of a step, but for what the step of the optimizer takes for itself."""
        return self.weights + self.optimizer + max(self.step, self.gradients)


def training_memory(model: nn.Module, inputs: Mapping[str, Tensor], optimizer: float = ADAM) -> TrainingMemory:
    """
    Take a step of training without values, and note what it would hold.

    Args:
        model: in training mode, its parameters on the device meta; those that require no gradient are not trained.
        inputs: what its forward pass takes, on the device meta.
        optimizer: bytes that it keeps of each number that is trained.

    Raises:
        NotImplementedError, RuntimeError: the model does something that needs values.
    """
    held = [*model.parameters(), *model.buffers()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _Held(held) as noted:
        output = model(**inputs)
        first = output if isinstance(output, Tensor) else tree_leaves(output)[0]
        # What a loss of classes or tokens takes: a float32 copy, and its logarithms.
        first.float().log_softmax(-1).sum().backward()
    for parameter in trained:
        parameter.grad = None
    return TrainingMemory(
        weights=sum(tensor.nbytes for tensor in held),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=round(optimizer * sum(parameter.numel() for parameter in trained)),
        step=noted.most,
    )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """
    Let the blocks of a model without values compute their activations again in the backward pass.

    Args:
        model: of a class that supports it.
    """
    # transformers 4 has the other name.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    # Random numbers are not drawn where there are no values, so that there is no state of them to keep.
    enable({"use_reentrant": False, "preserve_rng_state": False})


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, adds up the storages that operations make, for as long as anything holds them."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in before}

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1  # whether a mask is full, or a text the only one of its row: usually it is
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
