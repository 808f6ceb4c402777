"""
Fine-tunes an encoder-decoder to summarize SAMSum dialogues, or the texts of local files, and compresses it on the way.

    python scripts/run_summarization.py --model_name_or_path facebook/bart-base --task_name samsum --rank_ratio 0.2 \\
        --do_train --do_eval

The scores are the means over the rows of the F-measures ROUGE-1, ROUGE-2 and ROUGE-L, from 0 to 1, of summaries that
the model generates. `--decoder_model_name_or_path` joins two pre-trained encoders: the second becomes a decoder.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from tasks.arguments import TaskArguments, parse_args
from tasks.data import HubSet, first_rows, load_splits
from tasks.run import Run
from tasks.tiny_run import complete
from tasks.tiny_tasks import tiny_reversals
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)
from transformers.trainer_utils import set_seed

logger = logging.getLogger("run_summarization")

# A copy: the original is no longer on the Hub.
HUB_SETS: dict[str | None, HubSet] = {"samsum": HubSet("knkarthick/samsum")}
SCORES = {"rouge1": "rouge1", "rouge2": "rouge2", "rougel": "rougeL"}


@dataclass
class ScriptArguments(TaskArguments):
    decoder_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Make this the decoder of an EncoderDecoderModel, of which the other encodes."}
    )
    task_name: str | None = field(
        default=None, metadata={"choices": list(HUB_SETS), "help": "A set of the Hub; local files need none."}
    )
    text_column: str = field(default="dialogue", metadata={"help": "The column with the texts."})
    summary_column: str = field(default="summary", metadata={"help": "The column with their summaries."})
    source_prefix: str = field(default="", metadata={"help": "Put before each text; T5 wants 'summarize: '."})
    max_source_length: int = field(default=512, metadata={"help": "Cut longer texts to so many tokens."})
    max_target_length: int = field(
        default=128, metadata={"help": "Cut longer summaries; --generation_max_length is the same by default."}
    )


def prepare(rows: Dataset, split: str, tokenizer: Any, script: ScriptArguments) -> Dataset:
    text, summary = script.text_column, script.summary_column
    labelled = split != "test" or summary in rows.column_names
    columns = [text, summary] if labelled else [text]
    rows = first_rows(rows, split, set(columns), script)
    if split != "test":
        texts = zip(*(rows[column][:] for column in columns), strict=True)
        kept = [i for i, pair in enumerate(texts) if all(cell and cell.strip() for cell in pair)]
        if len(kept) < len(rows):
            lost = len(rows) - len(kept)
            logger.warning("%s: %d rows without a text or a summary are left out.", script.source(split), lost)
        if not kept:
            raise ValueError(f"{script.source(split)} has no row with a {text} and a {summary}.")
        rows = rows.select(kept)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [script.source_prefix + (cell or "") for cell in batch[text]]
        longest = min(script.max_source_length, tokenizer.model_max_length)
        encoded = tokenizer(texts, truncation=True, max_length=longest)
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if not labelled:
            return inputs
        summaries = [cell or "" for cell in batch[summary]]
        targets = tokenizer(text_target=summaries, truncation=True, max_length=script.max_target_length)
        return inputs | {"labels": targets["input_ids"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def load_model(script: ScriptArguments, tokenizer: Any) -> Any:
    """In float32: in the half precision of many checkpoints, small updates would be rounded away."""
    if script.decoder_model_name_or_path is None:
        return AutoModelForSeq2SeqLM.from_pretrained(script.model_name_or_path, dtype="float32")
    if AutoTokenizer.from_pretrained(script.decoder_model_name_or_path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"The decoder {script.decoder_model_name_or_path} has another vocabulary than the encoder "
            f"{script.model_name_or_path}: take two models that share their tokenizer."
        )
    return join_encoders(script.model_name_or_path, script.decoder_model_name_or_path, tokenizer)


def join_encoders(encoder: str, decoder: str, tokenizer: Any) -> Any:
    """An encoder-decoder of two pre-trained encoders, which knows the tokens that it generates between."""
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(
        encoder, decoder, encoder_dtype="float32", decoder_dtype="float32"
    )
    start = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id = start, end
        config.pad_token_id = tokenizer.pad_token_id
    return model


def compute_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean F-measures over the rows, with stemming."""
    scorer = RougeScorer(list(SCORES.values()), use_stemmer=True)
    rows = [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
    return {name: float(np.mean([row[kind].fmeasure for row in rows])) for name, kind in SCORES.items()}


def make_run(args: list[str] | None = None) -> Run:
    choices = parse_args(args, ScriptArguments, Seq2SeqTrainingArguments, predict_with_generate=True)
    script, training = choices.script, choices.training
    if not training.predict_with_generate:
        raise ValueError("ROUGE needs summaries that are generated: drop --predict_with_generate false.")
    training.generation_max_length = training.generation_max_length or script.max_target_length
    with training.main_process_first(desc="data"):
        splits = load_splits(script, training, HUB_SETS)
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        splits = {split: prepare(rows, split, tokenizer, script) for split, rows in splits.items()}

    set_seed(training.seed)
    model = load_model(script, tokenizer)
    model.accepts_loss_kwargs = False  # its loss is a mean: a Trainer divides it by the steps that it accumulates

    def decode(tokens: Any) -> list[str]:
        tokens = np.where(tokens == -100, tokenizer.pad_token_id, tokens)
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def compute(output: EvalPrediction) -> dict[str, float]:
        return compute_scores(decode(output.predictions), decode(output.label_ids))

    def predict(trainer: Trainer) -> None:
        output = run.predict(trainer)
        run.write_predictions(trainer, [" ".join(text.split()) for text in decode(output.predictions)])

    run = Run(
        *("run_summarization", choices, model, splits, SCORES, predict),
        trainer_class=Seq2SeqTrainer,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute,
    )
    return run


def main(args: list[str] | None = None) -> None:
    complete(make_run, args, tiny_reversals)


if __name__ == "__main__":
    main()
