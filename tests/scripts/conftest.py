import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.reviews import WORDS
from tasks.tiny_tasks import TRAINING, dialogues, entities, lines, read_run, save_model, sentences, write
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

TAGS = {"O": 0, "B-PER": 9, "B-LOC": 7, "I-LOC": 8}  # as WNUT-17 counts them


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Where a model of a kind is saved."""
    folders: dict[str, str] = {}

    def folder(kind: str) -> str:
        if kind not in folders:
            folders[kind] = save_model(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return folder


@pytest.fixture
def run_script() -> Callable[..., dict[str, Any]]:
    """Runs a script as its command line does, and returns its `run.json`."""

    def run(name: str, output: Path, *options: str) -> dict[str, Any]:
        importlib.import_module(name).main([*TRAINING, f"--output_dir={output}", *options])
        return read_run(output)

    return run


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Checks that a script ends with this message, from an exception or from the parser, and trains nothing."""

    def check(name: str, message: str, *options: str) -> None:
        script = importlib.import_module(name)
        monkeypatch.setattr(script, "Run", lambda *_, **__: pytest.fail("the run went on"))
        with pytest.raises((ValueError, SystemExit)) as refusal:
            script.main([f"--output_dir={tmp_path / 'refused'}", "--use_cpu", *options])
        assert message in (capsys.readouterr().err if refusal.type is SystemExit else str(refusal.value))

    return check


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model, without a head, that knows the words of `reviews.py`."""
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
def tokenizer(bert: str) -> BertTokenizerFast:
    return AutoTokenizer.from_pretrained(bert)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tagged = [row | {"ner_tags": [TAGS[tag] for tag in row["ner_tags"]]} for row in entities(32)]
    tasks = {"sst2": sentences(32), "wnut17": tagged, "samsum": dialogues(32), "wikitext2": lines(40)}
    for task, rows in tasks.items():
        (folder / task).mkdir()
        for split in ("train", "validation"):
            write(folder / task / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def options(folder_of: Callable[[str], str], data: Path, tmp_path: Path) -> list[str]:
    roles = {"encoder": "bert", "tagger": "bert", "encoder_decoder": "bart", "decoder": "gpt2"}
    models = [f"{role}={folder_of(kind)}" for role, kind in roles.items()]
    return ["--scale=tiny", f"--output_dir={tmp_path / 'out'}", f"--data_dir={data}", "--models", *models]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The output folder of each run of a script that is begun."""
    begun: list[str] = []
    for name in ("run_glue", "run_ner", "run_summarization", "run_clm"):
        script = importlib.import_module(name)

        def main(args: list[str], original: Callable[[list[str]], None] = script.main) -> None:
            begun.extend(arg.partition("=")[2] for arg in args if arg.startswith("--output_dir="))
            original(args)

        monkeypatch.setattr(script, "main", main)
    return begun
