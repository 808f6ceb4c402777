"""A checkpoint whose files are of different steps, runs or models is refused in our words before the first step."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, Trainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

MakeRun = Callable[..., Trainer]
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "trainer_state.json"
RECORD = "rankdyna_step.json"
CONFIG = RankDynaConfig(rank_ratio=0.3, rank_warmup_steps=2, rank_cooldown_steps=4)
SGD = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05})}


def bert(**changed: int) -> BertForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 32}
    return BertForSequenceClassification(BertConfig(**(sizes | changed)))


@pytest.fixture
def make_run(make_trainer: Callable[..., Trainer], tmp_path: Path) -> MakeRun:
    """A run without momentum of ten steps in a folder of its own, with checkpoints at steps 3, 6 and 9."""

    def make(folder: str, model: Any = None, settings: dict[str, Any] = SGD, **arguments: Any) -> Trainer:
        saved = {"save_strategy": "steps", "save_steps": 3, "max_steps": 10, "output_dir": str(tmp_path / folder)}
        torch.manual_seed(0)
        return make_trainer(
            model or bert(), RankDynaCallback(CONFIG), trainer_arguments=dict(settings), **(saved | arguments)
        )

    return make


@pytest.fixture
def run(make_run: MakeRun, train_once: Callable[..., Path]) -> Path:
    return train_once(lambda: make_run("run").train())


def refused(make_run: MakeRun, checkpoint: Path, said: str, **arguments: Any) -> None:
    again = make_run("again", **arguments)
    with pytest.raises(ValueError, match=said):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert again.optimizer is None or not again.optimizer.state  # nothing of it was loaded


def test_files_of_another_step(make_run: MakeRun, run: Path, tmp_path: Path) -> None:
    names = {WEIGHTS: "the weights"}
    for other in ("checkpoint-3", "checkpoint-9"):
        for name in (WEIGHTS, OPTIMIZER, "scheduler.pt", "rng_state.pth", STATE):
            mixed = Path(shutil.copytree(run / "checkpoint-6", tmp_path / f"{other}-{name}" / "checkpoint-6"))
            shutil.copy(run / other / name, mixed / name)
            if name == OPTIMIZER and (mixed / name).read_bytes() == (run / "checkpoint-6" / name).read_bytes():
                continue  # without momentum the state of two steps may be the same
            refused(
                make_run, mixed, rf"files of different steps, or damaged ones: {names.get(name, name)} as .*step 6"
            )
    make_run("again").train(resume_from_checkpoint=str(run / "checkpoint-6"))
    ends = [load_file(folder / WEIGHTS) for folder in (run, tmp_path / "again")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("change", ["truncated", "of another class", "of another run"])
def test_another_state_of_the_optimizer(make_run: MakeRun, run: Path, change: str) -> None:
    checkpoint = run / "checkpoint-6"
    if change == "truncated":
        (checkpoint / OPTIMIZER).write_bytes((checkpoint / OPTIMIZER).read_bytes()[:200])
    elif change == "of another class":
        torch.save(torch.optim.AdamW(bert().parameters()).state_dict(), checkpoint / OPTIMIZER)
    else:
        make_run("other", settings={}).train()
        shutil.copy(run.parent / "other" / "checkpoint-6" / OPTIMIZER, checkpoint)
    refused(make_run, checkpoint, r"files of different steps, or damaged ones: optimizer\.pt as")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_size": 32}, r"of another shape there \(bert\.embeddings\.LayerNorm"),
        ({"intermediate_size": 64}, r"of another shape there \(bert\.encoder\.layer\.0\.intermediate"),
        ({"num_hidden_layers": 1}, r"in layers that this model lacks \(bert\.encoder\.layer\.1"),
        ({"num_hidden_layers": 3}, r"in layers that the checkpoint lacks \(bert\.encoder\.layer\.2"),
        ({"vocab_size": 128}, r"1 of another shape there \(bert\.embeddings\.word_embeddings\.weight"),
        ({"num_labels": 5}, r"2 of another shape there \(classifier\.bias"),
    ],
)
@pytest.mark.parametrize("stop", [1, 6])
def test_a_model_of_another_size(
    make_run: MakeRun, train_once: Callable[..., Path], changed: dict[str, int], said: str, stop: int
) -> None:
    run = train_once(lambda: make_run("run", save_steps=stop).train(), save_steps=stop)
    refused(make_run, run / f"checkpoint-{stop}", f"other sizes or layers.*{said}", model=bert(**changed))


def test_a_record_that_is_damaged_missing_or_of_more_processes(
    make_run: MakeRun, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = run / "checkpoint-6" / RECORD
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"processes": 4}))
    refused(make_run, record.parent, "by a run of 4 processes, and has no random numbers for 1")
    for damaged in ("{", "[]", "3", '{"step": null}'):
        record.write_text(damaged)
        refused(make_run, record.parent, r"rankdyna_step\.json is damaged")
    record.write_text(json.dumps(content | {"files": content["files"] | {"scaler.pt": "0"}}))
    refused(make_run, record.parent, r"is incomplete, .*it lacks scaler\.pt")
    record.unlink()
    make_run("again").train(resume_from_checkpoint=str(record.parent))
    assert "has no rankdyna_step.json" in caplog.text


def test_weights_that_are_saved_anew_are_the_same(make_run: MakeRun, run: Path) -> None:
    """In other files, or with other metadata, they may be."""
    file = run / "checkpoint-6" / WEIGHTS
    save_file(load_file(file), file, {"format": "pt"})
    make_run("again").train(resume_from_checkpoint=str(file.parent))
