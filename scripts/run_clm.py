"""
Fine-tunes a causal language model on WikiText-2, the Penn Treebank, or local files, and compresses it on the way.

    python scripts/run_clm.py --model_name_or_path gpt2 --task_name wikitext2 --rank_ratio 0.2 --do_train --do_eval

The score is the perplexity, the exponential of the mean loss of a token. The texts are joined and cut into blocks,
each of which is an example.

Beside it `run.json` has, under `text`, the perplexity on whole sets, in windows that overlap, and how the model goes
on from a few prompts; both beside the dense model, with the part of the tokens at which the two have the same most
likely next one, and the divergence of their predictions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tasks.arguments import Choices, TaskArguments, parse_args
from tasks.data import CONVERTED, HubSet, first_rows, load_splits
from tasks.prompts import prompts_of_rows, read_prompts
from tasks.run import Run
from tasks.text_report import TextReport, check_named_reference, choose_reference, positions_of
from tasks.tiny_run import complete
from tasks.tiny_tasks import tiny_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, default_data_collator
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
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens from a window to the next, on whole sets: by default half of a block, which a window is."
        },
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Compare with this model: by default the teacher, or else the one that training starts from."
        },
    )
    prompts: str | None = field(
        default=None, metadata={"help": "A text file with a prompt a line: by default the begin of five rows."}
    )


def choose_block_size(script: ScriptArguments, tokenizer: Any) -> int:
    positions = positions_of(script.model_name_or_path, tokenizer)
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


def make_text_report(
    choices: Choices[ScriptArguments], rows: Mapping[str, Dataset], tokenizer: Any, block_size: int
) -> TextReport | None:
    """What the model makes of the splits that it is evaluated on; none if there are none."""
    script, training = choices.script, choices.training
    given = [f"--{name}" for name in ("stride", "reference", "prompts") if getattr(script, name) is not None]
    evaluated = {split: of for split, of in rows.items() if split != "train"}
    if not evaluated:
        if given:
            raise ValueError(f"{', '.join(given)}: this run evaluates nothing. Add --do_eval or --do_predict.")
        return None
    if block_size < 2:
        raise ValueError("--block_size 1 leaves no token to predict: it must be at least 2.")
    stride = block_size // 2 if script.stride is None else script.stride
    if stride > block_size:
        raise ValueError(
            f"--stride {stride} is more than the {block_size} tokens of a window: some would not be read."
        )
    texts = {}
    for split, of in evaluated.items():
        column = choose_text_column(of, split, script)
        texts[split] = [text or "" for text in first_rows(of, split, {column}, script)[column]]
    positions = positions_of(script.model_name_or_path, tokenizer)
    if script.prompts is None:
        prompts = prompts_of_rows(next(iter(texts.values())), tokenizer, positions)
    else:
        prompts = read_prompts(Path(script.prompts), tokenizer, positions)
    output = Path(training.output_dir).resolve()
    reference = choose_reference(script.reference, script.model_name_or_path, choices.rankdyna, training.do_train)
    replaced = reference is not None and training.do_train and Path(reference.source).resolve() == output
    if replaced and reference == choose_reference(None, script.model_name_or_path, None, training.do_train):
        reference = None  # a run that replaces the model which it starts from has nothing left to be compared with
    elif reference is not None and replaced:
        raise ValueError(
            f"--output_dir {training.output_dir} is the folder of {reference.words}, which the final model is to be "
            "compared with: it would be replaced. Give another folder."
        )
    if script.reference is not None:
        longest = max(block_size, *(len(ids) + prompts.new_tokens for ids in prompts.ids))
        check_named_reference(script.reference, tokenizer, longest)
    return TextReport(tokenizer, block_size, stride, texts, prompts, reference, on_card=training.do_train)


def make_run(args: list[str] | None = None) -> Run:
    choices = parse_args(args, ScriptArguments)
    script, training = choices.script, choices.training
    with training.main_process_first(desc="data"):
        rows = load_splits(script, training, TASKS)
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        block_size = choose_block_size(script, tokenizer)
        splits = {split: prepare(of, split, tokenizer, script, block_size) for split, of in rows.items()}
        report = make_text_report(choices, rows, tokenizer, block_size)

    set_seed(training.seed)
    # In the half precision of many checkpoints, small updates would be rounded away.
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype="float32")

    def evaluate_model(trainer: Trainer, split: str = "validation", prefix: str = "eval") -> dict[str, float]:
        metrics = trainer.evaluate(splits[split], metric_key_prefix=prefix)
        loss = metrics[f"{prefix}_loss"]
        return metrics | {f"{prefix}_perplexity": float(np.exp(loss))}

    options: dict[str, Any] = {"processing_class": tokenizer, "data_collator": default_data_collator}
    options |= {} if report is None else {"observe": report.observe}

    def predict(trainer: Trainer) -> None:
        run.note_test(trainer, evaluate_model(trainer, "test", "test"))

    run = Run("run_clm", choices, model, splits, ("perplexity",), predict, evaluate_model, **options)
    return run


def main(args: list[str] | None = None) -> None:
    complete(make_run, args, tiny_lines)


if __name__ == "__main__":
    main()
