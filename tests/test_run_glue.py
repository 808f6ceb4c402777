"""scripts/run_glue.py: what it reads, what it refuses, and what a run leaves behind."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from rankdyna_trainer import LowRankLinear
from rankdyna_trainer.report.tables import compression_summary

SCRIPT = Path(__file__).parents[1] / "scripts" / "run_glue.py"
spec = importlib.util.spec_from_file_location("run_glue", SCRIPT)
run_glue = importlib.util.module_from_spec(spec)
sys.modules["run_glue"] = run_glue
spec.loader.exec_module(run_glue)

GOOD = ["good", "fine", "great", "nice", "happy", "lovely", "bright", "warm"]
BAD = ["bad", "poor", "awful", "sad", "gray", "cold", "dull", "broken"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, "the", "a", "film", "day", "is", "so", "very"]
TRAINING = ["--per_device_train_batch_size=8", "--learning_rate=3e-3", "--use_cpu", "--disable_tqdm=true"]
TRAINING += ["--report_to=none"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": len(WORDS), "max_position_embeddings": 32}
    # With these a few steps are enough to learn something.
    ease = {"initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # As if the checkpoint came from another task.
    config = BertConfig(**sizes, **ease, problem_type="multi_label_classification")
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer(bert):
    return AutoTokenizer.from_pretrained(bert)


def write(path, rows):
    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def reviews(labels=(0, 1), count=24):
    """Rows which a tiny model learns in a few steps: "bad", "good", "bad bad", "good good", ..."""
    sentences = [" ".join([("bad", "good")[i % 2]] * (1 + i // 2 % 3)) for i in range(count)]
    return [{"sentence": sentences[i], "label": labels[i % 2], "idx": i} for i in range(count)]


def similarities(count=32):
    pairs = [(f"a {GOOD[i % 8]} day", f"a {(GOOD + BAD)[i % 16]} day", float(i % 16 < 8) * 5) for i in range(count)]
    return [{"sentence1": first, "sentence2": second, "label": label} for first, second, label in pairs]


def run(output, *options):
    run_glue.main([*TRAINING, f"--output_dir={output}", *options])
    return json.loads((output / "results.json").read_text())


def predictions(output, split="test"):
    header, *rows = (output / f"{split}_predictions.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    assert [row.split("\t")[0] for row in rows] == [str(i) for i in range(len(rows))]
    return [row.split("\t")[1] for row in rows]


class TestRuns:
    def test_plain_run_learns_saves_and_reports(self, bert, tmp_path, capsys):
        train = write(tmp_path / "train.jsonl", reviews())
        validation = write(tmp_path / "validation.jsonl", reviews(count=16) + reviews((1, 0), count=4))
        output = tmp_path / "out"
        results = run(
            output,
            *["--method=none", "--task_name=sst2", f"--model_name_or_path={bert}", "--seed=3"],
            *["--do_train", "--do_eval", f"--train_file={train}", f"--validation_file={validation}", "--max_steps=30"],
        )

        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
        expected = ["task", "method", "model", "seed", "accuracy", "target_parameter_ratio", "all_parameter_ratio"]
        assert list(results) == [*expected, "train_seconds", "train_steps"]
        # 16 of the 20 rows are labelled as in training, the rest the other way round.
        assert list(results.values())[:-2] == ["sst2", "none", bert, 3, 0.8, 1.0, 1.0]
        assert results["train_steps"] == 30
        assert results["train_seconds"] == json.loads((output / "train_results.json").read_text())["train_runtime"] > 0
        assert json.loads((output / "eval_results.json").read_text())["eval_accuracy"] == 0.8

        model = AutoModelForSequenceClassification.from_pretrained(output)
        assert model.config.id2label == {0: "negative", 1: "positive"}
        assert model.config.label2id == {"negative": 0, "positive": 1}
        assert model.config.problem_type == "single_label_classification"
        batch = AutoTokenizer.from_pretrained(output)("good good", return_tensors="pt")
        assert model(**batch).logits.argmax() == 1

    def test_rankdyna_run_leaves_a_compressed_checkpoint(self, bert, tmp_path):
        train = write(tmp_path / "train.jsonl", reviews())
        validation = write(tmp_path / "validation.jsonl", reviews(count=8))
        output, again = tmp_path / "out", tmp_path / "again"
        evaluation = ["--task_name=sst2", "--do_eval", f"--validation_file={validation}"]
        compression = ["--rank_ratio=0.25", "--rank_warmup_steps=1", "--rank_cooldown_steps=2"]
        results = run(
            output,
            *["--do_train", f"--model_name_or_path={bert}", f"--train_file={train}", "--max_steps=6", *evaluation],
            *[*compression, "--rank_scope=local", "--target_modules", "query", "value"],
        )

        model = AutoModelForSequenceClassification.from_pretrained(output)
        names = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
        summary = compression_summary(model)
        assert len(names) == 4
        assert all(name.endswith(("query", "value")) for name in names)
        assert results["method"] == "rankdyna"
        # 8 of the 32 groups of a 32 x 32 matrix, each of 64 numbers
        assert results["target_parameter_ratio"] == 0.5
        assert results["all_parameter_ratio"] == summary.all_ratio < 1
        assert model.config.id2label == {0: "negative", 1: "positive"}

        # In a run that does not compress, the checkpoint scores the same, and is not called dense.
        evaluated = run(again, "--method=none", f"--model_name_or_path={output}", *evaluation)
        for key in ("accuracy", "target_parameter_ratio", "all_parameter_ratio"):
            assert evaluated[key] == results[key]
        assert (evaluated["train_steps"], evaluated["train_seconds"]) == (0, 0.0)
        assert not (again / "config.json").exists()

    def test_regression(self, bert, tmp_path):
        rows = similarities()
        train = write(tmp_path / "train.jsonl", rows)
        output = tmp_path / "out"
        results = run(
            output,
            *["--method=none", "--task_name=stsb", f"--model_name_or_path={bert}", "--max_steps=4"],
            *["--do_train", "--do_eval", "--do_predict"],
            *[f"--train_file={train}", f"--validation_file={train}", f"--test_file={train}"],
        )
        predicted, labels = np.array(predictions(output), dtype=float), [row["label"] for row in rows]
        assert results["pearson"] == pytest.approx(np.corrcoef(predicted, labels)[0, 1], abs=1e-4)
        assert "spearmanr" in results and "accuracy" not in results
        config = AutoModelForSequenceClassification.from_pretrained(output).config
        assert (config.num_labels, config.problem_type) == (1, "regression")

    def test_constant_predictions_have_no_correlation(self, bert, tmp_path):
        train = write(tmp_path / "train.jsonl", similarities())
        same = [{"sentence1": "a day", "sentence2": "a film", "label": float(i)} for i in range(4)]
        validation = write(tmp_path / "validation.jsonl", same)
        results = run(
            tmp_path / "out",
            *["--method=none", f"--model_name_or_path={bert}", "--max_steps=1", "--do_train", "--do_eval"],
            *[f"--train_file={train}", f"--validation_file={validation}"],
        )
        assert results["task"] is None
        assert results["pearson"] is None

    def test_string_labels_of_a_csv_file(self, bert, tmp_path):
        train = write(tmp_path / "train.csv", reviews(("thumbs down", "thumbs up")))
        test = write(tmp_path / "test.csv", [{"sentence": text} for text in ("good", "bad bad", "good good")])
        output = tmp_path / "out"
        data = [f"--train_file={train}", f"--validation_file={train}"]
        run(
            output,
            *["--method=none", f"--model_name_or_path={bert}", "--max_steps=30"],
            *["--do_train", "--do_eval", "--do_predict", *data, f"--test_file={test}"],
        )
        assert predictions(output) == ["thumbs up", "thumbs down", "thumbs up"]
        config = AutoModelForSequenceClassification.from_pretrained(output).config
        assert config.id2label == {0: "thumbs down", 1: "thumbs up"}

        # A file in which one label is absent must not shrink or reorder the head that was trained.
        positive = write(tmp_path / "positive.csv", reviews(("thumbs down", "thumbs up"))[1::2])
        again = [f"--model_name_or_path={output}", "--method=none", "--do_eval", f"--validation_file={positive}"]
        assert run(tmp_path / "again", *again)["accuracy"] == 1.0

    def test_mnli_is_evaluated_and_predicted_on_both_halves(self, bert, tmp_path, monkeypatch):
        asked = []
        rows = [{"premise": f"a {GOOD[i % 8]} day", "hypothesis": f"a {BAD[i % 8]} day", "idx": i} for i in range(12)]
        halves = {"matched": [0] * 9 + [1] * 2 + [2], "mismatched": [0] * 2 + [1] * 9 + [-1]}
        splits = {"train": [{**row, "label": 0} for row in rows]}
        for half, labels in halves.items():
            labelled = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
            splits |= {f"validation_{half}": labelled, f"test_{half}": [{**row, "label": -1} for row in rows[:11]]}
        loaded = {name: Dataset.from_list(rows) for name, rows in splits.items()}
        monkeypatch.setattr(run_glue, "load_dataset", lambda *args: asked.append(args) or loaded)

        output = tmp_path / "out"
        results = run(
            output,
            *["--method=none", "--task_name=mnli", f"--model_name_or_path={bert}", "--max_steps=20"],
            *["--do_train", "--do_eval", "--do_predict"],
        )
        assert asked == [("nyu-mll/glue", "mnli")]
        # It has only ever seen label 0.
        assert results["accuracy"] == 9 / 12
        assert results["mm_accuracy"] == 2 / 11
        assert predictions(output) == predictions(output, "test_mm") == ["entailment"] * 11

    def test_the_seed_makes_the_head(self, bert, tmp_path):
        train = write(tmp_path / "train.jsonl", reviews())
        options = ["--method=none", f"--model_name_or_path={bert}", f"--train_file={train}", "--do_train"]
        heads = []
        for name, seed in (("first", 1), ("second", 1), ("third", 2)):
            output = tmp_path / name
            run_glue.main([*TRAINING, *options, "--max_steps=1", f"--output_dir={output}", f"--seed={seed}"])
            heads.append(load_file(output / "model.safetensors")["classifier.weight"])
        assert torch.equal(heads[0], heads[1])
        assert not torch.allclose(heads[0], heads[2], atol=1e-3)

    def test_half_precision_checkpoint_is_trained_in_float32(self, bert, tmp_path, tokenizer):
        half = tmp_path / "half"
        BertModel.from_pretrained(bert).to(torch.bfloat16).save_pretrained(half)
        tokenizer.save_pretrained(half)
        train = write(tmp_path / "train.jsonl", reviews())
        options = [f"--model_name_or_path={half}", f"--train_file={train}", f"--output_dir={tmp_path / 'out'}"]
        run_glue.main([*TRAINING, *options, "--method=none", "--do_train", "--max_steps=1"])
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}

    def test_decoder_without_a_padding_token(self, tmp_path):
        vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *GOOD, *BAD, "the", "film", "is", "so"])}
        words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = Whitespace()
        model = tmp_path / "gpt2"
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(model)
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(vocab_size=len(vocabulary), n_positions=16, n_embd=16, n_layer=1, n_head=2, **ends)
        GPT2Model(config).save_pretrained(model)
        rows = write(tmp_path / "rows.jsonl", reviews())
        options = [f"--model_name_or_path={model}", f"--validation_file={rows}"]
        assert 0 <= run(tmp_path / "out", *options, "--method=none", "--do_eval")["accuracy"] <= 1

    def test_encoder_decoder_that_returns_more_than_logits(self, tmp_path, tokenizer):
        sizes = {f"{part}_{size}": 1 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
        sizes |= {"vocab_size": len(WORDS), "max_position_embeddings": 32, "d_model": 16}
        ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
        model = tmp_path / "bart"
        BartModel(BartConfig(**sizes, **ends)).save_pretrained(model)
        tokenizer.save_pretrained(model)
        rows = write(tmp_path / "rows.jsonl", reviews(count=6))
        options = [f"--model_name_or_path={model}", "--task_name=sst2", f"--test_file={rows}"]
        run_glue.main([*TRAINING, *options, "--method=none", "--do_predict", f"--output_dir={tmp_path / 'out'}"])
        assert set(predictions(tmp_path / "out")) <= {"negative", "positive"}

    def test_resume(self, bert, tmp_path):
        train = write(tmp_path / "train.jsonl", reviews())
        options = [
            f"--model_name_or_path={bert}",
            f"--train_file={train}",
            "--method=none",
            "--do_train",
            "--max_steps=2",
        ]
        run_glue.main([*TRAINING, *options, f"--output_dir={tmp_path / 'out'}"])
        resume = [f"--resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-2'}", "--seed=7"]
        run_glue.main([*TRAINING, *options, f"--output_dir={tmp_path / 'again'}", *resume])
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("method", ["none", "rankdyna"])
    def test_push_to_hub(self, bert, tmp_path, monkeypatch, method):
        pushed = []
        monkeypatch.setattr(run_glue.Trainer, "init_hf_repo", lambda *_, **__: None)
        monkeypatch.setattr(run_glue.Trainer, "push_to_hub", lambda *_, **__: pushed.append(method))
        train = write(tmp_path / "train.jsonl", reviews())
        options = [f"--model_name_or_path={bert}", f"--train_file={train}", f"--output_dir={tmp_path / 'out'}"]
        options += [f"--method={method}", *(["--rank_ratio=0.5"] if method == "rankdyna" else [])]
        run_glue.main([*TRAINING, *options, "--do_train", "--max_steps=4", "--save_strategy=no", "--push_to_hub"])
        assert pushed == [method]


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


CLASSES = {"predictions": [1, 1, 1, 0, 0], "references": [1, 0, 0, 0, 0]}
NUMBERS = {"predictions": [1.0, 2.0, 3.0, 4.0], "references": [1.0, 2.0, 3.0, 10.0]}


class TestMetrics:
    @pytest.mark.parametrize(
        ("task", "data", "expected"),
        [
            # 1 true positive, 2 false positives, 2 true negatives: (1 * 2 - 2 * 0) / sqrt(3 * 1 * 4 * 2)
            ("cola", CLASSES, {"matthews_correlation": 2 / 24**0.5}),
            ("mnli", {"predictions": [0, 1, 2, 2], "references": [0, 2, 2, 2]}, {"accuracy": 3 / 4}),
            ("mrpc", CLASSES, {"accuracy": 3 / 5, "f1": 1 / 2}),
            ("qnli", CLASSES, {"accuracy": 3 / 5}),
            ("qqp", CLASSES, {"accuracy": 3 / 5, "f1": 1 / 2}),
            ("rte", CLASSES, {"accuracy": 3 / 5}),
            ("sst2", CLASSES, {"accuracy": 3 / 5}),
            ("stsb", NUMBERS, {"pearson": 14 / 250**0.5, "spearmanr": 1.0}),
            ("wnli", CLASSES, {"accuracy": 3 / 5}),
        ],
    )
    def test_without_the_hub(self, task, data, expected, monkeypatch):
        asked = []
        monkeypatch.setattr(run_glue.evaluate, "load", lambda *args, **_: asked.append(args))
        compute = run_glue.load_metric(task, run_glue.GLUE[task].metrics)
        assert compute(**{name: np.array(values) for name, values in data.items()}) == pytest.approx(expected)
        assert asked == []

    def test_every_task_of_glue(self):
        assert sorted(run_glue.GLUE) == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]

    def test_evaluate_is_used_when_the_hub_answers(self, monkeypatch):
        asked = []
        monkeypatch.setattr(run_glue.HfApi, "space_info", lambda *args, **options: asked.append(options["timeout"]))
        metric = SimpleNamespace(compute=lambda predictions, references: {"accuracy": 0.123})
        monkeypatch.setattr(run_glue.evaluate, "load", lambda *args, **_: asked.append(args) or metric)
        assert run_glue.load_metric("rte", ("accuracy",))(**CLASSES) == {"accuracy": 0.123}
        assert asked == [5, ("glue", "rte")]

    def test_a_metric_script_that_fails_is_replaced(self, monkeypatch, caplog):
        def fail(**_):
            raise ImportError("no such thing as load_metric")

        monkeypatch.setattr(run_glue.HfApi, "space_info", lambda *args, **_: None)
        monkeypatch.setattr(run_glue.evaluate, "load", lambda *args, **_: SimpleNamespace(compute=fail))
        assert run_glue.load_metric("rte", ("accuracy",))(**CLASSES) == {"accuracy": 3 / 5}
        assert "no such thing as load_metric" in caplog.text


class TestRefusals:
    """Each before any training: the message names what was given, and what to do."""

    @pytest.fixture
    def refuse(self, bert, tmp_path, monkeypatch):
        monkeypatch.setattr(run_glue, "Trainer", lambda **_: pytest.fail("the run went on"))
        train = write(tmp_path / "train.jsonl", reviews())

        def refuse(error, match, *options, data=(f"--train_file={train}", "--do_train", "--method=none")):
            with pytest.raises(error, match=match):
                run_glue.main(
                    [f"--model_name_or_path={bert}", f"--output_dir={tmp_path}", "--use_cpu", *data, *options]
                )

        return refuse

    def test_data_that_is_not_there(self, refuse, tmp_path):
        refuse(ValueError, "No data: give --task_name", data=("--do_train", "--method=none"))
        refuse(ValueError, "--validation_file nowhere.jsonl holds no json rows", "--validation_file=nowhere.jsonl")
        refuse(ValueError, "This run needs --validation_file too: it has only .*train.jsonl", "--do_eval")
        refuse(ValueError, "This run needs --test_file too", "--do_predict")
        test = write(tmp_path / "test.jsonl", reviews())
        refuse(
            ValueError, "This run needs --train_file too", data=(f"--test_file={test}", "--do_train", "--method=none")
        )

    def test_files_that_cannot_be_read(self, refuse, tmp_path):
        broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
        broken.write_text('{"sentence": "a film", "label": 1}\n{"sentence": "a fi')
        empty.touch()
        refuse(
            ValueError,
            "--validation_file .*broken.jsonl holds no json rows: .*JSON parse",
            f"--validation_file={broken}",
        )
        refuse(ValueError, "--validation_file .*empty.jsonl holds no json rows", f"--validation_file={empty}")

    def test_files_of_other_columns(self, refuse, tmp_path):
        other = write(tmp_path / "other.jsonl", [{"text": "a film", "label": 1}])
        unlabelled = write(tmp_path / "unlabelled.jsonl", [{"sentence": "a film", "idx": 1}])
        found = r"other.jsonl has no column sentence: it has \['text', 'label'\]"
        refuse(ValueError, found, "--do_eval", f"--validation_file={other}")
        refuse(ValueError, "no column label: it has", "--do_eval", f"--validation_file={unlabelled}")
        refuse(ValueError, "train.jsonl has no column hypothesis or premise", "--task_name=mnli")
        data = (f"--train_file={unlabelled}", "--do_train", "--method=none")
        refuse(ValueError, "unlabelled.jsonl has no column label", data=data)

    @pytest.mark.parametrize("name", ["max_train_samples", "max_eval_samples", "max_seq_length"])
    def test_numbers_below_one(self, refuse, name):
        refuse(ValueError, f"--{name} must be at least 1: got 0", f"--{name}=0")

    def test_rankdyna_without_a_ratio(self, refuse):
        refuse(ValueError, "exactly one of rank_ratio and param_ratio", "--method=rankdyna")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--task_name=sst3"], "invalid choice: 'sst3' (choose from"),
            (["--method=lora"], "invalid choice: 'lora'"),
            (["--rank_ratio=0.5"], "--method none does not compress: drop --rank_ratio=0.5, or use --method rankdyna"),
            (["--learning_rat=1"], "unrecognized arguments: --learning_rat=1"),
            (["--method=rankdyna", "--rank_ratio=0.5", "--rank_rato=1"], "unrecognized arguments: --rank_rato=1"),
            (["--do_train=false"], "nothing to do: give --do_train"),
            (["--method=rankdyna", "--rank_ratio=0.5", "--do_train=false", "--do_eval"], "or --method none with"),
        ],
    )
    def test_wrong_options(self, refuse, capsys, options, message):
        refuse(SystemExit, "2", *options)
        assert message in capsys.readouterr().err

    def test_help_lists_the_options_of_script_trainer_and_rankdyna(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            run_glue.main(["--help"])
        printed = capsys.readouterr().out
        assert all(option in printed for option in ("--task_name", "--learning_rate", "--rank_ratio"))
