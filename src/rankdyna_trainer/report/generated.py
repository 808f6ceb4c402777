"""Cards and pictures that were generated, told from those that a person wrote or changed, which are kept."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

from ..layers.notices import AboveProgressBars

CARD, IMAGE = "README.md", "ranks.png"
SOFTWARE = "rankdyna-trainer"
_MARK = "<!-- Written by rankdyna-trainer, which replaces it unless it was changed by hand: {} -->"
_MARKED = re.compile(re.escape(_MARK).replace(re.escape("{}"), "([0-9a-f]{64})") + r"\s*\Z")

logger = AboveProgressBars(logging.getLogger(__name__))


def marked(text: str) -> str:
    """The text of a card with a digest of it at the end, by which [`is_unchanged`] knows it."""
    text = unmarked(text)
    return f"{text}\n\n{_MARK.format(_digest(text))}\n"


def unmarked(text: str) -> str:
    """The text of a card without the digest."""
    return _MARKED.sub("", text).rstrip()


def is_unchanged(card: Path) -> bool:
    """Whether a file is a card that was [`marked`], and that nobody has changed since."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    mark = _MARKED.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()].rstrip())


def card_place(directory: Path) -> Path:
    """Where a new card is written: `README.md`, or beside it (`README.rankdyna.md`) if a person wrote that one."""
    return _place(directory, CARD, is_unchanged)


def image_place(directory: Path, usual: str = IMAGE) -> Path:
    """Where a new picture is written: `ranks.png`, or beside it (`ranks.rankdyna.png`) if that is another's."""
    return _place(directory, usual, _is_own_image)


def picture_metadata(file_format: str) -> dict[str, str]:
    """What the header of a picture says, by which [`image_place`] knows it: for a `"png"`, `"svg"` or `"pdf"` file."""
    return {"Software" if file_format == "png" else "Creator": SOFTWARE}


def replace_file(new: Path, place: Path, usual: str) -> None:
    """
    Move a file to its place, and say where it is if that is not the usual one.

    Args:
        new: finished, on the same disk.
        place: from [`card_place`] or [`image_place`].
        usual: the name that it would have had.
    """
    os.replace(new, place)
    if place.name != usual:
        logger.warning(
            "%s was written or changed by hand, and is kept: the new one is %s.", place.parent / usual, place.name
        )


@contextmanager
def never_fatal(what: str, directory: Path) -> Iterator[None]:
    """
    Turn an error into a warning: what only shows a model must not end the run that saved it.

    Args:
        what: is done, such as `"write the model card"`.
        directory: where the model was saved.
    """
    try:
        yield
    except Exception as error:
        logger.warning("The model is saved in %s, but it was not possible to %s: %r", directory, what, error)


def _place(directory: Path, usual: str, is_own: Callable[[Path], bool]) -> Path:
    """The first name that is free, or that of a file of ours: a link, even one to nowhere, was made by a person."""
    stem, _, ending = usual.partition(".")
    numbered = (f"{stem}.rankdyna-{number}.{ending}" for number in count(2))
    places = (directory / name for name in chain((usual, f"{stem}.rankdyna.{ending}"), numbered))
    return next(
        place
        for place in places
        if not os.path.lexists(place) or (place.is_file() and not place.is_symlink() and is_own(place))
    )


def _is_own_image(path: Path) -> bool:
    try:
        with path.open("rb") as image:
            return SOFTWARE.encode() in image.read(1024)
    except OSError:
        return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
