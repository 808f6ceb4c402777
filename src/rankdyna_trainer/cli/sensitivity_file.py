"""The file that `rankdyna sensitivity` leaves beside a model, and `rankdyna inspect` shows."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from ..report.generated import SOFTWARE
from ..report.sensitivity import ALL_LAYERS
from ..report.staging import staging_folder

NAME = "rankdyna_sensitivity.json"

logger = logging.getLogger(__name__)


def write_sensitivity(place: Path, document: dict[str, Any], costs: pd.DataFrame) -> Path | None:
    """
    Write what was measured, and its heatmap beside it.

    Args:
        place: of the .json file.
        document: what it holds.
        costs: from [`~rankdyna_trainer.report.sensitivity.layer_sensitivity`].

    Returns:
        The file of the heatmap; `None` without matplotlib, which is logged.

    Raises:
        OSError: it cannot be written. What was there before is as it was.
    """
    with staging_folder(place.parent) as staging:
        picture = None
        try:
            from ..report.plots import sensitivity_heatmap
        except ImportError as error:
            logger.warning("There is no heatmap of the sensitivity. %s", error)
        else:
            picture = place.with_suffix(".png")
            figure = sensitivity_heatmap(costs)
            figure.savefig(staging / picture.name, format="png", dpi=150, metadata={"Software": SOFTWARE})
        (staging / place.name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if picture is not None:
            os.replace(staging / picture.name, picture)
        os.replace(staging / place.name, place)
    return picture


def read_sensitivity(folder: Path, model: nn.Module) -> dict[str, Any] | None:
    """
    What was measured of a model, if it was; a file of another model, or a damaged one, is left aside with a log line.

    Args:
        folder: of the model.
        model: dense; its parameters may be without values.

    Returns:
        What [`write_sensitivity`] wrote.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        other = _what_differs(document, model)
    except (OSError, ValueError, TypeError, LookupError) as error:
        other = f"cannot be read ({error!r})"
    if other:
        logger.warning("%s is left aside, since it %s: run `rankdyna sensitivity %s` again.", file, other, folder)
        return None
    return dict(document)


def sensitivity_in_words(document: dict[str, Any]) -> list[str]:
    """The lines that sum a file up."""
    middle = document["middle_ratio"]
    together = {row["param_ratio"]: row["increase"] for row in document["together"] if row["layer"] == ALL_LAYERS}
    at_middle = [row for row in document["layers"] if row["param_ratio"] == middle]
    dearest = sorted(at_middle, key=lambda row: -float(row["increase"]))[:3]
    rises = ", ".join(f"{rise:+.4f} at param_ratio {ratio:g}" for ratio, rise in together.items())
    excluded = " ".join(f"--exclude_modules {ending}" for ending in document["exclude_modules"])
    return [
        f"Sensitivity: loss {document['dense_loss']:.4f} on {document['rows']:,} rows; all layers truncated without "
        f"training: {rises}",
        f"dearest alone at {middle:g}: " + ", ".join(f"{row['layer']} {row['increase']:+.4f}" for row in dearest),
        f"far dearer than others: {excluded}" if excluded else "no layer is far dearer than the others",
    ]


def _what_differs(document: dict[str, Any], model: nn.Module) -> str | None:
    if document["class"] != type(model).__name__:
        return f"is of a {document['class']}, and the model is a {type(model).__name__}"
    modules = dict(model.named_modules())
    for row in document["layers"]:
        weight = getattr(modules.get(row["layer"]), "weight", None)
        if weight is None or weight.numel() != row["dense_parameters"]:
            return f"tells of a layer that the model has not, or of another size ({row['layer']})"
    sensitivity_in_words(document)
    return None
