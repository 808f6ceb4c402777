"""scripts/tasks/run.py: the preset's schedule, what a run tells, and runs that are repeated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tasks.run import PresetSchedule
from tasks.tiny_tasks import dialogues, entities, lines, model, sentences, write
from transformers import Trainer, TrainingArguments

from rankdyna_trainer import RankDynaConfig

ROWS: dict[str, Any] = {
    "run_glue": (sentences, "bert", []),
    "run_ner": (entities, "bert", []),
    "run_summarization": (dialogues, "bart", ["--max_target_length=8"]),
    "run_clm": (lines, "gpt2", ["--block_size=8"]),
}


def test_the_budget_stops_falling_at_the_final_step_of_the_preset(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(4, 20, (8, 6))]
    arguments = {"max_steps": 12, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    args = TrainingArguments(str(tmp_path), disable_tqdm=True, **arguments)
    config = RankDynaConfig(rank_ratio=0.25, rank_warmup_steps=3.0)
    trainer = Trainer(model("llama"), args, train_dataset=rows, callbacks=[PresetSchedule(config, 7)])
    trainer.train()
    budgets = [entry["rank_budget"] for entry in trainer.state.log_history if "rank_budget" in entry]
    assert budgets[0] == budgets[2] > budgets[3] > budgets[5] > budgets[6]
    assert set(budgets[6:]) == {budgets[0] // 4}
    assert config.rank_cooldown_steps == 5


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_for_longer_runs_is_refused_before_training(name, folder_of, run_script, tmp_path):
    rows, kind, options = ROWS[name]
    train = write(tmp_path / "train.jsonl", rows(32))
    options = [*options, f"--model_name_or_path={folder_of(kind)}", "--do_train", f"--train_file={train}"]
    message = "ends the adjusting at step 1500, but this run has only 5 steps. Give --rank_warmup_steps and"
    with pytest.raises(ValueError, match=message):
        run_script(name, tmp_path / "out", *options, "--preset=cola", "--rank_ratio=0.5", "--max_steps=5")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))
    run = run_script(
        name,
        tmp_path / "own",
        *options,
        *["--preset=cola", "--rank_ratio=0.5", "--max_steps=5", "--rank_warmup_steps=1", "--rank_cooldown_steps=2"],
    )
    assert run["arguments"]["training"]["num_train_epochs"] == 8
    assert run["arguments"]["rankdyna"]["rank_warmup_steps"] == 1


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_does_not_grow_with_the_steps_that_are_accumulated(name, folder_of, run_script, tmp_path):
    rows, kind, options = ROWS[name]
    options = [*options, f"--model_name_or_path={folder_of(kind)}", f"--train_file={write(tmp_path / 'f', rows(8))}"]
    options += ["--method=none", "--do_train", "--max_steps=1"]
    losses = []
    for size, steps in ((4, 1), (1, 4)):
        output = tmp_path / str(steps)
        sizes = [f"--per_device_train_batch_size={size}", f"--gradient_accumulation_steps={steps}"]
        run_script(name, output, *options, *sizes)
        losses.append(json.loads((output / "train_results.json").read_text())["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) == ("run_glue", "rankdyna") else pytest.mark.long)
        for name in ROWS
        for method in ("none", "rankdyna")
    ],
)
def test_the_same_seed_gives_the_same_result(name, method, folder_of, run_script, tmp_path):
    rows, kind, options = ROWS[name]
    file = write(tmp_path / "rows.jsonl", rows(24))
    options = [*options, f"--model_name_or_path={folder_of(kind)}", f"--train_file={file}", "--do_train", "--do_eval"]
    options += [f"--validation_file={file}", f"--method={method}", "--max_steps=6"]
    options += ["--rank_ratio=0.5"] if method == "rankdyna" else []
    runs = [run_script(name, tmp_path / str(i), *options, f"--seed={3 + i // 2}") for i in range(3)]
    weights = [load_file(tmp_path / str(i) / "model.safetensors") for i in range(3)]
    assert runs[0]["scores"] == runs[1]["scores"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    shapes = [{key: weight.shape for key, weight in each.items()} for each in weights]
    assert shapes[0] != shapes[2] or not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_a_run_is_told_whole(folder_of, run_script, tmp_path):
    file = write(tmp_path / "rows.jsonl", sentences(16))
    output = tmp_path / "out"
    run = run_script(
        "run_glue",
        output,
        *["--rank_ratio=0.5", f"--model_name_or_path={folder_of('bert')}", "--do_train", "--do_eval", "--seed=7"],
        *[f"--train_file={file}", f"--validation_file={file}", "--max_steps=6", "--hub_token=secret"],
    )
    summary = ["task", "method", "model", "seed", "target_parameter_ratio", "all_parameter_ratio"]
    assert list(run) == [
        "script",
        *summary,
        "scores",
        "seconds",
        "steps",
        "peak_bytes",
        "arguments",
        "layers",
        "history",
    ]
    assert sum(layer["rank"] for layer in run["layers"].values()) == sum(
        layer["full_rank"] // 2 for layer in run["layers"].values()
    )
    assert run["history"][-1]["step"] == 6
    assert (run["script"], run["method"], run["seed"]) == ("run_glue", "rankdyna", 7)
    assert run["steps"] == {"final": 6} and run["seconds"]["final"] > 0
    assert run["arguments"]["script"]["train_file"] == file
    assert run["arguments"]["training"]["learning_rate"] == 1e-2
    assert run["arguments"]["rankdyna"]["rank_ratio"] == 0.5
    assert "secret" not in (output / "run.json").read_text()
    results = json.loads((output / "results.json").read_text())
    assert results["accuracy"] == run["scores"]["final"]["accuracy"]
    assert [results[key] for key in summary] == [run[key] for key in summary]
    assert not list(Path(output).glob("*.unfinished"))


def test_a_run_that_is_not_evaluated_is_told_too(folder_of, run_script, tmp_path):
    file = write(tmp_path / "rows.jsonl", lines(8))
    options = [f"--model_name_or_path={folder_of('gpt2')}", "--method=none", "--do_train", "--block_size=8"]
    run = run_script("run_clm", tmp_path / "out", *options, f"--train_file={file}", "--max_steps=2")
    assert run["scores"] == {} and run["steps"] == {"final": 2}
    assert not (tmp_path / "out" / "results.json").exists()
