"""Rows of a file as the examples on which Fisher information, or what enters the layers, is estimated."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from ..baselines.expected_loss import LANGUAGE_MODELS
from ..options import how_to_install

FILE_KINDS = {".csv": "csv", ".txt": "text", ".json": "json", ".jsonl": "json"}
CLASSIFIER = "ForSequenceClassification"
Example = dict[str, Tensor]
# Enough to observe the inputs of layers by, if no other number is asked for.
ROWS = 512

TextColumns = Annotated[list[str], typer.Option("--text_column", help="The column of the text; twice for pairs.")]
MaxLength = Annotated[int, typer.Option("--max_length", min=1, help="Tokens of a row; the rest is cut off.")]


def read_examples(
    model: PreTrainedModel,
    tokenizer: Any,
    path: Path,
    text_columns: Sequence[str],
    label_column: str | None,
    max_length: int,
    limit: int | None,
) -> list[Example]:
    """
    Each row as a batch of its own, so that none is padded.

    Args:
        model: a sequence classifier or a causal language model; without labels any that takes the tokens of a text.
        tokenizer: of the model.
        path: of a .jsonl, .json, .csv or .txt file.
        text_columns: one, or two for pairs; for a model that generates one text from another, that other one last.
        label_column: of a classifier: the number of the class, its name in the model's `label2id`, or a score. `None`
            for rows without labels, which are enough if no loss is asked for.
        max_length: tokens of a row.
        limit: rows, from the first on.

    Raises:
        ImportError: datasets is not installed.
        ValueError: the model, the file, a column or a label does not fit.
    """
    _check_model(model, label_column is not None)
    if not callable(tokenizer):
        raise ValueError("--train_file needs the model's tokenizer, which is not in its folder.")
    cut = {"truncation": True, "max_length": min(max_length, tokenizer.model_max_length)}
    class_column = label_column if is_classifier(model) else None
    shortest = 1 if label_column is None else 2  # a single token has no next one to predict
    read = inspect.signature(model.forward).parameters  # as a Trainer chooses columns
    examples: list[Example] = []
    for row in _read_rows(path, [*text_columns, *([class_column] if class_column else [])]):
        if len(examples) == limit:
            break
        texts = [str(row[column]) for column in text_columns]
        tokens = tokenizer(texts[0], **cut) if _generates_from_another(model) else tokenizer(*texts, **cut)
        example = {name: torch.tensor([values]) for name, values in tokens.items() if name in read}
        if class_column:
            examples.append(example | {"labels": torch.tensor([_label(row[class_column], model)])})
        elif example["input_ids"].shape[1] < shortest:
            continue
        elif _generates_from_another(model):  # without a text of its own, the decoder is given that of the encoder
            labels = tokenizer(text_target=texts[-1], **cut)["input_ids"]
            examples.append(example | {"labels": torch.tensor([labels])})
        else:
            examples.append(example if label_column is None else example | {"labels": example["input_ids"]})
    return examples


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether the rows of a model have a class, or a score, as their label."""
    return type(model).__name__.endswith(CLASSIFIER)


def in_batches(examples: Sequence[Example], most: int) -> list[Example]:
    """
    Rows of the same lengths together, so that none is padded.

    Args:
        examples: from [`read_examples`].
        most: rows of a batch.
    """
    alike: dict[tuple[tuple[str, torch.Size], ...], list[Example]] = {}
    for example in examples:
        alike.setdefault(tuple((name, tensor.shape) for name, tensor in example.items()), []).append(example)
    return [
        {name: torch.cat([row[name] for row in rows[start : start + most]]) for name in rows[0]}
        for rows in alike.values()
        for start in range(0, len(rows), most)
    ]


def _check_model(model: PreTrainedModel, with_labels: bool) -> None:
    kind = type(model).__name__
    if with_labels and not kind.endswith((CLASSIFIER, *LANGUAGE_MODELS)):
        raise ValueError(
            f"--train_file is for sequence classification and causal language models, not for a {kind}: in Python, "
            "rankdyna_trainer.baselines.fisher (for --fisher_file) and rankdyna_trainer.report.sensitivity take "
            "batches of any model that returns a loss."
        )
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"--train_file is for models that read texts, not for a {kind}: call "
            "rankdyna_trainer.baselines.whitened_svd in Python, with batches of what the model takes."
        )


def _generates_from_another(model: PreTrainedModel) -> bool:
    """Whether it is an encoder-decoder that generates texts: others make their decoder's inputs of the text itself."""
    return bool(model.config.is_encoder_decoder) and hasattr(model, "prepare_decoder_input_ids_from_labels")


def _read_rows(path: Path, columns: Sequence[str]) -> Any:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError
    except ImportError as error:
        raise ImportError(f"--train_file needs datasets: {how_to_install('scripts')}.") from error
    if path.suffix not in FILE_KINDS:
        raise ValueError(f"--train_file {path} must end in {', '.join(FILE_KINDS)}.")
    try:
        rows = load_dataset(FILE_KINDS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, StopIteration, ValueError) as error:  # the last one of older readers
        raise ValueError(f"--train_file {path} holds no rows: {error.__cause__ or error!r}") from error
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(
            f"--train_file {path} has no column {' or '.join(missing)}: it has {', '.join(rows.column_names)}. Name "
            "them with --text_column and --label_column."
        )
    return rows


def _label(value: Any, model: PreTrainedModel) -> int | float:
    config: Any = model.config
    if config.num_labels == 1:
        return float(value)
    label = config.label2id.get(value) if isinstance(value, str) else value
    if not isinstance(label, int) or not 0 <= label < config.num_labels:
        raise ValueError(f"The label {value!r} is none of the model's {config.num_labels}: {config.label2id}.")
    return label
