"""The figure of a curve, with matplotlib: the extra named `plots`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..options import how_to_install
from .curve import DENSE, chosen_metric, is_loss

try:
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import NullLocator
except ImportError as error:
    raise ImportError(f"Figures need matplotlib: {how_to_install('plots')}.") from error

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.transforms import Transform

# Of sizes that are nearer to each other than this part of the axis one alone is labelled.
LABEL_GAP = 0.1


def curve_figure(curve: pd.DataFrame, metric: str | None = None) -> Figure:
    """
    Draw a score over the part of the parameters that is kept, and that of the dense model as a line where it is known.

    Args:
        curve: from [`read_curve`]; models without this score are left out.
        metric: as for [`chosen_metric`].

    Raises:
        ValueError: no model was evaluated, or none has this score.
    """
    name = chosen_metric(curve, metric)
    scored = curve.dropna(subset=[name])
    compacted = scored.drop(index=DENSE, errors="ignore")
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(compacted["target_ratio"], compacted[name], marker="o", linewidth=2)
    # On this side of a point there is neither the dense line nor the next point.
    side = 1 if is_loss(name) else -1
    for score in scored.loc[scored.index == DENSE, name]:
        axes.axhline(score, color="black", linestyle="--", linewidth=1)
        axes.plot(1, score, marker="o", color="black", markerfacecolor="white")
        _write_beside(axes, f"dense {score:.4g}", (1, score), (-5, -3 * side), axes.get_yaxis_transform())
    axes.margins(x=0.14, y=0.16)
    axes.set_ylabel(name)
    told = _show_sizes(axes, scored)
    for size, score in zip(compacted["target_ratio"], compacted[name], strict=True):
        if size in told:
            _write_beside(axes, f"{score:.4g}", (size, score), (-5, 5 * side))
    return figure


def _write_beside(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[int, int], transform: Transform | None = None
) -> None:
    """At the left of a point, so many typographic points above or below it."""
    axes.annotate(
        text,
        point,
        xycoords=transform or axes.transData,
        xytext=offset,
        textcoords="offset points",
        horizontalalignment="right",
        verticalalignment="bottom" if offset[1] > 0 else "top",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _show_sizes(axes: Axes, sizes: pd.DataFrame) -> list[float]:
    """
    Both parts of the parameters at each size, the largest at the left, but not at one that is next to another.

    Returns:
        The sizes at which they stand.
    """
    if sizes["target_ratio"].min() > 0:
        axes.set_xscale("log")
    axes.invert_xaxis()
    axes.autoscale_view()
    to_axes, labels, last = axes.transScale + axes.transLimits, dict[float, str](), -1.0
    for target, whole in zip(sizes["target_ratio"], sizes["all_ratio"], strict=True):
        place = to_axes.transform((target, 0))[0]
        if place >= last + LABEL_GAP:
            labels[target], last = f"{target:.2g}\n({whole:.2f})", place
    axes.set_xticks([*labels], [*labels.values()])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("target layers' parameters kept (of all parameters)")
    axes.grid(alpha=0.3)
    return [*labels]
