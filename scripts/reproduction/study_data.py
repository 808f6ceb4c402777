"""The models and batches of the studies, which are those of the cells; and what a study found, kept in a file."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tasks.run import Run
from torch import Tensor
from torch.utils.data import DataLoader

from .cells import Grid, command_line, write


def kept(path: Path, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    What a study found: from its file, or computed now and kept there.

    Args:
        path: of the file.
        settings: all that the finding depends on.
        compute: the study.

    Raises:
        ValueError: the file has a finding with other settings.
    """
    if not path.exists():
        write(path, {"settings": settings, "found": compute()})
    content = json.loads(path.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(settings))
    if content["settings"] != asked:
        raise ValueError(
            f"{path} was found with other settings ({content['settings']}; now {asked}): give another --output_dir, "
            "or delete it."
        )
    return content["found"]


def request_of_cell(grid: Grid, task: str, method: str, ratio: float, seed: int) -> dict[str, Any]:
    """The script and the options of a finished cell."""
    folder = grid.cell_folder(task, method, ratio, seed)
    return json.loads((folder / "request.json").read_text(encoding="utf-8"))


def run_of_request(request: dict[str, Any], folder: Path, model: Path | None = None) -> Run:
    """
    The run of a cell, not begun: with its model, its rows and its choices.

    Args:
        request: from [`request_of_cell`].
        folder: for what it writes.
        model: another one than the cell's.
    """
    other = {"model_name_or_path": model} if model is not None else {}
    arguments = command_line(request["options"] | {"output_dir": folder} | other)
    run: Run = importlib.import_module(request["script"]).make_run(arguments)
    run.model.to(run.training.device)
    return run


def training_batches(run: Run, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of a run's training rows, epoch after epoch, shuffled by the seed."""
    batches: DataLoader[Any] = DataLoader(
        run.splits["train"],
        batch_size=run.training.train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=run.make_trainer(run.training, []).data_collator,
    )
    while True:
        for batch in batches:
            yield dict(batch)
