"""Rows of the training set as batches, beside the training itself: neither its order nor its random numbers change."""

import copy
import itertools
import logging
from collections.abc import Iterator
from typing import Any

from torch import distributed, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ..config import RankDynaConfig
from ..layers.dense import expects_groups
from ..layers.distributed import is_distributed
from ..layers.singular_group import SingularGroupLinear
from .calling_trainer import calling_trainer

ROWS = 512

logger = logging.getLogger(__name__)


class TrainingRows:
    """
    Batches of some rows of a training set, as its `DataLoader` makes them: the same ones whenever it is iterated.

    Of a data set with a length they lie evenly spread, of a stream they are the next ones of a copy. Where several
    processes train, each has a part of them. A stream that cannot be copied, such as one that can be read only once,
    is left alone: there are no batches then.

    Args:
        dataloader: of the `Trainer`.
        rows: how many, of all processes together.
    """

    def __init__(self, dataloader: Any, rows: int = ROWS) -> None:
        self._dataloader = dataloader
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        dataset: Any = self._dataloader.dataset
        size: int = self._dataloader.batch_size or getattr(self._dataloader.batch_sampler, "batch_size", None) or 1
        rank, processes = (distributed.get_rank(), distributed.get_world_size()) if is_distributed() else (0, 1)
        as_in_training = {"batch_size": size, "collate_fn": self._dataloader.collate_fn}
        if not isinstance(dataset, IterableDataset):
            count = min(self._rows, len(dataset))
            chosen = [i * len(dataset) // count for i in range(count)]
            yield from DataLoader(Subset(dataset, chosen[rank::processes] or chosen), **as_in_training)
        elif (stream := _copy(dataset)) is None:
            logger.warning("The training set can be read only once, so that none of its rows is looked at beforehand.")
        else:
            yield from itertools.islice(DataLoader(stream, **as_in_training), -(-self._rows // (size * processes)))


def _copy(stream: IterableDataset[Any]) -> IterableDataset[Any] | None:
    """A stream that can be read without a trace on the one of the training: not of a generator."""
    try:
        return copy.deepcopy(stream)
    except Exception:
        return None


def observed_rows(model: nn.Module, config: RankDynaConfig, train_dataloader: Any) -> dict[str, Any]:
    """What [`RankDyna`] looks at to see what enters the layers, and how; nothing if it does not."""
    was_prepared = any(expects_groups(m) or isinstance(m, SingularGroupLinear) for m in model.modules())
    if config.group_basis == "weights" or config.fixed_shapes or not was_prepared:
        return {}
    trainer = calling_trainer()
    if trainer is None:
        return {"batches": TrainingRows(train_dataloader)}
    return {
        "batches": TrainingRows(train_dataloader),
        "run": lambda batch: trainer.compute_loss(model, trainer._prepare_inputs(batch)),
    }
