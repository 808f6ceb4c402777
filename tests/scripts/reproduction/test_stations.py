import json
from pathlib import Path

import pytest
import reproduce
from reproduction import stations
from reproduction.stations import CANDIDATES, ONE_RUN, _rising


@pytest.mark.slow
@pytest.mark.long
def test_each_size_of_one_run_stands_beside_runs_of_its_own(
    options: list[str], runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stations, "EPOCHS", 9.0)  # in fewer steps the candidates do the same
    reproduce.main(["stations", *options, "--seeds", "0"])
    out = tmp_path / "out"
    records = {path.parent.name: json.loads(path.read_text()) for path in out.rglob("run.json")}
    assert len(records) == len(runs) == 4 + len(CANDIDATES) + 1
    steps = {name: sum(record["steps"].values()) for name, record in records.items()}
    losses = {
        name: [entry["loss"] for entry in record["history"] if "loss" in entry]
        for name, record in records.items()
        if name.startswith("one_run")
    }
    assert len({json.dumps(of_row) for of_row in losses.values()}) == 1 + len(CANDIDATES), f"{ONE_RUN} and candidates"
    each, in_all = (
        [count for name, count in steps.items() if f"the_same_steps_{how}" in name] for how in ("each", "in_all")
    )
    assert each == [steps["one_run"]] * 2 and sum(in_all) == steps["one_run"]
    place = out / "stations" / "sst2" / "seed0" / "one_run" / "param_ratio-0.7" / "trainer_state.json"
    score = json.loads(place.read_text())["log_history"][-1]["eval_accuracy"]
    last = records["one_run"]["scores"]["final"]["accuracy"]
    row = next(line for line in (out / "stations.md").read_text().splitlines() if "| one run " in line)
    assert [cell.strip() for cell in row.split("|")[3:5]] == [f"{100 * score:.1f}", f"{100 * last:.1f}"]
    assert not list(out.rglob("*.safetensors"))


@pytest.mark.parametrize(("steps", "sizes"), [(90, 4), (91, 4), (7, 3), (2, 3)])
def test_shares_that_rise_are_all_steps(steps: int, sizes: int) -> None:
    shares = [_rising(steps, number, sizes) for number in range(sizes)]
    assert sum(shares) == steps and shares[0] < shares[-1]
