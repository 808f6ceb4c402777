"""scripts/tasks/tiny_run.py: `--tiny` of each script trains, compresses and reloads, and says what came of it."""

import importlib
import json
import re

import pytest
from support.stand_ins import with_images
from tasks import tiny_run
from tasks.run import Run
from tasks.tiny_tasks import save_model

SCORES = {
    "run_audio_classification": "accuracy",
    "run_clm": "perplexity",
    "run_glue": "accuracy",
    "run_image_classification": "accuracy",
    "run_ner": "f1",
    "run_summarization": "rougel",
}


@pytest.fixture
def run_tiny(tmp_path, monkeypatch, capsys):
    """Runs a script in an empty folder, and returns its table and what else was printed; only few steps are made."""
    monkeypatch.chdir(tmp_path)

    complete = Run.complete

    def complete_in_few_steps(run: Run) -> None:
        run.training.max_steps = 4 if run.training.num_train_epochs else -1
        complete(run)

    monkeypatch.setattr(Run, "complete", complete_in_few_steps)

    def run(name: str, *options: str) -> tuple[dict[str, list[str]], str]:
        importlib.import_module(name).main(["--tiny", *options])
        printed = capsys.readouterr().out
        table = re.findall(r"^(dense|compressed|reloaded) +(.*)$", printed, re.MULTILINE)
        return {name: cells.split() for name, cells in table}, printed

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=with_images) if "image" in name else name for name in SCORES]
)
def test_each_script_trains_compresses_and_reloads(name, run_tiny, tmp_path):
    table, printed = run_tiny(name)
    folder = tmp_path / "tiny-output" / name
    assert list(table) == ["dense", "compressed", "reloaded"]
    assert table["reloaded"] == table["compressed"]
    assert table["dense"][-2:] == ["1.000", "1.000"]
    assert float(table["compressed"][-2]) <= 0.3
    runs = {run: json.loads((folder / run / "run.json").read_text()) for run in table}
    assert [run["method"] for run in runs.values()] == ["none", "rankdyna", "none"]
    assert SCORES[name] in runs["compressed"]["scores"]["final"]
    assert f"python scripts/{name}.py --model_name_or_path=tiny-output/{name}/model" in printed


def test_options_go_to_the_run_that_compresses(run_tiny, tmp_path):
    table, _ = run_tiny("run_glue", "--method=svd", "--rank_ratio=0.5", "--second_round_epochs=1", "--output-dir=here")
    runs = [json.loads((tmp_path / "here" / run / "run.json").read_text()) for run in table]
    assert [run["method"] for run in runs] == ["none", "svd", "none"]
    assert runs[1]["steps"] == {"final": 6}  # its first round is that of the dense model
    assert runs[1]["arguments"]["rankdyna"]["rank_ratio"] == 0.5


def test_a_reloaded_model_with_another_score_is_an_error(tmp_path, monkeypatch):
    scores = {"dense": 0.5, "compressed": 0.5, "reloaded": 0.25}
    ratios = {"target_parameter_ratio": 0.3, "all_parameter_ratio": 0.5}
    monkeypatch.setattr(Run, "complete", lambda _: None)
    monkeypatch.setattr(
        tiny_run, "read_run", lambda of: {"scores": {"final": {"accuracy": scores[of.name]}}, **ratios}
    )
    for name in ("dense", "compressed"):
        save_model("bert", tmp_path / name)
    with pytest.raises(SystemExit, match="The reloaded model is not the one that was trained"):
        importlib.import_module("run_glue").main(["--tiny", f"--output_dir={tmp_path}"])


def test_other_methods_are_refused(capsys):
    for method in ("none", "pruning"):
        with pytest.raises(SystemExit):
            importlib.import_module("run_glue").main(["--tiny", f"--method={method}"])
        assert f"invalid choice: '{method}'" in capsys.readouterr().err
