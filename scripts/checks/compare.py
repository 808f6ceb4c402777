"""
Whether two runs ended alike: their ranks, their scores, their weights.

    python scripts/checks/compare.py ONE_OUTPUT_DIR OTHER_OUTPUT_DIR

Scores are those of the last checkpoint of each run, of the groups that remain there; without one they are left out.
"""

import argparse
import json
import re
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor


def ranks(folder: Path) -> dict[str, int]:
    """The rank of each compressed layer of a compacted model."""
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))["rankdyna"]
    return {**record["ranks"], **record["dense"]}


def scores(folder: Path) -> dict[str, Tensor]:
    """The smoothed scores of the remaining groups of each layer, best first."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    if not checkpoints:
        return {}
    tensors = load_file(checkpoints[-1] / "model.safetensors")
    names = [key.removesuffix(".importance") for key in tensors if key.endswith(".importance")]
    return {name: tensors[f"{name}.importance"][tensors[f"{name}.remaining"]] for name in names}


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors, with `P Q` for each pair of P and Q, which stand for the same weight in any order of the groups."""
    tensors = load_file(folder / "model.safetensors")
    for name in [key.removesuffix(".p.weight") for key in tensors if key.endswith(".p.weight")]:
        tensors[f"{name}.weight"] = tensors.pop(f"{name}.p.weight") @ tensors.pop(f"{name}.q.weight")
    return tensors


def row(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference over all tensors that have the same shape in both."""
    names = [name for name in one if name in other and one[name].shape == other[name].shape and one[name].numel()]
    if not names:
        return {"compared": 0}
    differences = [float((one[name] - other[name]).abs().max()) for name in names]
    largest = max(float(torch.as_tensor(one[name]).abs().max()) for name in names)
    return {"compared": len(names), "of": len(one), "max |difference|": max(differences), "max |value|": largest}


def compare(one: Path, other: Path) -> pd.DataFrame:
    """A row for the ranks, the scores and the weights."""
    first, second = ranks(one), ranks(other)
    apart = [abs(rank - second[name]) for name, rank in first.items() if name in second]
    rank_row = {
        "compared": len(apart),
        "of": len(first),
        "max |difference|": max(apart),
        "max |value|": max(first.values()),
    }
    rows = {"ranks": rank_row, "scores": row(scores(one), scores(other)), "weights": row(weights(one), weights(other))}
    return pd.DataFrame.from_dict(rows, orient="index")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    arguments = parser.parse_args()
    print(compare(arguments.one, arguments.other).to_string(float_format="%.3g"))
