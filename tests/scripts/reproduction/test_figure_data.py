"""The figures of `reproduce.py` from its cells and studies, of which nothing is run twice."""

import json
import re
from pathlib import Path

import pytest
import torch
from reproduction import figure_data
from reproduction.cells import DENSE, GLOBAL, LOCAL, Grid, write
from reproduction.figure_data import FIGURES, make_figure
from reproduction.scales import Scale, Task
from reproduction.study_data import kept, request_of_cell, run_of_request, training_batches
from tasks.tiny_tasks import sentences
from tasks.tiny_tasks import write as write_rows

STEPS = 12  # six epochs of two batches
SCALE = Scale(
    models={"encoder": "unused"},
    tasks={"sst2": Task("run_glue", "encoder", ("accuracy",), {"task_name": "sst2"}, {"num_train_epochs": 6}, 1.0)},
    common={
        **{"save_strategy": "no", "use_cpu": True, "learning_rate": 2e-3, "logging_steps": 1},
        **{"per_device_train_batch_size": 8, "lr_scheduler_type": "linear"},
    },
    ratios=(0.5, 0.2),
    seeds=(0, 1),
    **{f"table{i}": () for i in range(1, 5)},
    heatmaps=dict.fromkeys(("figure3", "figure6", "figure7", "figure8"), "sst2"),
    heatmap_ratios=(0.5, 0.2),
    ablation="sst2",
    selection="sst2",
    study_steps=STEPS,
    removal_step=6,
)


def test_a_finding_is_kept(tmp_path):
    path, calls = tmp_path / "studies" / "one.json", []
    compute = lambda: calls.append(1) or {"numbers": [1.5]}  # noqa: E731
    for _ in range(2):
        assert kept(path, {"steps": (1, 2)}, compute) == {"numbers": [1.5]}
    assert len(calls) == 1
    with pytest.raises(ValueError, match="found with other settings"):
        kept(path, {"steps": (1, 3)}, compute)


@pytest.fixture
def grid(tmp_path, folder_of):
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    for split in ("train", "validation"):
        write_rows(data / f"{split}.jsonl", sentences(16))
    return Grid(SCALE, tmp_path / "grid", {"encoder": folder_of("bert")}, tmp_path / "data")


def test_batches_are_those_of_the_task(grid):
    folder = grid.cell_folder("sst2", DENSE, 1.0, 0)
    script, options = grid._options("sst2", DENSE, 1.0, 0)
    write(folder / "request.json", {"script": script, "options": {key: str(value) for key, value in options.items()}})
    request = request_of_cell(grid, "sst2", DENSE, 1.0, 0)
    assert run_of_request(request, folder).training.learning_rate == 2e-3

    def some(seed, count=4):
        return [
            row for row, _ in zip(training_batches(run_of_request(request, folder), seed), range(count), strict=False)
        ]

    one, again, other = some(0), some(0), some(1)
    ids = [[row for batch in batches for row in batch["input_ids"].tolist()] for batches in (one, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert sorted(ids[0][:16]) == sorted(ids[0][16:]) == sorted(ids[2][:16])  # two batches of 8 are an epoch
    assert sum(batch["labels"].sum() for batch in one) == 16
    first, second = (run_of_request(request, folder).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)  # the new head too


def narrow(path):
    """Markdown without the blanks that align its tables."""
    return re.sub(r" +\|", " |", re.sub(r"\| +", "| ", path.read_text()))


@pytest.mark.slow
@pytest.mark.long
def test_every_figure_is_made_and_nothing_runs_twice(grid, tmp_path, monkeypatch):
    paths = {name: make_figure(name, grid, tmp_path / "figures") for name in FIGURES}
    for name, files in paths.items():
        stems = ["figure2a", "figure2b"] if name == "figure2" else [name]
        assert [file.name for file in files] == [f"{s}{e}" for s in stems for e in (".png", ".svg")] + [f"{name}.md"]
        assert all(file.stat().st_size > 0 for file in files)
    # Beside each run lies the file of its lock.
    dense, runs = grid.cell("sst2", DENSE), sorted(filter(Path.is_dir, tmp_path.glob("grid/runs/sst2/*/*")))
    assert {run.name for run in runs} == {
        "none",
        "rankdyna-0.5",
        "rankdyna-0.2",
        "rankdyna_local-0.5",
        "rankdyna_local-0.2",
    }
    assert dense["steps"]["final"] == STEPS

    text = narrow(tmp_path / "figures" / "figure2.md")
    for scope, method in (("global", GLOBAL), ("local", LOCAL)):
        scores = [grid.score("sst2", grid.cell("sst2", method, 0.2, seed)) for seed in (0, 1)]
        assert f"| 0.2 | {scope} | {sum(scores) / 2:.1f} |" in text
    text = narrow(tmp_path / "figures" / "figure6.md")
    for layer, row in grid.cell("sst2", GLOBAL, 0.5)["layers"].items():
        assert f"| 0.5 | {layer} | {row['rank']} | 32 | 16 |" in text
    assert len(text.splitlines()) == 2 + 2 + 2 * 12
    found = json.loads((tmp_path / "grid/studies/figure4-sst2-0.2-seed0.json").read_text())["found"]
    assert sum(found["ranks"].values()) == sum(
        row["rank"] for row in grid.cell("sst2", GLOBAL, 0.2)["layers"].values()
    )
    text = narrow(tmp_path / "figures" / "figure4.md")
    for layer, groups in found["layers"].items():
        shared = len({*groups["kept"]} & {*range(len(groups["kept"]))})
        assert f"| {layer} | {len(groups['kept'])} | {shared} |" in text

    before = {file: file.read_bytes() for files in paths.values() for file in files}
    for study in ("importance_positions", "kept_groups"):
        monkeypatch.setattr(figure_data, study, lambda *_, **__: pytest.fail("a study ran again"))
    monkeypatch.setattr("run_glue.main", lambda _: pytest.fail("a cell ran again"))
    for name in FIGURES:
        make_figure(name, grid, tmp_path / "figures")
    assert all(Path(file).read_bytes() == content for file, content in before.items())
