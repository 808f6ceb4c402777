import json
from pathlib import Path

import pytest
import reproduce
from reproduction import frontier


@pytest.mark.slow
@pytest.mark.long
def test_frontier_has_equal_steps_and_chosen_rates(
    options: list[str], runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [frontier.DENSE, frontier.FIRST_ROUND, "whitened, teacher", frontier.PAPERS, frontier.OURS_TAUGHT]
    monkeypatch.setattr(frontier, "ROWS", {name: frontier.ROWS[name] for name in rows})
    monkeypatch.setattr(frontier, "COMPRESSED", rows[2:])
    monkeypatch.setattr(frontier, "LEARNING_RATES", (1e-2, 2e-2))
    reproduce.main(["frontier", *options])
    out = tmp_path / "out"
    records = {str(path.parent.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("run.json")}
    assert len(records) == len(runs) == len(set(runs))
    steps = {name: sum(record["steps"].values()) for name, record in records.items()}
    whole, taught = (
        {count for name, count in steps.items() if name.rpartition("/")[2].startswith(start)}
        for start in (("dense-1", "RankDyna_as"), ("dense-half", "whitened-teacher", "RankDyna-teacher"))
    )
    assert len(taught) == 1 and whole == {2 * taught.pop()}, "a row has other steps than the dense one"

    requests = [json.loads(path.read_text())["options"] for path in out.rglob("request.json")]
    teachers = [(taught["seed"], Path(taught["teacher"]).parent.name) for taught in requests if "teacher" in taught]
    assert teachers and all(name == f"seed{seed}" for seed, name in teachers), "a teacher is of another seed"
    assert len({taught.get("teacher_weight") for taught in requests if "teacher" in taught}) == 1

    text = (out / "frontier.md").read_text(encoding="utf-8")
    found = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("|")}
    for name in rows[2:]:
        tried = {
            rate: records[f"frontier/sst2/seed0/{name.replace(', ', '-').replace(' ', '_')}-0.5-{rate:g}"]
            for rate in (1e-2, 2e-2)
        }
        scores = {rate: record["scores"]["final"]["accuracy"] for rate, record in tried.items()}
        best = max(scores, key=lambda rate: scores[rate])
        assert found[name].split("|")[2].strip() == f"{best:g}"
        ratios = [record["target_parameter_ratio"] for record in tried.values()]
        assert all(0.3 < ratio <= 0.5 for ratio in ratios)
    assert "ahead by" in text and (out / "frontier.png").stat().st_size > 10_000
