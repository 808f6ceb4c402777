"""Several real processes under torchrun, over gloo on this machine, beside one process with the same global batch."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import distributed_runs
from support.oldest import ON_NUMBERED_CPU, TORCH_2_7
from support.processes import assert_same_as_one_process, assert_same_in_all_processes, run, start, torchrun
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from rankdyna_trainer import rank_report

pytestmark = pytest.mark.slow


ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
CHECKPOINTED = {"per_device_train_batch_size": 8, "gradient_checkpointing": True}
# Of the same rows as one process with batches of 16.
PLAIN: dict[str, dict[str, Any]] = {
    "ddp": {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1},
    "accumulation": ACCUMULATED,
    "checkpointing": CHECKPOINTED,
    "reentrant checkpointing": CHECKPOINTED | {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
UNEVEN = {"rows": 45, "max_steps": -1, "num_train_epochs": 5, "per_device_train_batch_size": 8}

SIZES: dict[str, Any] = {"ratios": [0.6, 0.3, 0.02], "keep": 0.765, "learning_rate": 1e-2}
SIZES |= {"metric_for_best_model": "loss", "greater_is_better": True}

# torch 2.7 adds gradients up over CPUs instead of taking their mean: there their scale must not count
# (https://github.com/pytorch/pytorch/issues/162338).
NO_SCALE = {"max_grad_norm": 0.0, "adam_epsilon": 1e-12} if TORCH_2_7 else {}
SAVED = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 4} | NO_SCALE
BEST = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "save_total_limit": 1}
SHARDED: dict[str, dict[str, Any]] = {
    "whole": SAVED | BEST | {"sharded": "FULL_STATE_DICT"},
    "sharded": SAVED | {"sharded": "SHARDED_STATE_DICT"},
    "resumed": SAVED | {"sharded": "SHARDED_STATE_DICT", "resume": "sharded/checkpoint-8"},
}

METRIC = {
    "basis": "activations",
    "per_device_train_batch_size": 8,
    "save_strategy": "steps",
    "save_steps": 1,
} | NO_SCALE
FACTORED: dict[str, dict[str, Any]] = {
    "metric": METRIC,
    "metric fsdp": METRIC | {"sharded": "FULL_STATE_DICT"},
}
RESUMED: dict[str, dict[str, Any]] = {
    f"from {at}": METRIC | {"resume": f"metric/checkpoint-{at}", "save_steps": 10} for at in (1, 2, 3)
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs in two processes, one after the other: these are slower to start than most runs are."""
    folder = tmp_path_factory.mktemp("two")
    runs = PLAIN | {"uneven": UNEVEN, "sizes": SIZES | {"per_device_train_batch_size": 8}} | SHARDED | FACTORED
    runs |= {} if TORCH_2_7 else RESUMED
    settings = [{"output_dir": str(folder / name)} | arguments for name, arguments in runs.items()]
    settings = [run | ({"resume": str(folder / run["resume"])} if "resume" in run else {}) for run in settings]
    run(2, *settings, timeout=600)
    return folder


def test_two_processes_end_as_one_does(two_processes: Path, tmp_path: Path) -> None:
    one, uneven = tmp_path / "one", two_processes / "uneven"
    distributed_runs.run({"output_dir": str(one), "per_device_train_batch_size": 16})
    for name in PLAIN:
        assert_same_in_all_processes(two_processes / name, 2)
        assert_same_as_one_process(two_processes / name, one)
    for folder, cuts in ((one, True), (two_processes / "ddp", False)):
        steps = json.loads((folder / "process-0.json").read_text())
        assert len(steps) == 20 and steps[-1]["operations"] < 0.4 * steps[0]["operations"]
        assert all(step["operations"] == step["promised"] for step in steps)  # removed groups leave it at once
        assert (steps[-1]["rows"] < steps[0]["rows"]) == cuts
    # The last batch of an epoch is filled up for the second process, so that it is no batch of one process.
    assert_same_in_all_processes(uneven, 2)
    assert rank_report(AutoModelForCausalLM.from_pretrained(uneven))["rank"].sum() == 77


def test_two_processes_stop_at_the_same_sizes(two_processes: Path, tmp_path: Path) -> None:
    """And end with the last but one, as if it were good that the loss is high: it falls on all the way down."""
    distributed_runs.run({"output_dir": str(tmp_path), "per_device_train_batch_size": 16} | SIZES)
    two = two_processes / "sizes"
    assert_same_in_all_processes(two, 2)
    for place, groups in (("", 116), ("rank_ratio-0.6", 231), ("rank_ratio-0.3", 116)):
        loaded = [AutoModelForCausalLM.from_pretrained(folder / place) for folder in (tmp_path, two)]
        assert rank_report(loaded[0]).equals(rank_report(loaded[1])) and rank_report(loaded[1])["rank"].sum() == groups
        for one, other in zip(*(model.parameters() for model in loaded), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert not (two / "rank_ratio-0.02").exists()


def test_sharded_training_ends_as_training_in_one_process(two_processes: Path, tmp_path: Path) -> None:
    """Through the Trainer; of accelerate only its refusal to shard on a CPU is changed, in `ShardedTrainer`."""
    distributed_runs.run({"output_dir": str(tmp_path), "per_device_train_batch_size": 16} | NO_SCALE)
    for name in SHARDED:
        assert_same_in_all_processes(two_processes / name, 2)
        assert_same_as_one_process(two_processes / name, tmp_path)
    resumed = (two_processes / "resumed" / "model.safetensors").read_bytes()
    assert resumed == (two_processes / "sharded" / "model.safetensors").read_bytes()


def test_two_processes_factor_alike(two_processes: Path) -> None:
    """Groups are made at step 1 of a warm-up of 2."""
    for name in ("metric", "metric fsdp"):
        assert_same_in_all_processes(two_processes / name, 2)
    assert_same_as_one_process(two_processes / "metric fsdp", two_processes / "metric")
    at_once, before = (
        load_file(two_processes / name / "checkpoint-1" / "model.safetensors") for name in ("metric", "ddp")
    )
    name = next(name for name in at_once if name.endswith(".v"))
    assert (at_once[name] - before[name]).norm() > 0.5 * before[name].norm()
    assert not any(tensor.any() for name, tensor in at_once.items() if name.endswith(".importance"))


@ON_NUMBERED_CPU
def test_two_processes_resume_before_at_and_after_the_step_that_factors(two_processes: Path) -> None:
    for name in RESUMED:
        resumed = (two_processes / name / "model.safetensors").read_bytes()
        assert resumed == (two_processes / "metric" / "model.safetensors").read_bytes(), name


def test_two_processes_begin_with_the_same_groups(tmp_path: Path) -> None:
    """Those of the weights, or what these groups are in the metric of the inputs, which is known later."""
    small = {"start": 0.8}
    distributed_runs.run({"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 16} | small)
    two = {"per_device_train_batch_size": 8} | small
    run(
        2,
        {"output_dir": str(tmp_path / "two")} | two,
        {"output_dir": str(tmp_path / "metric"), "basis": "activations", "warmup": 6} | two,
    )
    assert_same_as_one_process(tmp_path / "two", tmp_path / "one")
    for name in ("two", "metric"):
        assert_same_in_all_processes(tmp_path / name, 2)
        assert rank_report(AutoModelForCausalLM.from_pretrained(tmp_path / name))["rank"].sum() == 77
        groups = json.loads((tmp_path / name / "process-0.json").read_text())[0]["rows"]
        assert groups == json.loads((tmp_path / "one" / "process-0.json").read_text())[0]["rows"]


@pytest.mark.long
def test_four_processes_end_as_one_does(tmp_path: Path) -> None:
    one, small = tmp_path / "one", tmp_path / "small"
    distributed_runs.run({"output_dir": str(one), "per_device_train_batch_size": 16})
    distributed_runs.run({"output_dir": str(small), "per_device_train_batch_size": 8})
    run(
        4,
        {"output_dir": str(tmp_path / "four"), "per_device_train_batch_size": 4},
        {"output_dir": str(tmp_path / "four 2"), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    )
    assert_same_in_all_processes(tmp_path / "four", 4)
    assert_same_as_one_process(tmp_path / "four", one)
    assert_same_in_all_processes(tmp_path / "four 2", 4)
    assert_same_as_one_process(tmp_path / "four 2", small)


@ON_NUMBERED_CPU
@pytest.mark.long
def test_a_killed_process_stops_the_others_and_the_run_resumes(tmp_path: Path) -> None:
    common = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2}
    killed = common | {"output_dir": str(tmp_path / "killed")}
    started = time.monotonic()
    result = start(2, common | {"output_dir": str(tmp_path / "whole")}, killed | {"kill": [1, 9]})
    assert result.returncode != 0 and time.monotonic() - started < 200
    assert "SIGKILL" in result.stderr or "Signal 9" in result.stderr
    assert get_last_checkpoint(str(tmp_path / "killed")).endswith("checkpoint-8")
    assert not (tmp_path / "killed" / "config.json").exists()
    run(2, killed | {"resume": True})
    for name in ("model.safetensors", "config.json", "process-1.safetensors", "checkpoint-20/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.long
def test_a_loop_with_groups_that_do_not_split_evenly_over_three_processes(tmp_path: Path) -> None:
    for processes in (1, 3):
        result = torchrun(processes, "sharded_run.py", str(tmp_path / str(processes)))
        assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "3"
    assert_same_in_all_processes(folder, 3)
    assert_same_as_one_process(folder, tmp_path / "1")
    for i in range(3):
        assert (folder / f"resumed-{i}.safetensors").read_bytes() == (folder / "process-0.safetensors").read_bytes()
