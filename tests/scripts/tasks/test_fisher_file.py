from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tasks import run as task_run
from tasks.fisher_file import fisher_from_file
from tasks.tiny_tasks import sentences, write
from torch import Tensor, nn


@pytest.fixture
def factor(
    folder_of: Callable[[str], str], run_script: Callable[..., dict[str, Any]], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Factors a model that counts as fine-tuned."""

    def run(name: str, *options: str, rows: int = 16) -> dict[str, Any]:
        file = write(tmp_path / f"rows{rows}.jsonl", sentences(rows))
        given = [f"--model_name_or_path={folder_of('bert')}", f"--train_file={file}", f"--validation_file={file}"]
        given += ["--do_train", "--do_eval", "--num_train_epochs=0", "--second_round_epochs=0"]
        return run_script("run_glue", tmp_path / name, *given, *options)

    return run


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each estimate that is made."""
    made: list[int] = []
    original = task_run.fisher_information

    def estimate(*args: Any) -> Any:
        made.append(len(made))
        return original(*args)

    monkeypatch.setattr(task_run, "fisher_information", estimate)
    return made


def test_one_estimate_serves_all_methods_and_ratios_with_equal_results(
    factor: Callable[..., dict[str, Any]], estimates: list[int], tmp_path: Path
) -> None:
    file = f"--fisher_file={tmp_path / 'fisher.safetensors'}"
    for method, ratio in (("fwsvd", 0.5), ("tfwsvd", 0.5), ("fwsvd", 0.25)):
        options = [f"--method={method}", f"--rank_ratio={ratio}"]
        shared = factor(f"shared-{method}-{ratio}", *options, file)
        own = factor(f"own-{method}-{ratio}", *options)
        assert shared["scores"] == own["scores"]
        weights = [
            load_file(tmp_path / f"{kind}-{method}-{ratio}" / "model.safetensors") for kind in ("shared", "own")
        ]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert estimates == [0]
    assert not list(tmp_path.glob("*.unfinished"))


def test_who_comes_while_it_is_made_waits_for_it(tmp_path: Path) -> None:
    layer, rows = nn.Linear(3, 2), Dataset.from_dict({"input_ids": [[1, 2]]})
    second_has_come, estimated = Event(), list[Tensor]()

    def estimate() -> dict[str, Tensor]:
        assert second_has_come.wait(60)
        estimated.append(torch.rand(2, 3))
        return {"layer": estimated[-1]}

    def take(comes_second: bool) -> Tensor:
        if comes_second:
            second_has_come.set()
        return fisher_from_file(tmp_path / "fisher.safetensors", {"layer": layer}, rows, estimate)["layer"]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(take, (False, True))
    assert len(estimated) == 1 and torch.equal(first, second)


def test_file_of_other_weights_or_rows_is_refused(factor: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    options = ["--method=fwsvd", "--rank_ratio=0.5", f"--fisher_file={tmp_path / 'fisher.safetensors'}"]
    factor("first", *options)
    with pytest.raises(
        ValueError, match=r"fisher\.safetensors was made for other weights, or for other training rows"
    ):
        factor("other-rows", *options, rows=24)
    with pytest.raises(ValueError, match="was made for other weights"):
        factor("other-layers", *options, "--exclude_modules=query")


def test_truncated_file_is_refused_and_stays(factor: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    factor("first", "--method=fwsvd", "--rank_ratio=0.5", f"--fisher_file={path}")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        factor("second", "--method=fwsvd", "--rank_ratio=0.5", f"--fisher_file={path}")
    assert path.stat().st_size == 100


@pytest.mark.parametrize("method", ["none", "svd", "rankdyna"])
def test_method_without_fisher_information_has_no_use_for_it(method: str, refuse: Callable[..., None]) -> None:
    ratio = [] if method == "none" else ["--rank_ratio=0.5"]
    message = f"--method {method} needs no Fisher information"
    options = ["--model_name_or_path=x", "--task_name=sst2", "--do_train", "--fisher_file=f", f"--method={method}"]
    refuse("run_glue", message, *options, *ratio)
