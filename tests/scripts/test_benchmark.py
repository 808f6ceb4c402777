"""Each subcommand of `scripts/benchmark.py` on a tiny model; what is promised is counted again here, by hand."""

import json
from pathlib import Path
from typing import Any

import benchmark
import pytest

pytestmark = pytest.mark.slow

BATCH, LENGTH, HIDDEN, FFN, LAYERS = 4, 16, 32, 64, 2
TOKENS = BATCH * LENGTH
SHAPES = LAYERS * [*4 * [(HIDDEN, HIDDEN)], (FFN, HIDDEN), (HIDDEN, FFN)]
ATTENTION = 2 * BATCH * LENGTH**2 * HIDDEN
REST = LAYERS * ATTENTION + BATCH * HIDDEN * HIDDEN + BATCH * HIDDEN * 2  # pooler, two classes
DENSE = TOKENS * sum(out * into for out, into in SHAPES)
WORDS, PLACES = 96, 512
EMBEDDINGS = (WORDS + PLACES + 2) * HIDDEN
BIASES_AND_NORMS = LAYERS * (5 * HIDDEN + FFN + 4 * HIDDEN) + 2 * HIDDEN
HEAD = HIDDEN * HIDDEN + HIDDEN + 2 * HIDDEN + 2


def in_factors(ranks: list[int]) -> int:
    return TOKENS * sum(rank * (out + into) for rank, (out, into) in zip(ranks, SHAPES, strict=True))


def in_training(ranks: list[int]) -> int:
    """The forward pass of singular groups: x V^T U, or x (U V)."""
    return sum(
        min(TOKENS * rank * into + TOKENS * rank * out, out * rank * into + TOKENS * out * into)
        for rank, (out, into) in zip(ranks, SHAPES, strict=True)
    )


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    output = tmp_path / "results.json"
    benchmark.main([*map(str, arguments), "--output", str(output)])
    printed = capsys.readouterr().out
    results: dict[str, Any] = json.loads(output.read_text())
    assert {"settings", "versions", "tables"} <= results.keys()
    assert {"torch", "transformers", "cpu_count"} <= results["versions"].keys()
    assert results["settings"]["command"] == arguments[0]
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == sum(len(rows) + 2 for rows in results["tables"].values() if rows)
    return results


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bf16", marks=pytest.mark.long)])
def test_train(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--batch", BATCH, "--length", LENGTH, "--steps", 10, "--param_ratio", 0.2, "--dtype", dtype]
    results = run(tmp_path, capsys, "train", "--model", "tiny", *size)
    sides = results["sides"]
    assert list(sides) == ["dense", "rankdyna", "dense-first", "taught", "masked", "adalora", "two-round"]
    assert all(len(side[key]) == 10 for side in sides.values() for key in ("seconds", "own_seconds"))
    assert [row["phase"] for row in results["tables"]["phases"]] == 7 * ["warm-up", "adjusting", "cool-down"]

    full = [HIDDEN] * len(SHAPES)
    kept = list(sides["rankdyna"]["ranks"].values())
    of_square, of_ffn = 204 // 64, 409 // 96  # a fifth of 1024 and of 2048 numbers
    plain_svd = LAYERS * [*4 * [of_square], *2 * [of_ffn]]
    assert list(sides["two-round"]["ranks"].values()) == plain_svd
    operations = {name: side["multiply_adds"] for name, side in sides.items()}
    assert operations["dense"] == 10 * [3 * (DENSE + REST)]
    assert operations["masked"] == 10 * [3 * (in_factors(full) + REST)]
    assert operations["two-round"] == 10 * [3 * (in_factors(plain_svd) + REST)]
    # From 4 ranks for each layer down to 3.
    assert operations["adalora"] == 10 * [2 * (DENSE + REST) + 3 * in_factors([4] * len(SHAPES))]
    assert operations["rankdyna"][:2] == 2 * [3 * (in_training(full) + REST)]
    assert operations["rankdyna"][6:] == 4 * [3 * (in_training(kept) + REST)]
    assert sorted(operations["rankdyna"], reverse=True) == operations["rankdyna"]
    for name, teacher in (("dense-first", 0), ("taught", DENSE + REST)):
        assert operations[name][0] == 3 * (DENSE + REST) + teacher  # the warm-up has one step
        kept = list(sides[name]["ranks"].values())
        assert operations[name][6:] == 4 * [3 * (in_training(kept) + REST) + teacher]

    rows = {row["side"]: row for row in results["tables"]["runs"]}
    assert rows["rankdyna"]["promised"] == sum(operations["rankdyna"]) / sum(operations["dense"])
    assert rows["two-round"]["promised"] == 1 + (in_factors(plain_svd) + REST) / (DENSE + REST)
    assert rows["rankdyna"]["parameters kept"] <= 0.2
    share = results["share of matrix products"]
    assert 0 < share < 1 and rows["dense"]["promised with the rest"] == pytest.approx(1)
    for name, rounds in (("rankdyna", 1), ("two-round", 2)):
        rest = rounds * (1 - share)
        assert rows[name]["promised with the rest"] == pytest.approx(share * rows[name]["promised"] + rest)
    seconds = {name: sum(side["seconds"]) for name, side in sides.items()}
    assert rows["masked"]["/ dense"] == pytest.approx(seconds["masked"] / seconds["dense"])
    assert rows["two-round"]["/ dense"] == pytest.approx(1 + seconds["two-round"] / seconds["dense"])


def test_inference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--batch", 1, BATCH, "--length", LENGTH, "--repeats", 2, "--param_ratios", 0.5]
    results = run(tmp_path, capsys, "inference", "--model", "tiny", *size)
    rows = {(row["batch"], row["param_ratio"]): row for row in results["tables"]["models"]}
    assert list(rows) == [(1, "dense"), (1, "0.5"), (BATCH, "dense"), (BATCH, "0.5")]
    kept = in_factors(LAYERS * [*4 * [512 // 64], *2 * [1024 // 96]])
    assert rows[BATCH, "0.5"]["promised to them"] == DENSE / kept
    assert rows[BATCH, "0.5"]["promised"] == (DENSE + REST) / (kept + REST)
    assert rows[BATCH, "dense"]["promised"] == rows[BATCH, "dense"]["speed-up"] == 1
    assert all(len(times) == 2 for timing in results["timings"] for times in timing["seconds"].values())


@pytest.mark.long
def test_factorization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(tmp_path, capsys, "factorization", "--model", "tiny", "--repeats", 1)
    assert [len(times) for times in results["seconds"].values()] == [1, 1, 1, 2]
    assert results["cache_bytes"] > 4 * sum(HIDDEN * (out + into + 1) for out, into in SHAPES)


@pytest.mark.long
def test_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--batch", BATCH, "--length", LENGTH, "--steps", 6, "--rank_ratio", 0.5]
    sides = run(tmp_path, capsys, "memory", "--model", "tiny", *size)["sides"]
    steps = [f"step {number}" for number in range(1, 7)]
    assert list(sides["dense"]["peaks"]) == ["before the model", "model", *steps, "finish"]
    assert list(sides["rankdyna"]["peaks"]) == ["before the model", "model", "injection", *steps, "finish"]
    others = EMBEDDINGS + BIASES_AND_NORMS + HEAD
    dense = others + sum(out * into for out, into in SHAPES)
    groups = others + sum(HIDDEN * (out + into + 1) for out, into in SHAPES)
    assert sides["dense"]["in_theory"] == {step: pytest.approx(16 * dense / 1e6) for step in ("first", "last")}
    assert sides["rankdyna"]["in_theory"]["first"] == pytest.approx(16 * groups / 1e6)
    assert sides["rankdyna"]["in_theory"]["last"] < sides["rankdyna"]["in_theory"]["first"]


@pytest.mark.long
def test_memory_of_a_run_that_begins_with_fewer_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = [
        "--batch",
        BATCH,
        "--length",
        LENGTH,
        "--steps",
        4,
        "--param_ratio",
        0.5,
        "--warmup",
        0.5,
        "--cooldown",
        0.25,
    ]
    both = ["--sides", "rankdyna", "dense-first", "--start_ratio", 0.8]
    results = run(tmp_path, capsys, "memory", "--model", "tiny", *size, *both)
    sides = results["sides"]
    others = EMBEDDINGS + BIASES_AND_NORMS + HEAD
    dense = others + sum(out * into for out, into in SHAPES)
    groups = others + sum(0.8 * out * into // (out + into + 1) * (out + into + 1) for out, into in SHAPES)
    assert sides["rankdyna"]["in_theory"]["first"] == pytest.approx(16 * groups / 1e6)
    assert sides["dense-first"]["in_theory"]["first"] == pytest.approx(16 * dense / 1e6)
    assert "injection" in sides["rankdyna"]["peaks"] and "injection" not in sides["dense-first"]["peaks"]
    theory = next(row for row in results["tables"]["memory"] if row["peak"] == "in theory, first step")
    assert theory["rankdyna / dense"] == pytest.approx(groups / dense)


def test_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(min(shape) for shape in benchmark.LLAMA) == 224 * 4096
    monkeypatch.setattr(benchmark, "LLAMA", [(8, 8), (22, 8)])
    results = run(tmp_path, capsys, "selection", "--groups", 1000, "--layers", 3, "--repeats", 2)
    square, llama = results["tables"]["selections"]
    assert (square["groups"], square["scores, MB"]) == (1000, 0.004)
    assert llama["trained dense, GB"] == 16 * (64 + 176) / 1e9
    assert llama["trained in groups, GB"] == 16 * (8 * 17 + 8 * 31) / 1e9
    assert [len(timing["seconds"]) for timing in results["timings"]] == 4 * [2]


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--batch", BATCH, "--length", LENGTH, "--steps", 20, "--warmup", 0.2, "--param_ratio", 0.2]
    results = run(tmp_path, capsys, "profile", "--model", "tiny", *size)
    steps = {row["step"]: row for row in results["tables"]["steps"]}
    assert list(steps) == ["dense", "warm-up, in groups", "adjusting, step 6", "cool-down"]
    for name, row in steps.items():
        assert (row["scoring: operators"] > 0) == (name != "dense")
        assert (row["budget: operators"] > 0) == name.startswith("adjusting")
        assert row["operators"] >= row["scoring: operators"] + row["budget: operators"]
