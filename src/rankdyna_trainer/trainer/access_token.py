"""Keeps the access token of a run out of what the run writes."""

from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments


class UnsavedToken(str):
    """An access token that `pickle` writes as `None`, and that is otherwise the same string."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()

    def __copy__(self) -> "UnsavedToken":
        return self

    def __deepcopy__(self, memo: Any) -> "UnsavedToken":
        return self


def protect_token(args: TrainingArguments) -> None:
    """
    Keep `hub_token` out of `training_args.bin`, into which a `Trainer` pickles its arguments.

    Each checkpoint has that file, and the `Trainer` pushes it to the Hub, where all may read it.
    """
    if args.hub_token is not None:
        args.hub_token = UnsavedToken(args.hub_token)
