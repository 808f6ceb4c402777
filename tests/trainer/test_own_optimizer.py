"""An optimizer that the user made for the dense model, in a run whose layers are dense at first."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

MakeTrainer = Callable[..., Trainer]
LEARNING = 3  # steps until the layers are factored, of a warm-up of 6
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=6, rank_cooldown_steps=6)


def test_it_is_resumed_exactly(
    make_trainer: MakeTrainer, still_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    def run(folder: Path) -> Trainer:
        model = copy.deepcopy(still_bert)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        extra = {"optimizers": (optimizer, None)}
        settings = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1, "trainer_arguments": extra}
        return make_trainer(model, RankDynaCallback(CONFIG), **settings)

    whole = run(tmp_path / "whole")
    whole.train()
    for stop in (LEARNING - 1, LEARNING, LEARNING + 4, 15):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / f"from{stop}" / f"checkpoint-{stop}")
        resumed = run(tmp_path / f"from{stop}")
        resumed.train(resume_from_checkpoint=True)
        expected, found = whole.model.state_dict(), resumed.model.state_dict()
        assert found.keys() == expected.keys(), stop
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), stop
