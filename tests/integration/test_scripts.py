"""The scripts, run as a user runs them."""

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.training_runs import SequentialTrainer
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


families = script("families")


@pytest.fixture(scope="module")
def compressed_families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], bool]]:
    """For each family its row of the table, and whether one new process reloaded it with the same logits."""
    folders = {name: tmp_path_factory.mktemp(name) for name in families.FAMILIES}
    compressed = {name: families.compress(name, folder) for name, folder in folders.items()}
    reloaded = families.reload(list(folders.values()))
    return {
        name: (row, torch.equal(after, logits))
        for (name, (row, after)), logits in zip(compressed.items(), reloaded, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.long
def test_every_family_is_compressed_and_reloaded(
    family: str, compressed_families: dict[str, tuple[dict[str, Any], bool]]
) -> None:
    row, equal = compressed_families[family]
    assert float(row["injected"]) < 1e-5
    assert row["kept"] == -(-row["groups"] // 10)
    assert equal


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_custom_loop_reaches_the_ranks_of_the_trainer(
    scope: str,
    make_trainer: Callable[..., Trainer],
    still_bert: BertForSequenceClassification,
    rows: list[dict[str, torch.Tensor]],
) -> None:
    config = RankDynaConfig(rank_ratio=0.2, rank_scope=scope)
    custom = copy.deepcopy(still_bert)
    trainer = make_trainer(
        still_bert,
        RankDynaCallback(config),
        trainer_class=SequentialTrainer,
        max_steps=24,
        lr_scheduler_type="constant",
    )
    trainer.train()
    script("custom_loop").train(custom, config, DataLoader(rows, batch_size=8), learning_rate=1e-3, epochs=3)
    assert rank_report(custom).equals(rank_report(trainer.model))
