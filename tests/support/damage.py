"""Ways to damage or edit a compacted checkpoint, and what to look at afterwards."""

import hashlib
import json
import pickle
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import rankdyna_trainer
from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups

# A layer of rank 3; the tiny BERT's first layer has rank 0.
KEY = "bert.encoder.layer.0.attention.self.key"
TRANSFORMERS_4 = transformers.__version__.startswith("4.")
# transformers 4 opens a single weight file before our code is asked: its error is the reader's own.
REFUSED_BY_READER = (SafetensorError,) if TRANSFORMERS_4 else ()
# What transformers says of a tensor of another size.
MISMATCHED = "size mismatch" if TRANSFORMERS_4 else "You set `ignore_mismatched_sizes` to `False`"
Damage = Callable[[Path], object]


class Case(NamedTuple):
    """What is done to the folder of a checkpoint before it is loaded, and what the ValueError must say."""

    kind: str
    name: str
    damage: Damage
    message: str
    options: dict[str, Any] = {}  # noqa: RUF012
    load: Any = AutoModelForSequenceClassification

    def __str__(self) -> str:
        return f"{self.kind}-{self.name:.60}"


def compacted(model: nn.Module) -> nn.Module:
    """Compacted to ranks of every kind: 0, low, and so high that the layer stays dense."""
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5))
    layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
    for i, layer in enumerate(layers):
        rank = [0, 3, 5, layer.full_rank][i % 4]
        layer.set_remaining(torch.arange(layer.width) < rank)
    return compact(model).eval()


def raised_by(error: BaseException) -> str:
    """The package of the code that raised an error, if it is ours, or the folder."""
    file, package = (
        Path(traceback.extract_tb(error.__traceback__)[-1].filename),
        Path(rankdyna_trainer.__file__).parent,
    )
    return package.name if file.is_relative_to(package) else file.parent.name


def fingerprint(folder: Path) -> dict[str, str]:
    """All files of a folder, by what they hold."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def edited_config(edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def config(**values: object) -> Damage:
    return edited_config(lambda config: config.update(values))


def record(**values: object) -> Damage:
    """What config.json says of the format."""
    return edited_config(lambda config: config["rankdyna"].update(values))


def rank(name: str, rank: object) -> Damage:
    return edited_config(lambda config: config["rankdyna"]["ranks"].update({name: rank}))


def edited_tensors(edit: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})

    return damage


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return edited_tensors(lambda tensors: tensors.update({name: change(tensors[name])}))


def without(start: str) -> Damage:
    def remove(tensors: dict[str, Tensor]) -> None:
        found = [name for name in tensors if name.startswith(start)]
        assert found
        for name in found:
            del tensors[name]

    return edited_tensors(remove)


def first(value: float) -> Callable[[Tensor], Tensor]:
    """Another first number."""
    return lambda tensor: tensor.flatten().index_fill(0, torch.tensor([0]), value).reshape(tensor.shape)


def edited_file(edit: Callable[[bytes], bytes], pattern: str = "model.safetensors") -> Damage:
    def damage(folder: Path) -> None:
        file = sorted(folder.glob(pattern))[0]
        file.write_bytes(edit(file.read_bytes()))

    return damage


def truncated(part: float, pattern: str = "model.safetensors") -> Damage:
    return edited_file(lambda data: data[: int(part * len(data))], pattern)


def flipped(offset: int) -> Damage:
    return edited_file(lambda data: data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])


def sharded(then: Damage) -> Damage:
    def damage(folder: Path) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        then(folder)

    return damage


def edited_index(edit: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


class Trap:
    """Unpickled, it writes a file beside the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.file = folder.parent / "opened"

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.file, "opened")


def pickled(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes(pickle.dumps({KEY: Trap(folder)}))


def all_of(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def removed(pattern: str) -> Damage:
    return lambda folder: sorted(folder.glob(pattern))[0].unlink()


def swapped(one: str, other: str) -> Damage:
    return edited_tensors(lambda tensors: tensors.update({one: tensors[other], other: tensors[one]}))


def renamed(old: str, new: str) -> Damage:
    return edited_tensors(lambda tensors: tensors.update({new: tensors.pop(old)}))


def unlisted(part: str) -> Damage:
    def remove(config: dict[str, Any]) -> None:
        for layers in (config["rankdyna"]["ranks"], config["rankdyna"]["dense"]):
            for name in [name for name in layers if part in name]:
                del layers[name]

    return edited_config(remove)


no_ranks = edited_config(lambda config: config["rankdyna"].pop("ranks"))
to_int = partial(Tensor.to, dtype=torch.int32)
