import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_runs import Folders
from tasks import tiny_tasks
from transformers import BertForSequenceClassification, GPT2LMHeadModel

from rankdyna_trainer.cli.sensitivity_file import NAME
from rankdyna_trainer.cli.text_rows import in_batches
from rankdyna_trainer.report.sensitivity import ALL_LAYERS, layer_sensitivity

Run = Callable[..., str]


@pytest.fixture
def folder(folders: Folders, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders.dense, tmp_path / "model"))


@pytest.fixture
def rows(tmp_path: Path) -> list[object]:
    file = tiny_tasks.write(tmp_path / "rows.jsonl", tiny_tasks.sentences(40))
    return ["--train_file", file, "--text_column", "sentence"]


def one_by_one(count: int) -> list[dict[str, torch.Tensor]]:
    tokenizer, examples = tiny_tasks.tokenizer(), tiny_tasks.sentences(40)[:count]
    encoded = [tokenizer(row["sentence"], return_tensors="pt") for row in examples]
    return [{**tokens, "labels": torch.tensor([row["label"]])} for tokens, row in zip(encoded, examples, strict=True)]


def test_it_is_what_the_library_measures_on_single_rows(
    document: Callable[..., Any], folder: Path, rows: list[object]
) -> None:
    found = document(
        "sensitivity", folder, *rows, "--param_ratio", 0.5, "--param_ratio", 0.2, "--max_train_samples", 30
    )
    costs = layer_sensitivity(BertForSequenceClassification.from_pretrained(folder), one_by_one(30), [0.5, 0.2])
    assert found["rows"] == 30 and found["class"] == "BertForSequenceClassification"
    for row in found["layers"] + [row for row in found["together"] if row["layer"] == ALL_LAYERS]:
        expected = costs.loc[(row["layer"], row["param_ratio"])]
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["increase"] == pytest.approx(expected["increase"], abs=1e-5)
        assert row["parameters"] == expected["parameters"]
    assert len(found["layers"]) == 24
    assert found["middle_ratio"] == 0.2
    # The loss that is told for the dense model is what all rises are over.
    row = found["layers"][0]
    assert found["dense_loss"] == pytest.approx(row["loss"] - row["increase"])


def test_files_are_written_beside_the_model_and_inspect_shows_them(
    rankdyna: Run, document: Callable[..., Any], folder: Path, rows: list[object]
) -> None:
    assert document("inspect", folder)["sensitivity"] is None
    assert "Sensitivity" not in rankdyna("inspect", folder)
    before = (folder / "model.safetensors").read_bytes()
    shown = rankdyna("sensitivity", folder, *rows)
    assert (folder / "model.safetensors").read_bytes() == before
    saved = json.loads((folder / NAME).read_text())
    picture = folder / "rankdyna_sensitivity.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {folder / NAME} and {picture}." in shown
    assert not list(folder.glob("_rankdyna-*"))
    dearest = max(
        (row for row in saved["layers"] if row["param_ratio"] == 0.3), key=lambda row: float(row["increase"])
    )
    lines = [line.split()[0] for line in shown.partition("All together")[0].splitlines() if line[:2] in ("0.", "1.")]
    assert len(lines) == 12
    assert lines[0] == dearest["layer"].removeprefix("bert.encoder.layer.")
    assert "all layers at 0.15" in shown and "of targets" in shown and "of all" in shown
    assert document("inspect", folder)["sensitivity"] == saved
    words = rankdyna("inspect", folder)
    assert f"Sensitivity: loss {saved['dense_loss']:.4f} on 40 rows" in words
    assert f"dearest alone at 0.3: {dearest['layer']} {dearest['increase']:+.4f}" in words
    advice = " ".join(f"--exclude_modules {ending}" for ending in saved["exclude_modules"])
    assert advice in words and advice in shown


def test_another_place(rankdyna: Run, folder: Path, rows: list[object], tmp_path: Path) -> None:
    rankdyna("sensitivity", folder, *rows, "--param_ratio", 0.5, "-o", tmp_path / "costs.json")
    assert (tmp_path / "costs.json").is_file() and (tmp_path / "costs.png").is_file()
    assert not (folder / NAME).exists()


def test_layers_may_be_chosen(document: Callable[..., Any], folder: Path, rows: list[object]) -> None:
    options = ["--target_modules", "query", "--target_modules", "key", "--exclude_modules", "0.attention.self.key"]
    found = document("sensitivity", folder, *rows, "--param_ratio", 0.5, *options)
    names = {row["layer"].removeprefix("bert.encoder.layer.") for row in found["layers"]}
    assert names == {"0.attention.self.query", "1.attention.self.query", "1.attention.self.key"}


def test_a_layer_that_stands_out_is_named_as_an_option(rankdyna: Run, folder: Path, tmp_path: Path) -> None:
    """All others have so few groups that none is lost, and the labels are what the model says."""
    needed = "bert.encoder.layer.0.intermediate.dense.weight"
    model, sentences = BertForSequenceClassification.from_pretrained(folder), tiny_tasks.sentences(200)
    tokens = [tiny_tasks.tokenizer()(row["sentence"], return_tensors="pt") for row in sentences]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("bert.encoder") and weight.ndim == 2:
                weight.copy_(torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1]) / 5)
                if name == needed:
                    weight.copy_(torch.randn_like(weight))
        model.bert.pooler.dense.weight *= 20
        model.classifier.weight *= 100
        model.classifier.bias -= torch.cat([model(**text).logits for text in tokens]).mean(0)
        labels = [int(model(**text).logits.argmax()) for text in tokens]
    model.save_pretrained(folder)
    file = tiny_tasks.write(
        tmp_path / "own.jsonl",
        [{"text": row["sentence"], "label": label} for row, label in zip(sentences, labels, strict=True)],
    )
    shown = rankdyna("sensitivity", folder, "--train_file", file)
    assert "\n0.intermediate.dense * " in shown and "all others at 0.3" in shown
    assert shown.count("--exclude_modules") == 1 and "\n  --exclude_modules 0.intermediate.dense\n" in shown
    assert "far dearer than others: --exclude_modules 0.intermediate.dense\n" in rankdyna("inspect", folder)
    again = rankdyna("sensitivity", folder, "--train_file", file, "--exclude_modules", "0.intermediate.dense")
    assert "No layer stands out" in again
    assert "no layer is far dearer than the others" in rankdyna("inspect", folder)


def test_a_language_model(document: Callable[..., Any], tmp_path: Path) -> None:
    folder = tiny_tasks.save_model("gpt2", tmp_path / "gpt2")
    (tmp_path / "texts.txt").write_text("alice sees paris\n\nbob\ndave left rome\nalice left\n")
    found = document("sensitivity", folder, "--train_file", tmp_path / "texts.txt", "--param_ratio", 0.3)
    assert found["rows"] == 3
    tokenizer = tiny_tasks.tokenizer(ends=False)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        losses = [
            model(**tokens, labels=tokens["input_ids"]).loss.item()
            for tokens in (
                tokenizer(text, return_tensors="pt") for text in ("alice sees paris", "dave left rome", "alice left")
            )
        ]
    assert found["dense_loss"] == pytest.approx(sum(losses) / 3, abs=1e-6)


def test_batches_hold_each_row_once_and_none_is_padded() -> None:
    rows = [
        {"input_ids": torch.full((1, 2 + number % 3), number), "labels": torch.tensor([number])} for number in range(9)
    ]
    batches = in_batches(rows, 2)
    assert [len(batch["labels"]) for batch in batches] == [2, 1, 2, 1, 2, 1]
    assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == list(range(9))
    assert all((batch["input_ids"] == batch["labels"][:, None]).all() for batch in batches)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found | {"class": "GPT2Model"}, "is of a GPT2Model, and the model is a Bert"),
        (lambda found: found | {"layers": [found["layers"][0] | {"layer": "h.0"}]}, "that the model has not"),
        (lambda found: found | {"layers": [found["layers"][0] | {"dense_parameters": 7}]}, "of another size"),
        (lambda found: [], "cannot be read"),
        (lambda found: {"class": "BertForSequenceClassification", "layers": []}, "cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_is_left_aside(
    change: Callable[[Any], Any],
    reason: str,
    rankdyna: Run,
    document: Callable[..., Any],
    folder: Path,
    rows: list[object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = document("sensitivity", folder, *rows, "--param_ratio", 0.5, "--target_modules", "query")
    (folder / NAME).write_text(json.dumps(change(found)))
    assert "Sensitivity" not in rankdyna("inspect", folder)
    assert reason in caplog.text and f"run `rankdyna sensitivity {folder}` again" in caplog.text


def test_without_matplotlib(
    document: Callable[..., Any],
    folder: Path,
    rows: list[object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "rankdyna_trainer.report.plots", raising=False)
    monkeypatch.delattr("rankdyna_trainer.report.plots", raising=False)
    found = document("sensitivity", folder, *rows, "--param_ratio", 0.5, "--target_modules", "query")
    assert found["picture"] is None and (folder / NAME).is_file()
    assert "There is no heatmap of the sensitivity. Figures need matplotlib" in caplog.text


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, [], "Missing option '--train_file'"),
        (2, ["--train_file", "x", "--param_ratio", "1.5"], "must be in (0, 1]: got 1.5"),
        (2, ["--train_file", "x", "-o", "costs.csv"], "--output costs.csv must end in .json"),
        (1, ["--train_file", "x", "-o", "/no/folder/costs.json"], "give a file in a folder that is there"),
        (1, ["--train_file", "/no/file"], "There is no file /no/file"),
    ],
)
def test_wrong_options(code: int, arguments: list[str], message: str, refusal: Run, folder: Path) -> None:
    assert message in refusal(code, "sensitivity", folder, *arguments)
    assert not (folder / NAME).exists()


def test_a_model_of_the_hub_needs_a_place(refusal: Run) -> None:
    message = refusal(2, "sensitivity", "user/model", "--train_file", "x")
    assert "user/model is no folder on this machine: name the file to write with -o" in message


def test_models_and_rows_that_do_not_fit(refusal: Run, folders: Folders, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good", "label": 0}\n')
    options = ["--train_file", tmp_path / "rows.jsonl", "-o", tmp_path / "costs.json"]
    assert "has 1 rows with a loss: give some hundred" in refusal(1, "sensitivity", folder, *options)
    assert "is compacted already" in refusal(1, "sensitivity", folders.compacted, *options)
    assert not (tmp_path / "costs.json").exists()
