"""
RankDyna without a Trainer: the same objects in a training loop with accelerate.

    python scripts/custom_loop.py --model_name_or_path MODEL --train_file train.jsonl --output_dir OUT --rank_ratio 0.2

The file has a row a line with `sentence` and `label`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser

from rankdyna_trainer import RankDyna, RankDynaConfig, compact, inject_singular_groups


@dataclass
class LoopArguments:
    """What is trained, on what, and how long."""

    model_name_or_path: str
    train_file: str
    output_dir: str
    learning_rate: float = 1e-4
    epochs: int = 3


def train(model: Any, config: RankDynaConfig, batches: DataLoader[Any], learning_rate: float, epochs: int) -> None:
    """Fine-tune and compress the model, in place."""
    accelerator = Accelerator()
    inject_singular_groups(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    rankdyna = RankDyna(model, config, optimizer, total_steps=epochs * len(batches))
    model.train()
    for step, batch in enumerate((batch for _ in range(epochs) for batch in batches), start=1):
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        rankdyna.update_importance()
        optimizer.step()
        rankdyna.enforce_budget(step)
        optimizer.zero_grad()
    compact(accelerator.unwrap_model(model))


if __name__ == "__main__":
    args, config = HfArgumentParser((LoopArguments, RankDynaConfig)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path)
    rows = load_dataset("json", data_files=args.train_file, split="train")
    rows = rows.map(lambda row: tokenizer(row["sentence"], truncation=True) | {"labels": row["label"]})
    rows = rows.select_columns(["input_ids", "attention_mask", "labels"])
    loader = DataLoader(rows, batch_size=32, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    train(model, config, loader, args.learning_rate, args.epochs)
    model.save_pretrained(args.output_dir)
