"""Checkpoints of a running compression, as a `Trainer` writes them, read without that `Trainer`."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..layers.architecture import module_places
from ..layers.dense import DenseLayer, dense_weight
from ..layers.low_rank import STANDS_FOR_WEIGHT, LowRankLinear
from ..layers.singular_group import SingularGroupLinear
from .empty_model import empty_model, newest_inside, read_config
from .integrity import SavedTensor, SavedTensors, read_headers

MARK = ".remaining"  # what a layer of singular groups has, and no other
WEIGHT = ".weight"
Q = ".q.weight"
NO_GROUPS = SavedTensor("F32", (0,))  # of a layer of rank 0
# Weights of a variant, in one file or by the index of several.
VARIANT = re.compile(r"(?:pytorch_)?model\.(?!safetensors|bin)([^.]+)(?<!-of-\d{5})\.(?:safetensors|bin)")
INDEX_OF_VARIANT = re.compile(r"(?:pytorch_)?model\.(?:safetensors|bin)\.index\.([^.]+)\.json")


def weight_files(directory: str | Path, variant: str | None = None) -> list[Path]:
    """
    The safetensors files of a saved model: one, or all that its index names.

    Args:
        directory: of the model.
        variant: as `from_pretrained` takes it: `"fp16"` stands for `model.fp16.safetensors`.

    Raises:
        FileNotFoundError: there is none, or one of the index is missing.
        ValueError: the index is damaged.
    """
    folder = Path(directory)
    whole, index = (folder / _of_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if not index.is_file():
        if not whole.is_file():
            raise FileNotFoundError(
                f"{folder} has no {whole.name}: it is no checkpoint in that format.{newest_inside(folder)}"
                f"{advice_on_variants(folder)}"
            )
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}. Copy or download it again.") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{folder} is incomplete: {', '.join(missing)} is missing. Copy it again.")
    return files


def _of_variant(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def advice_on_variants(folder: Path) -> str:
    """A sentence that names the variants of the weights that a folder has; empty if it has none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [pattern.fullmatch(name) for name in names for pattern in (VARIANT, INDEX_OF_VARIANT)]
    variants = sorted({match[1] for match in found if match is not None})
    if not variants:
        return ""
    return (
        f" It has the variant {' and the variant '.join(variants)}: give --variant {variants[0]} on the command line, "
        f'or variant="{variants[0]}" to from_pretrained in Python.'
    )


def is_training_checkpoint(headers: SavedTensors) -> bool:
    """Whether the tensors are those of a model with singular groups."""
    return any(key.endswith(MARK) for key in headers)


def outline_training_checkpoint(directory: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """
    The model of a training checkpoint without its weights: of the groups only which remain is read.

    Raises:
        ValueError: as [`load_training_checkpoint`].
    """
    files = weight_files(directory)
    model, _ = _outline(directory, read_headers([str(file) for file in files]), trust_remote_code)
    for name, remaining in _read(files, MARK).items():
        layer: Any = model.get_submodule(name.removesuffix(MARK))
        layer.set_remaining(remaining)
    return model


def load_training_checkpoint(directory: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """
    The model of a training checkpoint (`checkpoint-N` of a run with a [`RankDynaCallback`]), with its singular groups.

    [`compact`] cuts it off at the ranks that it has.

    Args:
        directory: with `config.json` and the weights, in one file or several.
        trust_remote_code: run the code that lies beside the model, if its configuration names some.

    Returns:
        The model in evaluation mode, on the CPU, in the precision of the checkpoint.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: the checkpoint has no singular groups; a file is damaged; its tensors are not exactly those of the
            model that `config.json` describes; a tensor has inf or nan.
    """
    files = weight_files(directory)
    model, same = _outline(directory, read_headers([str(file) for file in files]), trust_remote_code)
    tensors = _read(files)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has inf or nan: training diverged, or the checkpoint is damaged.")
    model.load_state_dict(tensors, strict=False, assign=True)
    for layer in model.modules():
        if isinstance(layer, LowRankLinear):
            layer.settle()
    for names in same:
        _share(model, names, next(name for name in names if name in tensors))
    if model.can_generate() and (Path(directory) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def _outline(
    directory: str | Path, headers: SavedTensors, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[list[str]]]:
    """The model with empty singular groups of the saved widths, and the names of each tensor that has several."""
    if not is_training_checkpoint(headers):
        raise ValueError(
            f"{directory} has no singular groups: it is no checkpoint of a running compression. compact takes a "
            "checkpoint-N folder that was written before the end of the run."
        )
    model = empty_model(read_config(directory, trust_remote_code), trust_remote_code)
    places = module_places(model)
    for key, header in headers.items():
        name, in_groups = key.removesuffix(MARK).removesuffix(WEIGHT), key.endswith(MARK)
        layer = _submodule(model, name)
        # One that was compacted before, and is no target of this run.
        low_rank = key.endswith(WEIGHT) and header.shape == STANDS_FOR_WEIGHT and f"{name}{MARK}" not in headers
        if not in_groups and not (low_rank and isinstance(layer, (nn.Linear, Conv1D))):
            continue
        if not isinstance(layer, (nn.Linear, Conv1D)):
            raise ValueError(
                f"The checkpoint has singular groups for {name:.200}, which is no linear layer of the "
                f"{type(model).__name__} that config.json describes: they are of different checkpoints."
            )
        if low_rank:
            header = headers.get(f"{name}{Q}", NO_GROUPS)
        compressed = (_in_groups if in_groups else _low_rank)(layer, header.shape[0] if header.shape else 0)
        for parent, attribute in places[layer]:
            setattr(parent, attribute, compressed)
    return model, _checked_names(model, headers)


def _in_groups(layer: DenseLayer, width: int) -> SingularGroupLinear:
    out_features, in_features = dense_weight(layer).shape
    like: Any = {"dtype": layer.weight.dtype, "device": "meta"}
    u, sigma, v = (torch.empty(width, *size, **like) for size in ((out_features,), (), (in_features,)))
    return SingularGroupLinear(u, sigma, v, layer.bias, type(layer))


def _low_rank(layer: DenseLayer, rank: int) -> LowRankLinear:
    out_features, in_features = dense_weight(layer).shape
    like: Any = {"dtype": layer.weight.dtype, "device": "meta", "original_class": type(layer)}
    return LowRankLinear(in_features, out_features, rank, layer.bias is not None, **like)


def _checked_names(model: PreTrainedModel, headers: SavedTensors) -> list[list[str]]:
    expected = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        names.setdefault(id(tensor), []).append(name)
    problems = {
        "missing": [group[0] for group in names.values() if not any(name in headers for name in group)],
        "unexpected": [name for name in headers if name not in expected],
        "of another shape": [
            name for name in headers if name in expected and headers[name].shape != tuple(expected[name].shape)
        ],
    }
    found = [f"{len(keys)} {what} ({keys[0]:.200}, ...)" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"The tensors are not those of the {type(model).__name__} that config.json describes: {'; '.join(found)}. "
            "The checkpoint is incomplete, or config.json is of another one: copy the whole folder again."
        )
    return [group for group in names.values() if len(group) > 1]


def _read(files: list[Path], ending: str = "") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not ending:
            tensors |= load_file(file)
            continue
        with safe_open(file, framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys() if key.endswith(ending)}  # noqa: SIM118
    return tensors


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _share(model: nn.Module, names: list[str], source: str) -> None:
    parent, _, attribute = source.rpartition(".")
    tensor = getattr(model.get_submodule(parent), attribute)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, tensor)
