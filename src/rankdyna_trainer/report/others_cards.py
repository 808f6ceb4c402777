"""What a card takes over from those that others wrote: the base model's, and the one of the `Trainer`."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from .generated import CARD

# Whoever passes a model on has to name its licence.
PASSED_ON = ("license", "license_name", "license_link", "language")


def passed_on(model: Any) -> dict[str, Any]:
    """
    The licence and the language of the model that one was made from.

    Args:
        model: whose configuration names a folder or a repository of the Hub, or does not.

    Returns:
        What the card of that model says, by the names of its metadata, if it lies in the folder or in the Hub's cache:
        nothing is downloaded.
    """
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not source:
        return {}
    with suppress(Exception):  # what is wrong with another's card is no reason to write none
        file = Path(source, CARD) if Path(source).is_dir() else try_to_load_from_cache(source, CARD)
        if isinstance(file, (str, Path)) and Path(file).is_file():
            data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
            return {name: data[name] for name in PASSED_ON if data.get(name)}
    return {}


def around_introduction(text: str) -> tuple[str, str]:
    """What stands before the title of a card, and the sections after its introduction that say something."""
    heading = re.search(r"^# .*$", text, re.MULTILINE)
    title = heading.start() if heading else 0
    section = re.search(r"^## ", text[title:], re.MULTILINE)
    sections = text[title + section.start() :].strip() if section else ""
    return text[:title].strip(), re.sub(r"^#+ .*\n+More information needed\s*", "", sections, flags=re.MULTILINE)
