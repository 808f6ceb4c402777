"""scripts/run_ner.py: tags and tokens, the scores, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import run_ner
from datasets import ClassLabel, Dataset, Features, List, Value
from tasks import data as task_data
from tasks.tiny_tasks import entities, tokenizer, write
from transformers import AutoModelForTokenClassification

from rankdyna_trainer import LowRankLinear

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def predictions(folder: Path) -> list[list[str]]:
    header, *rows = (folder / "test_predictions.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    return [row.split("\t")[1].split() for row in rows]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_plain_run_learns_and_predicts(kind, folder_of, run_script, tmp_path):
    train = write(tmp_path / "train.jsonl", entities(32))
    wrong = entities(2)
    wrong[0]["ner_tags"][0] = "B-LOC"
    validation = write(tmp_path / "validation.jsonl", [*entities(4), *wrong])
    unseen = [{"tokens": ["bob", "left", "new", "york"]}, {"tokens": []}]
    output = tmp_path / "out"
    run = run_script(
        "run_ner",
        output,
        *["--method=none", f"--model_name_or_path={folder_of(kind)}", "--do_train", "--do_eval", "--do_predict"],
        *[f"--train_file={train}", f"--validation_file={validation}", "--num_train_epochs=12"],
        f"--test_file={write(tmp_path / 'test.jsonl', unseen)}",
    )
    # Of the 12 entities one is another kind of entity in the file; of the 21 tags one is.
    f1 = {"precision": 11 / 12, "recall": 11 / 12, "f1": 11 / 12, "accuracy": 20 / 21}
    assert run["scores"] == {"final": pytest.approx(f1)}
    tags, nothing = predictions(output)
    assert tags == ["B-PER", "O", "B-LOC", "I-LOC"]
    assert nothing == []
    assert AutoModelForTokenClassification.from_pretrained(output).config.id2label == {
        0: "O",
        1: "B-LOC",
        2: "B-PER",
        3: "I-LOC",
    }


def test_rankdyna_run_of_a_known_task_and_the_scores_of_its_checkpoint(folder_of, run_script, tmp_path):
    indices = {"O": 0, "B-PER": 1, "B-LOC": 5, "I-LOC": 6}
    rows = [{**row, "ner_tags": [indices[tag] for tag in row["ner_tags"]]} for row in entities(32)]
    data = [f"--{split}_file={write(tmp_path / f'{split}.jsonl', rows)}" for split in ("train", "validation", "test")]
    output = tmp_path / "out"
    run = run_script(
        "run_ner",
        output,
        *["--task_name=conll2003", f"--model_name_or_path={folder_of('bert')}", "--param_ratio=0.4", *data],
        *["--do_train", "--do_eval", "--do_predict", "--num_train_epochs=8"],
    )
    model = AutoModelForTokenClassification.from_pretrained(output)
    assert [model.config.id2label[i] for i in (0, 1, 2, 5, 8)] == ["O", "B-PER", "I-PER", "B-LOC", "I-MISC"]
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert run["target_parameter_ratio"] <= 0.4
    assert run["scores"]["test"] == run["scores"]["final"]
    assert run["scores"]["final"]["f1"] > 0.5
    options = ["--method=none", "--task_name=conll2003", f"--model_name_or_path={output}", "--do_eval", data[1]]
    again = run_script("run_ner", tmp_path / "again", *options)
    assert again["scores"]["final"] == run["scores"]["final"]


def test_scores_of_a_hand_made_example():
    expected = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "I-LOC", "O"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "B-LOC", "O", "O"]]
    references = np.array([[LABELS.index(tag) for tag in row] for row in expected])
    hidden = np.full((2, 1), -100)
    scores = run_ner.compute_scores(
        np.hstack([np.full((2, 1), 4), [[LABELS.index(tag) for tag in row] for row in predicted]]),
        np.hstack([hidden, references]),
        LABELS,
    )
    # 1 of 4 predicted entities is one of the 3 that are there; 5 of 8 tags agree.
    assert scores == pytest.approx({"precision": 1 / 4, "recall": 1 / 3, "f1": 2 / 7, "accuracy": 5 / 8})


class TestPrepare:
    def prepare(self, rows, split="train", **options):
        script = run_ner.ScriptArguments(model_name_or_path="m", dataset_name="user/set", **options)
        return run_ner.prepare(Dataset.from_list(rows), split, LABELS, tokenizer(), script)

    def test_the_first_token_of_a_word_has_its_tag(self):
        # The tokenizer makes three tokens of the first word, and none of the second.
        rows = [{"words": ["york's", " ", "alice"], "kinds": ["B-LOC", "O", "B-PER"]}]
        prepared = self.prepare(rows, tokens_column="words", tags_column="kinds")
        pieces = tokenizer()("york's alice")["input_ids"]
        assert prepared["input_ids"][:] == [pieces] and len(pieces) == 6
        assert prepared["labels"][:] == [[-100, 3, -100, -100, 1, -100]]

    def test_indices_are_tags(self):
        tags = self.prepare([{"tokens": ["alice", "left"], "ner_tags": [1, 0]}])["labels"][:]
        assert tags == self.prepare([{"tokens": ["alice", "left"], "ner_tags": ["B-PER", "O"]}])["labels"][:]

    def test_words_that_are_cut_are_told(self, caplog):
        rows = [{"tokens": ["alice"] * 9, "ner_tags": ["B-PER"] * 9}]
        assert self.prepare(rows, max_seq_length=6)["labels"][:] == [[-100, 1, 1, 1, 1, -100]]
        assert "user/set (train): 5 of 9 words have no token, most of them after the first 6" in caplog.text

    def test_rows_without_words(self, caplog):
        rows = [{"tokens": [], "ner_tags": []}, *entities(2)]
        assert len(self.prepare(rows)) == 2
        assert "user/set (train): 1 rows without a word are left out" in caplog.text
        assert len(self.prepare(rows, "test")) == 3

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"tokens": ["bob"], "ner_tags": ["B-FILM"]}, r"expected tags \['O', .*found \['B-FILM'\]"),
            ({"tokens": ["bob"], "ner_tags": [5]}, r"found \['5'\]"),
            ({"tokens": ["bob"], "ner_tags": ["O", "O"]}, "lists of one length, which they are not in row 0"),
            ({"tokens": "bob", "ner_tags": "bob"}, "lists of one length, which they are not in row 0"),
            ({"words": ["bob"], "ner_tags": ["O"]}, r"no column tokens: it has \['words', 'ner_tags'\]"),
            ({"tokens": ["bob"]}, r"no column ner_tags: it has \['tokens'\]"),
        ],
    )
    def test_refusals(self, row, message):
        with pytest.raises(ValueError, match=message):
            self.prepare([row])


class TestLabels:
    def find(self, rows, features=None, **options):
        script = run_ner.ScriptArguments(model_name_or_path="m", **({"dataset_name": "user/set"} | options))
        return run_ner.find_labels({"train": Dataset.from_list(rows, features=features)}, script)

    def test_names_in_the_training_rows(self):
        assert self.find(entities(2)) == ["O", "B-LOC", "B-PER", "I-LOC"]

    def test_names_that_the_hub_has(self):
        kinds = ClassLabel(names=["O", "B-X", "I-X"])
        features = Features({"tokens": List(Value("string")), "ner_tags": List(kinds)})
        assert self.find([{"tokens": ["bob"], "ner_tags": [0]}], features) == ["O", "B-X", "I-X"]

    def test_known_tasks(self):
        conll = self.find([], dataset_name=None, task_name="conll2003")
        assert conll == ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
        wnut = self.find([], dataset_name=None, task_name="wnut17")
        assert len(wnut) == 13 and wnut[:5] == [
            "O",
            "B-corporation",
            "I-corporation",
            "B-creative-work",
            "I-creative-work",
        ]

    def test_indices_of_nothing(self):
        with pytest.raises(ValueError, match=r"--task_name gives \(conll2003, wnut17\): found \['0', '3'\]"):
            self.find([{"tokens": ["bob", "left"], "ner_tags": [3, 0]}])


def test_a_task_of_the_hub(folder_of, run_script, tmp_path, monkeypatch):
    asked = []
    rows = [{"tokens": ["alice", "left"], "ner_tags": [9, 0]}] * 4
    splits = {"validation": Dataset.from_list(rows)}
    monkeypatch.setattr(task_data, "load_dataset", lambda *args, **rest: asked.append((args, rest)) or splits)
    options = ["--method=none", "--do_eval", "--task_name=wnut17", f"--model_name_or_path={folder_of('bert')}"]
    assert run_script("run_ner", tmp_path / "out", *options)["task"] == "wnut17"
    assert asked == [(("leondz/wnut_17", None), {"revision": "refs/convert/parquet"})]
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())) >= {
        "precision",
        "recall",
        "f1",
        "accuracy",
    }


def test_refusals(refuse, folder_of, tmp_path):
    train = f"--train_file={write(tmp_path / 'train.jsonl', entities(4))}"
    plain = [f"--model_name_or_path={folder_of('bert')}", "--method=none", "--do_train"]
    refuse("run_ner", "invalid choice: 'conll'", *plain, "--task_name=conll")
    refuse("run_ner", "has no column pos: it has ['tokens', 'ner_tags']", *plain, train, "--tags_column=pos")
    refuse("run_ner", "needs --validation_file too", *plain, train, "--do_eval")
