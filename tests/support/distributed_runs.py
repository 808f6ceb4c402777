"""
Runs of a tiny language model with the callback, for one process or for several under torchrun.

    torchrun --nproc_per_node 2 distributed_runs.py '[{"output_dir": "out", "max_steps": 20}]'

The settings are training arguments, and a few of `run`; what each process ends with is in `process-N.safetensors` in
the output_dir.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, SingularGroupLinear
from rankdyna_trainer.method import hessian
from rankdyna_trainer.method.hessian import random_signs

DEFAULTS: dict[str, Any] = {
    "max_steps": 20,
    "learning_rate": 1e-3,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, num_key_value_heads=2, **sizes))


def teacher() -> LlamaForCausalLM:
    """Another model of the same sizes."""
    taught = model()
    for parameter in taught.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return taught


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Each token is followed by the next one or the one after it; one row in three is padded."""
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randint(0, 64, (count, 1), generator=generator) + torch.arange(12).cumsum(0)) % 64
    labels = tokens.clone()
    labels[::3, 7:] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


class ShardedTrainer(Trainer):
    """With FSDP2, which accelerate leaves out on a CPU without a word; all else is as on a GPU."""

    state_dict_type: str | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type=self.state_dict_type
        )
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        self.is_fsdp_enabled = True
        assert self.accelerator.is_fsdp2


class KillAt(TrainerCallback):
    """Kills one process at the end of a step."""

    def __init__(self, process: int, step: int) -> None:
        self.process = process
        self.step = step

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.step and args.process_index == self.process:
            os.kill(os.getpid(), signal.SIGKILL)


class CountOperations(TrainerCallback):
    """At each step, of the target layers: the operations of a forward pass, and the rows that their tensors hold."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []

    def on_step_end(self, args, state, control, model, **kwargs: Any) -> None:  # type: ignore[no-untyped-def]
        layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
        if any(isinstance(layer.u, DTensor) for layer in layers):
            return  # sharded: only the whole model's forward pass can be called
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for layer in layers:
                layer(torch.zeros(1, layer.in_features))
        rows, groups = sum(layer.width for layer in layers), sum(layer.rank for layer in layers)
        promised = sum(2 * layer.rank * layer.group_parameters for layer in layers)
        counts = {"operations": counter.get_total_flops(), "promised": promised, "rows": rows, "groups": groups}
        self.steps.append(counts)


def run(settings: dict[str, Any]) -> Trainer:
    settings = dict(settings)
    names = ("resume", "kill", "rows", "sharded", "score", "signs", "basis", "taught", "warmup", "itself")
    names += ("ratios", "keep", "start")
    resume, kill, count, sharded, score, signs, basis, taught, warmup, itself, ratios, keep, begins = (
        settings.pop(name, None) for name in names
    )
    ShardedTrainer.state_dict_type = sharded
    # With the same signs everywhere, the estimates of several processes add up to that of one.
    hessian.random_signs = (lambda like, seed: [torch.ones_like(x) for x in like]) if signs else random_signs
    count_operations = CountOperations()
    config = RankDynaConfig(
        rank_ratio=ratios or 0.2,
        keep_score=keep,
        start_ratio=begins,
        rank_warmup_steps=warmup or 0.1,
        rank_cooldown_steps=0.4,
        importance_score=score or "first_order",
        group_basis=basis or "weights",
        hidden_weight=taught or 0.0,
        teacher="self" if itself else None,
    )
    trainer = (ShardedTrainer if sharded else Trainer)(
        model(),
        TrainingArguments(**(DEFAULTS | settings)),
        train_dataset=rows(count or 64),
        eval_dataset=rows(8),
        callbacks=[
            RankDynaCallback(config, teacher=None if taught is None or itself else teacher()),
            count_operations,
            *([KillAt(*kill)] if kill else []),
        ],
    )
    trainer.train(resume_from_checkpoint=resume)
    # A process that trains alone may be one of several at an earlier time: no name is written twice.
    file = Path(settings["output_dir"], f"process-{trainer.args.process_index}.safetensors")
    tensors = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()
        for name, tensor in trainer.model.state_dict().items()
    }
    save_file(tensors, file)
    file.with_suffix(".json").write_text(json.dumps(count_operations.steps))
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    for settings in json.loads(sys.argv[1]):
        run(settings)
