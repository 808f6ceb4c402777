"""
Fine-tunes a causal language model on WikiText-2, the Penn Treebank, or local files, and compresses it on the way.

    python scripts/run_clm.py --model_name_or_path gpt2 --task_name wikitext2 --rank_ratio 0.2 --do_train --do_eval

The score is the perplexity, the exponential of the mean loss of a token. The texts are joined and cut into blocks,
each of which is an example.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset
from tasks.arguments import TaskArguments, parse_args
from tasks.data import CONVERTED, HubSet, first_rows, load_splits
from tasks.run import Run
from tasks.tiny_run import complete
from tasks.tiny_tasks import tiny_lines
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, default_data_collator
from transformers.trainer_utils import set_seed

TASKS: dict[str | None, HubSet] = {
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "ptb": HubSet("ptb-text-only/ptb_text_only", revision=CONVERTED),
}
TEXT_COLUMNS = ("text", "sentence")
LONGEST_DEFAULT_BLOCK = 1024


@dataclass
class ScriptArguments(TaskArguments):
    task_name: str | None = field(
        default=None, metadata={"choices": list(TASKS), "help": "A set of the Hub; local files need none."}
    )
    train_file: str | None = field(default=None, metadata={"help": "A .txt, .jsonl, .json or .csv file."})
    text_column: str | None = field(default=None, metadata={"help": "By default text or sentence, or the only one."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens of an example: by default all that the model takes, at most 1024."}
    )


def choose_block_size(script: ScriptArguments, tokenizer: Any) -> int:
    config = AutoConfig.from_pretrained(script.model_name_or_path).get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if script.block_size is None:
        return min(LONGEST_DEFAULT_BLOCK, positions)
    if script.block_size > positions:
        raise ValueError(
            f"--block_size {script.block_size} is more than the {positions} tokens that {script.model_name_or_path} "
            "takes."
        )
    return script.block_size


def choose_text_column(rows: Dataset, split: str, script: ScriptArguments) -> str:
    if script.text_column is not None:
        return script.text_column
    strings = [name for name, feature in rows.features.items() if "string" in str(getattr(feature, "dtype", ""))]
    known = [name for name in TEXT_COLUMNS if name in strings] or strings
    if len(known) != 1 and known[:1] != ["text"]:
        raise ValueError(
            f"{script.source(split)} should have a column text, sentence, or only one of text: it has "
            f"{rows.column_names}. Name the one to learn: --text_column."
        )
    return known[0]


def prepare(rows: Dataset, split: str, tokenizer: Any, script: ScriptArguments, block_size: int) -> Dataset:
    column = choose_text_column(rows, split, script)
    rows = first_rows(rows, split, {column}, script)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {"input_ids": tokenizer([text or "" for text in batch[column]], verbose=False)["input_ids"]}

    def cut_into_blocks(batch: dict[str, list[Any]]) -> dict[str, Any]:
        tokens = list(chain.from_iterable(batch["input_ids"]))
        ends = range(block_size, len(tokens) + 1, block_size)  # what is left at the end of a batch is dropped
        blocks = [tokens[end - block_size : end] for end in ends]
        # Nothing predicts the first token; a Trainer counts it for some models, and would find too low a mean loss.
        labels = [[-100, *block[1:]] for block in blocks]
        return {"input_ids": blocks, "attention_mask": [[1] * block_size for _ in blocks], "labels": labels}

    encoded = rows.map(encode, batched=True, remove_columns=rows.column_names)
    blocks = encoded.map(cut_into_blocks, batched=True, remove_columns=encoded.column_names)
    if len(blocks) == 0:
        tokens = sum(map(len, encoded["input_ids"]))
        raise ValueError(
            f"{script.source(split)} has only {tokens} tokens, less than one block of {block_size}: decrease "
            "--block_size, or take more text."
        )
    return blocks


def make_run(args: list[str] | None = None) -> Run:
    choices = parse_args(args, ScriptArguments)
    script, training = choices.script, choices.training
    with training.main_process_first(desc="data"):
        splits = load_splits(script, training, TASKS)
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        block_size = choose_block_size(script, tokenizer)
        splits = {split: prepare(rows, split, tokenizer, script, block_size) for split, rows in splits.items()}

    set_seed(training.seed)
    # In the half precision of many checkpoints, small updates would be rounded away.
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype="float32")

    def evaluate_model(trainer: Trainer, split: str = "validation", prefix: str = "eval") -> dict[str, float]:
        metrics = trainer.evaluate(splits[split], metric_key_prefix=prefix)
        loss = metrics[f"{prefix}_loss"]
        return metrics | {f"{prefix}_perplexity": float(np.exp(loss))}

    options = {"processing_class": tokenizer, "data_collator": default_data_collator}

    def predict(trainer: Trainer) -> None:
        run.note_test(trainer, evaluate_model(trainer, "test", "test"))

    run = Run("run_clm", choices, model, splits, ("perplexity",), predict, evaluate_model, **options)
    return run


def main(args: list[str] | None = None) -> None:
    complete(make_run, args, tiny_lines)


if __name__ == "__main__":
    main()
