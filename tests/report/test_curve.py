import math
import re

import pandas as pd
import pytest

from rankdyna_trainer.report.curve import SIZES, chosen_metric, curve_section, score_names

NAN = math.nan


def make_curve(**scores: list[float]) -> pd.DataFrame:
    """The dense model and two others, with these scores each."""
    sizes = {
        "target_ratio": [1.0, 0.4996, 0.0664],
        "all_ratio": [1.0, 0.6, 0.3],
        "target_parameters": [1000, 500, 66],
        "all_parameters": [1250, 750, 316],
        "file_bytes": [5_000_000, 3_000_000, 1_264_000],
        "multiply_adds": [1100, 600, 166],
        "step": pd.array([None, 20, 80], dtype="Int64"),
    }
    assert set(sizes) == set(SIZES)
    return pd.DataFrame(sizes | scores, index=["dense", "param_ratio-0.5", "last"])


def test_the_first_score_that_is_no_loss_is_chosen() -> None:
    curve = make_curve(eval_f1=[0.9, 0.8, 0.7], eval_accuracy=[NAN, 0.8, NAN], eval_loss=[1.0, 2.0, 3.0])
    assert score_names(curve) == ["eval_f1", "eval_accuracy", "eval_loss"]
    assert chosen_metric(curve) == "eval_f1"
    assert chosen_metric(curve, "loss") == chosen_metric(curve, "eval_loss") == "eval_loss"
    assert chosen_metric(make_curve(eval_loss=[NAN, 2.0, 3.0])) == "eval_loss"
    assert chosen_metric(make_curve(eval_loss=[1.0, 2.0, 3.0], eval_b=[1.0, 0.5, 0.2], latency=[1.0] * 3)) == "eval_b"
    with pytest.raises(ValueError, match=r"metric 'acc' is no score of these models, which have eval_f1, eval_a"):
        chosen_metric(curve, "acc")
    # The dense model's score alone makes no curve.
    for nothing in (make_curve(), make_curve(eval_loss=[1.0, NAN, NAN])):
        with pytest.raises(ValueError, match="None of these models was evaluated"):
            chosen_metric(nothing)


def cells(section: str) -> list[list[str]]:
    """The rows of a Markdown table, its header first."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert {len(row) for row in rows} == {len(rows[0])} and all(re.fullmatch(":?-+:?", cell) for cell in rows[1])
    return [rows[0], *rows[2:]]


def test_the_section_marks_the_row_of_its_model() -> None:
    section = curve_section(make_curve(eval_accuracy=[0.87, 0.86, NAN], eval_loss=[0.1, 0.2, 0.3]), "param_ratio-0.5")
    assert section.startswith("## Sizes of the same run\n\n|")
    header, dense, here, last = cells(section)
    assert header[0] == "model" and header[-1] == "eval_accuracy"
    assert dense == ["dense", "1.000", "1.000", "1,250", "5.0", "1,100", "0.87"]
    assert here == [
        f"**{cell}**" for cell in ("param_ratio-0.5, this model", "0.500", "0.600", "750", "3.0", "600", "0.86")
    ]
    assert last == ["last", "0.066", "0.300", "316", "1.3", "166", ""]
    assert cells(curve_section(make_curve(eval_accuracy=[0.87, 0.86, NAN]), "last"))[-1][-1] == ""


def test_a_section_without_scores_has_sizes() -> None:
    header, *rows = cells(curve_section(make_curve(), "last"))
    assert header[-1] == "multiply-adds" and len(rows) == 3
    with pytest.raises(ValueError, match="None of these models was evaluated"):
        curve_section(make_curve(), "last", "eval_accuracy")
    with pytest.raises(ValueError, match=r"has no model 'param_ratio-0.4': it has dense, param_ratio-0.5, last"):
        curve_section(make_curve(), "param_ratio-0.4")
