"""Who reads the weight of a compressed layer instead of calling the layer: told from the error that it causes."""

import linecache
from collections.abc import Iterator
from types import FrameType

from torch import Tensor, nn

from .low_rank import CompressedLayer


def advice_on_read(model: nn.Module, error: BaseException) -> str | None:
    """
    What to do about an error that comes from what stands for the weight of a compressed layer.

    Args:
        model: that holds the layer.
        error: with the frames in which it was raised.

    Returns:
        A sentence that names the layer, the code that reads its weight, and `exclude_modules`; `None` if the error is
        of another kind.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, CompressedLayer)}
    for frame, number in _frames(error):
        if isinstance(frame.f_locals.get("self"), CompressedLayer):
            return None  # called as it should be
        if layers := [layer for layer in _read_layers(frame, number) if layer in names]:
            read = " or ".join(dict.fromkeys(names[layer] for layer in layers))
            return (
                f"{read} is compressed, but its weight, which is two zeros then, is read by {frame.f_code.co_name} in "
                f"{frame.f_code.co_filename}, line {number}, instead of the layer being called: name the layer in "
                "exclude_modules."
            )
    return None


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames outside of torch, from the one that raised the error outwards."""
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        if not str(traceback.tb_frame.f_globals.get("__name__", "")).startswith("torch."):
            frames.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return reversed(frames)


def _read_layers(frame: FrameType, number: int) -> Iterator[CompressedLayer]:
    """
    The layers of which a frame holds the weight, or which it names in the line that failed; if there is none, and its
    code speaks of weights, the layers that it holds.
    """
    values = [*frame.f_locals.values()]
    line = linecache.getline(frame.f_code.co_filename, number)
    found = False
    held = {id(value) for value in values if isinstance(value, Tensor)}
    named = [(name, value) for name, value in frame.f_locals.items() if isinstance(value, CompressedLayer)]
    children = [
        child for value in values if isinstance(value, nn.Module) for child in value.named_modules() if child[0]
    ]
    for name, module in [*named, *children]:
        if isinstance(module, CompressedLayer) and (id(module.weight) in held or f"{name}.weight" in line):
            found = True
            yield module
    if not found and "weight" in {*frame.f_code.co_names, *frame.f_code.co_consts}:
        yield from (layer for _, layer in named)
