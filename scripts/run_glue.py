"""
Fine-tunes a text classifier on a task of GLUE, or on local files, and compresses it on the way.

    python scripts/run_glue.py --model_name_or_path bert-base-uncased --task_name sst2 --rank_ratio 0.2 \
        --do_train --do_eval --learning_rate 1e-4 --output_dir out

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
import transformers
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

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
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv"}


def option(default: Any, text: str, **details: Any) -> Any:
    return field(default=default, metadata={"help": text, **details})


@dataclass
class DataArguments:
    model_name_or_path: str = field(metadata={"help": "A model of the Hub, or a local folder."})
    method: Literal["rankdyna", "none"] = option("rankdyna", "Compress, or only fine-tune.")
    task_name: str | None = option(None, "Of local files: what columns and metrics to use.", choices=list(GLUE))
    train_file: str | None = option(None, "A .jsonl, .json or .csv file; without any, GLUE is loaded from the Hub.")
    validation_file: str | None = option(None, "Likewise.")
    test_file: str | None = option(None, "Likewise, for --do_predict.")
    max_train_samples: int | None = option(None, "Train on the first N rows.")
    max_eval_samples: int | None = option(None, "Evaluate on the first N rows.")
    max_seq_length: int = option(128, "Cut longer texts to so many tokens.")
    pad_to_max_length: bool = option(False, "Pad to max_seq_length, not to the longest text of the batch.")
