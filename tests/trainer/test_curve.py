import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file
from support.stations import DENSE_SCORES, SCORES, edit_state, leave_stations
from transformers import BertForSequenceClassification

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.report.curve import LAST
from rankdyna_trainer.trainer.curve import read_curve

AssertRefused = Callable[[Callable[[], object], type[Exception], str], None]


@pytest.fixture
def run(tiny_bert: BertForSequenceClassification, tmp_path: Path) -> Path:
    """The folder of a run with three models, of a dense one that is in `tmp_path/dense`."""
    tiny_bert.save_pretrained(tmp_path / "dense")
    leave_stations(tmp_path / "dense", tmp_path / "run")
    return tmp_path / "run"


def test_sizes_are_those_of_the_files(run: Path) -> None:
    curve = read_curve(run)
    assert list(curve.index) == ["dense", "param_ratio-0.5", "param_ratio-0.3", "last"]
    dense = load_file(run.parent / "dense" / "model.safetensors")
    # Each linear layer has a weight matrix of its own; embeddings are no linear layers.
    linear = sum(w.numel() for name, w in dense.items() if w.dim() == 2 and "embeddings" not in name)
    assert curve.loc["dense", "all_parameters"] == sum(w.numel() for w in dense.values())
    assert curve.loc["dense", "multiply_adds"] == linear
    for name, folder in {"param_ratio-0.5": run / "param_ratio-0.5", "last": run}.items():
        file, row = folder / "model.safetensors", curve.loc[name]
        # The two numbers by which a layer is checked are no parameters of it.
        tensors = {key: w for key, w in load_file(file).items() if not (key.endswith("weight") and w.shape == (2,))}
        assert row["file_bytes"] == file.stat().st_size
        assert row["all_parameters"] == sum(w.numel() for w in tensors.values())
        assert row["all_ratio"] == pytest.approx(row["all_parameters"] / curve.loc["dense", "all_parameters"])
        targets = sum(w.numel() for key, w in tensors.items() if ".encoder." in key and w.dim() == 2)
        assert row["target_parameters"] == targets and row["target_ratio"] == targets / (2 * (4 * 32**2 + 2 * 32 * 64))
        assert row["multiply_adds"] == linear - curve.loc["dense", "target_parameters"] + targets


def test_scores_are_those_of_each_model(run: Path) -> None:
    curve = read_curve(run)
    metrics = list(DENSE_SCORES)
    assert curve.loc["dense", metrics].to_dict() == DENSE_SCORES
    assert curve.loc["param_ratio-0.5", metrics].to_dict() == SCORES[0.5][20]
    assert curve.loc["param_ratio-0.3", metrics].to_dict() == SCORES[0.3][40]
    assert curve.loc[LAST, metrics].to_dict() == SCORES[0.15][80]
    assert curve["step"].tolist()[1:] == [20, 40, 80] and pd.isna(curve.loc["dense", "step"])
    # One that was evaluated before its ranks were reached alone has no score, but what was left of it afterwards.
    edit_state(run / "param_ratio-0.3", global_step=41)
    assert math.isnan(read_curve(run).loc["param_ratio-0.3", "eval_accuracy"])
    results = {"eval_accuracy": 0.81, "eval_runtime": 1.0}
    (run / "param_ratio-0.3" / "eval_results.json").write_text(json.dumps(results))
    assert read_curve(run).loc["param_ratio-0.3", "eval_accuracy"] == 0.81


def test_a_run_that_is_not_at_its_end(run: Path) -> None:
    for file in [path for path in run.iterdir() if path.is_file()]:
        file.unlink()
    (run / "param_ratio-0.15").mkdir()  # where a model is being written
    curve = read_curve(run)
    assert list(curve.index) == ["dense", "param_ratio-0.5", "param_ratio-0.3"]
    assert "eval_accuracy" in curve and math.isnan(curve.loc["dense", "eval_accuracy"])


def test_models_without_a_state(run: Path) -> None:
    for file in run.rglob("trainer_state.json"):
        file.unlink()
    curve = read_curve(run)
    assert list(curve["step"].isna()) == [True] * 4 and "eval_accuracy" not in curve


def test_what_is_no_curve(run: Path, assert_refused: AssertRefused) -> None:
    dense = run.parent / "dense"
    assert_refused(lambda: read_curve(dense), FileNotFoundError, "no folder such as param_ratio-0.5")
    assert_refused(lambda: read_curve(run / "none"), FileNotFoundError, "There is no folder")
    other = RankDynaConfig(param_ratio=0.4, rank_scope="local").to_dict()
    edit_state(run / "param_ratio-0.3", RankDyna=other)
    assert_refused(
        lambda: read_curve(run), ValueError, r"param_ratio-0.3 and param_ratio-0.5 in .* not of the same run"
    )
    shutil.rmtree(run / "param_ratio-0.3")
    shutil.copytree(dense, run / "param_ratio-0.3")
    assert_refused(lambda: read_curve(run), ValueError, r"param_ratio-0.3 holds no compressed model")
