"""
RankDyna under FSDP2 in a loop of one's own: torch's `fully_shard` splits the groups over the processes of torchrun.

    torchrun --nproc_per_node 2 scripts/fsdp_loop.py --model_name_or_path MODEL --train_file train.jsonl \\
        --text_columns sentence1 sentence2 --output_dir OUT --rank_ratio 0.2

The file has a row a line, with the columns of text and `label`. Started with one process, it does the same without
sharding. The compacted model is saved in OUT, the model with its groups and scores before that in OUT/checkpoint-last.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    get_scheduler,
)
from transformers.trainer_utils import set_seed

from rankdyna_trainer import RankDyna, RankDynaConfig, inject_singular_groups
from rankdyna_trainer.checkpoint.saving import save_compacted, whole_state_dict


@dataclass
class LoopArguments:
    """What is trained, on what, and how long."""

    model_name_or_path: str
    train_file: str
    output_dir: str
    validation_file: str | None = None
    text_columns: list[str] = field(default_factory=lambda: ["sentence"])
    learning_rate: float = 1e-4
    epochs: int = 3
    batch_size: int = field(default=32, metadata={"help": "Of all processes together; what is left over is dropped."})
    seed: int = 0


def encode(tokenizer: Any, file: str, columns: list[str]) -> list[dict[str, Any]]:
    """Token ids and label of each row."""
    rows = load_dataset("json", data_files=file, split="train")
    return [
        dict(tokenizer(*(row[column] for column in columns), truncation=True, max_length=128))
        | {"label": row["label"]}
        for row in rows
    ]


def shard(model: Any) -> None:
    """Each block by itself, as accelerate's `fsdp=True` does; it needs a GPU, torch does not."""
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module)
    fully_shard(model)


def train(model: Any, config: RankDynaConfig, args: LoopArguments, rows: list[Any], collate: Any) -> RankDyna:
    """Fine-tune and compress the model, each process on its part of each batch."""
    process, processes = distributed.get_rank(), distributed.get_world_size()
    inject_singular_groups(model, config)
    if processes > 1:
        shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    steps = args.epochs * (len(rows) // args.batch_size)
    decay = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    rankdyna = RankDyna(model, config, optimizer, steps)
    shuffle = torch.Generator().manual_seed(args.seed)  # of its own: every process takes its part of the same batches
    orders = (torch.randperm(len(rows), generator=shuffle).tolist() for _ in range(args.epochs))
    batches = (
        order[start : start + args.batch_size]
        for order in orders
        for start in range(0, len(rows) - args.batch_size + 1, args.batch_size)
    )
    model.train()
    for step, batch in enumerate(batches, start=1):
        inputs = collate([rows[i] for i in batch])
        loss = model(**{name: values[process::processes] for name, values in inputs.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rankdyna.update_importance()
        optimizer.step()
        rankdyna.enforce_budget(step)
        decay.step()
        optimizer.zero_grad()
        if process == 0 and step % 20 == 0:
            print(json.dumps({"step": step, "loss": loss.item(), "remaining_groups": rankdyna.remaining_groups}))
    return rankdyna


@torch.no_grad()
def accuracy(model: Any, rows: list[Any], collate: Any) -> float:
    """The part of the rows that get the right label."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 32):
        inputs = collate(rows[start : start + 32])
        right += int((model(**inputs).logits.argmax(-1) == inputs["labels"]).sum())
    return right / len(rows)


if __name__ == "__main__":
    args, config = HfArgumentParser((LoopArguments, RankDynaConfig)).parse_args_into_dataclasses()
    distributed.init_process_group()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path)
    collate = DataCollatorWithPadding(tokenizer)
    rankdyna = train(model, config, args, encode(tokenizer, args.train_file, args.text_columns), collate)
    output, first = Path(args.output_dir), distributed.get_rank() == 0
    for folder, finish in ((output / "checkpoint-last", False), (output, True)):
        if finish:
            rankdyna.finish(rankdyna.schedule.total_steps)
        tensors = whole_state_dict(model) or model.state_dict()
        if first and finish:
            save_compacted(model, folder, tokenizer, tensors)
        elif first:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / "model.safetensors")
    if first and args.validation_file:
        model = AutoModelForSequenceClassification.from_pretrained(output)
        score = accuracy(model, encode(tokenizer, args.validation_file, args.text_columns), collate)
        print(json.dumps({"accuracy": score}))
    distributed.destroy_process_group()
