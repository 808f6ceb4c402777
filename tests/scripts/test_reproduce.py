import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reproduce
from reproduction import paper_results, parts, tables
from reproduction.cells import BASELINES, DENSE, METHODS, Grid, command_line, run_once
from reproduction.scales import SCALES
from tasks.arguments import parse_args
from tasks.presets import PRESETS
from transformers import TrainingArguments

REPRODUCE = Path(reproduce.__file__)


def tiny_grid(options: list[str], **changes: Any) -> Grid:
    choices = reproduce.parse_args(["table1", *options])
    return Grid(replace(SCALES["tiny"], **changes), choices.output_dir, choices.models, choices.data_dir)


@pytest.mark.slow
@pytest.mark.long
def test_table1_of_a_run_that_was_killed_in_the_middle_and_repeated(
    options: list[str], runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "other-cache")}
    process = subprocess.Popen(
        [sys.executable, str(REPRODUCE), "table1", *options],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "env": os.environ | quiet},
    )
    begun = 0
    for line in process.stdout or ():
        begun += line.startswith("+ ")
        if begun == 4:
            break
    process.kill()
    process.communicate()
    out = tmp_path / "out"
    finished = {str(path.parent): path.read_text(encoding="utf-8") for path in out.rglob("run.json")}
    assert len(finished) == 3

    scale = replace(SCALES["tiny"], ratios=(0.5,))
    monkeypatch.setitem(SCALES, "tiny", scale)
    reproduce.main(["table1", *options])
    assert not finished.keys() & set(runs) and len(runs) == len(set(runs))
    records = {str(path.parent): path.read_text(encoding="utf-8") for path in out.rglob("run.json")}
    assert records.keys() == finished.keys() | set(runs) and records.items() >= finished.items()
    assert len(records) == (1 + len(METHODS)) * len(scale.seeds) + len(tables.AT_ONE_RATIO)

    text = (out / "table1.md").read_text(encoding="utf-8")
    found = [
        json.loads(record)["scores"]["final"]["accuracy"]
        for folder, record in records.items()
        if "/sst2/" in folder and folder.endswith("/tfwsvd-0.5")
    ]
    mean, deviation = 50 * sum(found), 100 * abs(found[0] - found[1]) / 2**0.5
    row = next(line for line in text.splitlines() if line.startswith("| 0.5") and "| TFWSVD " in line)
    assert f"{mean:.2f} ± {deviation:.2f}" in row
    assert all(f"## Order of the methods at {comparison}" in text for comparison in tables.COMPARISONS)
    assert "## wnut17, rank ratio 0.2, one seed" in text

    runs.clear()
    reproduce.main(["table1", *options])
    assert runs == [] and (out / "table1.md").read_text(encoding="utf-8") == text


@pytest.mark.slow
def test_parts_have_equal_steps_and_a_teacher_that_is_trained_once(
    options: list[str], runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ("dense", "until flat, metric, floor", "teacher, metric", "whitened, two rounds, teacher")
    monkeypatch.setattr(parts, "ROWS", {name: parts.ROWS[name] for name in (*rows, "dense, half of the steps")})
    monkeypatch.setattr(parts, "PARAM_RATIO", 0.5)  # of so few groups none fits into 0.15
    reproduce.main(["parts", *options, "--seeds", "0"])
    records = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("run.json")}
    assert len(records) == len(runs) == 5  # the teacher of two rows is that of a row of its own
    steps = {name: sum(record["steps"].values()) for name, record in records.items()}
    of_student = ("teacher-metric", "whitened-two_rounds-teacher", "dense-half_of_the_steps")
    half = steps[of_student[-1]]
    assert steps == {"dense": 2 * half, "until_flat-metric-floor": 2 * half} | dict.fromkeys(of_student, half)
    lines_of_table = (tmp_path / "out" / "parts.md").read_text(encoding="utf-8").splitlines()
    found = {row.split("|")[1].strip(): row for row in lines_of_table if row.startswith("|")}
    assert " 100 % " in found["dense"]
    for name in rows:
        record = records[name.replace(", ", "-").replace(" ", "_")]
        assert f"| {100 * record['scores']['final']['accuracy']:.1f} " in found[name]


@pytest.mark.slow
@pytest.mark.long
def test_cells_that_run_at_once_are_those_that_run_one_by_one(options: list[str], tmp_path: Path) -> None:
    few = ["--tasks", "sst2", "--seeds", "0"]
    together = [option.replace("/out", "/together") for option in options]
    reproduce.main(["table1", *together, *few, "--jobs", "2"])
    logs = {path.relative_to(tmp_path / "together/logs") for path in (tmp_path / "together/logs").rglob("*.log")}
    folders = {path.parent for path in (tmp_path / "together/runs").rglob("run.json")}
    assert {f"{log.with_suffix('')}" for log in logs} >= {str(f.relative_to(tmp_path / "together")) for f in folders}
    reproduce.main(["table1", *options, *few])
    assert len(folders) == len(list((tmp_path / "out/runs").rglob("run.json")))
    assert (tmp_path / "together/table1.md").read_text() == (tmp_path / "out/table1.md").read_text()


def test_cell_of_equal_parameters_has_at_most_those_of_svd(options: list[str]) -> None:
    grid = tiny_grid(options)
    equal = grid.cell("sst2", "rankdyna_equal_parameters", 0.5)
    svd = grid.cell("sst2", "svd", 0.5)
    assert equal["arguments"]["rankdyna"]["param_ratio"] == svd["target_parameter_ratio"]
    assert 0.8 * svd["target_parameter_ratio"] < equal["target_parameter_ratio"] <= svd["target_parameter_ratio"]


def test_baselines_share_one_fine_tuned_model_and_one_fisher_information(options: list[str], runs: list[str]) -> None:
    grid = tiny_grid(options)
    found = [grid.cell("sst2", method, 0.5) for method in BASELINES]
    assert [Path(run).name for run in runs] == [DENSE, *(f"{method}-0.5" for method in BASELINES)]
    dense = grid.cell("sst2", DENSE)
    assert all(run["scores"]["fine_tuned"] == dense["scores"]["final"] for run in found)
    assert (grid.cell_folder("sst2", DENSE, 1.0, 0) / "fisher.safetensors").exists()
    assert not any((grid.cell_folder("sst2", method, 0.5, 0) / "model.safetensors").exists() for method in BASELINES)


def test_stopped_run_goes_on_from_its_checkpoint(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    common = SCALES["tiny"].common | {"save_strategy": "epoch", "save_total_limit": 1}
    grid = tiny_grid(options, common=common)
    whole = grid.cell("sst2", "rankdyna", 0.5, seed=0)["layers"]

    script = importlib.import_module("run_glue")
    original = script.Run.finish
    monkeypatch.setattr(script.Run, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    other = replace(grid, folder=grid.folder / "stopped")
    with pytest.raises(KeyboardInterrupt):
        other.cell("sst2", "rankdyna", 0.5, seed=0)
    monkeypatch.setattr(script.Run, "finish", original)
    given: list[str] = []
    monkeypatch.setattr(script, "main", lambda args, main=script.main: (given.extend(args), main(args)))
    assert other.cell("sst2", "rankdyna", 0.5, seed=0)["layers"] == whole
    assert any(arg.startswith("--resume_from_checkpoint=") for arg in given)


def test_folder_of_a_run_with_other_options_is_refused(options: list[str]) -> None:
    grid = tiny_grid(options)
    grid.cell("sst2", DENSE)
    other = tiny_grid(options, common=SCALES["tiny"].common | {"learning_rate": 0.5})
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01 and is 0\.5"):
        replace(other, scale=replace(other.scale, tasks=_without(other, "learning_rate"))).cell("sst2", DENSE)


def _without(grid: Grid, key: str) -> dict[str, Any]:
    return {
        name: replace(task, options={k: v for k, v in task.options.items() if k != key})
        for name, task in grid.scale.tasks.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("table", "numbers"), [pytest.param("table2", 3, marks=pytest.mark.long), ("table3", 1)])
def test_table_of_one_ratio_has_the_papers_numbers_beside_ours(
    options: list[str], table: str, numbers: int, tmp_path: Path
) -> None:
    reproduce.main([table, *options])
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tmp_path / f"out/{table}.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    assert len(rows) == 2 + len(tables.AT_ONE_RATIO)
    printed = dict(zip(rows[0], next(row for row in rows if row[0] == "TFWSVD"), strict=True))
    ours = [value for name, value in printed.items() if name in SCALES["tiny"].tasks or name.startswith("rouge")]
    assert sum(value.replace(".", "").isdecimal() for value in ours) >= numbers
    assert ("47.8" if table == "table2" else "79.3") in printed.values()


def test_table5_is_that_of_the_paper(tmp_path: Path) -> None:
    reproduce.main(["table5", "--scale=paper", f"--output_dir={tmp_path}"])
    text = (tmp_path / "table5.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "qnli" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["qnli", "32", "2000", "12000"]


def test_averages_of_the_papers_table1_are_those_of_its_scores() -> None:
    for row in paper_results.TABLE1:
        assert sum(row.scores[1:]) / 7 == pytest.approx(row.glue_average, abs=0.11), row
        assert sum(row.scores) / 8 == pytest.approx(row.all_average, abs=0.11), row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "bert"], "ROLE=MODEL"),
        (["--models", "reader=x"], "has the roles encoder"),
        (["--tasks", "squad"], "table1 of tiny has sst2, wnut17, not squad"),
        (["--tasks", "samsum"], "not samsum"),
        (["--jobs", "0"], "--jobs must be at least 1: got 0"),
        (["--data_dir", "nowhere"], "nowhere is no folder"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.main(["table1", "--scale=tiny", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("scale", list(SCALES))
def test_scales_are_complete(scale: str) -> None:
    found = SCALES[scale]
    used = {*found.table1, *found.table1_once, *found.table2, *found.table3, *found.table4, *found.heatmaps.values()}
    used |= {*found.decoder}
    assert used | {found.ablation, found.selection} <= found.tasks.keys()
    assert {found.tasks[task].role for task in used} <= found.models.keys()
    assert set(found.heatmap_ratios) <= set(found.ratios)
    assert 0 < found.removal_step < found.study_steps


@pytest.mark.parametrize("scale", list(SCALES))
def test_every_cell_of_a_scale_is_a_command_that_its_script_takes(
    scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grid, "cell", lambda *_, **__: {"target_parameter_ratio": 0.3})
    grid = Grid(SCALES[scale], tmp_path, {"encoder_decoder": "made", "decoder": "made"})
    for name, task in grid.scale.tasks.items():
        script = importlib.import_module(task.script)
        training = getattr(script, "Seq2SeqTrainingArguments", TrainingArguments)
        for method in (DENSE, *METHODS):
            _, options = grid._options(name, method, 0.1, 3)
            arguments = command_line(options | {"output_dir": tmp_path, "use_cpu": True})
            choices = parse_args(arguments, script.ScriptArguments, training)
            assert (choices.script.method, choices.training.seed) == (method.split("_")[0], 3)
            if method == "rankdyna_local":
                assert choices.rankdyna is not None and choices.rankdyna.rank_scope == "local"
            if scale == "paper":
                epochs = 0 if method in BASELINES else 8
                assert (choices.training.num_train_epochs, choices.training.learning_rate) == (epochs, 1e-4)
                assert choices.final_step == (PRESETS[name].final if method.startswith("rankdyna") else None)


def test_task_without_a_model_on_the_hub_says_how_to_make_one(tmp_path: Path) -> None:
    grid = Grid(SCALES["small"], tmp_path, {})
    with pytest.raises(ValueError, match=r"for samsum: make one .*make_models\.py.*encoder_decoder=FOLDER"):
        grid.cell("samsum", "svd", 0.2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole", [True, False])
def test_checkpoint_that_a_run_was_killed_in_writing_is_not_resumed(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given = tmp_path / "cell", []
    for step in (8, 16):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        if step == 8 or whole:
            (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}", encoding="utf-8")

    def main(args: list[str]) -> None:
        given.extend(args)
        (folder / "run.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(importlib.import_module("run_glue"), "main", main)
    run_once("run_glue", {"method": "rankdyna"}, folder, keep_weights=False)
    assert f"--resume_from_checkpoint={folder / f'checkpoint-{16 if whole else 8}'}" in given


def test_what_a_stopped_run_without_a_checkpoint_has_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cell"

    def main(_: list[str]) -> None:
        assert [path.name for path in folder.iterdir()] == ["request.json"]
        (folder / "run.json").write_text('{"done": true}', encoding="utf-8")

    monkeypatch.setattr(importlib.import_module("run_glue"), "main", main)
    folder.mkdir()
    (folder / "half.bin").write_text("x", encoding="utf-8")
    assert run_once("run_glue", {"method": "none"}, folder, keep_weights=False) == {"done": True}
