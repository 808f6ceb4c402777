"""What is drawn in the figures of `reproduce.py`."""

import pandas as pd
import pytest
from reproduction.figures import bins_of, figure1, figure2_loss, figure2_scores, figure3, figure4, portions


def test_bins():
    assert [len(part) for part in bins_of(768, 14)] == [55] * 13 + [53]
    assert [number for part in bins_of(32, 14) for number in part] == list(range(32))
    assert portions([0, 1, 5], bins_of(6, 2)) == pytest.approx([2 / 3, 1 / 3])
    assert portions([], bins_of(6, 2)) == [0, 0]


def positions_of(steps, removal_step):
    matrix = {"groups": 50, "positions": {"1": [0.02] * steps, "40": [0.8] * steps}, "movement": [0.0] * (steps - 1)}
    return {
        **{"steps": steps, "removal_step": removal_step, "removed_part": 0.8, "block": "layer.1", "removed": {}},
        "matrices": {"W_o": {"layer": "o"} | matrix, "W_f2": {"layer": "f"} | matrix},
    }


def labelled(axes):
    return bool(axes.get_xlabel() and axes.get_ylabel())


def test_figure1_draws_the_positions():
    figure = figure1(positions_of(5, 3), positions_of(5, None), "a title")
    assert len(figure.axes) == 4 and labelled(figure.axes[2])
    for axes in figure.axes:
        first, second = axes.lines[:2]
        assert list(first.get_xdata()) == [1, 2, 3, 4, 5]
        assert list(first.get_ydata()) == [0.02] * 5 and list(second.get_ydata()) == [0.8] * 5
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 2, 2]
    assert list(figure.axes[0].lines[2].get_xdata()) == [3, 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["group 1", "group 40"]


def test_figure2_draws_means_and_spreads():
    rows = [["global", 0.5, 0, 0.6, 80.0], ["global", 0.5, 1, 0.4, 90.0], ["local", 0.5, 0, 0.4, 70.0]]
    runs = pd.DataFrame(rows, columns=["scope", "ratio", "seed", "parameters", "score"])
    figure = figure2_scores(runs, "a title", "accuracy, %")
    left, right = figure.axes
    assert left.get_xlabel() and right.get_xlabel() and left.get_ylabel() == "accuracy, %"
    means = [[list(bars.lines[0].get_xydata()[0]) for bars in axes.containers] for axes in (left, right)]
    assert means == [[[0.5, 85], [0.5, 70]], [[0.5, 85], [0.4, 70]]]
    spread = left.containers[0].lines[2][0].get_segments()[0]
    assert spread[:, 1] == pytest.approx([85 - 50**0.5, 85 + 50**0.5])

    rows = [
        [scope, seed, step, step + seed, 9 - step]
        for scope in ("global", "local")
        for seed in (0, 1)
        for step in (1, 2)
    ]
    losses = pd.DataFrame(rows, columns=["scope", "seed", "step", "loss", "rank_budget"])
    loss, budget = figure2_loss(losses, "a title", window=1).axes
    assert labelled(loss) and budget.get_ylabel()
    assert [line.get_ydata().tolist() for line in loss.lines] == [[1.5, 2.5]] * 2
    assert budget.lines[0].get_xydata().tolist() == [[1, 8], [2, 7]]
    smooth = figure2_loss(losses, "a title", window=3).axes[0]
    assert smooth.lines[0].get_ydata().tolist() == [2, 2]


def test_figure3_has_one_scale_of_colours():
    def report(ranks):
        rows = {f"layer.{i}.query": {"rank": rank, "full_rank": 8, "form": "low rank"} for i, rank in enumerate(ranks)}
        return pd.DataFrame.from_dict(rows, orient="index")

    figure = figure3({"one": report([1, 2]), "two": report([4, 0])}, "a title")
    one, two, colours = figure.axes
    assert [axes.get_title() for axes in (one, two)] == ["one", "two"] and labelled(one) and labelled(two)
    assert [text.get_text() for text in (*one.texts, *two.texts)] == ["1", "2", "4", "0"]
    assert one.images[0].get_clim() == two.images[0].get_clim() == (0, 0.5)
    assert colours.get_ylabel() == "rank / full rank"


def test_figure4_draws_the_portions():
    figure = figure4([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [0, 5], "a title", bins=3)
    svd, own = figure.axes
    assert [[bar.get_height() for bar in axes.containers[1]] for axes in (svd, own)] == [[1, 0, 0], [0.5, 0, 0.5]]
    assert [label.get_text() for label in own.get_xticklabels()] == ["1\u20132\n5.5", "3\u20134\n3.5", "5\u20136\n1.5"]
    assert own.get_xlabel() and own.get_ylabel() and svd.get_ylabel()
