"""What is asked of a self-contained checkpoint and its model."""

import filecmp
from pathlib import Path

import torch
from torch import nn

from rankdyna_trainer.checkpoint import modeling_rankdyna

FILE = Path(modeling_rankdyna.__file__)
INPUT = torch.arange(2, 22).reshape(2, 10)


def logits(model: nn.Module) -> torch.Tensor:
    arguments = {"decoder_input_ids": INPUT} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(INPUT, **arguments).logits


def is_self_contained(folder: Path) -> bool:
    copied = folder / FILE.name
    has_file = copied.exists() and filecmp.cmp(copied, FILE, shallow=False)
    named = f"{FILE.stem}." in (folder / "config.json").read_text()
    assert has_file == named
    return has_file
