"""What a run uploads while it trains: never a model that loads wrong, never its token, and enough to go on with."""

import copy
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from support.damage import compacted
from support.hub_server import OWNER, READER, HubServer
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report

NAME = "alice/small"
CONFIG = RankDynaConfig(rank_ratio=0.2)
MakeRun = Callable[..., Trainer]


@pytest.fixture
def make_run(make_trainer: Callable[..., Trainer], still_bert: torch.nn.Module, tmp_path: Path) -> MakeRun:
    """A run of 12 steps that pushes each of its checkpoints, from the same model at each call."""

    def make(*callbacks: TrainerCallback, **arguments: Any) -> Trainer:
        defaults = {"push_to_hub": True, "hub_model_id": NAME, "hub_always_push": True}
        defaults |= {"save_strategy": "steps", "save_steps": 5, "max_steps": 12}
        return make_trainer(copy.deepcopy(still_bert), RankDynaCallback(CONFIG), *callbacks, **(defaults | arguments))

    return make


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs).logits


class Broken(Exception):
    pass


class BreakAt(TrainerCallback):
    """The machine of the run is gone after a step; what it was uploading is there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise Broken


def test_revisions_of_a_run(
    hub: HubServer,
    make_run: MakeRun,
    still_bert: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    # An earlier model, of which the client leaves the shards there.
    compacted(copy.deepcopy(still_bert)).push_to_hub(NAME, max_shard_size="20KB")
    trainer = make_run()
    trainer.train()
    revisions = hub.repository(NAME)
    pushed = dict(zip(revisions.titles, revisions.commits, strict=True))
    for step in (5, 10, 12):
        revision = pushed[f"Training in progress, step {step}"]
        files = hub.files(NAME, revision)
        for name in ("model.safetensors", "config.json"):
            assert files[name] == (tmp_path / "output" / f"checkpoint-{step}" / name).read_bytes()
        assert "rankdyna" not in json.loads(files["config.json"])  # so that it is the same without us
        with pytest.raises(ValueError, match="this is a checkpoint of a running compression with rankdyna-trainer"):
            AutoModelForSequenceClassification.from_pretrained(NAME, revision=revision)

    trainer.push_to_hub()
    for source in (NAME, tmp_path / "output"):
        loaded = AutoModelForSequenceClassification.from_pretrained(source)
        assert torch.equal(outputs(loaded, batch), outputs(trainer.model, batch))
    tags = hub.files(NAME)["README.md"].decode().split("---")[1]
    assert "- rankdyna\n" in tags and "- low-rank\n" in tags


def test_upload_that_still_runs_at_the_end_reads_its_own_files(
    hub: HubServer, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    hub.fail("POST .*preupload", ended)  # before it reads the files

    finish = Trainer._finish_current_push

    def released(trainer: Trainer) -> None:
        ended.set()
        finish(trainer)

    monkeypatch.setattr(Trainer, "_finish_current_push", released)
    make_run(save_steps=12).train()
    for name in ("model.safetensors", "config.json"):
        assert hub.files(NAME)[name] == (tmp_path / "output" / "checkpoint-12" / name).read_bytes()
        assert hub.files(NAME)[name] != (tmp_path / "output" / name).read_bytes()


def test_resume_from_the_last_checkpoint_of_another_machine(
    hub: HubServer, make_run: MakeRun, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    whole = make_run(output_dir=str(tmp_path / "whole"), push_to_hub=False)
    whole.train()
    broken = make_run(BreakAt(8), hub_strategy="checkpoint")
    with pytest.raises(Broken):
        broken.train()
    broken._finish_current_push()
    copy = snapshot_download(NAME, allow_patterns="last-checkpoint/*", local_dir=tmp_path / "copy")
    resumed = make_run(output_dir=str(tmp_path / "resumed"), push_to_hub=False)
    resumed.train(resume_from_checkpoint=str(Path(copy, "last-checkpoint")))
    assert rank_report(resumed.model)["rank"].tolist() == rank_report(whole.model)["rank"].tolist()
    assert torch.equal(outputs(resumed.model, batch), outputs(whole.model, batch))


def test_run_outlives_a_hub_that_refuses_all_uploads(
    hub: HubServer, make_run: MakeRun, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    hub.fail("POST .*preupload", *[403] * 3)
    trainer = make_run()
    trainer.train()
    assert hub.files(NAME) == {}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output")
    assert torch.equal(outputs(loaded, batch), outputs(trainer.model, batch))


def test_tokens_are_nowhere(
    hub: HubServer,
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)  # so that only the other one can push
    for name in ("transformers", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.DEBUG)
    for name in ("transformers", "huggingface_hub", "httpcore", "httpx2"):
        caplog.set_level(logging.DEBUG, logger=name)
    trainer = make_run(hub_token=OWNER, hub_strategy="all_checkpoints", report_to="tensorboard")
    trainer.train()
    trainer.push_to_hub()
    logging.getLogger("transformers").info(trainer.args)

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    captured = capfd.readouterr()
    assert {"training_args.bin", "README.md"} <= {path.name for path in written}
    assert "checkpoint-5/training_args.bin" in hub.files(NAME) and "POST" in caplog.text
    for token in (OWNER, READER):
        assert [path for path in written if token.encode() in path.read_bytes()] == []
        assert token.encode() not in hub.uploaded()
        assert token not in caplog.text + captured.out + captured.err
    reloaded = torch.load(tmp_path / "output" / "training_args.bin", weights_only=False)
    assert reloaded.hub_token is None and reloaded.hub_model_id == NAME
    assert trainer.args.hub_token == OWNER
