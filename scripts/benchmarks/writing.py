"""What a benchmark leaves: JSON with every number, and Markdown tables."""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import rankdyna_trainer

from .measuring import Results, Rows, shown
from .models import DEVICE


def versions() -> dict[str, Any]:
    """Where this was measured."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "rankdyna_trainer": rankdyna_trainer.__version__,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
    }


def markdown(rows: Rows) -> str:
    """The rows as a table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        lines.append([shown(cell) if isinstance(cell, float) else str(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(options: argparse.Namespace, results: Results) -> None:
    """Into the file of the options, beside them and the versions."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    everything = {"settings": settings, "versions": versions(), **results}
    replace_text(options.output, json.dumps(everything, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file that is whole whenever this may be interrupted."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
