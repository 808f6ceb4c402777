"""
Fine-tunes a text classifier on a task of GLUE, or on local files, and compresses it on the way.

    python scripts/run_glue.py --model_name_or_path bert-base-uncased --task_name sst2 --rank_ratio 0.2 --do_train

`--method none` is the same run without the compression: the baseline to compare with.
"""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import evaluate
import numpy as np
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.hf_argparser import HfArgumentParser
from transformers.trainer_utils import set_seed

from rankdyna_trainer import LowRankLinear, RankDynaCallback, RankDynaConfig
from rankdyna_trainer.report import compression_summary

logger = logging.getLogger("run_glue")


class Task(NamedTuple):
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]  # none: regression
    metrics: tuple[str, ...]


GLUE = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": Task(("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",)),
    "stsb": Task(("sentence1", "sentence2"), (), ("pearson", "spearmanr")),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
}
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearmanr": lambda labels, predictions: spearmanr(labels, predictions).statistic,
}


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "A model of the Hub, or a local folder."})
    method: Literal["rankdyna", "none"] = field(default="rankdyna", metadata={"help": "Compress, or only fine-tune."})
    task_name: str | None = field(
        default=None, metadata={"choices": list(GLUE), "help": "A task of GLUE, or what local files look like."}
    )
    train_file: str | None = field(default=None, metadata={"help": "A .jsonl, .json or .csv file."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise."})
    test_file: str | None = field(default=None, metadata={"help": "Likewise, for --do_predict."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first N rows."})
    max_seq_length: int = field(default=128, metadata={"help": "Cut longer texts to so many tokens."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to max_seq_length, not to the batch."})

    def __post_init__(self) -> None:
        given = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        self.files = {split: path for split, path in given.items() if path is not None}
        if self.task_name is None and not self.files:
            raise ValueError("No data: give --task_name for a task of the Hub, or --train_file, --validation_file.")
        for name in ("max_train_samples", "max_eval_samples", "max_seq_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1: got {getattr(self, name)}.")


def parse_args(args: list[str] | None) -> tuple[ScriptArguments, TrainingArguments, RankDynaConfig | None]:
    types: Any = (ScriptArguments, TrainingArguments, RankDynaConfig)
    usage = "%(prog)s --model_name_or_path MODEL --output_dir DIR [options]"
    parser = HfArgumentParser(types, usage=usage, allow_abbrev=False)
    chosen = parser.parse_args(args)
    if not chosen.do_train and (chosen.method == "rankdyna" or not (chosen.do_eval or chosen.do_predict)):
        parser.error("nothing to do: give --do_train, or --method none with --do_eval or --do_predict")
    # A RankDynaConfig cannot be made without a ratio, and a plain run has none.
    used: Any = HfArgumentParser(types if chosen.method == "rankdyna" else types[:2], allow_abbrev=False)
    script, training, *rankdyna, unused = used.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if unused:
        parser.error(f"--method none does not compress: drop {' '.join(unused)}, or use --method rankdyna")
    return script, training, rankdyna[0] if rankdyna else None


def load_splits(script: ScriptArguments, training: TrainingArguments) -> dict[str, Dataset]:
    splits = {}
    for split, path in script.files.items():
        kind = "csv" if path.endswith(".csv") else "json"
        try:
            splits[split] = load_dataset(kind, data_files=path, split="train")
        except (FileNotFoundError, DatasetGenerationError, StopIteration) as error:
            raise ValueError(f"--{split}_file {path} holds no {kind} rows: {error.__cause__ or error!r}") from error
    if not splits:
        hub = load_dataset("nyu-mll/glue", script.task_name)
        splits = {name.replace("_mismatched", "_mm").replace("_matched", ""): rows for name, rows in hub.items()}
    wanted = {"train": training.do_train, "validation": training.do_eval, "test": training.do_predict}
    for split in wanted:
        if wanted[split] and split not in splits:
            raise ValueError(f"This run needs --{split}_file too: it has only {', '.join(script.files.values())}.")
    return {split: rows for split, rows in splits.items() if wanted[split.removesuffix("_mm")]}


def infer_task(splits: dict[str, Dataset], model_name: str) -> Task:
    features = next(iter(splits.values())).features
    dtypes = {name: str(getattr(feature, "dtype", "")) for name, feature in features.items()}
    columns = tuple(name for name in dtypes if "string" in dtypes[name] and name not in ("label", "id", "idx"))
    if not 1 <= len(columns) <= 2:
        raise ValueError(f"Expected one or two columns of text, not {columns}: drop the others, or give --task_name.")
    labels: tuple[str, ...] = ()
    if "train" not in splits:  # then only the checkpoint knows what its head was trained for
        config = AutoConfig.from_pretrained(model_name)
        labels = tuple(config.id2label.values()) if config.num_labels > 1 else ()
    elif "float" not in dtypes.get("label", "float"):
        # Of all rows, not of the first --max_train_samples: a class may begin later.
        values = set(splits["train"]["label"][:]) - {None, -1}
        if len(values) < 2 or len({type(value) for value in values}) > 1:
            raise ValueError(f"The training labels must be at least two, all text or all numbers: found {values}.")
        labels = tuple(sorted(values)) if "string" in dtypes["label"] else tuple(map(str, range(max(values) + 1)))
    return Task(columns, labels, ("accuracy",) if labels else ("pearson", "spearmanr"))


def prepare(rows: Dataset, split: str, task: Task, tokenizer: Any, script: ScriptArguments) -> Dataset:
    source, labelled = script.files.get(split, f"{script.task_name} ({split})"), not split.startswith("test")
    missing = {*task.text_columns, *(["label"] if labelled else [])} - set(rows.column_names)
    if missing:
        raise ValueError(f"{source} has no column {' or '.join(sorted(missing))}: it has {rows.column_names}.")
    limit = {"train": script.max_train_samples, "test": None}.get(split, script.max_eval_samples)
    rows = rows.select(range(len(rows))[:limit])
    ids = {key: i for i, name in enumerate(task.labels) for key in (name, i)}
    if labelled:
        kept = [i for i, label in enumerate(rows["label"][:]) if label is not None and (label != -1 or not ids)]
        if len(kept) < len(rows):
            logger.warning("%s: %d rows without a label are left out.", source, len(rows) - len(kept))
        rows = rows.select(kept)
        unknown = set(rows["label"][:]) - ids.keys() if ids else set()
        if unknown or not kept:
            raise ValueError(f"{source}: expected labels {task.labels} or their indices, found {unknown or 'none'}.")

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [[text or "" for text in batch[column]] for column in task.text_columns]  # an empty csv cell is None
        length = min(script.max_seq_length, tokenizer.model_max_length)
        padding = "max_length" if script.pad_to_max_length else False
        labels = {"labels": [ids[label] if ids else float(label) for label in batch["label"]]} if labelled else {}
        return {**tokenizer(*texts, truncation=True, max_length=length, padding=padding), **labels}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def load_metric(task_name: str | None, names: tuple[str, ...]) -> Callable[..., dict[str, float]]:
    if task_name is not None:
        try:
            # evaluate does not heed HF_HUB_OFFLINE, and behind a firewall it would wait for minutes.
            HfApi().space_info("evaluate-metric/glue", timeout=5)
            compute: Callable[..., dict[str, float]] = evaluate.load("glue", task_name, keep_in_memory=True).compute
            compute(predictions=[0, 1], references=[0, 1])
            return compute
        except Exception as error:  # a downloaded script may raise anything, and its numbers can be had without it
            logger.warning("Scores are computed without evaluate, whose GLUE metric cannot be loaded: %s", error)
    return lambda predictions, references: {name: float(METRICS[name](references, predictions)) for name in names}


def main(args: list[str] | None = None) -> None:
    script, training, rankdyna = parse_args(args)
    with training.main_process_first(desc="data"):
        splits = load_splits(script, training)
        task = GLUE[script.task_name] if script.task_name else infer_task(splits, script.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        splits = {split: prepare(rows, split, task, tokenizer, script) for split, rows in splits.items()}
    compute = load_metric(script.task_name, task.metrics)

    set_seed(training.seed)
    labels = task.labels or ("score",)
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model_name_or_path,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="single_label_classification" if task.labels else "regression",
        dtype="float32",  # in the half precision of many checkpoints, small updates would be rounded away
    )
    model.config.pad_token_id = tokenizer.pad_token_id

    def decode(logits: Any, _: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1) if task.labels else logits.squeeze(-1)

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        compute_metrics=lambda output: compute(predictions=output.predictions, references=output.label_ids),
        preprocess_logits_for_metrics=decode,
        callbacks=[RankDynaCallback(rankdyna)] if rankdyna else None,
    )
    output, seconds = Path(str(training.output_dir)), 0.0
    if training.do_train:
        metrics = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint).metrics
        seconds = metrics["train_runtime"]
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        if rankdyna is None:  # otherwise the callback has saved the compressed model
            trainer.save_model()
        elif training.push_to_hub:
            trainer.push_to_hub()
    for split in (name for name in splits if name.startswith("test")):
        rows = enumerate(trainer.predict(splits[split]).predictions)
        text = "".join(f"{i}\t{labels[value] if task.labels else value}\n" for i, value in rows)
        if trainer.is_world_process_zero():
            (output / f"{split}_predictions.tsv").write_text("index\tprediction\n" + text, encoding="utf-8")
    if training.do_eval:
        metrics = trainer.evaluate()
        if "validation_mm" in splits:
            metrics |= trainer.evaluate(splits["validation_mm"], metric_key_prefix="eval_mm")
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        compressed = rankdyna or any(isinstance(module, LowRankLinear) for module in model.modules())
        sizes = compression_summary(model) if compressed else None
        results: dict[str, Any] = {"task": script.task_name, "method": script.method}
        results |= {"model": script.model_name_or_path, "seed": training.seed}
        # A constant prediction has no correlation, and JSON has no NaN.
        scores = {key.removeprefix("eval_"): metrics[key] for key in metrics if key.endswith(task.metrics)}
        results |= {key: score if math.isfinite(score) else None for key, score in scores.items()}
        results |= {"target_parameter_ratio": sizes.target_ratio if sizes else 1.0}
        results |= {"all_parameter_ratio": sizes.all_ratio if sizes else 1.0}
        results |= {"train_seconds": seconds, "train_steps": trainer.state.global_step}
        if trainer.is_world_process_zero():
            (output / "results.json").write_text(json.dumps(results) + "\n")
            print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
