"""scripts/run_glue.py: which task the rows are of, and what is made of them."""

from types import SimpleNamespace

import pytest
import run_glue
from datasets import Dataset
from support.reviews import reviews, write


class TestInferTask:
    def infer(self, *rows, columns=("sentence",)):
        train = Dataset.from_list([{**dict.fromkeys(columns, "a film"), **row} for row in rows])
        return run_glue.infer_task({"train": train}, "no/model")

    def test_floats_are_regression(self):
        task = self.infer({"label": 0.5}, {"label": 2.0}, columns=("first", "second"))
        assert task == (("first", "second"), (), ("pearson", "spearmanr"))

    def test_whole_numbers_are_classes(self):
        assert self.infer({"label": 2}, {"label": -1}, {"label": 0}) == (("sentence",), ("0", "1", "2"), ("accuracy",))

    def test_strings_are_classes_in_sorted_order(self):
        assert self.infer({"label": "no"}, {"label": "yes"}, {"label": "maybe"}).labels == ("maybe", "no", "yes")

    def test_identifiers_are_no_text(self):
        columns = ("id", "idx", "sentence")
        assert self.infer({"label": 0}, {"label": 1}, columns=columns).text_columns == ("sentence",)

    def test_too_many_or_no_text_columns(self):
        with pytest.raises(ValueError, match=r"one or two columns of text, not \('a', 'b', 'c'\).*--task_name"):
            self.infer({"label": 0}, {"label": 1}, columns=("a", "b", "c"))
        with pytest.raises(ValueError, match=r"one or two columns of text, not \(\)"):
            self.infer({"label": 0, "count": 3}, {"label": 1, "count": 4}, columns=())

    def test_one_label_is_not_enough(self):
        with pytest.raises(ValueError, match=r"at least two.*found \{1\}"):
            self.infer({"label": 1}, {"label": -1}, {"label": 1})

    def test_text_and_numbers_do_not_mix(self, tmp_path):
        path = write(tmp_path / "train.jsonl", [{"sentence": "a film", "label": label} for label in (1, "good")])
        script = SimpleNamespace(files={"train": path})
        training = SimpleNamespace(do_train=True, do_eval=False, do_predict=False)
        with pytest.raises(ValueError, match="all text or all numbers"):
            run_glue.infer_task(run_glue.load_splits(script, training), "no/model")


class TestPrepare:
    TASK = run_glue.Task(("sentence",), ("negative", "positive"), ("accuracy",))

    def prepare(self, tokenizer, rows, split="train", task=TASK, **options):
        script = run_glue.ScriptArguments(model_name_or_path="m", task_name="sst2", **options)
        return run_glue.prepare(Dataset.from_list(rows), split, task, tokenizer, script)

    def test_names_and_indices_of_labels(self, tokenizer):
        assert self.prepare(tokenizer, reviews((0, 1), 4))["labels"][:] == [0, 1, 0, 1]
        assert self.prepare(tokenizer, reviews(("negative", "positive"), 4))["labels"][:] == [0, 1, 0, 1]

    def test_first_rows_are_taken(self, tokenizer):
        rows = reviews(count=12)
        for split, option in (("train", "max_train_samples"), ("validation", "max_eval_samples")):
            taken = self.prepare(tokenizer, rows, split, **{option: 5})
            assert taken["input_ids"][:] == [tokenizer(row["sentence"])["input_ids"] for row in rows[:5]]
        options = {"max_train_samples": 5, "max_eval_samples": 5}
        assert len(self.prepare(tokenizer, rows, "test", **options)) == 12
        assert len(self.prepare(tokenizer, rows, "validation_mm", **options)) == 5

    def test_lengths(self, tokenizer):
        rows = [{"sentence": "the film is " + "very " * words + "good", "label": 1} for words in (0, 10, 50)]

        def lengths(**options):
            return [len(ids) for ids in self.prepare(tokenizer, rows, **options)["input_ids"]]

        assert lengths() == [6, 16, 32]  # the model has 32 positions
        assert lengths(max_seq_length=10) == [6, 10, 10]
        assert lengths(max_seq_length=10, pad_to_max_length=True) == [10, 10, 10]

    def test_pairs_and_empty_cells(self, tokenizer):
        task = run_glue.Task(("first", "second"), (), ("pearson",))
        rows = [{"first": "a film", "second": "a day", "label": 3}, {"first": "a film", "second": None, "label": 2}]
        prepared = self.prepare(tokenizer, rows, task=task)
        expected = tokenizer(["a film", "a film"], ["a day", ""])
        assert prepared["input_ids"][:] == expected["input_ids"]
        assert prepared["token_type_ids"][:] == expected["token_type_ids"]
        assert [type(label) for label in prepared["labels"]] == [float, float]

    def test_rows_without_a_label(self, tokenizer, caplog):
        rows = [{"sentence": "a film", "label": label} for label in (0, -1, None, 1)]
        assert self.prepare(tokenizer, rows)["labels"][:] == [0, 1]
        assert "sst2 (train): 2 rows without a label are left out" in caplog.text
        assert len(self.prepare(tokenizer, rows, "test")) == 4
        with pytest.raises(ValueError, match="found none"):
            self.prepare(tokenizer, rows[1:3])

    def test_minus_one_is_a_number_in_regression(self, tokenizer):
        task = run_glue.Task(("sentence",), (), ("pearson",))
        rows = [{"sentence": "a film", "label": label} for label in (-1.0, None, 1.0)]
        assert self.prepare(tokenizer, rows, task=task)["labels"][:] == [-1.0, 1.0]

    @pytest.mark.parametrize("label", [2, -2, "neutral"])
    def test_unknown_label(self, tokenizer, label):
        with pytest.raises(ValueError, match=rf"\(train\): expected labels .*'negative', 'positive'.*{label}"):
            self.prepare(tokenizer, [{"sentence": "a film", "label": label}])
