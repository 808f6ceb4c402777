"""The empirical Fisher information of target weights, streamed over data: eq. 13."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..layers.dense import DenseLayer, dense_weight
from ..layers.offloaded import refuse_offloaded
from ..options import shown


def fisher_information(
    model: nn.Module,
    layers: Mapping[str, DenseLayer],
    dataloader: Iterable[Mapping[str, Any]],
    per_example: bool = True,
) -> dict[str, Tensor]:
    """
    Eq. 13: for each number of the layers' weights, the mean over the examples of its squared gradient.

    The gradient is that of the loss that the model itself returns, in evaluation mode, so without dropout. Beside the
    sums, one number for each number of the weights, only one layer's gradient is held at a time. The model is left as
    it was: its modes, its gradients and what requires them.

    Args:
        model: dense; called with the entries of a batch as its arguments.
        layers: of this model, by name.
        dataloader: gives batches as a data collator of `transformers` does, with labels: a mapping from argument names
            to tensors, with the examples in dimension 0.
        per_example: run each example by itself, as eq. 13 asks. If false, a batch is run at once, and the mean over
            the batches of the squared gradient *of the batch* is taken: the gradients of its examples are averaged
            before they are squared. With `g` the gradient of an example, that expects
            `E[g]^2 + (E[g^2] - E[g]^2) / batch size` instead of `E[g^2]`. Near a minimum, where `E[g]` is small, it is
            smaller by the batch size and otherwise alike. Measured on MiniLM-L6, fine-tuned on SST-2, with 32 batches
            of 32, in its third block: 33 times smaller; the cosine between the two is 0.97 to 0.997 for a weight, and
            0.996 or more for its row sums; 30 s instead of 55 s.

    Returns:
        By name `(out_features, in_features)`, in float32 or better, on the layer's device.

    Raises:
        TypeError: the dataloader or a batch is of the wrong type.
        ValueError: the dataloader is empty, the tensors of a batch do not agree on the number of examples, the model
            returns no loss, the loss or a gradient is not finite, no gradient reaches a layer, or it is offloaded.
    """
    if not isinstance(dataloader, Iterable) or isinstance(dataloader, (str, Mapping)):
        raise TypeError(
            "dataloader must give batches, as torch.utils.data.DataLoader(rows, batch_size=32, collate_fn=collator) "
            f"does: got a {type(dataloader).__name__}."
        )
    if not layers:
        return {}
    sums = {name: _zeros(dense_weight(layer).detach()) for name, layer in layers.items()}
    reached: set[str] = set()
    count = 0
    with _gradients_handed_over(model, layers, sums, reached), torch.enable_grad():
        for number, batch in enumerate(tqdm(dataloader, "Estimating Fisher information", unit="batch"), start=1):
            for example in checked_examples(batch, number, per_example):
                count += 1
                loss = returned_loss(model, example, f"example {count}" if per_example else f"batch {number}")
                if not loss.requires_grad:
                    raise ValueError(
                        "The loss does not depend on any weight that requires gradients: the model detaches it."
                    )
                loss.backward(inputs=[layer.weight for layer in layers.values()])  # type: ignore[no-untyped-call]
            if count:
                _check_gradients(sums, reached, number)
    if not count:
        raise ValueError("There is no data to estimate the Fisher information on: the dataloader is empty.")
    return {name: values.div_(count) for name, values in sums.items()}


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


@contextmanager
def _gradients_handed_over(
    model: nn.Module, layers: Mapping[str, DenseLayer], sums: Mapping[str, Tensor], reached: set[str]
) -> Iterator[None]:
    """In evaluation mode, squares the gradient of each layer into its sum, and leaves the model as it was."""
    refuse_offloaded(model)
    modes = {module: module.training for module in model.modules()}
    gradients = {layer: layer.weight.grad for layer in layers.values()}
    hooks = []
    try:
        model.eval()
        for name, layer in layers.items():
            layer.weight.grad = None
            # Dropped as soon as it is added, so that the gradients of the other layers are not held beside it.
            adding = _adding_square(name, sums[name], isinstance(layer, Conv1D), reached)
            hooks.append(layer.weight.register_post_accumulate_grad_hook(adding))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, gradient in gradients.items():
            layer.weight.grad = gradient
        for module, training in modes.items():
            module.training = training


def _adding_square(name: str, squares: Tensor, transposed: bool, reached: set[str]) -> Callable[[Tensor], None]:
    def add(weight: Tensor) -> None:
        if weight.grad is None:  # another hook of the user's took it
            return
        gradient = (weight.grad.t() if transposed else weight.grad).to(squares.dtype)
        squares.addcmul_(gradient, gradient)
        weight.grad = None
        reached.add(name)

    return add


def checked_examples(batch: Any, number: int, per_example: bool) -> Iterator[dict[str, Any]]:
    """
    The examples of a batch, one by one or at once, none of an empty one.

    Args:
        batch: a mapping from the model's arguments to tensors, with the examples in dimension 0.
        number: of the batch, for the messages.
        per_example: each example as a batch of its own.

    Raises:
        TypeError: the batch is no such mapping.
        ValueError: its tensors do not agree on the number of examples.
    """
    if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
        raise TypeError(
            "A batch must be a mapping from the model's arguments to tensors, as a data collator of transformers "
            f"gives: batch {number} is {shown(batch)}."
        )
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    sizes = {key: len(value) if value.ndim else None for key, value in tensors.items()}
    size = next(iter(sizes.values()))
    if size is None or len(set(sizes.values())) > 1:
        raise ValueError(
            "The tensors of a batch must have the examples in dimension 0, as a data collator stacks them: those of "
            f"batch {number} are of the shapes {shown({key: tuple(value.shape) for key, value in tensors.items()})}."
        )
    if not per_example and size:
        yield dict(batch)
        return
    for i in range(size):
        yield {key: tensors[key][i : i + 1] if key in tensors else value for key, value in batch.items()}


def returned_loss(model: nn.Module, example: Mapping[str, Any], which: str) -> Tensor:
    """
    The loss that a model itself returns, one number.

    Args:
        model: called with the entries of the example as its arguments, on its own device.
        example: one example or a batch of them, with labels.
        which: it is, for the messages.

    Raises:
        ValueError: the model returns no loss, or it is not one finite number.
    """
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in example.items()})
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch with {', '.join(example)}: the batches must have "
            "what it needs for one, which is labels for most models."
        )
    if loss.numel() != 1 or not torch.isfinite(loss).all():
        raise ValueError(
            f"The loss of {which} is {shown(loss.detach())} instead of one finite number: leave the example out if it "
            "has no label to learn from; load the model in float32 if half precision overflows."
        )
    return loss


def _check_gradients(sums: Mapping[str, Tensor], reached: set[str], number: int) -> None:
    if missing := [name for name in sums if name not in reached]:
        raise ValueError(
            f"The loss gives {len(missing)} of {len(sums)} target layers no gradient ({missing[0]}, ...): the model "
            "does not use them for these batches. Name them in exclude_modules."
        )
    for name, squares in sums.items():
        if not torch.isfinite(squares.amax()):
            raise ValueError(
                f"The gradient of {name} has inf or nan in batch {number}, or its square has: training diverged, or "
                "the numbers are too large for the model's precision. Load it in float32."
            )
