"""Whether a compacted checkpoint's files, its `config.json` and the model that is loaded from them belong together."""

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from accelerate.utils import find_tied_parameters
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..layers.dense import kept_dense_rank
from ..layers.low_rank import STANDS_FOR_WEIGHT, LowRankLinear
from ..layers.quantized import is_quantized

# Numbers that a model may hold beside those of a small checkpoint: positions, rotary tables, a new head.
LARGEST_ADDITION = 2**24


class SavedTensor(NamedTuple):
    """What the header of a safetensors file tells of a tensor: `dtype` as in `"F32"`, and `shape`."""

    dtype: str
    shape: tuple[int, ...]


SavedTensors: TypeAlias = dict[str, SavedTensor]


def read_headers(files: Sequence[str]) -> SavedTensors:
    """
    All tensors of a checkpoint by name; the numbers are not read.

    Raises:
        ValueError: a file is damaged, missing or no safetensors file. Such a file is not opened.
    """
    headers: SavedTensors = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(
                f"{file} is no safetensors file, as all files of a compacted checkpoint are: it was not opened, since "
                "other formats can run code. Take the weights from where the checkpoint was made."
            )
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    header = tensors.get_slice(key)
                    headers[key] = SavedTensor(header.get_dtype(), tuple(header.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged: {error}. Copy or download it again.") from error
    return headers


def find_layers(model: PreTrainedModel, listed: Sequence[str], headers: SavedTensors) -> dict[str, str]:
    """
    The names that the layers listed in `config.json` have in a model, which may have another head than the saved one.

    Args:
        model: dense.
        listed: the names in `config.json`.
        headers: of the checkpoint.

    Returns:
        From each listed name to the one in the model, without the layers of a head that the model does not have.

    Raises:
        ValueError: a layer is listed twice, is tied to another, or is missing where it cannot be.
    """
    linear = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (nn.Linear, Conv1D))
    }
    # transformers 5 ties weights after they are loaded, transformers 4 has done it by now.
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied = {*ties, *ties.values()}.union(*find_tied_parameters(model))
    names: dict[str, str] = {}
    taken: set[nn.Module] = set()
    for saved in listed:
        name = next((name for name in _variants(model, saved) if name in linear), None)
        if name is None:
            continue
        if linear[name] in taken:
            raise ValueError(
                f"config.json is damaged: it lists the layer {saved:.200} twice. Copy or download it again."
            )
        if f"{name}.weight" in tied:
            raise ValueError(
                f"config.json is damaged: it lists the layer {saved:.200}, whose weight is tied to another and never "
                "compressed. Copy or download it again."
            )
        taken.add(linear[name])
        names[saved] = name
    # Files may have other names than the model; where all layers are found by name, a layer without tensors has none.
    by_name = bool(headers) and all(f"{saved}.weight" in headers for saved in names)
    for saved in listed:
        if saved in names:
            continue
        in_file = any(key.startswith(f"{saved}.") for key in headers)
        if not _may_be_of_another_head(model, saved) or (by_name and not in_file):
            raise ValueError(
                f"config.json lists the compressed layer {saved:.200}, which a {type(model).__name__} of this "
                "configuration does not have: load the checkpoint with the class that saved it, and with its own "
                "config.json."
            )
    return names


def check_before_loading(model: PreTrainedModel, headers: SavedTensors) -> None:
    """
    Compare a model, its low-rank layers in place, with the checkpoint that is to be loaded.

    Raises:
        ValueError: a layer is compressed in the file only, a tensor is of another type or size than in the model, or
            the model would hold more numbers beside those of the checkpoint than the checkpoint has.
    """
    held = sum(torch.Size(tensor.shape).numel() for tensor in headers.values())
    made = sum(buffer.numel() for buffer in model.buffers())
    made += sum(p.numel() for name, p in model.named_parameters() if _saved_tensor(model, name, headers) is None)
    if headers and made > max(held, LARGEST_ADDITION):
        raise ValueError(
            f"By config.json the model has {made} numbers beside the {held} of the checkpoint's tensors: config.json "
            "was edited, or is of another checkpoint. Copy the whole folder again."
        )
    for name, parameter in model.named_parameters():
        saved = _saved_tensor(model, name, headers)
        if saved is None:
            continue
        if saved.shape == STANDS_FOR_WEIGHT and parameter.ndim > 1:
            raise ValueError(
                f"{name} is compressed in the file, but config.json does not list its layer: config.json was edited, "
                "or is of another checkpoint. Copy the whole folder again."
            )
        if parameter.is_floating_point() and not saved.dtype.startswith(("F", "BF")):
            raise ValueError(f"{name} has the type {saved.dtype} in the file, which is damaged. Copy it again.")
        # A head may be replaced by one of another size, and conversions of transformers change shapes, but no sizes.
        if _inside_base(model, name) is not None and parameter.numel() != torch.Size(saved.shape).numel():
            raise ValueError(
                f"{name} is {saved.shape} in the file, but {tuple(parameter.shape)} by config.json: they are of "
                "different checkpoints, or config.json was edited. Copy the whole folder again."
            )


def check_loaded(model: PreTrainedModel, headers: SavedTensors, missing: set[str] | None = None) -> None:
    """
    Check a model that was loaded from a checkpoint. New parameters of a head that was not saved are allowed.

    Args:
        model: as `from_pretrained` returns it.
        headers: of the checkpoint.
        missing: the names of the parameters that were not loaded, where `transformers` does not mark those that were.

    Raises:
        ValueError: a parameter was not in the checkpoint, so that it was made at random, or has inf or nan.
    """
    new: list[str] = []
    present: set[str] = set()
    for name, parameter in model.named_parameters():
        # Offloaded parameters are elsewhere, and lose the mark by which transformers knows what it has loaded.
        offloaded = parameter.is_meta or hasattr(model.get_submodule(name.rpartition(".")[0]), "_hf_hook")
        loaded = getattr(parameter, "_is_hf_initialized", False) if missing is None else name not in missing
        if not offloaded and not loaded:
            new.append(name)
            continue
        present |= {_in_any_block(name), _part(model, name)}
        if not parameter.is_meta and not is_quantized(parameter) and not torch.isfinite(parameter).all():
            raise ValueError(
                f"{name} has inf or nan: the checkpoint is damaged, or of a training that diverged, or its numbers "
                f"exceed {parameter.dtype}."
            )
    for name in new:
        if _must_be_saved(model, name, present) and _saved_tensor(model, name, headers) is None:
            raise ValueError(
                f"The checkpoint has no weights for {name} of a {type(model).__name__}: it is incomplete, or its "
                "config.json was edited or is of another checkpoint. Copy the whole folder again."
            )


def _must_be_saved(model: PreTrainedModel, name: str, present: set[str]) -> bool:
    """Whether a parameter that was not loaded is none that another class, or an option, adds to the saved model."""
    if any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ()):
        return False
    layer, _, _ = name.rpartition(".")
    if isinstance(model.get_submodule(layer.rpartition(".")[0]), LowRankLinear):
        return True
    if kept_dense_rank(model.get_submodule(layer)) is not None:
        return True
    inside = _inside_base(model, name)
    if "." not in (inside or name):  # an embedding of masked frames, for one, comes with an option
        return False
    if _is_saved_class(model):
        return True
    in_any_block = _in_any_block(name)
    return inside is not None and (in_any_block if in_any_block != name else _part(model, name)) in present


def _in_any_block(name: str) -> str:
    """A name with stars for numbers: the same for all blocks of a stack."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _part(model: PreTrainedModel, name: str) -> str:
    """The part of the base model that holds a parameter, such as `"part embeddings"`."""
    return f"part {(_inside_base(model, name) or name).partition('.')[0]}"


def _inside_base(model: PreTrainedModel, name: str) -> str | None:
    """A name as the base model has it; none if it belongs to a head."""
    if model.base_model is model:
        return name
    prefix = f"{model.base_model_prefix}."
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def _is_saved_class(model: PreTrainedModel) -> bool:
    return type(model).__name__ in (model.config.architectures or ())


def _may_be_of_another_head(model: PreTrainedModel, saved: str) -> bool:
    prefix = f"{model.base_model_prefix}."
    children = dict(model.base_model.named_children())
    return not (_is_saved_class(model) or saved.startswith(prefix) or saved.partition(".")[0] in children)


def _variants(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """The names of one thing in models with and without a head."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def _saved_tensor(model: PreTrainedModel, name: str, headers: SavedTensors) -> SavedTensor | None:
    return next((headers[key] for key in _variants(model, name) if key in headers), None)
