"""The second moments of what enters the layers of a model, streamed over some batches."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..options import shown
from .architecture import has_encoder
from .decomposition import in_float64
from .dense import in_features, out_features
from .distributed import is_distributed, reshard, sum_of_processes
from .offloaded import device_of
from .rank_record import config_owners

# What the second moments of the layers that are looked at together may hold. Their roots take their place.
BYTES_AT_ONCE = 3 * 2**30


def parts_that_fit(
    layers: Mapping[str, nn.Module], room: int | None = None, with_outputs: bool = False
) -> list[list[str]]:
    """
    The names of the layers, in order, in parts of which the second moments fit into memory together.

    Args:
        layers: by name.
        room: the bytes that the second moments of a part may hold, by default `BYTES_AT_ONCE`. A part has one layer at
            least.
        with_outputs: whether there is a second moment of each layer's outputs as well.
    """
    most = BYTES_AT_ONCE if room is None else room
    parts: list[list[str]] = []
    held = 0
    for name, layer in layers.items():
        size = 8 * (in_features(layer) ** 2 + (out_features(layer) ** 2 if with_outputs else 0))
        if not parts or held + size > most:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return parts


@torch.no_grad()
def input_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    run: Callable[[Any], object] | None = None,
) -> dict[str, Tensor]:
    """
    The sum of `x x^T` over the tokens that enter each layer, padding left out, in evaluation mode.

    The model is left as it was, and so are all random numbers. Layers with the same input, such as query, key and
    value, share one sum. Where several processes call it, each with batches of its own, all get the sum over all.

    Args:
        model: dense, or with singular groups.
        layers: of this model, by name.
        batches: mappings from the model's arguments to tensors, as a data collator of `transformers` gives.
        run: what to do with a batch; by default the model is called with its entries as arguments.

    Returns:
        By name `(in_features, in_features)` in float64; none for a layer that no batch reaches.

    Raises:
        TypeError: a batch is no mapping, and there is no `run`.
    """
    watched = _WatchedInputs(model, layers)
    with as_it_was(model), watched:
        for batch in tqdm(batches, "Observing the inputs of layers", unit="batch", delay=10):
            (run or calling(model))(batch)
    moments = watched.moments
    if is_distributed():
        sizes = {name: in_features(layer) for name, layer in layers.items()}
        moments = of_all_processes(moments, sizes, next(model.parameters()).device)
    return moments


class _WatchedInputs:
    """Adds up the inputs of layers while it is entered."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.moments: dict[str, Tensor] = {}
        self._layers = layers
        self._called: list[Any] = config_owners(model) or [model]
        self._encoders = [called.get_encoder() for called in self._called if has_encoder(called)]
        self._in_encoder = {module for encoder in self._encoders for module in encoder.modules()}
        self._masks: list[Tensor] = []
        self._encoded: Tensor | None = None
        self._last: tuple[Tensor | None, str] = (None, "")

    def __enter__(self) -> "_WatchedInputs":
        self._handles = [
            *(layer.register_forward_pre_hook(self._noting(name)) for name, layer in self._layers.items()),
            *(called.register_forward_pre_hook(self._note_masks, with_kwargs=True) for called in self._called),
            *(encoder.register_forward_hook(self._note_encoded) for encoder in self._encoders),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last, self._encoded, self._masks = (None, ""), None, []

    def _note_masks(self, module: nn.Module, inputs: Any, named: Mapping[str, Any]) -> None:
        """Which tokens are no padding: of the encoder or the only stack first, of a decoder last."""
        names = ("attention_mask", "decoder_attention_mask")
        self._masks = [named[name].bool() for name in names if _is_mask(named.get(name))]
        labels = named.get("labels")
        if self._encoders and named.get(names[1]) is None and labels is not None and _is_mask(labels):
            self._masks.append(labels.ne(-100))

    def _note_encoded(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._encoded = output if isinstance(output, Tensor) else output[0]

    def _noting(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        in_decoder = bool(self._encoders) and self._layers[name] not in self._in_encoder

        def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            last, by = self._last
            self._last = (x, name)
            known = self.moments.get(by) if x is last else None
            if known is not None and self.moments.setdefault(name, known) is known:
                return  # what the layer before has noted
            rows = self._tokens(x, in_decoder and x is not self._encoded).detach().float()
            with torch.autocast(rows.device.type, enabled=False):
                moment = in_float64(rows.t() @ rows)
            if name not in self.moments:
                self.moments[name] = moment
            else:
                self.moments[name].add_(moment)

        return note

    def _tokens(self, x: Tensor, of_decoder: bool) -> Tensor:
        """The rows of an input `(..., in_features)` that are no padding."""
        for mask in reversed(self._masks) if of_decoder else self._masks:
            if mask.shape == x.shape[:-1]:
                return x[mask.to(x.device)]
        return x.reshape(-1, x.shape[-1])


def _is_mask(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.ndim == 2


def calling(model: nn.Module) -> Callable[[Any], object]:
    """
    What runs a model on a batch, on the model's device.

    Raises:
        TypeError: when it is called with a batch that is no mapping.
    """
    device = device_of(model)

    def call(batch: Any) -> object:
        if not isinstance(batch, Mapping):
            raise TypeError(
                "A batch must be a mapping from the model's arguments to tensors, as a data collator of transformers "
                f"gives: got {shown(batch)}."
            )
        return model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})

    return call


def of_all_processes(
    moments: Mapping[str, Tensor], sizes: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """
    The sums of second moments over the processes.

    Args:
        moments: by name `(size, size)` in float64, as far as this process has some.
        sizes: of all of them, by name.
        device: for which the processes have a backend.

    Returns:
        By name those that are not zero.
    """
    # A process may have seen a layer that another has not: all of them have to send the same tensors.
    empty = {name: torch.zeros(size, size, dtype=torch.float64, device=device) for name, size in sizes.items()}
    sums = sum_of_processes([moments.get(name, empty[name]).to(device) for name in sizes])
    return {name: total for name, total in zip(sizes, sums, strict=True) if total.any()}


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; modes and random numbers are those from before when it is left."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            model.eval()
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes.items():
            module.training = training
        if is_distributed():
            reshard(model)
