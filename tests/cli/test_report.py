import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.training_runs import CONFIG, STEPS, STOP, Folders
from transformers import BertForSequenceClassification

from rankdyna_trainer import rank_report
from rankdyna_trainer.checkpoint.training import load_training_checkpoint
from rankdyna_trainer.method.schedule import RankBudgetSchedule

Document = Callable[..., Any]
Refusal = Callable[..., str]


def test_of_a_compacted_checkpoint(document: Document, folders: Folders) -> None:
    found = document("report", folders.compacted)
    model = BertForSequenceClassification.from_pretrained(folders.compacted)
    assert {layer["layer"]: layer["rank"] for layer in found["layers"]} == rank_report(model)["rank"].to_dict()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dense = sum(p.numel() for p in BertForSequenceClassification.from_pretrained(folders.dense).parameters())
    assert found["summary"]["all_parameters"] == parameters
    assert found["summary"]["dense_all_parameters"] == dense
    assert found["file_bytes"] == (folders.compacted / "model.safetensors").stat().st_size
    # The pooler (32 x 32) and the head (2 x 32) are linear layers too.
    operations = found["multiply_adds_per_vector"]
    assert operations["linear"] == operations["target"] + 32 * 32 + 2 * 32
    assert operations["dense_linear"] == 16384 + 32 * 32 + 2 * 32
    assert not found["in_training"]
    assert found["run"] is None


def test_of_a_checkpoint_of_a_run(document: Document, folders: Folders) -> None:
    found = document("report", folders.training)
    ranks = rank_report(load_training_checkpoint(folders.training))["rank"]
    assert {layer["layer"]: layer["rank"] for layer in found["layers"]} == ranks.to_dict()
    run = found["run"]
    assert (run["step"], run["total_steps"], run["unit"]) == (STOP, STEPS, "groups")
    assert run["budget"] == RankBudgetSchedule(1, 3, STEPS).budget(STOP, 384, [77]) == ranks.sum()
    assert run["final_budget"] == 77
    assert run["config"] == CONFIG.to_dict()


def test_of_a_finished_run(document: Document, rankdyna: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    finished = shutil.copytree(folders.run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    found = document("report", finished)
    assert found["run"] == document("report", folders.training)["run"] and not found["in_training"]
    shown = rankdyna("report", finished)
    assert f"compacted, {found['file_bytes'] / 1e6:,.1f} MB" in shown and f"step {STOP} of {STEPS}\n" in shown
    budget = RankBudgetSchedule(1, 3, STEPS).budget(STOP, 384, [77])
    assert f"budget: {budget} groups now, 77 at the end" in shown
    assert "chosen: rank_ratio=0.2, rank_warmup_steps=1.0, rank_cooldown_steps=3.0" in shown
    state = json.loads((finished / "trainer_state.json").read_text())
    state["stateful_callbacks"]["RankDyna"]["initial ranks"].pop()
    (finished / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(AssertionError, match=r"11 target layers, and this one has 12: .* another model"):
        rankdyna("report", finished)


def test_the_tables(rankdyna: Callable[..., str], folders: Folders) -> None:
    shown = rankdyna("report", folders.compacted)
    assert "BertForSequenceClassification, compacted" in shown
    assert "32*" in shown and "Ranks in bert.encoder.layer.*, in the order of the blocks" in shown
    assert "attention.self.query " in shown and " bert.encoder" not in shown.replace("in bert.encoder", "")
    assert "layers at rank 0: 3 of 12, kept dense: 3 of 12" in shown
    assert f"step {STOP} of {STEPS}" in rankdyna("report", folders.training)


def test_what_cannot_be_reported(refusal: Refusal, folders: Folders, tmp_path: Path) -> None:
    assert f"see `rankdyna inspect {folders.dense}`" in refusal(1, "report", folders.dense)
    shutil.copytree(folders.compacted, tmp_path / "edited")
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    name = next(iter(config["rankdyna"]["ranks"]))
    config["rankdyna"]["ranks"][name] += 1
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config))
    assert "config.json and the weights are of different checkpoints" in refusal(1, "report", tmp_path / "edited")
    weights = tmp_path / "edited" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert "model.safetensors is damaged" in refusal(1, "report", tmp_path / "edited")
    weights.unlink()
    assert "has no model.safetensors" in refusal(1, "report", tmp_path / "edited")
    assert "There is no folder" in refusal(1, "report", tmp_path / "none")


def test_a_damaged_trainer_state(refusal: Refusal, folders: Folders, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folders.training, tmp_path / "copied"))
    (copied / "trainer_state.json").write_text("{}")
    assert "trainer_state.json is damaged" in refusal(1, "report", copied)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot(suffix: str, document: Document, folders: Folders, tmp_path: Path) -> None:
    source = folders.training if suffix == "svg" else folders.compacted
    output = tmp_path / f"ranks.{suffix}"
    found = document("plot", source, "-o", output)
    begin = output.read_bytes()[:100]
    assert {"png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF"}[suffix] in output.read_bytes()[:1000], begin
    assert found["bytes"] == output.stat().st_size


def test_plot_of_the_history(rankdyna: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    for source in (folders.training, folders.run):
        rankdyna("plot", source, "--history", "-o", tmp_path / "history.svg")
        drawn = (tmp_path / "history.svg").read_text()
        rankdyna("plot", folders.training, "-o", tmp_path / "ranks.svg")
        assert drawn != (tmp_path / "ranks.svg").read_text()
        # The points of each line are those of the steps.
        lines = re.findall(r'<path d="(M [^"]*L [^"]*)" clip-path', drawn)
        assert STOP in {line.count("L") + 1 for line in lines}
        (tmp_path / "history.svg").unlink()


def test_a_plot_replaces_another_only_when_it_is_whole(
    refusal: Refusal, rankdyna: Callable[..., str], folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, link = tmp_path / "ranks.png", tmp_path / "link.png"
    output.write_text("old")
    link.symlink_to(output)

    def full(self: object, file: Path, **_: object) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", full)
        assert "cannot be written ([Errno 28] No space" in refusal(1, "plot", folders.compacted, "-o", output)
    assert output.read_text() == "old"
    rankdyna("plot", folders.compacted, "-o", link)
    assert link.is_symlink() and output.read_bytes().startswith(b"\x89PNG")
    for name, target in (("nowhere.png", tmp_path / "no" / "file.png"), ("circle.png", tmp_path / "circle.png")):
        (tmp_path / name).symlink_to(target)
        assert "in a folder that is there" in refusal(1, "plot", folders.compacted, "-o", tmp_path / name)
    names = ["circle.png", "link.png", "nowhere.png", "ranks.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_plots_that_cannot_be_made(
    refusal: Refusal, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "must end in .png, .pdf, .svg" in refusal(2, "plot", folders.compacted, "-o", tmp_path / "ranks.bmp")
    assert "Missing option" in refusal(2, "plot", folders.compacted)
    assert "in a folder that is there" in refusal(1, "plot", folders.compacted, "-o", tmp_path / "no" / "ranks.png")
    assert "no trainer_state.json" in refusal(1, "plot", folders.dense, "--history", "-o", tmp_path / "history.png")
    monkeypatch.setitem(sys.modules, "rankdyna_trainer.report.plots", None)
    monkeypatch.delattr("rankdyna_trainer.report.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "rankdyna_trainer.report.plots")
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    message = refusal(1, "plot", folders.compacted, "-o", tmp_path / "ranks.png")
    here, elsewhere = '`pip install ".[plots]"` in a checkout', '`pip install "rankdyna-trainer[plots]"`'
    assert message == f"Error: Figures need matplotlib: {here}, or {elsewhere} once a package index has it."
