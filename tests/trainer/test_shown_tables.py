"""What a run prints at its start and at its end."""

import re
from collections.abc import Callable

import pytest
from transformers import BertForSequenceClassification, Trainer
from transformers.utils import logging

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_start_and_end_are_shown_once(
    make_trainer: Callable[..., Trainer],
    tiny_bert: BertForSequenceClassification,
    capfd: pytest.CaptureFixture[str],
    disable_tqdm: bool,
) -> None:
    make_trainer(tiny_bert, RankDynaCallback(CONFIG), disable_tqdm=disable_tqdm).train()
    out, err = capfd.readouterr()
    lines = [line for line in out.splitlines() if line.strip()]
    assert sum(line.startswith("RankDyna compresses 12 layers") for line in lines) == 1
    assert any(line.startswith("Groups are removed from step 2 to step 12 of 20") for line in lines)
    sizes = [number for number, line in enumerate(lines) if line.startswith("parameters of the target layers")]
    assert len(sizes) == 2, "once before the first step, once after the last"
    assert lines[sizes[1] - 3].split() == ["before", "after", "kept"]
    assert 'BertForSequenceClassification.from_pretrained("' in out
    # On the bar, where it is not left out, at the last step.
    bars = [line for line in re.split("[\r\n]", err) if line.startswith("100%") and "20/20" in line]
    assert all("kept=" in bar for bar in bars) and bool(bars) is not disable_tqdm
    assert "Writing model shards: 0it" not in err, "the trial of the saving shows a progress bar"


def test_nothing_is_shown_to_who_wants_only_errors(
    make_trainer: Callable[..., Trainer], tiny_bert: BertForSequenceClassification, capfd: pytest.CaptureFixture[str]
) -> None:
    verbosity = logging.get_verbosity()
    try:
        make_trainer(tiny_bert, RankDynaCallback(CONFIG), log_level="error", disable_tqdm=True).train()
    finally:
        logging.set_verbosity(verbosity)  # which the Trainer sets for the whole process
    assert "RankDyna" not in (out := capfd.readouterr().out) and "target layers" not in out
