"""Names, what the value of an option may be, and how an error shows it."""

import argparse
import math
import os
import re
import reprlib
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from numbers import Real
from typing import Any

# Under which name `config.json` has what the format of compacted models needs.
METHOD = "rankdyna"
# The warm-up that ends when the loss has fallen and flattened.
AUTO = "auto"

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def how_to_install(extra: str) -> str:
    """The two commands that add an extra; the quotes keep brackets from every shell."""
    index, checkout = (f'`pip install "{package}[{extra}]"`' for package in ("rankdyna-trainer", "."))
    return f"{checkout} in a checkout, or {index} once a package index has it"


def shown(value: object) -> str:
    """A value as an error message shows it: `repr` may be endless, too deep, or fail."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write an int of more than 4300 digits
        return "a number of thousands of digits"


def number(name: str, value: object) -> float:
    """A finite number, or a `TypeError` or `ValueError` that names the option."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number: got {shown(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite: got {shown(value)}.")
    return number


def part_of(part: float, whole: int) -> Fraction:
    """
    `part * whole` for a part that a person wrote in decimals, without its rounding error: the part 0.07 of 100 is 7,
    where `0.07 * 100` is 7.000000000000001 and would be rounded up to 8.
    """
    return Fraction(repr(float(part))) * whole


def steps(name: str, value: object) -> float:
    """A whole number of steps, or a part of all; or a `TypeError` or `ValueError` that names the option."""
    steps = number(name, value)
    if steps < 0 or (steps >= 1 and steps != int(steps)):
        raise ValueError(f"{name} must be a whole number of steps, or a part of all steps in (0, 1): got {steps}.")
    return steps


def falling_parts(name: str, value: object) -> float | list[float]:
    """
    A part in (0, 1], or a list of several, each smaller than the one before; a list of one is that one. Or a
    `TypeError` or `ValueError` that names the option.
    """
    several = isinstance(value, (list, tuple))
    parts = [number(name, part) for part in (value if isinstance(value, (list, tuple)) else [value])]
    if not parts:
        raise ValueError(f"{name} is the part to keep, or several in a list: got {shown(value)}.")
    for part in parts:
        if not 0 < part <= 1:
            raise ValueError(f"{name} is the part to keep and must be in (0, 1]: got {part}.")
    if any(later >= earlier for earlier, later in pairwise(parts)):
        raise ValueError(f"{name} must fall from each part to the next: got {shown(value)}.")
    return parts if several and len(parts) > 1 else parts[0]


def check_phases(warmup: float | str, cooldown: float) -> None:
    """Two parts of all steps leave some between them, or a `ValueError` that names the options."""
    if not isinstance(warmup, str) and warmup < 1 and cooldown < 1 and warmup + cooldown >= 1:
        raise ValueError(
            f"rank_warmup_steps={warmup} and rank_cooldown_steps={cooldown} leave no step to remove groups in: their "
            "sum must be below 1. Decrease one of them."
        )


def start_part(value: object, ratio_name: str, first: float) -> float:
    """
    The part of its parameters with which a layer begins, in (0, 1] and no less than the run's first size needs; or a
    `TypeError` or `ValueError` that names the options.

    Args:
        value: of `start_ratio`.
        ratio_name: `"rank_ratio"` or `"param_ratio"`.
        first: the largest ratio of that name.
    """
    start = number("start_ratio", value)
    if not 0 < start <= 1:
        raise ValueError(
            f"start_ratio is the part of the parameters to begin with and must be in (0, 1]: got {start}."
        )
    # Some part of a layer's groups holds a larger part of its parameters.
    too_small = start < first if ratio_name == "param_ratio" else start <= first
    if too_small:
        raise ValueError(
            f"start_ratio={start} would begin with less than {ratio_name}={first} asks for: give a larger "
            f"start_ratio, a smaller {ratio_name}, or leave start_ratio out."
        )
    return start


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    """A value is one of some words, or a `ValueError` that names the option."""
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}: got {shown(value)}.")


def check_switch(name: str, value: object) -> None:
    """A value is `True` or `False`, or a `TypeError` that names the option."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False: got {shown(value)}.")


def check_count(name: str, value: object) -> None:
    """A whole number from 1 on, or a `TypeError` or `ValueError` that names the option."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int: got {shown(value)}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1: got {shown(value)}.")
    if value > sys.maxsize:
        raise ValueError(f"{name} must be at most {sys.maxsize}: got {shown(value)}.")


def check_source(source: str) -> None:
    """
    Check that a model can be in a folder or, by its name, in a repository of the Hub, without asking for it.

    Raises:
        FileNotFoundError: there is no such folder, and no repository can have this name.
    """
    named = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]{0,95}", source) and not re.search(r"--|\.\.|[.-]$|\.git$", source)
    if named or os.path.exists(source):
        return
    if source.startswith((".", "~")) or os.path.isabs(source) or source.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {source}.")
    raise FileNotFoundError(
        f"There is no folder {source}, and no repository of the Hub can have this name: give a folder, or a name such "
        "as user/model."
    )


class NumberOrWord(argparse.Action):
    """A command line's option that is a number or a word, where the type of the field would allow only one of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"type": _number_or_word}))

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)


def _number_or_word(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def module_patterns(name: str, value: object) -> list[str] | str | None:
    """Name endings, one regular expression, or `None`; or a `TypeError` or `ValueError` that names the option."""
    if value is None:
        return None
    if isinstance(value, (list, tuple, set)):
        if not value or not all(isinstance(pattern, str) and pattern for pattern in value):
            raise ValueError(f"{name} must be a regular expression or a list of name endings: got {shown(value)}.")
        patterns = sorted(value) if isinstance(value, set) else list(value)
        # A command line hands over a list; a single entry that can be no module's name is a regular expression.
        if len(patterns) > 1 or (patterns[0] != "all-linear" and re.fullmatch(r"[\w.-]+", patterns[0])):
            return patterns
        value = patterns[0]
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name} must be a regular expression or a list of name endings: got {shown(value)}.")
    if value != "all-linear":
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{name}={shown(value)} is not a regular expression: {error}.") from error
    return value
