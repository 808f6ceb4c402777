"""`--method svd`, `fwsvd`, `tfwsvd` and `whitened` of every script: fine-tune, factor, fine-tune again."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tasks.tiny_tasks import dialogues, entities, lines, sentences, tokenizer, write
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from rankdyna_trainer import LowRankLinear, RankDynaConfig, baselines, rank_report

TASKS: dict[str, Any] = {
    "run_glue": (sentences, "bert", [], AutoModelForSequenceClassification),
    "run_ner": (entities, "bert", [], AutoModelForTokenClassification),
    "run_summarization": (dialogues, "bart", ["--max_target_length=8"], AutoModelForSeq2SeqLM),
    "run_clm": (lines, "gpt2", ["--block_size=7"], AutoModelForCausalLM),
}
METHODS = ["svd", "fwsvd", "tfwsvd", "whitened"]
ONCE = set(zip(TASKS, METHODS, strict=True))


@pytest.fixture
def run_task(
    folder_of: Callable[[str], str], run_script: Callable[..., dict[str, Any]], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Trains and evaluates a tiny model of a script's task on 16 rows, two epochs in the first round."""

    def run(name: str, output: Path, *options: str, model: str | None = None) -> dict[str, Any]:
        rows, kind, own, _ = TASKS[name]
        file = write(tmp_path / "rows.jsonl", rows(16))
        data = [f"--train_file={file}", f"--validation_file={file}", "--do_train", "--do_eval"]
        source = f"--model_name_or_path={model or folder_of(kind)}"
        return run_script(name, output, source, *own, *data, "--num_train_epochs=2", *options)

    return run


def equal_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def compare_layers(expected: Any, saved: Any, count: int) -> None:
    """In float32, though the training was in bfloat16."""
    pairs = zip(expected.modules(), saved.modules(), strict=True)
    compared = [(layer, other) for layer, other in pairs if isinstance(layer, LowRankLinear)]
    assert len(compared) == count
    for layer, other in compared:
        torch.testing.assert_close(other.to_dense_weight(), layer.to_dense_weight(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [
        # Each method and each task once; the rest with the long ones.
        pytest.param(name, method, marks=() if (name, method) in ONCE else pytest.mark.long)
        for name in TASKS
        for method in METHODS
    ],
)
def test_both_rounds(name, method, run_task, tmp_path):
    output, auto = tmp_path / "out", TASKS[name][3]
    run = run_task(name, output, f"--method={method}", "--rank_ratio=0.25", "--second_round_epochs=1.5")
    assert list(run["scores"]) == ["fine_tuned", "factored", "final"]
    assert len({tuple(scores) for scores in run["scores"].values()}) == 1
    assert list(run["seconds"]) == ["fine_tuned", "factored", "final"] and min(run["seconds"].values()) > 0
    assert run["steps"] == {"fine_tuned": 4, "final": 3}

    model = auto.from_pretrained(output)
    low_rank = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert low_rank and all(module.rank == 8 for module in low_rank)  # a quarter of 32
    report = rank_report(model)
    expected = report["parameters"].sum() / report["dense_parameters"].sum()
    assert run["target_parameter_ratio"] == pytest.approx(expected) and 0 < expected < 1
    assert run["all_parameter_ratio"] < 1
    results = json.loads((output / "results.json").read_text())
    assert results["train_steps"] == 7
    assert results["train_seconds"] == pytest.approx(sum(run["seconds"].values()))

    # The first round is plain fine-tuning, and its model is kept.
    plain = run_task(name, tmp_path / "plain", "--method=none")
    assert plain["scores"]["final"] == run["scores"]["fine_tuned"]
    assert equal_weights(tmp_path / "plain", output / "fine_tuned")
    # It may be taken from there, for another method or another ratio.
    again = tmp_path / "again"
    options = [f"--method={method}", "--rank_ratio=0.25", "--second_round_epochs=1.5", "--num_train_epochs=0"]
    rerun = run_task(name, again, *options, model=str(output / "fine_tuned"))
    assert rerun["scores"] == run["scores"]
    assert list(rerun["steps"]) == ["final"] and not (again / "fine_tuned").exists()
    assert equal_weights(output, again)


@pytest.mark.parametrize("name", TASKS)
def test_without_a_second_round_the_model_is_what_the_library_makes(name, run_task, tmp_path):
    output, auto = tmp_path / "out", TASKS[name][3]
    run = run_task(name, output, "--method=svd", "--param_ratio=0.3", "--second_round_epochs=0")
    assert run["scores"]["factored"] == run["scores"]["final"]
    expected = baselines.svd(auto.from_pretrained(output / "fine_tuned"), RankDynaConfig(param_ratio=0.3))
    saved = auto.from_pretrained(output).state_dict()
    for key, weight in expected.state_dict().items():
        assert torch.equal(saved[key], weight), key


@pytest.mark.parametrize("method", ["fwsvd", "tfwsvd"])
def test_the_fisher_information_is_of_the_training_rows(method, run_task, tmp_path):
    output = tmp_path / "out"
    run_task("run_clm", output, f"--method={method}", "--rank_ratio=0.25", "--second_round_epochs=0", "--bf16")
    block = torch.tensor([tokenizer(ends=False)(lines(1)[0]["text"])["input_ids"]])  # each row is one block
    batches = [{"input_ids": block, "labels": block}] * 16
    dense = AutoModelForCausalLM.from_pretrained(output / "fine_tuned")
    expected = getattr(baselines, method)(dense, RankDynaConfig(rank_ratio=0.25), batches)
    compare_layers(expected, AutoModelForCausalLM.from_pretrained(output), count=8)


@pytest.mark.parametrize("options", [[], ["--rank_scope=global"]])
def test_whitened_sees_the_training_rows(options, run_task, tmp_path):
    output, options = tmp_path / "out", ["--rank_ratio=0.25", "--second_round_epochs=0", "--bf16", *options]
    run_task("run_glue", output, "--method=whitened", *options)
    batches = [  # none of them padded
        {**tokenizer()(row["sentence"], return_tensors="pt"), "labels": torch.tensor([row["label"]])}
        for row in sentences(16)
    ]
    dense = AutoModelForSequenceClassification.from_pretrained(output / "fine_tuned")
    scope = "global" if "--rank_scope=global" in options else "local"
    expected = baselines.whitened_svd(dense, RankDynaConfig(rank_ratio=0.25), batches, scope)
    compare_layers(expected, AutoModelForSequenceClassification.from_pretrained(output), count=12)


@pytest.mark.parametrize("name", TASKS)
def test_what_cannot_be_factored_is_refused_before_the_first_round(name, run_task, tmp_path):
    with pytest.raises(ValueError, match="no_such_layer"):
        run_task(name, tmp_path / "out", "--method=svd", "--rank_ratio=0.2", "--target_modules", "no_such_layer")
    assert not (tmp_path / "out" / "fine_tuned" / "config.json").exists()


def test_a_compressed_model_is_refused_before_the_first_round(run_task, tmp_path):
    output, again = tmp_path / "out", tmp_path / "again"
    run_task("run_clm", output, "--rank_ratio=0.2")
    with pytest.raises(ValueError, match="out is compressed already, and --method svd factors a dense model"):
        run_task("run_clm", again, "--method=svd", "--rank_ratio=0.2", model=str(output))
    assert not (again / "fine_tuned" / "config.json").exists()


@pytest.mark.slow
def test_rounds_in_bfloat16_with_a_limit_of_steps_and_the_best_checkpoint(run_task, tmp_path):
    output = tmp_path / "out"
    options = ["--bf16", "--max_steps=3", "--save_strategy=steps", "--save_steps=1", "--eval_strategy=steps"]
    options += ["--eval_steps=1", "--load_best_model_at_end", "--save_total_limit=1"]
    run = run_task("run_glue", output, *options, "--method=svd", "--rank_ratio=0.25", "--second_round_epochs=1")
    assert run["steps"] == {"fine_tuned": 3, "final": 2}  # --max_steps is of the first round
    assert list(output.glob("checkpoint-*")) and list((output / "fine_tuned").glob("checkpoint-*"))
    evaluated = importlib.import_module("run_glue").AutoModelForSequenceClassification.from_pretrained(output)
    assert any(isinstance(module, LowRankLinear) for module in evaluated.modules())
