"""The suite of `scripts/benchmark.py`, with its tiny sizes: all parts run, and one that fails costs no other."""

import json
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
from benchmarks import suite as suites

# Where there is no GPU, its graphs are left out.
PARTS = {
    "ceilings": {"ceilings"},
    "train": {"phases", "runs"},
    "profile": {"steps"},
    "memory": {"memory"},
    "decomposition": {"matrices", "models", "decoder of 1B"},
    "inference": {"forward passes"},
    "decode": {"tokens"},
    "llama-train": {"phases", "runs"},
    "compiled": {"forward passes", "phases", "runs"},
}


def run(output: Path, *choices: str) -> tuple[dict[str, Any], str]:
    benchmark.main(["--suite", "tiny", "--output", str(output), *choices])
    file = output if output.suffix else output / "tiny.json"
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_all_parts(tmp_path: Path) -> None:
    results, page = run(tmp_path / "table.json")
    assert list(results["parts"]) == list(PARTS)
    assert not [part["error"] for part in results["parts"].values() if "error" in part]
    for name, titles in PARTS.items():
        tables = {title for title in results["tables"] if title.startswith(f"{name}: ")}
        assert tables == {f"{name}: {title}" for title in titles}
        assert f"\n## {name}, " in page
        assert results["parts"][name]["seconds"] > 0

    phases = {(row["side"], row["phase"]): row for row in results["tables"]["train: phases"]}
    assert [phase for side, phase in phases if side == "dense"] == ["warm-up", "adjusting", "cool-down"]
    assert ("dense-first", "warm-up, in groups") in phases and ("rankdyna", "warm-up") in phases
    assert phases["rankdyna", "cool-down"]["promised"] < 1 < phases["rankdyna", "warm-up"]["promised"]
    # Removed in steps 3 and 4, but by the interval only when the final budget is due.
    assert phases["dense-first", "adjusting"]["promised"] < phases["rankdyna", "warm-up"]["promised"]
    seldom = "dense-first, every 10 steps"
    assert phases[seldom, "adjusting"]["promised"] == phases[seldom, "warm-up, in groups"]["promised"]

    steps = {row["step"]: row for row in results["tables"]["profile: steps"]}
    assert steps["dense"]["scoring: operators"] == 0 < steps["cool-down"]["scoring: operators"]
    assert steps["cool-down"]["operators"] < steps["adjusting, step 4"]["operators"]
    exact = [row for row in results["tables"]["decomposition: matrices"] if "lowrank" not in row["way"]]
    assert all(row["error"] < 1e-5 for row in exact)
    assert {row["batch"] for row in results["tables"]["inference: forward passes"]} == {1, 4}


def test_a_part_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(bench: Any) -> None:
        bench.show("numbers", [{"before": 1}])
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(suites.PARTS, "train", fail)
    results, page = run(tmp_path / "folder", "--parts", "train", "inference")
    assert list(results["parts"]) == ["ceilings", "train", "inference"]
    assert "RuntimeError: no such kernel" in results["parts"]["train"]["error"] and "no such kernel" in page
    assert results["tables"]["train: numbers"] == [{"before": 1}]
    assert results["tables"]["inference: forward passes"]
    assert "no such kernel" in capsys.readouterr().out


def test_no_part_is_begun_after_the_budget(tmp_path: Path) -> None:
    results, page = run(tmp_path / "table.json", "--parts", "train", "--budget", "0")
    assert not results["tables"] and page.count("Left out: 0 s of the budget were left") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_is_needed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        benchmark.main(["suite", "--name", "h100", "--output", str(tmp_path)])
