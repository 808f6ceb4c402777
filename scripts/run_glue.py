"""
Fine-tunes a text classifier on a task of GLUE, or on local files, and compresses it on the way.

    python scripts/run_glue.py --model_name_or_path bert-base-uncased --task_name sst2 --rank_ratio 0.2 --do_train

`--method none` is the same run without the compression: the baseline to compare with. `svd`, `fwsvd`, `tfwsvd` and
`whitened` fine-tune, factor, and fine-tune again. `--preset sst2` takes the hyper-parameters of the paper.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import evaluate
import numpy as np
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tasks.arguments import TaskArguments, parse_args
from tasks.class_labels import class_indices, class_names, labelled_rows
from tasks.data import first_rows, needed_splits, read_files
from tasks.run import Run
from tasks.tiny_run import complete
from tasks.tiny_tasks import tiny_sentences
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer
from transformers.trainer_utils import set_seed

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
class ScriptArguments(TaskArguments):
    task_name: str | None = field(
        default=None, metadata={"choices": list(GLUE), "help": "A task of GLUE, or what local files look like."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Cut longer texts to so many tokens."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to max_seq_length, not to the batch."})


def load_splits(script: ScriptArguments, training: Any) -> dict[str, Dataset]:
    splits = read_files(script.files)
    if not splits and script.dataset_name is not None:
        splits = dict(load_dataset(script.dataset_name, script.dataset_config_name))
    elif not splits:
        hub = load_dataset("nyu-mll/glue", script.task_name)
        splits = {name.replace("_mismatched", "_mm").replace("_matched", ""): rows for name, rows in hub.items()}
    return needed_splits(splits, script, training)


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
        labels = class_names(splits["train"]["label"][:])
    return Task(columns, labels, ("accuracy",) if labels else ("pearson", "spearmanr"))


def prepare(rows: Dataset, split: str, task: Task, tokenizer: Any, script: ScriptArguments) -> Dataset:
    source, labelled = script.source(split), not split.startswith("test")
    rows = first_rows(rows, split, {*task.text_columns, *(["label"] if labelled else [])}, script)
    ids = class_indices(task.labels)
    if labelled:
        rows = labelled_rows(rows, source, "label", ids)

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


def make_run(args: list[str] | None = None) -> Run:
    choices = parse_args(args, ScriptArguments)
    script, training = choices.script, choices.training
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
    model.accepts_loss_kwargs = False  # its loss is a mean: a Trainer divides it by the steps that it accumulates

    def decode(logits: Any, _: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1) if task.labels else logits.squeeze(-1)

    def evaluate_model(trainer: Trainer) -> dict[str, float]:
        metrics = trainer.evaluate()
        if "validation_mm" in splits:
            metrics |= trainer.evaluate(splits["validation_mm"], metric_key_prefix="eval_mm")
        return metrics

    def predict(trainer: Trainer) -> None:
        for split in (name for name in splits if name.startswith("test")):
            values = trainer.predict(splits[split]).predictions
            run.write_predictions(trainer, [labels[value] if task.labels else value for value in values], split)

    run = Run(
        *("run_glue", choices, model, splits, task.metrics, predict, evaluate_model),
        processing_class=tokenizer,
        compute_metrics=lambda output: compute(predictions=output.predictions, references=output.label_ids),
        preprocess_logits_for_metrics=decode,
    )
    return run


def main(args: list[str] | None = None) -> None:
    complete(make_run, args, tiny_sentences)


if __name__ == "__main__":
    main()
