"""
Draw the picture at the head of the README: score and latency over size, dense and compressed, from committed numbers.

Scores are those of the first table of REPRODUCTION.md; latencies are documents of `rankdyna benchmark --json`, one a
line, of models of the same cells.

    python scripts/front_picture.py --output docs/_static/front.png
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from reproduction.figures import BLACK, BLUE, GREEN, ORANGE, VERMILION

ROOT = Path(__file__).parents[1]
DENSE, OURS = "dense", "RankDyna, equal parameters"
STYLES: dict[str, dict[str, Any]] = {
    "SVD": {"label": "SVD", "color": ORANGE, "marker": "v", "linewidth": 1.2},
    "FWSVD": {"label": "FWSVD", "color": GREEN, "marker": "^", "linewidth": 1.2},
    "TFWSVD": {"label": "TFWSVD", "color": BLUE, "marker": "D", "linewidth": 1.2},
    OURS: {"label": "RankDyna", "color": VERMILION, "marker": "o", "linewidth": 2.5},
}
CELL = re.compile(r"(\d+\.\d+) ± (\d+\.\d+)")


class Score(NamedTuple):
    """A cell of the table: parts of the parameters, of the target layers and of all, and percent of three seeds."""

    target: float
    all: float
    mean: float
    spread: float


class Latency(NamedTuple):
    """The time of a forward pass, that of the dense model being 1, by the part of the parameters."""

    target: float
    batch: int
    time: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, default=ROOT / "REPRODUCTION.md")
    parser.add_argument("--latencies", type=Path, default=ROOT / "docs" / "_static" / "front.jsonl")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    figure = draw(read_scores(options.scores), read_latencies(options.latencies))
    figure.savefig(options.output, dpi=150)


def read_scores(page: Path) -> dict[str, list[Score]]:
    """By method, the largest size first; `DENSE` has one."""
    text = page.read_text(encoding="utf-8")
    table = text[text.index("\n| rank ratio") :].partition("\n\n")[0]
    scores: dict[str, list[Score]] = {}
    for row in table.splitlines():
        cells = [cell.strip() for cell in row.strip("| ").split("|")]
        if cells[1:2] and cells[1] in (DENSE, *STYLES) and (score := CELL.fullmatch(cells[-1])):
            sizes = float(cells[2]), float(cells[3])
            scores.setdefault(cells[1], []).append(Score(*sizes, float(score[1]), float(score[2])))
    return scores


def read_latencies(documents: Path) -> list[Latency]:
    """One for each document, in their order."""
    latencies = []
    for line in documents.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        batch = document["inputs"]["input_ids"][0]
        latencies.append(Latency(document["target_parameter_ratio"], batch, document["timings"][0]["ratio"]))
    return latencies


def draw(scores: dict[str, list[Score]], latencies: list[Latency]) -> Figure:
    """
    Two panels over the part of the parameters that is kept: the score, and the time beside a dense model.

    Args:
        scores: from `read_scores`.
        latencies: from `read_latencies`.
    """
    figure = Figure(figsize=(7.8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, style in STYLES.items():
        sizes, _, means, spreads = zip(*(scores[DENSE] if name == OURS else []), *scores[name], strict=True)
        left.errorbar(sizes, means, yerr=spreads, capsize=3, **style)
    left.axhline(scores[DENSE][0].mean, color=BLACK, linestyle="--", linewidth=1, label="dense")
    left.set(title="Accuracy on SST-2, %", ylabel="mean and spread of three seeds")
    for batch, colour in zip(sorted({latency.batch for latency in latencies}), (BLUE, VERMILION), strict=True):
        of_batch = [Latency(1.0, batch, 1.0), *(latency for latency in latencies if latency.batch == batch)]
        sizes, _, times = zip(*of_batch, strict=True)
        right.plot(sizes, times, color=colour, marker="o", label=f"batch of {batch}")
    right.axhline(1, color=BLACK, linestyle="--", linewidth=1)
    right.set(title="Forward pass on a CPU, dense = 1", ylim=(0, 1.1))
    for axes in (left, right):
        _show_sizes(axes, [scores[DENSE][0], *scores[OURS]])
    left.legend(loc="lower left", frameon=False, fontsize=8)
    right.legend(loc="lower left", frameon=False, fontsize=8)
    return figure


def _show_sizes(axes: Axes, sizes: list[Score]) -> None:
    """Both parts of the parameters at each size, the dense model at the left."""
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks([size.target for size in sizes], [f"{size.target:.2f}\n({size.all:.2f})" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("target layers' parameters kept (of all parameters)")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
