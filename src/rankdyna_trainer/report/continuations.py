"""The section of a card that shows what a language model writes: made later than the card was written."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .card_sections import put_section

HEADING = "## Text"
_MARKUP = re.compile(r"[\\`*_\[\]|~$]")


class Continuation(NamedTuple):
    """A prompt, and how the reference and the compacted model go on from it."""

    prompt: str
    reference: str
    compacted: str


def add_continuations(directory: str | Path, rows: Sequence[Continuation], how: str, reference: str = "dense") -> Path:
    """
    Write into the card of a language model what it writes, in the place of what it said before.

    Args:
        directory: of the model, with its card.
        rows: whose texts are shown as they are, each in one line.
        how: they were made, and what else is to be said of them, in a sentence or more.
        reference: what the model is compared with, as the head of its column.

    Returns:
        The file of the card: that beside it, if a person wrote or changed the one that is there.
    """
    lines = [f"| prompt | {reference} | compacted |", "| :-- | :-- | :-- |"]
    lines += [f"| {' | '.join(map(_shown, row))} |" for row in rows]
    return put_section(Path(directory), "\n".join([HEADING, "", *lines, "", how]))


def _shown(text: str) -> str:
    """A text of any kind in a cell of a Markdown table."""
    return _MARKUP.sub(r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))
