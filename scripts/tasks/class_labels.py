"""The labels of a classification task, of texts, images or sounds: their names, and the rows that have one."""

import logging
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

logger = logging.getLogger("class_labels")


def class_names(labels: Iterable[Any]) -> tuple[str, ...]:
    """The classes that training labels name or count, in the order of their indices."""
    values = set(labels) - {None, -1}
    if len(values) < 2 or len({type(value) for value in values}) > 1 or not isinstance(min(values), str | int):
        raise ValueError(f"The training labels must be at least two, all text or all numbers: found {values}.")
    if isinstance(min(values), str):
        return tuple(sorted(values))
    return tuple(map(str, range(max(values) + 1)))


def class_indices(names: Iterable[str]) -> dict[Any, int]:
    """The index of each class, by its name and by itself."""
    return {key: i for i, name in enumerate(names) for key in (name, i)}


def labelled_rows(rows: Dataset, source: str, column: str, indices: dict[Any, int]) -> Dataset:
    """
    The rows that have a label; where there are no classes, -1 is a number as any other.

    Raises:
        ValueError: no row has a label, or one has the label of an unknown class.
    """
    kept = [i for i, label in enumerate(rows[column][:]) if label is not None and (label != -1 or not indices)]
    if len(kept) < len(rows):
        logger.warning("%s: %d rows without a label are left out.", source, len(rows) - len(kept))
    rows = rows.select(kept)
    unknown = set(rows[column][:]) - indices.keys() if indices else set()
    if unknown or not kept:
        names = tuple(name for name in indices if isinstance(name, str))
        raise ValueError(f"{source}: expected labels {names} or their indices, found {unknown or 'none'}.")
    return rows
