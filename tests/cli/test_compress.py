import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import TRANSFORMERS_4
from support.training_runs import Folders
from tasks import tiny_tasks
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    BertForSequenceClassification,
    GPT2LMHeadModel,
)

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.baselines import fwsvd, svd, tfwsvd, whitened_svd
from rankdyna_trainer.baselines.fisher import fisher_information
from rankdyna_trainer.layers.targets import find_targets

CONFIG = RankDynaConfig(param_ratio=0.3)
TEXTS = ("dialogue", "summary")
Refusal = Callable[..., str]


def dense(folders: Folders) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(folders.dense).eval()


def saved_equals(folder: Path, model: Any) -> bool:
    saved, expected = load_file(folder / "model.safetensors"), model.state_dict()
    return saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


def examples(folders: Folders, rows: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    tokenizer = tiny_tasks.tokenizer()
    encoded = [tokenizer(row["sentence"], return_tensors="pt") for row in rows]
    return [{**tokens, "labels": torch.tensor([row["label"]])} for tokens, row in zip(encoded, rows, strict=True)]


def test_svd(rankdyna: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    rankdyna("compress", folders.dense, "--method", "svd", "--rank_ratio", 0.2, "-o", tmp_path / "small")
    assert saved_equals(tmp_path / "small", svd(dense(folders), RankDynaConfig(rank_ratio=0.2)))
    assert (tmp_path / "small" / "tokenizer.json").is_file()


def test_with_rows(document: Callable[..., Any], folders: Folders, tmp_path: Path) -> None:
    rows = tiny_tasks.sentences(12)
    file = tiny_tasks.write(tmp_path / "rows.jsonl", rows)
    options = ["--param_ratio", 0.3, "--train_file", file, "--text_column", "sentence", "--max_train_samples", 8]
    found = document("compress", folders.dense, "--method", "fwsvd", *options, "-o", tmp_path / "small")
    assert found["target_ratio"] <= 0.3
    assert saved_equals(tmp_path / "small", fwsvd(dense(folders), CONFIG, examples(folders, rows[:8])))


def test_with_a_file_of_fisher_information(rankdyna: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    model, config = dense(folders), RankDynaConfig(param_ratio=0.3, target_modules=["query"])
    fisher = fisher_information(model, find_targets(model, config), examples(folders, tiny_tasks.sentences(4)))
    save_file(fisher, tmp_path / "fisher.safetensors")
    options = ["--param_ratio", 0.3, "--target_modules", "query", "--fisher_file", tmp_path / "fisher.safetensors"]
    rankdyna("compress", folders.dense, "--method", "tfwsvd", *options, "-o", tmp_path / "small")
    assert saved_equals(tmp_path / "small", tfwsvd(model, config, fisher))


def test_a_language_model_learns_from_plain_texts(rankdyna: Callable[..., str], tmp_path: Path) -> None:
    folder = tiny_tasks.save_model("gpt2", tmp_path / "gpt2")
    (tmp_path / "texts.txt").write_text("alice sees paris\n\nbob\ndave left rome\n")
    options = ["--param_ratio", 0.3, "--train_file", tmp_path / "texts.txt", "-o", tmp_path / "small"]
    rankdyna("compress", folder, "--method", "fwsvd", *options)
    tokenizer = tiny_tasks.tokenizer(ends=False)
    tokens = [tokenizer(text, return_tensors="pt") for text in ("alice sees paris", "dave left rome")]
    batches = [{**each, "labels": each["input_ids"]} for each in tokens]
    expected = fwsvd(GPT2LMHeadModel.from_pretrained(folder).eval(), CONFIG, batches)
    saved = load_file(tmp_path / "small" / "model.safetensors")
    # The product, since the sign of a group is that of rounding errors.
    products = [
        factors["transformer.h.0.mlp.c_fc.p.weight"] @ factors["transformer.h.0.mlp.c_fc.q.weight"]
        for factors in (saved, expected.state_dict())
    ]
    torch.testing.assert_close(*products)


@pytest.mark.parametrize(
    ("options", "count"), [(["--max_train_samples", 8], 8), pytest.param([], 512, marks=pytest.mark.long)]
)
def test_whitened_needs_texts_alone(
    options: list[object], count: int, document: Callable[..., Any], folders: Folders, tmp_path: Path
) -> None:
    rows = tiny_tasks.sentences(600)
    file = tiny_tasks.write(tmp_path / "rows.jsonl", [{"text": row["sentence"]} for row in rows])
    options = [*options, "--param_ratio", 0.3, "--train_file", file, "-o", tmp_path / "small"]
    found = document("compress", folders.dense, "--method", "whitened", *options)
    assert found["target_ratio"] <= 0.3
    tokenizer = tiny_tasks.tokenizer()
    texts = [tokenizer(row["sentence"], return_tensors="pt") for row in rows[:count]]
    assert saved_equals(tmp_path / "small", whitened_svd(dense(folders), CONFIG, texts))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_whitened_may_share_one_budget(
    kind: str, rankdyna: Callable[..., str], folders: Folders, tmp_path: Path
) -> None:
    """A classifier's rows have labels then; a language model's are its tokens, and T5's in a column of their own."""
    options = ["--method", "whitened", "--rank_scope", "global", "--param_ratio", 0.3, "-o", tmp_path / "small"]
    if kind == "bert":
        rows = tiny_tasks.sentences(12)
        model: Any = dense(folders)
        batches, folder, columns = examples(folders, rows), folders.dense, ["sentence"]
    elif kind == "gpt2":
        rows, folder, columns = tiny_tasks.lines(12), tiny_tasks.save_model("gpt2", tmp_path / "gpt2"), ["text"]
        batches = [dict(tiny_tasks.tokenizer(ends=False)(row["text"], return_tensors="pt")) for row in rows]
        model = GPT2LMHeadModel.from_pretrained(folder)
    else:
        rows, folder, columns = tiny_tasks.dialogues(12), tiny_tasks.save_model("t5", tmp_path / "t5"), [*TEXTS]
        sources, targets = ([tiny_tasks.tokenizer()(row[text], return_tensors="pt") for row in rows] for text in TEXTS)
        batches = [
            {name: source[name] for name in ("input_ids", "attention_mask")} | {"labels": target["input_ids"]}
            for source, target in zip(sources, targets, strict=True)
        ]
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    options += ["--train_file", tiny_tasks.write(tmp_path / "rows.jsonl", rows)]
    rankdyna("compress", folder, *options, *(f"--text_column={column}" for column in columns))
    expected = whitened_svd(model, CONFIG, batches, rank_scope="global").state_dict()
    saved = type(model).from_pretrained(tmp_path / "small").state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


def test_whitened_is_for_any_model_that_reads_texts(rankdyna: Callable[..., str], tmp_path: Path) -> None:
    """One without a head, and one that generates a text from another, which has a column of its own or has not."""
    rows = tiny_tasks.dialogues(8)
    file = tiny_tasks.write(tmp_path / "rows.jsonl", rows)
    tokenizer = tiny_tasks.tokenizer()
    tokens = {"return_tensors": "pt", "return_token_type_ids": False}  # of which T5 knows nothing
    sources = [dict(tokenizer(row["dialogue"], **tokens)) for row in rows]
    targets = [tokenizer(row["summary"], return_tensors="pt")["input_ids"] for row in rows]
    summarized = [source | {"labels": target} for source, target in zip(sources, targets, strict=True)]
    repeated = [source | {"labels": source["input_ids"]} for source in sources]
    for kind, auto, columns, batches in (
        ("bert", AutoModel, ["dialogue"], sources),
        ("t5", AutoModelForSeq2SeqLM, ["dialogue", "summary"], summarized),
        ("t5", AutoModelForSeq2SeqLM, ["dialogue"], repeated),
        ("bart", AutoModelForSeq2SeqLM, ["dialogue", "summary"], summarized),
    ):
        folder, output = tmp_path / kind, tmp_path / f"{kind}-{len(columns)}"
        tiny_tasks.save_model(kind, folder)
        options = ["--param_ratio", 0.3, "--train_file", file, *(f"--text_column={column}" for column in columns)]
        rankdyna("compress", folder, "--method", "whitened", *options, "-o", output)
        expected = whitened_svd(auto.from_pretrained(folder), CONFIG, batches).state_dict()
        loaded = auto.from_pretrained(output).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected), output.name


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ["--method", "svd"], "exactly one of rank_ratio and param_ratio"),
        (2, ["--method", "svd", "--rank_ratio", "0.2", "--param_ratio", "0.2"], "exactly one of"),
        (2, ["--method", "svd", "--rank_ratio", "0.2", "--train_file", "x"], "takes neither"),
        (2, ["--method", "fwsvd", "--rank_ratio", "0.2"], "takes one of --fisher_file and --train_file"),
        (2, ["--method", "whitened", "--rank_ratio", "0.2"], "takes --train_file, and no --fisher_file"),
        (
            2,
            ["--method", "whitened", "--rank_ratio", "0.2", "--train_file", "x", "--fisher_file", "x"],
            "takes --train_file, and no --fisher_file: it needs no gradients",
        ),
        (
            2,
            ["--method", "svd", "--rank_ratio", "0.2", "--rank_scope", "global"],
            "--method svd brings each layer to the same ratio: drop --rank_scope",
        ),
        (2, ["--method", "pca", "--rank_ratio", "0.2"], "--method"),
        (1, ["--method", "fwsvd", "--rank_ratio", "0.2", "--train_file", "/no/file"], "There is no file /no/file"),
    ],
)
def test_wrong_options(
    code: int, arguments: list[str], message: str, refusal: Refusal, folders: Folders, tmp_path: Path
) -> None:
    assert message in refusal(code, "compress", folders.dense, *arguments, "-o", tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"sentence": "good", "label": 0}\n', "has no column text: it has sentence, label"),
        ("rows.jsonl", '{"text": "good", "label": 2}\n', "The label 2 is none of the model's 2"),
        ("rows.csv", "text,label\ngood,bad\n", "The label 'bad' is none of the model's 2"),
        ("rows.jsonl", "{", "holds no rows"),
        ("rows.parquet", "", "must end in .csv, .txt, .json, .jsonl"),
    ],
)
def test_rows_that_do_not_fit(
    name: str, content: str, message: str, refusal: Refusal, folders: Folders, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    options = ["--rank_ratio", 0.2, "--train_file", tmp_path / name, "-o", tmp_path / "small"]
    assert message in refusal(1, "compress", folders.dense, "--method", "fwsvd", *options)


def test_models_that_do_not_fit(refusal: Refusal, folders: Folders, tmp_path: Path) -> None:
    svd_options = ["--method", "svd", "--rank_ratio", 0.2, "-o", tmp_path / "small"]
    assert "is compacted already" in refusal(1, "compress", folders.compacted, *svd_options)
    assert "is a checkpoint of a running compression" in refusal(1, "compress", folders.training, *svd_options)
    options = ["--method", "fwsvd", "--rank_ratio", 0.2, "-o", tmp_path / "small"]
    t5 = tiny_tasks.save_model("t5", tmp_path / "t5")
    (tmp_path / "texts.txt").write_text("alice sees paris\n")
    message = refusal(1, "compress", t5, *options, "--train_file", tmp_path / "texts.txt")
    assert "not for a T5ForConditionalGeneration" in message
    vit = tiny_tasks.save_model("vit", tmp_path / "vit")
    options[1] = "whitened"
    message = refusal(1, "compress", vit, *options, "--train_file", tmp_path / "texts.txt")
    assert "--train_file is for models that read texts, not for a ViTModel: call rankdyna_trainer.baselines" in message
    bert = tiny_tasks.save_model("bert", tmp_path / "bert")
    message = refusal(1, "compress", bert, *options, "--train_file", tmp_path / "texts.txt", "--rank_scope", "global")
    assert "BertModel returned no loss" in message and 'rank_scope="local" needs no loss' in message
    (tmp_path / "texts.txt").write_text("\n\n")
    gpt2 = tiny_tasks.save_model("gpt2", tmp_path / "gpt2")
    message = refusal(1, "compress", gpt2, *options, "--train_file", tmp_path / "texts.txt")
    assert "No batch of the dataloader told anything about a target layer: it is empty" in message
    options[1] = "fwsvd"
    (tmp_path / "fisher").write_bytes(b"x" * 50)
    assert "cannot be read" in refusal(1, "compress", t5, *options, "--fisher_file", tmp_path / "fisher")
    save_file({"x": torch.ones(1)}, tmp_path / "fisher")
    assert "has no tensor for" in refusal(1, "compress", t5, *options, "--fisher_file", tmp_path / "fisher")


@pytest.mark.parametrize("architectures", [None, ["BertModel"]])
def test_a_head_that_has_no_place_is_named_instead_of_lost(
    architectures: list[str] | None, refusal: Refusal, folders: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders.dense, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = architectures
    (folder / "config.json").write_text(json.dumps(config))
    said = refusal(1, "compress", folder, "--method", "svd", "--rank_ratio", 0.2, "-o", tmp_path / "small")
    assert "2 tensors without a place in a BertModel" in said and "(classifier.bias, ...)" in said
    assert ("since it has no architectures" in said) == (architectures is None)
    assert not (tmp_path / "small").exists()


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 cannot load a model that is on the disk as a whole")
@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_on_the_disk(method: str, rankdyna: Callable[..., str], folders: Folders, tmp_path: Path) -> None:
    file = tiny_tasks.write(tmp_path / "rows.jsonl", tiny_tasks.sentences(6))
    options = ["--method", method, "--param_ratio", 0.3]
    options += ["--train_file", file, "--text_column", "sentence"] if method == "whitened" else []
    rankdyna("compress", folders.dense, *options, "-o", tmp_path / "in-memory")
    on_disk = ["--device_map", "disk", "--offload_folder", tmp_path / "offloaded"]
    rankdyna("compress", folders.dense, *options, *on_disk, "-o", tmp_path / "small")
    small, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "in-memory"))
    assert small.keys() == expected.keys()
    assert all(torch.equal(small[name], expected[name]) for name in small)


@pytest.mark.skipif(not TRANSFORMERS_4, reason="transformers 5 can")
def test_transformers_4_has_nothing_on_the_disk_alone(refusal: Refusal, folders: Folders, tmp_path: Path) -> None:
    options = ["--method", "svd", "--param_ratio", 0.3, "--device_map", "disk", "-o", tmp_path / "small"]
    assert "--device_map disk needs transformers 5" in refusal(2, "compress", folders.dense, *options)


def test_a_device_map_that_is_none(refusal: Refusal, folders: Folders, tmp_path: Path) -> None:
    options = ["--method", "svd", "--param_ratio", 0.3, "--device_map", "nowhere", "-o", tmp_path / "small"]
    assert "nowhere" in refusal(1, "compress", folders.dense, *options)
