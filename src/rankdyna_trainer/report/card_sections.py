"""Sections of a card that are written, or written anew, after the card."""

import re
from pathlib import Path

from huggingface_hub import ModelCard

from .card import write_card
from .generated import CARD

# What follows the sizes and the scores, in this order; the last one is there in any case.
_ORDER = ("## Speed", "## Text", "## Ranks")


def section_of(card: Path, heading: str) -> str:
    """The section of a card under a heading such as `"## Speed"`; empty if it has none, or there is no card."""
    found = _section(heading).search(card.read_text(encoding="utf-8")) if card.is_file() else None
    return found[0].strip() if found else ""


def put_section(directory: Path, section: str) -> Path:
    """
    Write a section into the card of a model, in the place of what it said under the same heading before.

    Args:
        directory: of the model, with its card.
        section: which begins with its heading.

    Returns:
        The file of the card: that beside it, if a person wrote or changed the one that is there.
    """
    card = ModelCard.load(directory / CARD, ignore_metadata_errors=True)
    heading = section.partition("\n")[0]
    text = _section(heading).sub("", card.text)
    later = _ORDER[_ORDER.index(heading) + 1 :] if heading in _ORDER else _ORDER
    others = re.search(rf"^(?:{'|'.join(later)})$", text, re.MULTILINE)
    place = others.start() if others else len(text)
    card.text = f"{text[:place]}{section.strip()}\n\n{text[place:]}"
    return write_card(card, directory)


def _section(heading: str) -> re.Pattern[str]:
    return re.compile(rf"^{re.escape(heading)}\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
