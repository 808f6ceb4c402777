import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import reproduce
from reproduction import candidates, geometry
from reproduction.cells import Grid
from reproduction.scales import SCALES
from tasks import run as task_run

from rankdyna_trainer import RankDynaCallback


@pytest.mark.slow
@pytest.mark.long
def test_each_candidate_has_the_steps_and_the_size_of_the_defaults_and_another_model(
    options: list[str], bert: str, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_dropout = tmp_path / "with dropout"
    shutil.copytree(bert, with_dropout)
    config = json.loads((with_dropout / "config.json").read_text()) | {"hidden_dropout_prob": 0.1}
    (with_dropout / "config.json").write_text(json.dumps(config))
    options = [f"tagger={with_dropout}" if option.startswith("tagger=") else option for option in options]
    monkeypatch.setattr(geometry, "PARAM_RATIO", 0.5)  # of so few groups none fits into 0.15
    monkeypatch.setattr(candidates, "INTERVAL", 2)
    reproduce.main(["geometry", *options])
    out = tmp_path / "out"
    records = {path.parent: json.loads(path.read_text()) for path in out.rglob("run.json")}
    assert len(records) == len(runs) == len(geometry.ROWS) * 2
    assert all(Path(run).name == "defaults" for run in runs[:2]), "the others are compared with them"
    assert len({sum(record["steps"].values()) for record in records.values()}) == 1
    assert all(0.4 < record["target_parameter_ratio"] <= 0.5 for record in records.values())
    losses = {
        folder.name: [entry["loss"] for entry in record["history"] if "loss" in entry]
        for folder, record in records.items()
        if folder.parent.name == "seed0"
    }
    for name, of_row in losses.items():
        assert (of_row == losses["defaults"]) == (name == "defaults"), name
    assert task_run.RankDynaCallback is RankDynaCallback
    assert not list(out.rglob("*.safetensors"))

    lines = (out / "geometry.md").read_text(encoding="utf-8").splitlines()
    table = {cells[1].strip(): cells for cells in (line.split("|") for line in lines if line.startswith("|"))}
    for row in geometry.ROWS:
        name = row.replace(", ", "-").replace(" ", "_")
        scores, defaults = (
            [
                100 * records[out / "geometry/sst2" / f"seed{seed}" / of]["scores"]["final"]["accuracy"]
                for seed in (0, 1)
            ]
            for of in (name, "defaults")
        )
        assert table[row][2].strip().startswith(f"{fmean(scores):.2f} ± ")
        ahead = table[row][3].strip()
        assert ahead == "" if row == "defaults" else ahead.startswith(f"{fmean(scores) - fmean(defaults):+.2f} ± ")


def test_learning_rate_of_its_row_warms_up(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "PARAM_RATIO", 0.5)
    choices = reproduce.parse_args(["geometry", *options])
    grid = Grid(SCALES["tiny"], choices.output_dir, choices.models, choices.data_dir)
    run = geometry._cell(grid, "sst2", "learning rate warms up over a tenth of the steps", 0)
    rates = [entry["learning_rate"] for entry in run["history"] if "learning_rate" in entry]
    assert rates[0] == 0 and max(rates) == rates[2] == 1e-2 and rates[1] == 5e-3


def test_a_cpu_without_bf16_units_runs_the_table_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def note(script: str, options: dict[str, Any], folder: Path, keep_weights: bool) -> dict[str, Any]:
        given.append(options)
        return {"scores": {"final": {"f1": 0.5}}, "target_parameter_ratio": 0.15, "seconds": {}}

    monkeypatch.setattr(geometry, "run_once", note)
    command = ["geometry", "--scale", "small", "--tasks", "wnut17", "--seeds", "0", "--output_dir", str(tmp_path)]
    reproduce.main(command)
    assert given and all(options["bf16"] is True for options in given)
    with_bf16, given = given, []
    reproduce.main([*command, "--float32"])
    assert given == [{name: value for name, value in options.items() if name != "bf16"} for options in with_bf16]
