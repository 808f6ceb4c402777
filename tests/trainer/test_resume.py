"""A run that was stopped and resumed ends as if it had never been stopped, or says why it cannot be resumed."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paper import PAPER
from transformers import BertConfig, BertForSequenceClassification, Trainer
from transformers.optimization import Adafactor

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report

CONFIG = RankDynaConfig(rank_ratio=0.3, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)
STEPS = 20  # warm-up to step 2, adjusting to step 12, cool-down
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"optim": "adamw_torch"},
    "Adafactor": {
        "optimizer_cls_and_kwargs": (Adafactor, {"lr": 1e-3, "scale_parameter": False, "relative_step": False})
    },
    "SGD with momentum": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})},
}
MakeRun = Callable[..., Trainer]
BeginWith = Callable[..., Path]


def small_bert() -> BertForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))


@pytest.fixture
def make_run(make_trainer: Callable[..., Trainer], tmp_path: Path) -> MakeRun:
    """A run in a folder of its own, with a checkpoint at each step, and with dropout."""

    def make(
        folder: str, config: RankDynaConfig | None = CONFIG, optimizer: str = "AdamW", **arguments: Any
    ) -> Trainer:
        torch.manual_seed(0)
        settings = dict(OPTIMIZERS[optimizer])
        optim = {"optim": settings.pop("optim")} if "optim" in settings else {}
        defaults = {
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": STEPS,
            "output_dir": str(tmp_path / folder),
        }
        callbacks = [RankDynaCallback(config)] if config else []
        return make_trainer(small_bert(), *callbacks, trainer_arguments=settings, **(defaults | optim | arguments))

    return make


@pytest.fixture
def begin_with(make_run: MakeRun, train_once: Callable[..., Path]) -> BeginWith:
    """The folder of a finished run, `tmp_path/run`, which a test may change."""
    return lambda **arguments: train_once(lambda: make_run("run", **arguments).train(), **arguments)


def largest_difference(one: Path, other: Path, pattern: str = "") -> float:
    """Over all tensors of two files whose name has the pattern; infinite if their names or shapes differ."""
    first, second = load_file(one), load_file(other)
    if {name: tensor.shape for name, tensor in first.items()} != {name: t.shape for name, t in second.items()}:
        return math.inf
    differences = [
        (first[name].double() - second[name].double()).abs().max().item()
        for name in first
        if pattern in name and first[name].numel()
    ]
    assert differences
    return max(differences)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "every"),
    [("AdamW", False), *(pytest.param(name, True, marks=pytest.mark.long) for name in OPTIMIZERS)],
)
def test_resume_is_exact_from_every_step(make_run: MakeRun, tmp_path: Path, optimizer: str, every: bool) -> None:
    make_run("whole", optimizer=optimizer).train()
    whole, weights, scores = tmp_path / "whole", [], []
    for stop in range(1, STEPS + 1) if every else (1, 2, 3, 7, 11, 12, 13, 19, 20):
        shutil.copytree(whole / f"checkpoint-{stop}", tmp_path / "resumed" / f"checkpoint-{stop}")
        resumed = make_run("resumed", optimizer=optimizer)
        resumed.train(resume_from_checkpoint=True)
        last = Path(f"checkpoint-{STEPS}", "model.safetensors")
        weights.append(largest_difference(whole / "model.safetensors", tmp_path / "resumed" / "model.safetensors"))
        scores.append(largest_difference(whole / last, tmp_path / "resumed" / last, ".importance"))
        for name in ("model.safetensors", "config.json", str(last)):
            assert (whole / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), (stop, name)
        shutil.rmtree(tmp_path / "resumed")
    print(f"\n{optimizer}: {len(weights)} stops, max |difference| of weights {max(weights)}, of scores {max(scores)}")
    assert max(weights) == max(scores) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"config": RankDynaConfig(rank_ratio=0.5, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)},
            "rank_ratio was 0.3 and is 0.5.",
        ),
        (
            {"config": RankDynaConfig(param_ratio=0.3, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)},
            "rank_ratio was 0.3 and is None; param_ratio was None and is 0.3",
        ),
        (
            {
                "config": RankDynaConfig(
                    rank_ratio=0.3, importance_beta=0.5, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER
                )
            },
            "importance_beta was 0.85 and is 0.5.",
        ),
        (
            {
                "config": RankDynaConfig(
                    rank_ratio=0.3, rank_scope="local", rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER
                )
            },
            "rank_scope was 'global' and is 'local'.",
        ),
        ({"max_steps": 24}, "total steps was 20 and is 24."),
    ],
)
@pytest.mark.parametrize("stop", [1, 6, 15])
def test_another_run_is_not_resumed(
    make_run: MakeRun, begin_with: BeginWith, tmp_path: Path, stop: int, changes: dict[str, Any], message: str
) -> None:
    begin_with()
    other = make_run("other", **changes)
    with pytest.raises(ValueError, match=f"checkpoint of step {stop} belongs to another run.*{re.escape(message)}"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert other.state.global_step == stop


def test_another_folder_of_the_cache_is_no_other_run(make_run: MakeRun, begin_with: BeginWith, tmp_path: Path) -> None:
    begin_with()
    cached = dataclasses.replace(CONFIG, factorization_cache=str(tmp_path / "cache"))
    make_run("other", cached).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))


def test_a_checkpoint_from_before_there_was_an_option_is_resumed(
    make_run: MakeRun, begin_with: BeginWith, tmp_path: Path
) -> None:
    begin_with()
    state = tmp_path / "run" / "checkpoint-6" / "trainer_state.json"
    content = json.loads(state.read_text())
    for name in ("hidden_weight", "group_basis", "block_floor"):
        del content["stateful_callbacks"]["RankDyna"][name]
    state.write_text(json.dumps(content))
    resumed = make_run("resumed")
    resumed.train(resume_from_checkpoint=str(state.parent))
    files = (tmp_path / folder / "model.safetensors" for folder in ("run", "resumed"))
    assert largest_difference(*files) == 0
    other = make_run("other", dataclasses.replace(CONFIG, hidden_weight=0.5, group_basis=None, block_floor=0.25))
    with pytest.raises(ValueError, match="belongs to another run") as refused:
        other.train(resume_from_checkpoint=str(state.parent))
    for was in ("hidden_weight was 1.0", "group_basis was 'weights' and is None", "block_floor was 0.0 and is 0.25"):
        assert was in str(refused.value)


def test_other_targets_are_named_before_anything_is_loaded(
    make_run: MakeRun, begin_with: BeginWith, tmp_path: Path
) -> None:
    begin_with()
    for targets, misfit in (
        (["query", "key"], r"4 in singular groups there, but not in this model \(bert\.encoder\.layer\.0\.att"),
        ("all-linear", r"1 dense there \(bert\.pooler\.dense, \.\.\.\)\."),
    ):
        other = make_run(
            "other",
            RankDynaConfig(
                rank_ratio=0.3, target_modules=targets, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER
            ),
        )
        with pytest.raises(ValueError, match=misfit):
            other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))


def test_a_checkpoint_without_the_callback_is_not_resumed(
    make_run: MakeRun, begin_with: BeginWith, tmp_path: Path
) -> None:
    make_run("plain", config=None).train()
    with pytest.raises(ValueError, match=r"6 dense there.*written without the RankDynaCallback"):
        make_run("run").train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-6"))

    # Groups whose state does not tell the run, as of a model_init that injects while the callback is missing.
    begin_with()
    state_file = tmp_path / "run" / "checkpoint-6" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    del state["stateful_callbacks"]["RankDyna"]
    state_file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="step 6 was written without the RankDynaCallback"):
        make_run("again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))


def test_a_compacted_model_is_not_resumed(make_run: MakeRun, tmp_path: Path) -> None:
    finished = make_run("run")
    finished.train()
    with pytest.raises(ValueError, match="6 in singular groups there, but not in this model"):
        finished.train(resume_from_checkpoint=True)
    shutil.copy(tmp_path / "run" / "model.safetensors", tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    with pytest.raises(ValueError, match=r"compacted there \(bert.*after the end of its run"):
        make_run("again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))


def test_resume_where_callback_states_are_restored(make_run: MakeRun, begin_with: BeginWith, tmp_path: Path) -> None:
    begin_with()
    resumed = make_run("resumed", restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert rank_report(resumed.model)["rank"].sum() == math.ceil(0.3 * 96)


def test_a_checkpoint_in_several_files(make_run: MakeRun, tmp_path: Path) -> None:
    """A layer's tensors are then in different files, as are those of a model of many gigabytes."""
    make_run("whole", save_steps=6).train()
    split = tmp_path / "split" / "checkpoint-6"
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", split)
    tensors = load_file(split / "model.safetensors")
    (split / "model.safetensors").unlink()
    files: dict[str, dict[str, torch.Tensor]] = {}
    for i, name in enumerate(sorted(tensors)):
        files.setdefault(f"model-{i % 7:05d}.safetensors", {})[name] = tensors[name]
    for file, held in files.items():
        save_file(held, split / file, metadata={"format": "pt"})
    index = {name: file for file, held in files.items() for name in held}
    (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    make_run("split", save_steps=6).train(resume_from_checkpoint=True)
    assert largest_difference(*(tmp_path / folder / "model.safetensors" for folder in ("whole", "split"))) == 0.0


LAYER = "bert.encoder.layer.0.output.dense"


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("optimizer.pt", "the state of the optimizer"),
        ("scheduler.pt", "the state of the learning rate"),
        ("rng_state.pth", r"the random numbers of this process \(rng_state\.pth\)"),
        (f"{LAYER}.remaining", f"the tensor {LAYER}.remaining"),
        (f"{LAYER}.u", f"the tensor {LAYER}.u"),
        (f"{LAYER}.importance", f"the tensor {LAYER}.importance"),
        ("classifier.bias", r"the tensor classifier\.bias"),
        ("bert.embeddings.LayerNorm.weight", r"the tensor bert\.embeddings\.LayerNorm\.weight"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_before_the_first_step(
    lost: str, said: str, make_run: MakeRun, begin_with: BeginWith
) -> None:
    checkpoint = begin_with(max_steps=8, save_steps=6) / "checkpoint-6"
    if (checkpoint / lost).exists():
        (checkpoint / lost).unlink()
    else:
        tensors = load_file(checkpoint / "model.safetensors")
        del tensors[lost]
        save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    again = make_run("again", max_steps=8, save_steps=6)
    with pytest.raises(ValueError, match=rf"checkpoint-6 is incomplete, .*it lacks {said}\. Copy the whole folder"):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 6


@pytest.mark.parametrize("entry", [[1, 2], "run", 3])
def test_a_state_of_another_type_is_called_damaged(entry: object, make_run: MakeRun, begin_with: BeginWith) -> None:
    state_file = begin_with(max_steps=8, save_steps=6) / "checkpoint-6" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state["stateful_callbacks"]["RankDyna"] = entry
    state_file.write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match=r"trainer_state\.json of the checkpoint is damaged: what it says of RankDyna"
    ):
        make_run("again", max_steps=8, save_steps=6).train(resume_from_checkpoint=str(state_file.parent))
