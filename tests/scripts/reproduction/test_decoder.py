import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reproduce
from reproduction import decoder
from reproduction.cells import Grid, command_line
from reproduction.scales import SCALES
from tasks.arguments import parse_args


@pytest.mark.slow
@pytest.mark.long
def test_rows_that_are_trained_have_the_same_steps_and_the_others_their_factored_model(
    options: list[str], runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALES, "tiny", replace(SCALES["tiny"], decoder_ratios=(0.5,)))
    reproduce.main(["decoder", *options])
    out = tmp_path / "out"
    records = {path.parent.name: json.loads(path.read_text()) for path in out.rglob("run.json")}
    assert len(records) == len(runs) == len(decoder.ROWS)
    steps = {name: sum(record["steps"].values()) for name, record in records.items()}
    assert steps.pop("dense-1") == 0 and len(set(steps.values())) == 1 and steps["RankDyna-0.5"] > 0
    text = (out / "decoder.md").read_text(encoding="utf-8")
    assert "blocks of 16 tokens" in text and "windows of 16 tokens at a stride of 8" in text
    blocks, windows = (_rows(part) for part in text.split("## ")[1:])
    assert len(blocks) == len(decoder.ROWS) + len(decoder.BASELINES) and len(windows) == len(decoder.ROWS)
    for row in decoder.BASELINES:
        record = records[f"{row.replace(', ', '-').replace(' ', '_')}-0.5"]
        assert record["scores"]["fine_tuned"] == records["dense-1"]["scores"]["final"]
        assert blocks[row]["0.5"] == f"{record['scores']['factored']['perplexity']:.4g}"
        assert blocks[f"{row}, then trained"]["0.5"] == f"{record['scores']['final']['perplexity']:.4g}"
        assert (blocks[row]["steps"], blocks[f"{row}, then trained"]["steps"]) == ("0", str(steps["RankDyna-0.5"]))
        assert 0.3 < record["target_parameter_ratio"] <= 0.5
    assert blocks["dense"]["1"] == f"{records['dense-1']['scores']['final']['perplexity']:.4g}"
    assert windows["RankDyna"]["0.5"] == f"{records['RankDyna-0.5']['text']['validation']['perplexity']:.4g}"
    assert not list(out.rglob("*.safetensors"))


def _rows(table: str) -> dict[str, dict[str, str]]:
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")
    ]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_every_run_is_a_command_that_its_script_takes_and_the_longest_come_first(
    scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(decoder, "run_once", lambda script, options, *_, **__: given.append(options))
    grid = Grid(SCALES[scale], tmp_path, {"decoder": "made"})
    cells = decoder.cells_of_decoder(grid, grid.scale.decoder, (3, 4))
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        cell.run()
    script = importlib.import_module("run_clm")
    chosen = [parse_args(command_line(o | {"output_dir": tmp_path}), script.ScriptArguments) for o in given]
    names = [cell.name.rpartition("/")[2] for cell in cells]
    sizes = [f"{ratio:g}" for ratio in grid.scale.decoder_ratios]
    assert names[: len(sizes)] == [f"RankDyna-teacher-{size}" for size in sizes]
    assert names[-2:] == ["dense-fine-tuned-1", "dense-1"]
    assert {choices.training.seed for choices in chosen} == {3}
    for name, choices in zip(names, chosen, strict=True):
        config, method = choices.rankdyna, choices.script.method
        assert (config is None) == (method == "none") == name.startswith("dense")
        assert choices.training.do_train == (name != "dense-1")
        if method != "none":
            assert name.endswith(f"-{config.param_ratio:g}")
            assert config.teacher == ("made" if "teacher" in name else None)
        if method == "rankdyna":
            assert config.start_ratio == (None if "start_ratio_none" in name else 1.0)
        rounds = (choices.training.num_train_epochs, choices.script.second_round_epochs)
        assert (rounds == (0, decoder.EPOCHS)) if method in ("svd", "whitened") else rounds[0] == decoder.EPOCHS
        if method == "whitened":
            assert config.rank_scope == ("global" if "expected_loss" in name else "local")


def test_scale_without_a_decoder_says_how_to_make_one(tmp_path: Path) -> None:
    grid = Grid(SCALES["small"], tmp_path, {})
    with pytest.raises(ValueError, match=r"for wikitext2: make one .*make_models\.py.*decoder=FOLDER"):
        decoder.decoder(grid, ("wikitext2",), (0,))


@pytest.mark.parametrize(("perplexity", "shown"), [(23.456, "23.46"), (3.8e7, "3.8e+07"), (None, "not finite")])
def test_perplexity_that_is_no_number_is_no_zero(perplexity: float | None, shown: str) -> None:
    grid = Grid(SCALES["tiny"], Path(), {})
    run = {"scores": {"factored": {"perplexity": perplexity}}, "steps": {}, "seconds": {"factored": 2.6}}
    record = decoder._record(grid, "SVD", {0.5: run | {"peak_bytes": {"factored": 1.26e9}}}, "factored")
    assert record == {"row": "SVD", "1": "", "0.7": "", "0.5": shown, "steps": "0", "GB": "1.3", "seconds": 3}
