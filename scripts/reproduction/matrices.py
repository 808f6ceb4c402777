"""Which of a model's layers is W_q, W_k, W_v, W_o, W_f1 or W_f2, and of which block."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.layers.architecture import block_prefixes
from rankdyna_trainer.layers.targets import find_targets

# By the paper's name of a matrix type, how its layers' names end, as in BERT and its relatives. Of several endings
# that fit a name, the longest counts: `attention.output.dense` is W_o, although it ends with `output.dense` too.
MATRIX_ENDINGS: Mapping[str, tuple[str, ...]] = {
    "W_q": ("query",),
    "W_k": ("key",),
    "W_v": ("value",),
    "W_o": ("attention.output.dense",),
    "W_f1": ("intermediate.dense",),
    "W_f2": ("output.dense",),
}


class Matrix(NamedTuple):
    """A target layer: its name, the block that it is in, and its type, a key of [`MATRIX_ENDINGS`]."""

    name: str
    block: str
    type: str


def matrices_of(
    model: nn.Module, config: RankDynaConfig, endings: Mapping[str, tuple[str, ...]] = MATRIX_ENDINGS
) -> list[Matrix]:
    """
    The target layers of a dense model which are of one of the types, in the model's order.

    Raises:
        ValueError: there is none of some type.
    """
    names = list(find_targets(model, config))
    found = []
    for prefix in block_prefixes(model):
        for name in (name for name in names if name.startswith(prefix)):
            number, _, inside = name.removeprefix(prefix).partition(".")
            pairs = [(end, kind) for kind in endings for end in endings[kind]]
            fitting = [(len(end), kind) for end, kind in pairs if f".{inside}".endswith(f".{end}")]
            if fitting:
                found.append(Matrix(name, f"{prefix}{number}", max(fitting)[1]))
    if missing := set(endings) - {matrix.type for matrix in found}:
        raise ValueError(
            f"No layer is of type {', '.join(sorted(missing))}: give endings for the names of this model's layers, "
            f"which are {', '.join(names)}."
        )
    return found
