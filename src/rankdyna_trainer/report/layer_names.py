"""Names of layers, so short that they fit into a narrow terminal."""

from collections.abc import Sequence
from itertools import takewhile


def by_matrix(names: Sequence[str]) -> dict[str, list[str]]:
    """The names of layers by what they are in each block: with stars for the numbers."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(".".join("*" if part.isdecimal() else part for part in name.split(".")), []).append(name)
    return kinds


def without_prefix(kinds: Sequence[str]) -> tuple[str, list[str]]:
    """
    Names that fit into a narrow table.

    Args:
        kinds: from [`by_matrix`].

    Returns:
        What is to be said before them of the modules that all of them are in, if there are such; and the rest of
        each name.
    """
    parts = [kind.split(".") for kind in kinds]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*(part[:-1] for part in parts), strict=False))
    shared = [column[0] for column in same]
    return f" in {'.'.join(shared)}" if shared else "", [".".join(part[len(shared) :]) for part in parts]
