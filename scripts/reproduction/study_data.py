"""The models and batches of the studies, which are those of the cells; and what a study found, kept in a file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from run_glue import GLUE, ScriptArguments, load_model, load_splits, prepare
from task_common import Choices, parse_args
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding
from transformers.trainer_utils import set_seed

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


def cell_choices(grid: Grid, task: str, method: str, ratio: float, seed: int) -> Choices[ScriptArguments]:
    """
    What a finished cell was run with.

    Raises:
        ValueError: it is no task of `run_glue.py`.
    """
    folder = grid.cell_folder(task, method, ratio, seed)
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    if request["script"] != "run_glue":
        raise ValueError(f"Figures 1 and 4 look at text classifiers, tasks of run_glue: {task} is of another script.")
    return parse_args(command_line(request["options"] | {"output_dir": str(folder)}), ScriptArguments)


def task_model(choices: Choices[ScriptArguments], name: str | Path, seed: int) -> Any:
    """A model of a task, on the device of its runs; a head that the model does not have yet is that of the seed."""
    set_seed(seed)
    task = GLUE[str(choices.script.task_name)]
    return load_model(str(name), task, _tokenizer(choices)).to(choices.training.device)


def task_batches(choices: Choices[ScriptArguments], seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the task's training rows as its runs prepare them, epoch after epoch, shuffled by the seed."""
    script, tokenizer = choices.script, _tokenizer(choices)
    rows = load_splits(script, choices.training)["train"]
    rows = prepare(rows, "train", GLUE[str(script.task_name)], tokenizer, script)
    batches: DataLoader[Any] = DataLoader(
        rows,
        batch_size=choices.training.train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    while True:
        for batch in batches:
            yield dict(batch)


def _tokenizer(choices: Choices[ScriptArguments]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(choices.script.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
