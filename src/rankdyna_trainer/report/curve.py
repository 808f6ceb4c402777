"""The models that one run has left at several sizes, side by side: which score each of them has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..options import shown

# Imported where a table is made: a card needs none to be read.
if TYPE_CHECKING:
    import pandas as pd

# In the index of a curve: the dense model, and the one in the run's own folder.
DENSE, LAST = "dense", "last"
# The columns that are no scores.
SIZES = ("target_ratio", "all_ratio", "target_parameters", "all_parameters", "file_bytes", "multiply_adds", "step")
LATENCY = "latency"
# Of the section of a card.
HEADING = "## Sizes of the same run"


def score_names(curve: pd.DataFrame) -> list[str]:
    """
    The scores that at least one compacted model of a curve has.

    Args:
        curve: from [`read_curve`].

    Returns:
        Their names, losses last.
    """
    compacted = curve.drop(index=DENSE).drop(columns=[*SIZES, LATENCY], errors="ignore")
    return sorted(compacted.columns[compacted.notna().any()], key=is_loss)


def is_loss(metric: str) -> bool:
    """Whether a score is better the smaller it is."""
    return metric.endswith("loss")


def chosen_metric(curve: pd.DataFrame, metric: str | None = None) -> str:
    """
    The score that is shown of a curve.

    Args:
        curve: from [`read_curve`].
        metric: its name, with `eval_` before it or without, as for `metric_for_best_model`; if left out, the first one
            that is no loss, or else the loss.

    Raises:
        ValueError: no model of the curve has a score, or none has this one.
    """
    names = score_names(curve)
    if not names:
        raise ValueError(
            "None of these models was evaluated, so there is no score to show: train with an eval_dataset and an "
            'eval_strategy, such as eval_strategy="epoch".'
        )
    if metric is None:
        return names[0]
    for name in (metric, f"eval_{metric}"):
        if name in names:
            return name
    raise ValueError(f"metric {shown(metric)} is no score of these models, which have {', '.join(names)}.")


def curve_section(curve: pd.DataFrame, here: str, metric: str | None = None, note: str = "") -> str:
    """
    The section of a card that shows a model among the others of its run.

    Args:
        curve: from [`read_curve`].
        here: the model that the card is of, as the index of the curve has it; its row is marked.
        metric: as for [`chosen_metric`].
        note: how one of them was chosen, in a sentence.

    Returns:
        A heading and a Markdown table with a row a model, the dense one first. Without any score it has sizes alone.

    Raises:
        ValueError: the curve has no model `here`, or no score `metric`.
    """
    if here not in curve.index:
        raise ValueError(f"The run has no model {shown(here)}: it has {', '.join(curve.index)}.")
    chosen = chosen_metric(curve, metric) if metric is not None or score_names(curve) else None
    columns = ["model", "of the target layers", "of all", "parameters", "weight files, MB", "multiply-adds"]
    columns += [chosen] if chosen else []
    lines = [f"| {' | '.join(columns)} |", f"| :-- |{' --: |' * (len(columns) - 1)}"]
    for name, row in curve.iterrows():
        cells = [f"{row['target_ratio']:.3f}", f"{row['all_ratio']:.3f}", f"{row['all_parameters']:,.0f}"]
        cells += [f"{row['file_bytes'] / 1e6:,.1f}", f"{row['multiply_adds']:,.0f}"]
        if chosen:
            cells.append("" if row[chosen] != row[chosen] else f"{row[chosen]:.4g}")  # NaN where it was not evaluated
        if name == here:
            lines.append(f"| **{name}, this model** | {' | '.join(f'**{cell}**' if cell else '' for cell in cells)} |")
        else:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    how = (
        "Parts of the parameters that are kept, and multiply-adds of all linear layers for a token. Each model is in "
        f"the folder of its name, inside that of the {LAST} one. Size of the dense weight files: computed."
    )
    return "\n".join([HEADING, "", *lines, "", f"{how} {note}".strip()])
