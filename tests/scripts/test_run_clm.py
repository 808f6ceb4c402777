"""scripts/run_clm.py: blocks, perplexity, the models and files that it takes, and what it refuses."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_clm
import torch
from datasets import Dataset
from tasks import data as task_data
from tasks import text_report
from tasks.strided import measure
from tasks.tiny_tasks import lines, save_model, tokenizer, write
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rankdyna_trainer import LowRankLinear, RankDynaConfig
from rankdyna_trainer.report.card_sections import section_of


def perplexity(folder: Path, texts: list[str], block: int) -> float:
    """Of all words of the text in blocks, but the first word of each, which nothing predicts."""
    tokens = [token for text in texts for token in tokenizer(ends=False)(text)["input_ids"]]
    blocks = torch.tensor([tokens[i : i + block] for i in range(0, len(tokens) - block + 1, block)])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(blocks).logits.double()
    losses = [cross_entropy(row[:-1], expected[1:]) for row, expected in zip(logits, blocks, strict=True)]
    return float(torch.stack(losses).mean().exp())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_plain_run_learns_and_tells_the_perplexity(kind, folder_of, run_script, tmp_path):
    train = write(tmp_path / "train.jsonl", lines(40))
    validation = [{"text": "the film is new and good"}, *lines(5)]
    output = tmp_path / "out"
    run = run_script(
        "run_clm",
        output,
        *["--method=none", f"--model_name_or_path={folder_of(kind)}", "--block_size=8", "--do_train", "--do_eval"],
        *["--do_predict", f"--train_file={train}", "--max_steps=30", f"--test_file={train}"],
        f"--validation_file={write(tmp_path / 'validation.jsonl', validation)}",
    )
    expected = perplexity(output, [row["text"] for row in validation], 8)
    assert run["scores"]["final"] == {"perplexity": pytest.approx(expected, rel=1e-4)}
    learned = perplexity(output, [row["text"] for row in lines(40)], 8)
    assert run["scores"]["test"] == {"perplexity": pytest.approx(learned, rel=1e-4)}
    assert learned < 1.5 < expected < 1000
    assert (run["script"], run["method"], run["target_parameter_ratio"]) == ("run_clm", "none", 1.0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rankdyna_run_leaves_a_compressed_model(kind, folder_of, run_script, tmp_path):
    data = [f"--{split}_file={write(tmp_path / f'{split}.jsonl', lines(20))}" for split in ("train", "validation")]
    output = tmp_path / "out"
    run = run_script(
        "run_clm",
        output,
        *["--rank_ratio=0.25", f"--model_name_or_path={folder_of(kind)}", "--block_size=8", *data],
        *["--do_train", "--do_eval", "--num_train_epochs=4"],
    )
    model = AutoModelForCausalLM.from_pretrained(output)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert 0 < run["target_parameter_ratio"] < run["all_parameter_ratio"] < 1
    options = ["--method=none", f"--model_name_or_path={output}", "--block_size=8", data[1], "--do_eval"]
    again = run_script("run_clm", tmp_path / "again", *options)
    assert again["scores"] == run["scores"]
    assert again["target_parameter_ratio"] == run["target_parameter_ratio"]


def test_a_loss_beyond_all_numbers_is_no_number_in_json(folder_of, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(run_clm.Trainer, "evaluate", lambda *_, **__: {"eval_loss": 1e4})
    file = write(tmp_path / "validation.jsonl", lines(4))
    options = ["--method=none", f"--model_name_or_path={folder_of('gpt2')}", "--do_eval", "--block_size=8"]
    run = run_script("run_clm", tmp_path / "out", *options, f"--validation_file={file}")
    assert run["scores"] == {"final": {"perplexity": None}}


class TestTexts:
    @pytest.fixture
    def files(self, tmp_path):
        validation = [{"text": "the film is new and good"}, *lines(5), {"text": ""}]
        return [
            f"--train_file={write(tmp_path / 'train.jsonl', lines(20))}",
            f"--validation_file={write(tmp_path / 'validation.jsonl', validation)}",
        ]

    def test_final_model_beside_the_one_that_training_started_from(
        self, folder_of, run_script, files, tmp_path, capsys
    ):
        start, output = folder_of("gpt2"), tmp_path / "out"
        options = [*files, "--block_size=8", "--do_eval"]
        training = [f"--model_name_or_path={start}", "--rank_ratio=0.25", "--do_train", "--max_steps=20"]
        text = run_script("run_clm", output, *options, *training)["text"]
        assert (text["length"], text["stride"], text["reference"], text["new_tokens"]) == (8, 4, start, 20)
        words = " ".join(["the film is new and good", *[row["text"] for row in lines(5)]])
        ids = torch.tensor(tokenizer(ends=False)(words)["input_ids"])
        models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (output, start)]
        expected = measure(models[0], ids, 8, 4, models[1])
        assert text["validation"] == pytest.approx(expected._asdict(), rel=1e-4)
        assert expected.tokens == len(ids) - 1 and expected.agreement < 1
        read = f"Validation set, {len(ids) - 1} tokens in windows of 8 at a stride of 4: perplexity "
        assert read in capsys.readouterr().out
        section = section_of(output / "README.md", "## Text")
        assert read in section and "dense is the reference, the model that training started from." in section
        assert len(text["continuations"]) == 5 and start not in section
        for row in text["continuations"]:
            assert "| {prompt} | {reference} | {model} |".format(**row) in section

        alone = ["--method=none", f"--model_name_or_path={output}"]
        again = run_script("run_clm", tmp_path / "again", *options, *alone, f"--reference={start}")["text"]
        assert again == text
        without = run_script("run_clm", tmp_path / "without", *options, *alone, "--stride=8")["text"]
        assert (without["stride"], without["reference"], without["validation"]["agreement"]) == (8, None, None)
        assert {row["reference"] for row in without["continuations"]} == {None}
        assert [row["model"] for row in without["continuations"]] == [row["model"] for row in text["continuations"]]

    def test_a_baseline_gets_a_card_for_its_texts(self, folder_of, run_script, files, tmp_path):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("alice sees\n")
        options = ["--method=svd", "--param_ratio=0.5", "--num_train_epochs=0", "--second_round_epochs=0"]
        options += [f"--prompts={prompts}"]
        output = tmp_path / "out"
        model = f"--model_name_or_path={folder_of('gpt2')}"
        run = run_script("run_clm", output, *files, *options, model, "--block_size=8", "--do_train", "--do_eval")
        (row,) = run["text"]["continuations"]
        assert row["prompt"] == "alice sees" and len(row["model"].split()) == 24
        card = (output / "README.md").read_text()
        assert f"| alice sees | {row['reference']} | {row['model']} |" in card
        assert f"{(output / 'model.safetensors').stat().st_size:,}" in card and str(tmp_path) not in card

    def test_a_run_that_replaces_its_model_has_no_reference(self, run_script, files, tmp_path):
        folder = save_model("gpt2", tmp_path / "model")
        steps = ["--rank_ratio=0.5", "--max_steps=20", "--do_train", "--do_eval", "--block_size=8"]
        run = run_script("run_clm", Path(folder), *files, *steps, f"--model_name_or_path={folder}")
        assert run["text"]["reference"] is None and run["text"]["validation"]["perplexity"] > 1

    def test_the_reference(self):
        config = partial(RankDynaConfig, rank_ratio=0.5)
        choose = text_report.choose_reference
        assert choose("other/model", "start", config(teacher="t"), True) == ("other/model", "other/model")
        assert choose("/other/model", "start", None, False) == ("/other/model", "a model that was given")
        assert choose(None, "start", config(teacher="t"), True) == ("t", "the teacher")
        for of in (None, config(), config(teacher="self")):
            assert choose(None, "start", of, True) == ("start", "the model that training started from")
        assert choose(None, "start", None, False) is None

    def test_refusals(self, refuse, folder_of, files, tmp_path):
        model, start = f"--model_name_or_path={folder_of('gpt2')}", folder_of("gpt2")
        evaluated = [model, *files, "--method=none", "--do_eval", "--block_size=8"]
        refuse("run_clm", "--stride 9 is more than the 8 tokens of a window", *evaluated, "--stride=9")
        refuse("run_clm", "--block_size 1 leaves no token to predict", *evaluated, "--block_size=1")
        refuse("run_clm", "none.txt cannot be read", *evaluated, f"--prompts={tmp_path / 'none.txt'}")
        trained = [model, *files, "--method=none", "--do_train", "--block_size=8"]
        refuse("run_clm", "--stride, --prompts: this run evaluates nothing", *trained, "--stride=2", "--prompts=a.txt")
        message = f"--output_dir {start} is the folder of a model that was given"
        refuse("run_clm", message, *trained, "--do_eval", f"--output_dir={start}", f"--reference={start}")
        other, short = tmp_path / "other", tmp_path / "short"
        for folder, words in ((other, ["more"]), (short, [])):
            (of := tokenizer(ends=False)).add_tokens(words)
            of.save_pretrained(folder)
        GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=22, n_positions=7)).save_pretrained(short)
        refuse("run_clm", "has 23 tokens, and the model has 22", *evaluated, f"--reference={other}")
        refuse("run_clm", "takes 7 tokens at once, and 27 are needed", *evaluated, f"--reference={short}")


class TestBlocks:
    def prepare(self, texts, column="text", **options):
        script = run_clm.ScriptArguments(model_name_or_path="m", task_name="wikitext2", **options)
        rows = Dataset.from_list([{column: text} for text in texts])
        return run_clm.prepare(rows, "train", tokenizer(ends=False), script, 4)

    def test_rows_are_joined_and_what_is_left_is_dropped(self):
        texts = ["alice sees", None, "the new film", "bob likes paris", "oslo"]
        ids = tokenizer(ends=False)(" ".join(filter(None, texts)))["input_ids"]
        blocks = self.prepare(texts)
        assert blocks["input_ids"][:] == [ids[:4], ids[4:8]]
        assert blocks["labels"][:] == [[-100, *ids[1:4]], [-100, *ids[5:8]]]
        assert blocks["attention_mask"][:] == [[1] * 4] * 2

    def test_first_rows_are_taken(self):
        assert len(self.prepare(["alice sees new york"] * 9, max_train_samples=3)) == 3

    def test_less_than_a_block(self):
        with pytest.raises(ValueError, match=r"wikitext2 \(train\) has only 3 tokens, less than one block of 4"):
            self.prepare(["alice sees oslo"])

    def test_columns(self):
        assert len(self.prepare(["alice sees new york"], column="sentence")) == 1
        assert len(self.prepare(["alice sees new york"], column="words", text_column="words")) == 1
        rows = Dataset.from_list([{"first": "alice", "second": "bob"}])
        script = run_clm.ScriptArguments(model_name_or_path="m", task_name="ptb")
        with pytest.raises(
            ValueError, match=r"ptb \(test\) should have a column text.*\['first', 'second'\].*--text_col"
        ):
            run_clm.choose_text_column(rows, "test", script)


@pytest.mark.parametrize(("positions", "expected"), [(40, 40), (4096, 1024)])
def test_default_block_size(positions, expected, monkeypatch):
    config = SimpleNamespace(get_text_config=lambda **_: SimpleNamespace(max_position_embeddings=positions))
    monkeypatch.setattr(text_report.AutoConfig, "from_pretrained", lambda _: config)
    script = run_clm.ScriptArguments(model_name_or_path="m", task_name="ptb")
    assert run_clm.choose_block_size(script, None) == expected


def test_text_files_keep_their_line_breaks(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("alice sees oslo\n\nbob\n")
    rows = task_data.read_files({"train": str(file)})["train"]
    assert rows["text"][:] == ["alice sees oslo\n", "\n", "bob\n"]


@pytest.mark.parametrize(
    ("task", "asked"),
    [
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1", None)),
        ("ptb", ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet")),
    ],
)
def test_tasks_of_the_hub(task, asked, folder_of, run_script, tmp_path, monkeypatch):
    splits = {"train": Dataset.from_list(lines(4)), "test": Dataset.from_list(lines(4))}
    splits["validation"] = Dataset.from_list([{"text": row["text"]} for row in lines(4)])

    def load(name, config, revision):
        assert (name, config, revision) == asked
        return splits

    monkeypatch.setattr(task_data, "load_dataset", load)
    options = ["--method=none", "--do_eval", "--block_size=8", f"--model_name_or_path={folder_of('gpt2')}"]
    run = run_script("run_clm", tmp_path / "out", *options, f"--task_name={task}")
    assert run["task"] == task and math.isfinite(run["scores"]["final"]["perplexity"])


def test_refusals(refuse, folder_of, tmp_path):
    model = f"--model_name_or_path={folder_of('gpt2')}"
    train = f"--train_file={write(tmp_path / 'train.jsonl', lines(4))}"
    plain = [model, "--method=none", "--do_train"]
    refuse("run_clm", "No data: give --task_name", *plain)
    refuse("run_clm", "invalid choice: 'wikitext3'", *plain, "--task_name=wikitext3")
    refuse("run_clm", "--block_size must be at least 1: got 0", *plain, train, "--block_size=0")
    refuse("run_clm", "--block_size 41 is more than the 40 tokens", *plain, train, "--block_size=41")
    refuse("run_clm", "has no column words: it has ['text']", *plain, train, "--text_column=words")
