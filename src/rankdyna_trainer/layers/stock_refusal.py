"""
Where a `transformers` that does not know the format is told to stop, in words that name this library.

An entry of `config.json`, `transformers_weights`, names the file of the weights. It is read by every `from_pretrained`
before any weight is, and what is no name of a file is printed in a `ValueError`, which no option suppresses: not
`ignore_mismatched_sizes` either, with which the layers would be random. Where the format is known, it is not seen.
"""

from typing import Any

from ..options import METHOD

ENTRY = "transformers_weights"
_OURS = "this "  # no file has such a name
_COMPACTED = f"{_OURS}model is compressed with rankdyna-trainer"
SELF_CONTAINED = (
    f"{_COMPACTED}. Load it with trust_remote_code=True, or `import rankdyna_trainer` before it is loaded."
)
COMPACTED = f"{_COMPACTED}. Install that, and `import rankdyna_trainer` before it is loaded."
UNFINISHED = (
    f"{_OURS}is a checkpoint of a running compression with rankdyna-trainer, which a Trainer resumes from. "
    "`rankdyna compact` makes a model of it that can be loaded."
)


class HiddenEntry:
    """
    The entry as an attribute of configurations: to those who load a model it is as if a text of ours were not there,
    if the ranks are, by which it can be loaded. And our texts are saved, while `transformers` saves no value of it.
    """

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        if config is None:
            return self
        if ENTRY not in vars(config):
            raise AttributeError(f"{type(config).__name__!r} object has no attribute {ENTRY!r}")
        return None if METHOD in vars(config) and _is_ours(config) else vars(config)[ENTRY]

    def __set__(self, config: Any, value: Any) -> None:
        vars(config)[ENTRY] = value

    def __delete__(self, config: Any) -> None:
        if not _is_ours(config):
            del vars(config)[ENTRY]


def _is_ours(config: Any) -> bool:
    return str(vars(config).get(ENTRY)).startswith(_OURS)
