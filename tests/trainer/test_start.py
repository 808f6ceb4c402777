"""A run that begins with the groups that `start_ratio` has room for, in a real Trainer."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import layers_of
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, inject_singular_groups, rank_report
from rankdyna_trainer.checkpoint.run_state import read_run_state

MakeTrainer = Callable[..., Trainer]
WHEN: dict[str, Any] = {"rank_warmup_steps": 6, "rank_cooldown_steps": 6}  # of 20 steps; factored after the third
SIZES = [0.6, 0.3]
CONFIG = RankDynaConfig(param_ratio=SIZES, start_ratio=0.7, **WHEN)


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["activations", pytest.param("weights", marks=pytest.mark.long)])
def test_resume_is_exact_and_each_size_is_a_part_of_the_dense_model(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path, basis: str
) -> None:
    def run(folder: str, resume: bool = False) -> Trainer:
        torch.manual_seed(0)
        config = RankDynaConfig(**CONFIG.to_dict() | {"group_basis": basis})
        trainer = make_trainer(
            copy.deepcopy(tiny_bert),
            RankDynaCallback(config),
            output_dir=str(tmp_path / folder),
            save_strategy="steps",
            save_steps=1,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    for place, ratio in (("whole", SIZES[1]), (f"whole/param_ratio-{SIZES[0]:g}", SIZES[0])):
        report = rank_report(AutoModelForSequenceClassification.from_pretrained(tmp_path / place))
        assert 0.95 * ratio < report["parameters"].sum() / report["dense_parameters"].sum() <= ratio
    state = read_run_state(tmp_path / "whole")
    assert state.config is not None and state.config.start_ratio == 0.7
    report = rank_report(whole.model)
    rooms = 0.7 * report["dense_parameters"] // (report["out_features"] + report["in_features"] + 1)
    assert state.initial_ranks == rooms.astype(int).tolist()
    kept = [entry["kept"] for entry in whole.state.log_history if "kept" in entry]
    assert kept[:2] == ([1.0, 1.0] if basis == "activations" else [kept[3]] * 2) and 0.6 < kept[3] <= 0.7
    for stop in (2, 3, 4, 8, 15):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "resumed" / f"checkpoint-{stop}")
        resumed = run("resumed", resume=True)
        assert equal_weights(whole.model, resumed.model), stop
        last = Path("checkpoint-20", "model.safetensors")
        assert (tmp_path / "whole" / last).read_bytes() == (tmp_path / "resumed" / last).read_bytes()
        shutil.rmtree(tmp_path / "resumed")


def test_what_a_run_shows(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), log_level="info")
    trainer.train()
    shape = rank_report(trainer.model)
    size = shape["out_features"] + shape["in_features"]
    begins = int((0.7 * shape["dense_parameters"] // (size + 1) * size).sum())
    dense = int(shape["dense_parameters"].sum())
    shown = capsys.readouterr().out
    assert f"start_ratio=0.7: the groups begin with {begins:,} parameters of the target layers" in shown
    row = next(line for line in shown.splitlines() if line.startswith("parameters of the target layers"))
    assert row.split()[5:] == [f"{dense:,}", f"{int(0.3 * dense):,}", "0.3"]
    assert json.loads((tmp_path / "output" / "trainer_state.json").read_text())["stateful_callbacks"]["RankDyna"][
        "start_ratio"
    ] == pytest.approx(0.7)


def test_a_run_of_another_start_is_not_resumed(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5, "output_dir": str(tmp_path / "run")}
    make_trainer(copy.deepcopy(tiny_bert), RankDynaCallback(CONFIG), **saving).train()
    other = make_trainer(tiny_bert, RankDynaCallback(RankDynaConfig(param_ratio=SIZES, **WHEN)), **saving)
    with pytest.raises(ValueError, match=r"another run.*start_ratio was 0\.7 and is None"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))


def test_what_cannot_be_is_refused_by_the_constructor(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    with pytest.raises(ValueError, match=r"start_ratio=1\.0 begins with .* fewer than the .* rank_ratio=0\.9 keeps"):
        make_trainer(tiny_bert, RankDynaCallback(RankDynaConfig(rank_ratio=0.9, start_ratio=1.0)))
    assert not layers_of(tiny_bert)


def test_a_model_that_was_injected_whole_is_refused(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    model = inject_singular_groups(tiny_bert, RankDynaConfig(param_ratio=0.3))
    with pytest.raises(ValueError, match=r"has 384 singular groups, more than start_ratio=0\.7 begins with \(\d+\)"):
        make_trainer(model, RankDynaCallback(CONFIG)).train()
