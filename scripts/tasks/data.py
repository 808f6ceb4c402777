"""Reading the data of a task: local files, or a set of the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from .arguments import TaskArguments

FILE_KINDS = {".csv": "csv", ".txt": "text"}


class HubSet(NamedTuple):
    """Where a task is on the Hub."""

    name: str | None
    config: str | None = None
    revision: str | None = None


# Where the Hub converts sets to Parquet which are a script in their own repository: datasets runs no scripts any more.
CONVERTED = "refs/convert/parquet"


def read_files(files: Mapping[str, str]) -> dict[str, Dataset]:
    """The local files, by split."""
    splits = {}
    for split, path in files.items():
        kind = FILE_KINDS.get(Path(path).suffix, "json")
        options = {"keep_linebreaks": True} if kind == "text" else {}
        try:
            splits[split] = load_dataset(kind, data_files=path, split="train", **options)
        except (FileNotFoundError, DatasetGenerationError, StopIteration, ValueError) as error:
            raise ValueError(f"--{split}_file {path} holds no {kind} rows: {error.__cause__ or error!r}") from error
    return splits


def load_splits(script: TaskArguments, training: Any, hub_sets: Mapping[str | None, HubSet]) -> dict[str, Dataset]:
    """The splits that the run needs, from the local files, or else from the Hub."""
    splits = read_files(script.files)
    if not splits:
        named = script.dataset_name is not None
        hub = HubSet(script.dataset_name, script.dataset_config_name) if named else hub_sets[script.task_name]
        splits = dict(load_dataset(hub.name, hub.config, revision=hub.revision))
    return needed_splits(splits, script, training)


def needed_splits(splits: dict[str, Dataset], script: TaskArguments, training: Any) -> dict[str, Dataset]:
    """Those that the run needs; a second half of a split, such as `validation_mm`, goes with the first."""
    wanted = {"train": training.do_train, "validation": training.do_eval, "test": training.do_predict}
    for split in wanted:
        if wanted[split] and split not in splits and script.files:
            needed = script.split_source.format(split=split)
            raise ValueError(f"This run needs {needed} too: it has only {', '.join(script.files.values())}.")
        if wanted[split] and split not in splits:
            raise ValueError(f"{script.source(split)} is not there: the set has only {', '.join(splits)}.")
    return {split: rows for split, rows in splits.items() if wanted.get(split.removesuffix("_mm"))}


def first_rows(rows: Dataset, split: str, columns: set[str], script: TaskArguments) -> Dataset:
    """As many as the options say, once it is clear that the columns are there."""
    if missing := columns - set(rows.column_names):
        expected = " or ".join(sorted(missing))
        raise ValueError(f"{script.source(split)} has no column {expected}: it has {rows.column_names}.")
    limit = {"train": script.max_train_samples, "test": None}.get(split, script.max_eval_samples)
    return rows.select(range(len(rows))[:limit])
