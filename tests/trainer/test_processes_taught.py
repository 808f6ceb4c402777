"""Several processes with a teacher, and with groups in the metric of the inputs, of which each sees other rows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import distributed_runs
from support.processes import assert_same_as_one_process, assert_same_in_all_processes, run

from rankdyna_trainer.checkpoint.run_state import read_run_state

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_two_processes_with_a_teacher_end_as_one_does(tmp_path: Path) -> None:
    # Of logits alone: the error of hidden states is relative to those that a process sees.
    taught = {"taught": 0.0}
    distributed_runs.run({"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 16} | taught)
    distributed_runs.run({"output_dir": str(tmp_path / "untaught"), "per_device_train_batch_size": 16})
    two = taught | {"per_device_train_batch_size": 8}
    run(
        2,
        two | {"output_dir": str(tmp_path / "ddp")},
        two | {"output_dir": str(tmp_path / "fsdp"), "sharded": "FULL_STATE_DICT"},
        two | {"output_dir": str(tmp_path / "hidden"), "taught": 1.0},
    )
    assert_same_in_all_processes(tmp_path / "hidden", 2)
    for name in ("ddp", "fsdp"):
        assert_same_in_all_processes(tmp_path / name, 2)
        assert_same_as_one_process(tmp_path / name, tmp_path / "one")
    one, untaught = (load_file(tmp_path / name / "process-0.safetensors") for name in ("one", "untaught"))
    assert not torch.allclose(one["lm_head.weight"], untaught["lm_head.weight"], rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_shards_of_a_model_that_teaches_itself_resume(tmp_path: Path) -> None:
    """The teacher is made, and groups are, at step 3."""
    common = {"basis": "activations", "itself": True, "taught": 0.0, "per_device_train_batch_size": 8}
    common |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 12, "warmup": 0.4}
    sharded = common | {"sharded": "FULL_STATE_DICT"}
    run(
        2,
        common | {"output_dir": str(tmp_path / "ddp")},
        sharded | {"output_dir": str(tmp_path / "fsdp")},
        *(
            sharded
            | {"output_dir": str(tmp_path / f"from {step}"), "resume": str(tmp_path / f"fsdp/checkpoint-{step}")}
            for step in (2, 3, 8)
        ),
    )
    for name in ("ddp", "fsdp"):
        assert_same_in_all_processes(tmp_path / name, 2)
    assert_same_as_one_process(tmp_path / "fsdp", tmp_path / "ddp")
    for step in (2, 3, 8):
        resumed = (tmp_path / f"from {step}" / "model.safetensors").read_bytes()
        assert resumed == (tmp_path / "fsdp" / "model.safetensors").read_bytes(), step


@pytest.mark.long
@pytest.mark.parametrize("sharded", [None, "FULL_STATE_DICT"])
def test_processes_that_wait_for_their_mean_loss_resume(sharded: str | None, tmp_path: Path) -> None:
    flat = {"basis": "activations", "itself": True, "taught": 0.0, "warmup": "auto", "learning_rate": 0.03}
    flat |= {"sharded": sharded, "save_strategy": "steps", "save_steps": 5, "max_steps": 40}
    flat |= {"per_device_train_batch_size": 8}
    run(
        2,
        flat | {"output_dir": str(tmp_path / "whole")},
        flat | {"output_dir": str(tmp_path / "resumed"), "resume": str(tmp_path / "whole/checkpoint-5")},
    )
    assert_same_in_all_processes(tmp_path / "whole", 2)
    warmup = read_run_state(tmp_path / "whole" / "checkpoint-40").warmup_steps
    assert warmup is not None and 5 < warmup < 20
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.long
def test_a_process_alone_under_torchrun_begins_in_groups(tmp_path: Path) -> None:
    """DDP holds the parameters of a single process too, and takes no others later."""
    settings = {"basis": "activations", "gradient_checkpointing": True, "max_steps": 6, "warmup": 0.4}
    run(1, settings | {"output_dir": str(tmp_path)})
    assert any(name.endswith(".q.weight") for name in load_file(tmp_path / "process-0.safetensors"))
