import pandas as pd
import pytest

from rankdyna_trainer.report.card import curve_image
from rankdyna_trainer.report.curve_plot import curve_figure
from rankdyna_trainer.report.plots import as_png, history_figure, rank_heatmap, sensitivity_heatmap
from rankdyna_trainer.report.sensitivity import ALL_LAYERS, COLUMNS


def make_report(ranks, full_rank=8, dense=()):
    """The columns of `rank_report`, for layers given as {name: rank}."""
    rows = [
        {
            "layer": name,
            "out_features": full_rank,
            "in_features": full_rank,
            "full_rank": full_rank,
            "rank": rank,
            "dense_parameters": full_rank**2,
            "parameters": full_rank**2 if name in dense else 2 * rank * full_rank,
            "form": "dense" if name in dense else "low rank",
        }
        for name, rank in ranks.items()
    ]
    return pd.DataFrame(rows).set_index("layer")


def row_labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def column_labels(figure):
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


def drawn(figure):
    """{(row label, column label): text} of each written cell."""
    rows, columns = row_labels(figure), column_labels(figure)
    cells = {}
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        cells[rows[y], columns[x]] = text.get_text()
    return cells


def test_bert_has_a_column_for_each_block_and_a_row_for_each_matrix():
    ranks = {
        f"bert.encoder.layer.{block}.{matrix}": 4 + block
        for block in range(3)
        for matrix in ("attention.self.query", "output.dense")
    }
    figure = rank_heatmap(make_report(ranks))

    assert row_labels(figure) == ["attention.self.query", "output.dense"]
    assert column_labels(figure) == ["0", "1", "2"]
    assert drawn(figure)["output.dense", "2"] == "6"
    assert len(drawn(figure)) == 6
    axes, colorbar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("block", "matrix")
    assert colorbar.get_ylabel() == "rank / full rank"


def test_colour_is_the_part_of_full_rank():
    figure = rank_heatmap(make_report({"h.0.mlp.c_fc": 0, "h.1.mlp.c_fc": 2, "h.2.mlp.c_fc": 8}))
    image = figure.axes[0].images[0]
    assert image.get_array().tolist() == [[0.0, 0.25, 1.0]]
    assert image.get_clim() == (0, 1)


def test_blocks_are_in_the_order_of_their_numbers():
    ranks = {f"h.{block}.attn.c_attn": block for block in (10, 9, 0)}
    figure = rank_heatmap(make_report(ranks, full_rank=16))
    assert column_labels(figure) == ["0", "9", "10"]
    assert drawn(figure) == {("c_attn", "0"): "0", ("c_attn", "9"): "9", ("c_attn", "10"): "10"}


def test_encoder_and_decoder_are_different_rows_of_their_own_length():
    ranks = {f"model.encoder.layers.{block}.fc1": 1 for block in range(3)}
    ranks |= {"model.decoder.layers.0.fc1": 2}
    figure = rank_heatmap(make_report(ranks))
    assert row_labels(figure) == ["encoder.layers.*.fc1", "decoder.layers.*.fc1"]
    assert drawn(figure)["decoder.layers.*.fc1", "0"] == "2"
    assert figure.axes[0].images[0].get_array().mask.tolist() == [[False] * 3, [False, True, True]]


def test_nested_numbers_stay_in_the_matrix_name():
    ranks = {
        f"encoder.block.{block}.layer.{sublayer}": 3
        for block in range(2)
        for sublayer in ("0.SelfAttention.q", "1.DenseReluDense.wi")
    }
    figure = rank_heatmap(make_report(ranks))
    assert row_labels(figure) == ["0.SelfAttention.q", "1.DenseReluDense.wi"]
    assert column_labels(figure) == ["0", "1"]


def test_experts_are_rows():
    ranks = {f"model.layers.{block}.experts.{expert}.w1": 3 for block in range(2) for expert in range(4)}
    figure = rank_heatmap(make_report(ranks))
    assert row_labels(figure) == [f"{expert}.w1" for expert in range(4)]
    assert column_labels(figure) == ["0", "1"]


def test_a_number_that_never_varies_is_not_the_block():
    figure = rank_heatmap(make_report({f"0.encoder.layers.{block}.fc1": block for block in range(3)}))
    assert column_labels(figure) == ["0", "1", "2"]
    assert len(row_labels(figure)) == 1


def test_shared_blocks_and_layers_without_a_number():
    ranks = {
        "albert.encoder.embedding_hidden_mapping_in": 5,
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn": 3,
    }
    figure = rank_heatmap(make_report(ranks))
    assert row_labels(figure) == ["embedding_hidden_mapping_in", "albert_layer_groups.*.albert_layers.0.ffn"]
    assert column_labels(figure) == ["0", "none"]
    assert drawn(figure)["embedding_hidden_mapping_in", "none"] == "5"


def test_no_two_layers_share_a_cell():
    ranks = dict.fromkeys(["0.a.0", "0.a.1", "1.a.1", "a.0", "a.1", "a", "b.0.a.7"], 1)
    assert len(drawn(rank_heatmap(make_report(ranks)))) == len(ranks)


def test_dense_layers_are_framed():
    ranks = {"h.0.fc": 2, "h.1.fc": 8, "h.2.fc": 0}
    figure = rank_heatmap(make_report(ranks, dense=["h.1.fc"]))
    (frame,) = figure.axes[0].patches
    assert frame.get_x() + frame.get_width() / 2 == pytest.approx(1)
    assert frame.get_y() + frame.get_height() / 2 == pytest.approx(0)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one dense matrix"]

    without = rank_heatmap(make_report(ranks))
    assert not without.axes[0].patches and not without.legends


@pytest.mark.parametrize("blocks", [6, 30])
def test_cell_texts_fit_their_cells(blocks, tmp_path):
    ranks = {f"layers.{block}.{matrix}": 1536 for block in range(blocks) for matrix in ("q", "k", "v", "o")}
    figure = rank_heatmap(make_report(ranks, full_rank=1536))
    figure.savefig(tmp_path / "ranks.png")
    axes = figure.axes[0]
    cell = axes.transData.transform((1, 1)) - axes.transData.transform((0, 0))
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.width < abs(cell[0]) and box.height < abs(cell[1])


def test_nothing_to_draw():
    report = make_report({"h.0.fc": 1})
    with pytest.raises(ValueError, match="names no layer"):
        rank_heatmap(report.iloc[:0])


@pytest.mark.slow
def test_pyplot_is_never_touched(run_fresh):
    code = "import sys, rankdyna_trainer.report.plots; assert 'matplotlib.pyplot' not in sys.modules"
    run_fresh(code)


@pytest.mark.slow
def test_without_matplotlib_the_error_names_the_extra(run_fresh):
    code = "import sys; sys.modules['matplotlib.figure'] = None; import rankdyna_trainer.report.plots"
    run = run_fresh(code, check=False)
    assert 'Figures need matplotlib: `pip install ".[plots]"`' in run.stderr


def history(budget_in):
    """Rows of `log_history`: the remaining groups and parameters, and a budget just above one of them."""
    rows = []
    for step, groups in ((5, 40), (10, 20), (15, 12)):
        row = {"step": step, "remaining_groups": groups, "remaining_parameters": 9 * groups}
        row["rank_budget"] = row[f"remaining_{budget_in}"] + 1
        rows.append(row | {"loss": 1 / step})
        rows.append({"step": step, "eval_loss": 2 / step, "eval_accuracy": 0.5, "eval_runtime": 1.0})
    return [*rows, {"step": 15, "train_runtime": 9.0, "train_loss": 0.3}]


def lines(axes):
    """{label: points} of each drawn line."""
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.lines}


@pytest.mark.parametrize("unit", ["groups", "parameters"])
def test_history_of_a_training(unit, tmp_path):
    figure = history_figure(history(unit))
    panels = dict(zip(["groups", "parameters", "loss"], figure.axes, strict=True))
    assert [axes.get_ylabel() for axes in figure.axes] == list(panels)
    assert figure.axes[-1].get_xlabel() == "optimizer step"
    drawn = {name: lines(axes) for name, axes in panels.items()}
    assert drawn["loss"] == {
        "training": [(5, 1 / 5), (10, 1 / 10), (15, 1 / 15)],
        "eval": [(5, 2 / 5), (10, 2 / 10), (15, 2 / 15)],
    }
    assert drawn["groups"]["remaining groups"] == [(5, 40), (10, 20), (15, 12)]
    assert drawn["parameters"]["remaining parameters"] == [(5, 360), (10, 180), (15, 108)]
    points = drawn[unit][f"remaining {unit}"]
    assert drawn[unit]["budget"] == [(step, size + 1) for step, size in points]
    assert sum("budget" in drawn[name] for name in drawn) == 1
    figure.savefig(tmp_path / "history.png")


def test_history_of_several_evaluation_sets_and_of_none():
    rows = history("groups")
    for row in rows:
        if "eval_loss" in row:
            row["eval_films_loss"] = row.pop("eval_loss")
    assert list(lines(history_figure(rows).axes[-1])) == ["training", "eval_films"]
    assert list(lines(history_figure(rows[:1]).axes[-1])) == ["training"]


def test_history_of_another_training():
    with pytest.raises(ValueError, match=r"names no rank_budget.*RankDynaCallback"):
        history_figure([{"step": 1, "loss": 1.0}])


def make_curve(sizes, scores, dense=0.87):
    """The columns of `read_curve` that are drawn: the dense model, and others of these sizes and scores."""
    names = ["dense", *(f"param_ratio-{size}" for size in sizes)]
    targets = [1.0, *sizes]
    columns = {"target_ratio": targets, "all_ratio": [0.2 + 0.8 * target for target in targets]}
    return pd.DataFrame(columns | {"eval_accuracy": [dense, *scores]}, index=names)


def boxes(axes):
    """Where each text beside a point is, once the figure is drawn."""
    return {text.get_text(): text.get_window_extent() for text in axes.texts}


@pytest.mark.parametrize("metric", ["eval_accuracy", "eval_loss"])
def test_a_score_over_the_sizes(metric):
    curve = make_curve([0.5, 0.3, 0.15], [0.86, 0.84, 0.79]).rename(columns={"eval_accuracy": metric})
    if metric == "eval_loss":
        curve[metric] = 1.2 - curve[metric]
    figure = curve_figure(curve)
    assert curve_image(curve, metric.removeprefix("eval_")) == as_png(figure)
    (axes,) = figure.axes
    points = [tuple(map(float, point)) for point in axes.lines[0].get_xydata()]
    assert points == list(curve[["target_ratio", metric]].iloc[1:].itertuples(index=False, name=None))
    assert axes.get_ylabel() == metric and "of all parameters" in axes.get_xlabel()
    labels = {
        float(tick): label.get_text() for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    }
    assert labels == {1.0: "1\n(1.00)", 0.5: "0.5\n(0.60)", 0.3: "0.3\n(0.44)", 0.15: "0.15\n(0.32)"}
    left, right = (axes.transData.transform((size, 0))[0] for size in (1.0, 0.15))
    assert left < right, "the dense model is at the left"
    texts, frame = boxes(axes), axes.get_window_extent()
    assert list(texts) == [f"dense {curve[metric].iloc[0]:.4g}", *(f"{score:.4g}" for _, score in points)]
    height = axes.transData.transform((1, curve[metric].iloc[0]))[1]
    for text, box in texts.items():
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, text
        assert not box.y0 < height < box.y1, f"{text} is on the dense line"
        assert all(text == other or not box.overlaps(other_box) for other, other_box in texts.items())


def test_a_curve_without_the_dense_score_or_some_other():
    figure = curve_figure(make_curve([0.5, 0.3, 0.15], [0.86, float("nan"), 0.79], dense=float("nan")))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.86", "0.79"]
    assert axes.get_xticks().tolist() == [0.5, 0.15] and len(axes.lines) == 1
    figure.draw_without_rendering()
    assert all(axes.get_window_extent().x0 <= box.x0 for box in boxes(axes).values())
    with pytest.raises(ValueError, match="None of these models was evaluated"):
        curve_figure(make_curve([0.5], [float("nan")]))


def test_one_of_two_sizes_next_to_each_other_is_labelled_and_nothing_left_has_a_place():
    (axes,) = curve_figure(make_curve([0.31, 0.3, 0.1], [0.85, 0.84, 0.7])).axes
    assert axes.get_xticks().tolist() == [1.0, 0.31, 0.1]
    assert [text.get_text() for text in axes.texts] == ["dense 0.87", "0.85", "0.7"]
    (axes,) = curve_figure(make_curve([0.5, 0.0], [0.85, 0.5])).axes
    assert axes.get_xticks().tolist() == [1.0, 0.5, 0.0]


def test_sensitivity_has_a_panel_for_each_ratio():
    names = [f"h.{block}.{matrix}" for block in range(2) for matrix in ("attn", "mlp")]
    rises = {0.5: [0.01, 0.01, 0.01, 0.02], 0.2: [0.1, 0.1, -0.0001, 0.9]}
    keys = [(name, ratio) for name in names for ratio in rises] + [(ALL_LAYERS, ratio) for ratio in rises]
    values = [rises[ratio][names.index(name)] if name in names else 2.0 for name, ratio in keys]
    index = pd.MultiIndex.from_tuples(keys, names=["layer", "param_ratio"])
    costs = pd.DataFrame([[4, 100, 50, 1 + value, value, 0.001] for value in values], index, COLUMNS)
    figure = sensitivity_heatmap(costs)

    upper, lower = [axes for axes in figure.axes if axes.images and axes.get_xlabel()]
    assert [text.get_text() for text in upper.texts] == ["0.010", "0.010", "0.010", "0.020"]
    assert [text.get_text() for text in lower.texts] == ["0.100", "0.100", "0.000", "0.900"]
    assert lower.images[0].get_array().tolist() == [[0.1, -0.0001], [0.1, 0.9]]
    assert "(all layers together: +2.000)" in lower.get_title()
    # At the smaller ratio one layer costs nine times what the median does.
    assert [frame.get_xy() for frame in lower.patches] == [(0.55, 0.55)] == [frame.get_xy() for frame in upper.patches]
    assert column_labels(figure) == ["0", "1"] and row_labels(figure) == ["attn", "mlp"]
