"""
A run of a tiny language model that FSDP2 shards over the processes of torchrun (with one process: not sharded).

    torchrun --nproc_per_node 2 sharded_run.py OUTPUT_DIR

It is run as a whole, and once more up to the middle of the adjusting phase, saved in shards, loaded into a new model,
and finished: `process-N.safetensors` and `resumed-N.safetensors` are what each process ends with.
"""

import sys
from pathlib import Path

import distributed_runs
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from rankdyna_trainer import RankDyna, RankDynaConfig, inject_singular_groups
from rankdyna_trainer.checkpoint.saving import save_compacted, whole_state_dict

CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
STEPS = 20
SAVED_AT = 7


def start() -> tuple[LlamaForCausalLM, torch.optim.Optimizer, RankDyna]:
    model = inject_singular_groups(distributed_runs.model(), CONFIG)
    if distributed.get_world_size() > 1:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, RankDyna(model, CONFIG, optimizer, STEPS)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rankdyna: RankDyna, first: int, last: int) -> None:
    rows = distributed_runs.rows(16 * STEPS)
    for step in range(first, last + 1):
        batch = rows[16 * (step - 1) : 16 * step][distributed.get_rank() :: distributed.get_world_size()]
        inputs, labels = (torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels"))
        # Every row counts 11 or 6 labels: the sum is what all processes agree on.
        model(input_ids=inputs, labels=labels, num_items_in_batch=96 / distributed.get_world_size()).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rankdyna.update_importance()
        optimizer.step()
        rankdyna.enforce_budget(step)
        optimizer.zero_grad()


def finish(model: nn.Module, rankdyna: RankDyna, file: Path) -> dict[str, torch.Tensor]:
    rankdyna.finish(STEPS)
    whole = whole_state_dict(model)
    tensors = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, file)
    return tensors if whole is None else whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    output, process = Path(sys.argv[1]), distributed.get_rank()
    output.mkdir(exist_ok=True)

    model, optimizer, rankdyna = start()
    train(model, optimizer, rankdyna, 1, SAVED_AT)
    weights, state = get_state_dict(model, optimizer)
    if distributed.get_world_size() > 1:
        checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=output / "shards")
    train(model, optimizer, rankdyna, SAVED_AT + 1, STEPS)
    tensors = finish(model, rankdyna, output / f"process-{process}.safetensors")
    if process == 0:
        save_compacted(model, output, state_dict=tensors)

    if distributed.get_world_size() > 1:
        model, optimizer, rankdyna = start()
        weights, state = get_state_dict(model, optimizer)
        checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=output / "shards")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        train(model, optimizer, rankdyna, SAVED_AT + 1, STEPS)
        finish(model, rankdyna, output / f"resumed-{process}.safetensors")
    distributed.destroy_process_group()
