"""scripts/run_summarization.py: the models that it takes, generated summaries, ROUGE, and what it refuses."""

from pathlib import Path

import pytest
import run_summarization
from datasets import Dataset
from tasks import data as task_data
from tasks.tiny_tasks import dialogues, save_model, tokenizer, write
from transformers import AutoModelForSeq2SeqLM, EncoderDecoderModel, PreTrainedTokenizerFast

from rankdyna_trainer import LowRankLinear

SUMMARY = "the film is good"


def predictions(folder: Path) -> list[str]:
    header, *rows = (folder / "test_predictions.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    return [row.split("\t")[1] for row in rows]


@pytest.mark.parametrize("kind", ["bart", "t5", "marian", "encoder-decoder"])
def test_plain_run_learns_to_generate(kind, folder_of, run_script, tmp_path):
    train = write(tmp_path / "train.jsonl", dialogues(16))
    # Of the words of the second summary half are generated, and half of those generated are in it, in one pair.
    validation = write(
        tmp_path / "validation.jsonl", [*dialogues(1), dialogues(2)[1] | {"summary": "alice is good bob"}]
    )
    output = tmp_path / "out"
    run = run_script(
        "run_summarization",
        output,
        *["--method=none", f"--model_name_or_path={folder_of(kind)}", "--do_train", "--do_eval", "--do_predict"],
        *[f"--train_file={train}", f"--validation_file={validation}", "--num_train_epochs=15"],
        *["--max_target_length=12", f"--test_file={write(tmp_path / 'test.jsonl', dialogues(2))}"],
    )
    assert predictions(output) == [SUMMARY] * 2
    expected = {"rouge1": (1 + 2 / 4) / 2, "rouge2": (1 + 1 / 3) / 2, "rougel": (1 + 2 / 4) / 2}
    assert run["scores"]["final"] == pytest.approx(expected)
    assert run["scores"]["test"] == {"rouge1": 1.0, "rouge2": 1.0, "rougel": 1.0}


@pytest.mark.parametrize("kind", ["bart", "t5", "encoder-decoder"])
def test_rankdyna_run_leaves_a_compressed_model(kind, folder_of, run_script, tmp_path):
    data = [f"--{split}_file={write(tmp_path / f'{split}.jsonl', dialogues(16))}" for split in ("train", "validation")]
    output = tmp_path / "out"
    run = run_script(
        "run_summarization",
        output,
        *["--rank_ratio=0.4", f"--model_name_or_path={folder_of(kind)}", "--do_train", "--do_eval", *data],
        *["--num_train_epochs=15", "--max_target_length=12"],
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(output)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert 0 < run["target_parameter_ratio"] < 1
    options = ["--method=none", f"--model_name_or_path={output}", data[1], "--do_eval", "--max_target_length=12"]
    assert run_script("run_summarization", tmp_path / "again", *options)["scores"] == run["scores"]


def test_two_encoders_are_joined(folder_of, run_script, tmp_path):
    train = write(tmp_path / "train.jsonl", dialogues(16))
    output, bert = tmp_path / "out", folder_of("bert")
    run = run_script(
        "run_summarization",
        output,
        *["--method=none", f"--model_name_or_path={bert}", f"--decoder_model_name_or_path={bert}", "--do_train"],
        *["--do_predict", "--num_train_epochs=15", f"--train_file={train}", f"--test_file={train}"],
    )
    assert predictions(output) == [SUMMARY] * 16
    assert run["arguments"]["script"]["decoder_model_name_or_path"] == bert
    model = AutoModelForSeq2SeqLM.from_pretrained(output)
    assert isinstance(model, EncoderDecoderModel)
    generated = model.generate(**tokenizer()("alice sees rome", return_tensors="pt"), max_length=12)
    assert tokenizer().decode(generated[0], skip_special_tokens=True) == SUMMARY


def test_rouge_of_a_hand_made_example():
    scores = run_summarization.compute_scores(["the films are new", "oslo"], ["the film is new", "rome"])
    # "film" and "films" have one stem: 3 of 4 words, in order; of the 3 pairs only "the film".
    assert scores == pytest.approx({"rouge1": 3 / 8, "rouge2": 1 / 6, "rougel": 3 / 8})
    assert run_summarization.compute_scores(["new the film"], ["the film new"])["rougel"] == pytest.approx(2 / 3)


class TestPrepare:
    def prepare(self, rows, split="train", **options):
        script = run_summarization.ScriptArguments(model_name_or_path="m", task_name="samsum", **options)
        return run_summarization.prepare(Dataset.from_list(rows), split, tokenizer(), script)

    def test_texts_are_cut_and_prefixed(self):
        rows = [{"text": "alice sees new york", "short": "the film is good"}]
        options = {"text_column": "text", "summary_column": "short", "source_prefix": "the day "}
        prepared = self.prepare(rows, **options, max_source_length=6, max_target_length=4)
        assert prepared["input_ids"][:] == [tokenizer()("the day alice sees")["input_ids"]]
        assert prepared["labels"][:] == [tokenizer()("the film")["input_ids"]]
        assert prepared.column_names == ["input_ids", "attention_mask", "labels"]

    def test_rows_without_a_text_or_a_summary(self, caplog):
        rows = [*dialogues(2), {"dialogue": " ", "summary": "oslo"}, {"dialogue": "bob", "summary": None}]
        assert len(self.prepare(rows)) == 2
        assert "samsum (train): 2 rows without a text or a summary are left out" in caplog.text
        assert len(self.prepare(rows, "test")) == 4
        with pytest.raises(ValueError, match=r"samsum \(train\) has no row with a dialogue and a summary"):
            self.prepare(rows[2:])

    def test_missing_columns(self):
        with pytest.raises(ValueError, match=r"has no column summary: it has \['dialogue'\]"):
            self.prepare([{"dialogue": "bob left"}])
        assert "labels" not in self.prepare([{"dialogue": "bob left"}], "test").column_names


def test_a_task_of_the_hub(folder_of, run_script, tmp_path, monkeypatch):
    asked = []
    splits = {"validation": Dataset.from_list(dialogues(2))}
    monkeypatch.setattr(task_data, "load_dataset", lambda *args, **_: asked.append(args) or splits)
    options = ["--method=none", "--do_eval", "--task_name=samsum", f"--model_name_or_path={folder_of('bart')}"]
    run_script("run_summarization", tmp_path / "out", *options, "--max_target_length=6")
    assert asked == [("knkarthick/samsum", None)]


def test_generation_is_as_long_as_a_summary_may_be(folder_of, run_script, tmp_path):
    file = f"--validation_file={write(tmp_path / 'validation.jsonl', dialogues(2))}"
    options = [
        "--method=none",
        "--do_eval",
        file,
        f"--model_name_or_path={folder_of('bart')}",
        "--max_target_length=6",
    ]
    training = run_script("run_summarization", tmp_path / "out", *options)["arguments"]["training"]
    assert (training["predict_with_generate"], training["generation_max_length"]) == (True, 6)
    options += ["--generation_max_length=9"]
    training = run_script("run_summarization", tmp_path / "again", *options)["arguments"]["training"]
    assert training["generation_max_length"] == 9


def test_refusals(refuse, folder_of, tmp_path):
    train = f"--train_file={write(tmp_path / 'train.jsonl', dialogues(4))}"
    plain = [f"--model_name_or_path={folder_of('bert')}", "--method=none", "--do_train"]
    refuse("run_summarization", "invalid choice: 'xsum'", *plain, "--task_name=xsum")
    refuse("run_summarization", "drop --predict_with_generate false", *plain, train, "--predict_with_generate=false")
    refuse("run_summarization", "has no column article", *plain, train, "--text_column=article")
    refuse(
        "run_summarization", "--max_target_length must be at least 1: got 0", *plain, train, "--max_target_length=0"
    )
    other = Path(save_model("bert", tmp_path / "other"))
    words = PreTrainedTokenizerFast.from_pretrained(other)
    words.add_tokens("aardvark")
    words.save_pretrained(other)
    refuse("run_summarization", "has another vocabulary", *plain, train, f"--decoder_model_name_or_path={other}")
