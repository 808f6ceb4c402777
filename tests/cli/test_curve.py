import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.stations import DENSE_SCORES, SCORES, edit_state, leave_stations
from support.training_runs import Folders

from rankdyna_trainer.report import timing as clock

Document = Callable[..., Any]
Refusal = Callable[..., str]
NAMES = ["dense", "param_ratio-0.5", "param_ratio-0.3", "last"]


@pytest.fixture(scope="module")
def left(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with three models."""
    leave_stations(folders.dense, root := tmp_path_factory.mktemp("stations") / "run")
    return root


@pytest.fixture
def run(left: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(left, tmp_path / "run"))


def test_the_document_and_its_pictures(document: Document, run: Path) -> None:
    found = document("curve", run, "--length", 16, "--batch_size", 2, "--repeats", 3)
    assert found["metric"] == "eval_accuracy" and found["inputs"] == {"input_ids": [2, 16]}
    assert [model["model"] for model in found["models"]] == NAMES
    dense, half, third, last = found["models"]
    assert dense["scores"] == DENSE_SCORES and dense["step"] is None and last["scores"] == SCORES[0.15][80]
    for model, folder in ((half, run / "param_ratio-0.5"), (third, run / "param_ratio-0.3"), (last, run)):
        report = document("report", folder)
        assert model["file_bytes"] == report["file_bytes"] and model["step"] == report["run"]["step"]
        assert model["target_ratio"] == report["summary"]["target_ratio"]
        assert (model["all_ratio"], model["all_parameters"]) == (
            report["summary"]["all_ratio"],
            report["summary"]["all_parameters"],
        )
        assert model["multiply_adds"] == report["multiply_adds_per_vector"]["linear"]
        assert dense["multiply_adds"] == report["multiply_adds_per_vector"]["dense_linear"]
        assert dense["all_parameters"] == report["summary"]["dense_all_parameters"]
    for model in found["models"]:
        seconds = model["latency"]["seconds"]
        assert len(seconds) == 3 and model["latency"]["median"] == statistics.median(seconds)
    assert found["pictures"] == [str(run / "curve.png"), str(run / "curve.svg")]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (run / "curve.svg").read_text()


def test_each_model_is_timed_under_its_own_name(
    document: Document, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the parameters of the model that runs in the place of seconds."""

    def size(work: Any) -> float:
        work()
        return float(sum(parameter.numel() for parameter in work.__wrapped__.func.parameters()))

    monkeypatch.setattr(clock, "timed", size)
    for model in document("curve", run, "--length", 8, "--repeats", 1)["models"]:
        assert model["latency"]["median"] == model["all_parameters"]


def test_the_tables(rankdyna: Callable[..., str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = rankdyna("curve", run, "--length", 8, "--repeats", 1)
    rows = [line.split() for line in shown.splitlines()]
    for name, score in zip(NAMES, (0.87, 0.86, 0.84, 0.8), strict=True):
        scores, sizes = (row for row in rows if row[:1] == [name])
        assert scores[3] == str(score) and len(scores) == 5 and len(sizes) == 4
    assert "medians of 1, float32, cpu" in shown and f"Wrote {run / 'curve.png'} and {run / 'curve.svg'}." in shown
    untimed = rankdyna("curve", run, "--no_latency", "--metric", "loss")
    assert "eval_loss" in untimed and "medians" not in untimed


def test_pictures_of_others_are_kept(document: Document, run: Path) -> None:
    (run / "curve.png").write_bytes(b"mine")
    for _ in range(2):  # ours is replaced
        found = document("curve", run, "--no_latency")
        assert found["pictures"] == [str(run / "curve.rankdyna.png"), str(run / "curve.svg")]
    assert (run / "curve.png").read_bytes() == b"mine"
    assert sorted(path.name for path in run.glob("curve*")) == ["curve.png", "curve.rankdyna.png", "curve.svg"]


def test_another_place(document: Document, run: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in run.iterdir())
    found = document("curve", run, "--no_latency", "-o", tmp_path / "sizes.pdf", "--metric", "eval_loss")
    assert found["pictures"] == [str(tmp_path / "sizes.pdf")] and found["metric"] == "eval_loss"
    assert (tmp_path / "sizes.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in run.iterdir()) == before
    assert "latency" not in found["models"][0] and "device" not in found


def test_what_has_no_curve(
    refusal: Refusal, folders: Folders, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no folder such as param_ratio-0.5" in refusal(1, "curve", folders.compacted)
    assert "There is no folder" in refusal(1, "curve", tmp_path / "none")
    assert "must end in .png, .pdf, .svg" in refusal(2, "curve", run, "-o", tmp_path / "curve.bmp")
    assert "in a folder that is there" in refusal(1, "curve", run, "-o", tmp_path / "no" / "curve.png")
    # What is wrong is said before the models are timed.
    monkeypatch.setattr(clock, "timed", None)
    assert "metric 'f1' is no score" in refusal(1, "curve", run, "--metric", "f1")
    weights = run / "param_ratio-0.3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert "model.safetensors is damaged" in refusal(1, "curve", run)
    shutil.rmtree(run / "param_ratio-0.3")
    for folder in (run, run / "param_ratio-0.5"):
        edit_state(folder, log_history=[])
    assert "None of these models was evaluated" in refusal(1, "curve", run)
    monkeypatch.setitem(sys.modules, "rankdyna_trainer.report.plots", None)
    monkeypatch.delattr("rankdyna_trainer.report.plots", raising=False)
    refusal(1, "curve", run)
