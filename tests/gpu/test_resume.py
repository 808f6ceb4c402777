"""A run that was stopped and resumed on a card ends as if it had never been stopped, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.on_gpu import largest_difference, ranks_of
from transformers import BertConfig, BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

MakeTrainer = Callable[..., Trainer]
# Of 20 steps. By default: before and after the layers are factored, and while groups are removed.
STOPS = (4, 8, 12)
CONFIGS = {
    "default": RankDynaConfig(rank_ratio=0.2),
    "weights": RankDynaConfig(rank_ratio=0.2, group_basis="weights", rank_warmup_steps=6, rank_cooldown_steps=6),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_resume_is_exact(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path, config: str
) -> None:
    """With dropout, whose random numbers are those of the device."""

    def run(folder: str, checkpoint: int | None = None) -> Any:
        torch.manual_seed(1)
        model = BertForSequenceClassification(BertConfig(**tiny_bert.config.to_dict()))
        trainer = make_trainer(
            model,
            RankDynaCallback(CONFIGS[config]),
            output_dir=str(tmp_path / folder),
            save_strategy="steps",
            save_steps=4,
        )
        path = str(tmp_path / "whole" / f"checkpoint-{checkpoint}")
        trainer.train(resume_from_checkpoint=path if checkpoint else None)
        return trainer.model

    whole = run("whole")
    differences = {}
    for stop in STOPS:
        resumed = run(f"resumed-{stop}", stop)
        assert ranks_of(resumed) == ranks_of(whole), f"resumed from step {stop}"
        differences[stop] = largest_difference(resumed.state_dict(), whole.state_dict())
        equal = all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
        assert equal == (differences[stop] == 0)
    if any(differences.values()):
        again = largest_difference(run("again").state_dict(), whole.state_dict())
        pytest.fail(f"by the step of the stop the weights differ by {differences}; two whole runs differ by {again}")
