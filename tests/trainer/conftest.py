import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, SingularGroupLinear, rank_report

MakeTrainer = Callable[..., Trainer]
TrainOnce = Callable[..., Path]
Row = dict[str, torch.Tensor]
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def train_once(trained_folder: Path, tmp_path: Path) -> TrainOnce:
    """
    Gives `tmp_path/folder` as a training leaves it, which only the first test of a module does that asks for it: the
    others have a copy, that they may change as well.
    """

    def train(training: Callable[[], object], folder: str = "run", **of: object) -> Path:
        kept = trained_folder / "-".join([folder, *(f"{name}={value}" for name, value in of.items())])
        if kept.exists():
            return shutil.copytree(kept, tmp_path / folder, dirs_exist_ok=True)
        training()
        shutil.copytree(tmp_path / folder, kept)
        return tmp_path / folder

    return train


@pytest.fixture
def check_compressed(tmp_path: Path) -> Callable[..., None]:
    """Checks that a finished run met a `rank_ratio` of 0.2, and that its folder loads as the trained model."""

    def check(trainer: Trainer, inputs: Row) -> None:
        model = trainer.model
        assert not any(isinstance(module, SingularGroupLinear) for module in model.modules())
        report = rank_report(model)
        groups = int(report[["out_features", "in_features"]].min(axis=1).sum())
        assert report["rank"].sum() == math.ceil(0.2 * groups) > 0
        loaded = type(model).from_pretrained(tmp_path / "output", dtype=model.dtype)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)

    return check


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def make_scored(make_trainer: MakeTrainer, rows: list[dict[str, torch.Tensor]]) -> MakeTrainer:
    """A Trainer that compresses, and computes the accuracy on data that is from the Hub."""
    data = Dataset.from_list([{name: tensor.tolist() for name, tensor in row.items()} for row in rows])
    data.info.download_checksums = {"hf://datasets/stanfordnlp/sst2@8d51e7e/data/train.parquet": {}}

    def make(model: nn.Module | None, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
        extra = {"compute_metrics": accuracy, "train_dataset": data, "eval_dataset": data}
        return make_trainer(
            model,
            arguments.pop("callback", None) or RankDynaCallback(CONFIG),
            *callbacks,
            trainer_arguments=extra | arguments.pop("more", {}),
            **arguments,
        )

    return make
