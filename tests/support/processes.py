"""Starts several processes under torchrun, and compares what each of them ends with."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rankdyna_trainer import rank_report


def torchrun(processes: int, program: str, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program = str(Path(__file__).with_name(program))
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}  # a process that aborts says where it was
    return subprocess.run(
        [*command, program, *arguments], capture_output=True, text=True, timeout=timeout, env=environment
    )


def start(processes: int, *settings: dict[str, Any], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return torchrun(processes, "distributed_runs.py", json.dumps(settings), timeout=timeout)


def run(processes: int, *settings: dict[str, Any], timeout: float = 240) -> None:
    result = start(processes, *settings, timeout=timeout)
    if "(SIGABRT)" in result.stderr:  # by gloo's threads, once in some hundred runs: no Python code aborts a process
        warnings.warn(f"A process was aborted, and the run is repeated:\n{result.stderr}", stacklevel=2)
        result = start(processes, *settings, timeout=timeout)
    assert result.returncode == 0, result.stderr


def assert_same_in_all_processes(folder: Path, processes: int) -> None:
    first = folder / "process-0.safetensors"
    for i in range(1, processes):
        assert (folder / f"process-{i}.safetensors").read_bytes() == first.read_bytes()


def assert_same_as_one_process(folder: Path, one: Path) -> None:
    """The same ranks, which are in the shapes, and the same weights to float32 rounding."""
    several, single = load_file(folder / "process-0.safetensors"), load_file(one / "process-0.safetensors")
    assert {name: tensor.shape for name, tensor in several.items()} == {n: t.shape for n, t in single.items()}
    for name, tensor in several.items():
        torch.testing.assert_close(tensor, single[name], rtol=1e-4, atol=2e-6)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(tensor, several[name]) for name, tensor in loaded.state_dict().items())
    assert 0 < rank_report(loaded)["rank"].sum() <= 77
