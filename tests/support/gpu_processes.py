"""
Runs of a tiny language model with the callback on a GPU, by itself or under torchrun, where DDP or FSDP2 wraps it.

    torchrun --nproc_per_node 1 gpu_processes.py '[{"output_dir": "out", "fsdp": true}]'

What it ends with is in `trained.safetensors` and `trained.json` in the output_dir.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainingArguments

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report
from rankdyna_trainer.layers.distributed import whole
from support import distributed_runs

WRAPPERS: dict[str, Any] = {"ddp": {"ddp": True}, "fsdp": {"fsdp": True}}
BASES: dict[str, Any] = {"weights": {"basis": "weights"}, "default": {}}
SETTINGS: dict[str, Any] = {
    "max_steps": 12,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class Wrapped(TrainerCallback):
    """The classes of what is trained, and of its parameters."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.classes = [type(self.trainer.model_wrapped).__name__]
        self.classes += sorted({type(parameter).__name__ for parameter in self.trainer.model.parameters()})


def run(settings: dict[str, Any]) -> None:
    settings = dict(settings)
    config = RankDynaConfig(
        rank_ratio=0.2, group_basis=settings.pop("basis", None), rank_warmup_steps=4, rank_cooldown_steps=4
    )
    wrapped = Wrapped()
    # Where there is one process, accelerate wraps nothing.
    always = patch.object(Accelerator, "multi_device", True) if settings.pop("ddp", False) else nullcontext()
    trainer = Trainer(
        distributed_runs.model(),
        TrainingArguments(**(SETTINGS | settings)),
        train_dataset=distributed_runs.rows(64),
        callbacks=[RankDynaCallback(config), wrapped],
    )
    wrapped.trainer = trainer
    with always:
        trainer.train()
    folder = Path(settings["output_dir"])
    tensors = {name: whole(tensor).contiguous() for name, tensor in trainer.model.state_dict().items()}
    save_file(tensors, folder / "trained.safetensors")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"classes": wrapped.classes, "ranks": rank_report(trainer.model)["rank"].tolist(), "losses": losses}
    (folder / "trained.json").write_text(json.dumps(result | {"device": trainer.args.device.type}))


class Started:
    """A run under torchrun, in a process group of its own: one that hangs is stopped with all that it began."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        program = [str(Path(__file__)), json.dumps([settings | {"output_dir": str(folder)}])]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node=1"]
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONFAULTHANDLER": "1"}
        environment |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}  # a machine may have no other
        folder.mkdir()
        self._output = folder / "output.txt"  # a pipe that nobody reads yet would stop it when it is full
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, *program],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> tuple[int | str, str]:
        """Its exit code, or that it was stopped since it took longer than that from now on, and what it printed."""
        code: int | str
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds} s"
            self.stop()
        return code, self._output.read_text(errors="replace")

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for settings in json.loads(sys.argv[1]):
        run(settings)
    if distributed.is_initialized():
        distributed.destroy_process_group()
