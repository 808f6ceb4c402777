import os
import re
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from damage import REFUSED_BY_READER, raised_by
from transformers import BertConfig, BertForSequenceClassification


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
def tiny_bert(seed: None) -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).eval()


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


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: programs that a shell starts in the background ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
