import gc
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from huggingface_hub import constants, file_download, hf_api, utils
from support.damage import REFUSED_BY_READER, raised_by
from support.fresh_processes import FreshProcesses
from support.hub_server import OWNER, HubServer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import distributed
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

WORDS = ["[PAD]", "[UNK]", *(f"word{i}" for i in range(62))]
Row = dict[str, torch.Tensor]


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Those that share a long start of processes come first: of its first tests no other worker takes any."""
    items.sort(key=lambda item: "two_processes" not in item.fixturenames)


def pytest_collectstart() -> None:
    """What is imported is no garbage, and would be looked through again and again while it grows."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Each run of a Trainer collects garbage, for which it would look through all that was imported."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trackio reads once where it is to write, and a Trainer may report to all that is installed."""
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of runs would draw one at their end, which takes longer than many of them."""
    if request.node.get_closest_marker("heatmap") is None:
        monkeypatch.setattr("rankdyna_trainer.trainer.ending.ranks_image", lambda model: None)


@pytest.fixture(autouse=True)
def no_settings_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training arguments of transformers 4 leave their precision and compiler to what is trained after them."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random weights are the same in each run, and in each test by itself."""
    torch.manual_seed(0)


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone, as torchrun makes one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def tiny_bert(seed: None) -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).eval()


@pytest.fixture
def still_bert(tiny_bert: BertForSequenceClassification) -> BertForSequenceClassification:
    """Without dropout: what it computes depends on no random numbers."""
    for module in tiny_bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout_prob"):  # of the attention, in transformers 4
            module.dropout_prob = 0.0
    return tiny_bert


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def rows() -> list[Row]:
    """64 sentences; the label tells whether the first word is of the first half of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, len(WORDS), (64, 10), generator=generator)
    return [{"input_ids": row, "labels": (row[0] < 33).long()} for row in tokens]


@pytest.fixture
def batch(rows: list[Row]) -> Row:
    """All rows as one batch."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture
def make_trainer(tmp_path: Path, rows: list[Row]) -> Iterator[Callable[..., Trainer]]:
    """A Trainer of 20 steps on the rows, saved to `tmp_path/output`; keywords are training arguments."""

    def make(
        model: torch.nn.Module | None,
        *callbacks: TrainerCallback,
        trainer_class: type[Trainer] = Trainer,
        trainer_arguments: dict[str, object] | None = None,
        **arguments: object,
    ) -> Trainer:
        defaults: dict[str, object] = {
            "output_dir": str(tmp_path / "output"),
            "max_steps": 20,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        args = TrainingArguments(**(defaults | arguments))
        extra = {"train_dataset": rows, "eval_dataset": rows} | (trainer_arguments or {})
        return trainer_class(model, args, callbacks=list(callbacks), **extra)

    yield make


@pytest.fixture(scope="session")
def assert_refused() -> Callable[[Callable[[], object], type[Exception], str], None]:
    """Checks that an action raises exactly this exception, with this message, and that our own code raises it."""

    def check(action: Callable[[], object], exception: type[Exception], message: str) -> None:
        with pytest.raises((exception, *REFUSED_BY_READER)) as refusal:
            action()
        if isinstance(refusal.value, REFUSED_BY_READER):
            return
        assert re.search(message, str(refusal.value)), str(refusal.value)
        assert refusal.type is exception
        assert raised_by(refusal.value) == "rankdyna_trainer"

    return check


@pytest.fixture(scope="session")
def run_fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., CompletedProcess[str]]]:
    """Runs a program in a process that has imported neither transformers nor this library."""
    with FreshProcesses(tmp_path_factory.mktemp("printed")) as processes:
        yield processes.run


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: programs that a shell starts in the background ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback, which this process uses as its owner, with an empty cache, and without a pause at retries."""
    # The name of huggingface_hub 0 is another.
    close_session = utils.close_session if hasattr(utils, "close_session") else utils.reset_sessions
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # huggingface_hub 0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Where hf_xet is installed, the client would upload large files to the servers of that protocol.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # some releases keep a client there
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    close_session()
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    serving.start()
    yield server
    close_session()
    server.shutdown()
    serving.join()
    server.server_close()
