"""
How far the outputs of factored layers are from those of the dense ones, on rows that were not used to factor them:
after SVD, FWSVD and SVD in the metric of the inputs, at equal ranks. First of random layers, then of those of a model.

    python scripts/checks/output_errors.py --model_name_or_path MODEL --train_file train.jsonl --param_ratio 0.15

The model is a fine-tuned classifier of sentences, and the file has the columns `sentence` and `label`. The table has
the mean over the layers of `E |W x - P Q x|^2 / E |W x|^2`, and in how many layers each method has the least.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from datasets import load_dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from rankdyna_trainer import LowRankLinear, RankDynaConfig
from rankdyna_trainer.baselines import fwsvd, svd, whitened_svd
from rankdyna_trainer.layers.input_moments import input_moments
from rankdyna_trainer.layers.targets import find_targets

ROWS, BATCH, LAYERS = 512, 32, 20


class Layer(nn.Module):
    """A layer in a block of its own, with a loss, whose outputs are not equally certain."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(in_features, out_features))])

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`x (rows, in_features)`, `labels (rows, out_features)` -> `logits` and the mean squared error as `loss`."""
        logits = self.blocks[0](x)
        return {"logits": logits, "loss": (logits - labels).square().mean()}


def random_layer(seed: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A layer of a random size, and rows which lie mostly in a few directions."""
    torch.manual_seed(seed)
    out_features, in_features = (int(size) for size in torch.randint(48, 256, (2,)))
    model = Layer(out_features, in_features)
    mixing = torch.logspace(0, -2, in_features)[:, None] * torch.randn(in_features, in_features)
    batches = []
    for _ in range(2 * ROWS // BATCH):
        x = torch.randn(BATCH, in_features) @ mixing
        noise = torch.logspace(0, -1, out_features) * torch.randn(BATCH, out_features)
        batches.append({"x": x, "labels": model.blocks[0](x).detach() + noise})
    return model, batches


def errors(model: Any, batches: Sequence[Any], ratio: float) -> pd.DataFrame:
    """A row for each target layer, a column for each method: half of the batches factors, the other half measures."""
    known, unseen = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    config = RankDynaConfig(param_ratio=ratio)
    methods: dict[str, Callable[[nn.Module, RankDynaConfig], nn.Module]] = {
        "SVD": svd,
        "FWSVD": partial(fwsvd, dataloader=known),
        "whitened": partial(whitened_svd, dataloader=known),
    }
    layers: dict[str, Any] = dict(find_targets(model, config))
    moments = input_moments(model, layers, batches=unseen)
    found: dict[str, dict[str, float]] = {}
    for method, factor in methods.items():
        factored = factor(copy.deepcopy(model), config)
        for name, layer in layers.items():
            compressed: Any = factored.get_submodule(name)
            new = compressed.to_dense_weight() if isinstance(compressed, LowRankLinear) else compressed.weight
            missing, weight = (w.detach().double() for w in (layer.weight - new, layer.weight))
            c = moments[name].double()
            found.setdefault(method, {})[name] = float(((missing @ c) * missing).sum() / ((weight @ c) * weight).sum())
    return pd.DataFrame(found)


def rows_of(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Batches of twice as many rows as are needed."""
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    rows = load_dataset("json", data_files=options.train_file, split="train").select(range(2 * ROWS))
    rows = rows.map(lambda row: tokenizer(row["sentence"], truncation=True) | {"labels": row["label"]})
    rows = rows.select_columns(["input_ids", "attention_mask", "labels"])
    return list(DataLoader(rows, batch_size=BATCH, collate_fn=DataCollatorWithPadding(tokenizer)))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--param_ratio", type=float, default=0.15)
    options = parser.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(options.model_name_or_path).eval()
    tables = {
        f"{LAYERS} random layers": pd.concat([errors(*random_layer(i), options.param_ratio) for i in range(LAYERS)]),
        "the model": errors(model, rows_of(options), options.param_ratio),
    }
    for name, table in tables.items():
        print(f"{name}, {len(table)} layers, {options.param_ratio} of the parameters")
        lowest = table.idxmin(axis=1).value_counts().reindex(table.columns, fill_value=0)
        print(pd.DataFrame({"error": table.mean(), "least in": lowest}).to_string(float_format="{:.4f}".format), "\n")


if __name__ == "__main__":
    main()
