"""The section of a card that tells how fast the model is: measured later than the card was written."""

from collections.abc import Sequence
from pathlib import Path

from .card_sections import put_section

HEADING = "## Speed"


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
    lines = ["| batch | dense, ms | compacted, ms | compacted / dense |", "| --: | --: | --: | --: |"]
    lines += [
        f"| {batch} | {1000 * dense:.4g} | {1000 * compacted:.4g} | {compacted / dense:.3g} |"
        for batch, dense, compacted in rows
    ]
    return put_section(directory, "\n".join([HEADING, "", *lines, "", how]))
