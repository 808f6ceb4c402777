"""scripts/run_glue.py: what a run leaves behind."""

import json

import numpy as np
import pytest
import run_glue
import torch
from datasets import Dataset
from safetensors.torch import load_file
from support.reviews import BAD, GOOD, WORDS, reviews, write
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from rankdyna_trainer import LowRankLinear
from rankdyna_trainer.report.tables import compression_summary

TRAINING = ["--per_device_train_batch_size=8", "--learning_rate=3e-3", "--use_cpu", "--disable_tqdm=true"]
TRAINING += ["--report_to=none"]


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
