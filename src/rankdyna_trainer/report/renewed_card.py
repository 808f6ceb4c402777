"""A card that was generated before its model could be loaded in another way."""

import re
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn

from .card import model_card, write_card
from .generated import CARD, is_unchanged

_LOADING = re.compile(r"^## How to load it\n.*?(?=^## )", re.MULTILINE | re.DOTALL)


def renew_loading(model: nn.Module, directory: Path) -> None:
    """
    Let the card of a saved model say how that is loaded now; one that a person wrote or changed is kept.

    Args:
        model: as it is on disk; its parameters may be without values.
        directory: where it is.
    """
    if not is_unchanged(directory / CARD):
        return
    card = ModelCard.load(directory / CARD, ignore_metadata_errors=True)
    name = re.search(r'from_pretrained\("([^"]+)"', card.text)
    new = _LOADING.search(model_card(model, name[1] if name else directory.resolve().name).text)
    if new is not None:
        card.text = _LOADING.sub(lambda _: new[0], card.text)
        write_card(card, directory)
