"""The section of a card that tells how fast the model is: measured later than the card was written."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from .card import write_card
from .generated import CARD

HEADING = "## Speed"
_SECTION = re.compile(rf"^{HEADING}\n.*?(?=^## )", re.MULTILINE | re.DOTALL)


def speed_section(card: Path) -> str:
    """The section of a card, from [`add_speed`]; empty if it has none, or there is no card."""
    found = _SECTION.search(card.read_text(encoding="utf-8")) if card.is_file() else None
    return found[0].strip() if found else ""


def add_speed(directory: Path, rows: Sequence[tuple[int, float, float]], how: str) -> Path:
    """
    Write into the card of a model how fast it is, in the place of what it said before.

    Args:
        directory: of the model, with its card.
        rows: of each batch its size, and the seconds of the dense and of the compacted model.
        how: it was measured, in a sentence.

    Returns:
        The file of the card: that beside it, if a person wrote or changed the one that is there.
    """
    card = ModelCard.load(directory / CARD, ignore_metadata_errors=True)
    lines = ["| batch | dense, ms | compacted, ms | compacted / dense |", "| --: | --: | --: | --: |"]
    lines += [
        f"| {batch} | {1000 * dense:.4g} | {1000 * compacted:.4g} | {compacted / dense:.3g} |"
        for batch, dense, compacted in rows
    ]
    section = "\n".join([HEADING, "", *lines, "", how, "", ""])
    text = _SECTION.sub("", card.text)
    ranks = re.search(r"^## Ranks$", text, re.MULTILINE)
    place = ranks.start() if ranks else len(text)
    card.text = f"{text[:place]}{section}{text[place:]}"
    return write_card(card, directory)
