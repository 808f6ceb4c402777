"""A few cases of `scripts/checks/fuzz.py --cases 2000`, and faults that it has to find."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import fuzz

from rankdyna_trainer.layers import compaction
from rankdyna_trainer.method import algorithm


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the program; returns its exit code and what it printed."""
    monkeypatch.setattr(fuzz, "quiet", lambda: None)

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fuzz.py", *options])
        code = 0
        try:
            fuzz.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().out

    return run


def test_some_cases_pass(tried: Callable[..., tuple[int, str]]) -> None:
    code, output = tried("--cases", "10", "--seed", "1")
    assert code == 0, output
    assert "cases: 10\n" in output and "failures: 0\n" in output
    assert "model: plain" in output and "groups: dense at first" in output
    assert int(output.split("removals checked: ")[1].split()[0]) > 10


def keep_first(scores: Any, costs: Any, caps: Any, budget: int, multiple_of: int = 1) -> list[torch.Tensor]:
    return [torch.arange(len(values)) < budget // len(scores) // max(costs) for values in scores]


def scaled(layer: Any, original: Callable[[Any], Any] = compaction._compacted) -> Any:
    new = original(layer)
    next(new.parameters()).data.mul_(1.5)
    return new


def half_removed(layer: Any, remaining: torch.Tensor, optimizer: Any) -> None:
    layer.set_remaining(layer.remaining_on_cpu & remaining.cpu())


@pytest.mark.parametrize(
    ("place", "name", "fault", "words"),
    [
        pytest.param(algorithm, "select_groups", keep_first, "were kept", marks=pytest.mark.long),
        pytest.param(algorithm, "remove_groups", half_removed, "a removed group of", marks=pytest.mark.long),
        (compaction, "_compacted", scaled, "compaction changes what the model computes"),
    ],
)
def test_a_fault_is_found(
    place: Any,
    name: str,
    fault: Any,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tried: Callable[..., tuple[int, str]],
) -> None:
    monkeypatch.setattr(place, name, fault)
    code, output = tried("--cases", "12", "--seed", "1")
    assert code == 1 and words in output
    command = next(line for line in output.splitlines() if "--first" in line)
    code, again = tried(*command.split()[2:])
    assert code == 1 and "cases: 1\n" in again and "failures: 1\n" in again
