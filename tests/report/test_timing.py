import itertools
from functools import partial

import pytest
import torch

from rankdyna_trainer.report.timing import WARM_UP, device_in_words, quartiles, timed_in_turns


def test_in_turns_and_after_a_warm_up() -> None:
    calls: list[str] = []
    seconds = timed_in_turns({name: partial(calls.append, name) for name in ("one", "other")}, 4)
    assert {name: len(times) for name, times in seconds.items()} == {"one": 4, "other": 4}
    assert calls.count("one") == calls.count("other") == 4 + WARM_UP
    pairs = [tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert all(set(pair) == {"one", "other"} for pair in pairs)
    assert all(pair != following for pair, following in itertools.pairwise(pairs))


def test_quartiles() -> None:
    assert quartiles([3.0, 1.0, 2.0]) == (1.0, 2.0, 3.0)
    assert quartiles([0.5]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("threads", "words"), [(1, "cpu, 1 thread"), (2, "cpu, 2 threads")])
def test_device(threads: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_in_words(torch.device("cpu")) == words
