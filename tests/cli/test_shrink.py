import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.training_runs import Folders
from tasks import tiny_tasks
from transformers import BertForSequenceClassification

from rankdyna_trainer import RankDynaConfig, rank_report
from rankdyna_trainer.baselines import shrink, shrink_on_data
from rankdyna_trainer.checkpoint.importance_file import read_importance

NAME = "importance.safetensors"
CONFIG = RankDynaConfig(param_ratio=0.1)
Refusal = Callable[..., str]


def loaded(folder: Path) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(folder).eval()


def ranks_of(model: Any) -> dict[str, int]:
    return dict(model.config.rankdyna["ranks"] | model.config.rankdyna["dense"])


def saved_equals(folder: Path, model: Any) -> bool:
    """What a person loads is the model, and the scores beside it are of its groups."""
    saved, expected = loaded(folder).state_dict(), model.state_dict()
    assert read_importance(folder, ranks_of(model))
    return saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


def test_by_the_scores_of_the_run(document: Callable[..., Any], folders: Folders, tmp_path: Path) -> None:
    model = loaded(folders.run)
    removed = shrink(model, CONFIG, read_importance(folders.run, ranks_of(model)))
    found = document("shrink", folders.run, "--param_ratio", 0.1, "-o", tmp_path / "small")
    assert found["scored_by"] == "importance" and found["removed"] == pytest.approx(removed)
    assert 0 < found["target_ratio"] <= 0.1 and (tmp_path / "small" / "tokenizer.json").is_file()
    assert found["file_bytes"] == (tmp_path / "small" / "model.safetensors").stat().st_size
    assert saved_equals(tmp_path / "small", model)


def test_on_rows(document: Callable[..., Any], folders: Folders, tmp_path: Path) -> None:
    rows = tiny_tasks.sentences(12)
    file = tiny_tasks.write(tmp_path / "rows.jsonl", rows)
    options = ["--train_file", file, "--text_column", "sentence", "--max_train_samples", 8]
    found = document("shrink", folders.run, "--param_ratio", 0.1, *options, "-o", tmp_path / "small")
    model, tokenizer = loaded(folders.run), tiny_tasks.tokenizer()
    batches = [tokenizer(row["sentence"], return_tensors="pt") for row in rows[:8]]
    removed = shrink_on_data(model, CONFIG, batches, read_importance(folders.run, ranks_of(model)))
    assert found["scored_by"] == "rows" and found["removed"] == pytest.approx(removed)
    assert saved_equals(tmp_path / "small", model)


def test_rows_are_enough_where_the_run_left_no_scores(
    document: Callable[..., Any], folders: Folders, tmp_path: Path
) -> None:
    file = tiny_tasks.write(tmp_path / "rows.jsonl", tiny_tasks.sentences(8))
    options = ["--train_file", file, "--text_column", "sentence", "-o", tmp_path / "small"]
    found = document("shrink", folders.compacted, "--param_ratio", 0.1, *options)
    assert 0 < found["removed"] < 1 and 0 < found["target_ratio"] <= 0.1


def test_it_says_what_it_expects_to_cost(rankdyna: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    model = loaded(folders.run)
    removed = shrink(model, CONFIG, read_importance(folders.run, ranks_of(model)))
    shown = rankdyna("shrink", folders.run, "--param_ratio", 0.1, "-o", tmp_path / "small")
    assert f"Expected cost: {removed:.1%} of the importance that the groups had is gone" in shown
    assert "parameters of the target layers" in shown and "parameters of the whole model" in shown
    file = tiny_tasks.write(tmp_path / "rows.jsonl", tiny_tasks.sentences(8))
    options = ["--train_file", file, "--text_column", "sentence", "-o", tmp_path / "smaller"]
    shown = rankdyna("shrink", folders.run, "--rank_ratio", 0.05, *options)
    assert "of their output energy on 8 rows" in shown


def test_a_multiple_of_groups_remains_and_it_can_be_cut_again(
    rankdyna: Callable[..., str], folders: Folders, tmp_path: Path
) -> None:
    multiple = ["--rank_multiple_of", 4]
    rankdyna("shrink", folders.run, "--rank_ratio", 0.15, *multiple, "-o", tmp_path / "small")
    assert (rank_report(loaded(tmp_path / "small"))["rank"] % 4 == 0).all()
    rankdyna("shrink", tmp_path / "small", "--rank_ratio", 0.1, *multiple, "-o", tmp_path / "smaller")
    report = rank_report(loaded(tmp_path / "smaller"))
    assert 0 < report["rank"].sum() <= 0.1 * report["full_rank"].sum() + 1 and (report["rank"] % 4 == 0).all()


def test_a_merged_or_self_contained_model_is_not_confused_by_the_scores(
    rankdyna: Callable[..., str], document: Callable[..., Any], folders: Folders, tmp_path: Path
) -> None:
    assert (folders.run / NAME).is_file()
    found = document("merge", folders.run, "-o", tmp_path / "dense")
    assert found["file_bytes"] == (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert not (tmp_path / "dense" / NAME).exists()
    size = (folders.run / "model.safetensors").stat().st_size
    assert document("report", folders.run)["file_bytes"] == size
    copied = shutil.copytree(folders.run, tmp_path / "copied")
    rankdyna("make-self-contained", copied)
    assert load_file(copied / NAME).keys() == load_file(folders.run / NAME).keys()


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        (2, [], "exactly one of rank_ratio and param_ratio"),
        (2, ["--rank_ratio", "0.1", "--param_ratio", "0.1"], "exactly one of"),
        (2, ["--param_ratio", "0.1", "--rank_multiple_of", "0"], "rank_multiple_of must be at least 1"),
        (1, ["--param_ratio", "0.1", "--train_file", "/no/file"], "There is no file /no/file"),
        (1, ["--param_ratio", "0.99"], "no more than param_ratio=0.99: give a smaller param_ratio"),
    ],
)
def test_wrong_options(
    code: int, options: list[str], message: str, refusal: Refusal, folders: Folders, tmp_path: Path
) -> None:
    assert message in refusal(code, "shrink", folders.run, *options, "-o", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_checkpoints_that_do_not_fit(refusal: Refusal, folders: Folders, tmp_path: Path) -> None:
    options = ["--param_ratio", 0.1, "-o", tmp_path / "small"]
    said = refusal(1, "shrink", folders.compacted, *options)
    assert f"has no {NAME}, the scores that the end of a run leaves" in said and "with --train_file" in said
    assert "holds no compacted model" in refusal(1, "shrink", folders.dense, *options)
    damaged = shutil.copytree(folders.run, tmp_path / "damaged")
    (damaged / NAME).write_bytes(b"x" * 50)
    assert f"{NAME} is damaged" in refusal(1, "shrink", damaged, *options)
    quantized = shutil.copytree(folders.run, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    (quantized / "config.json").write_text(json.dumps(config))
    assert "is quantized (torchao): take the model that it was made from" in refusal(1, "shrink", quantized, *options)
    (tmp_path / "rows.jsonl").write_text("{")
    assert "holds no rows" in refusal(1, "shrink", folders.run, *options, "--train_file", tmp_path / "rows.jsonl")
    assert not (tmp_path / "small").exists()
