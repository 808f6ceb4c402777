"""
A save that dies at any file operation leaves the old model or the new one: in the folder, or whole beside its files.
"""

import contextlib
import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from rankdyna_trainer import RankDynaConfig, compact, inject_singular_groups
from rankdyna_trainer.checkpoint.output_folder import check_writable
from rankdyna_trainer.checkpoint.saving import check_saving, save_compacted
from rankdyna_trainer.layers.singular_group import SingularGroupLinear
from rankdyna_trainer.report import staging


class Killed(BaseException):
    pass


def compacted(config: Any, seed: int, kept: int) -> nn.Module:
    """The groups that remain are others for another seed, their number is given by `kept`."""
    torch.manual_seed(seed)
    model = inject_singular_groups(
        BertForSequenceClassification(copy.deepcopy(config)), RankDynaConfig(rank_ratio=0.5)
    )
    for layer in (module for module in model.modules() if isinstance(module, SingularGroupLinear)):
        layer.set_remaining(torch.arange(layer.width) < kept)
    return compact(model)


def loaded_weights(folder: Path) -> dict[str, torch.Tensor] | None:
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).state_dict()
    except (OSError, ValueError):
        return None


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kept", [3, 5], ids=["the same ranks", "other ranks"])
def test_stopped_at_every_file_operation(
    tiny_bert: BertForSequenceClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int, shards: bool
) -> None:
    old, new = compacted(tiny_bert.config, 1, 3), compacted(tiny_bert.config, 2, kept)
    before, after = old.state_dict(), new.state_dict()
    outcomes = []
    for deadline in range(1, 100):
        folder = tmp_path / str(deadline)
        old.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
        operations = 0

        def counted(operation: Callable[..., Any], deadline: int = deadline) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal operations
                operations += 1
                if operations >= deadline:  # who is killed does nothing any more
                    raise Killed
                return operation(*args, **kwargs)

            return run

        with monkeypatch.context() as patched:
            for module, name in ((os, "replace"), (os, "link"), (Path, "unlink")):
                patched.setattr(module, name, counted(getattr(module, name)))
            patched.setattr(shutil, "rmtree", lambda *_, **__: None)
            patched.setattr(staging, "_is_left", lambda folder: False)  # this process lives on
            with contextlib.suppress(Killed):
                save_compacted(new, folder)
        if operations < deadline:
            break
        weights = loaded_weights(folder)
        outcomes.append("none" if weights is None else "old" if same(weights, before) else "new")
        assert weights is None or same(weights, before) or same(weights, after)
        if weights is None:
            (left,) = (ready.parent for ready in folder.glob("_rankdyna-*/ready"))
            weights = loaded_weights(left / "new")
            assert weights is not None and same(weights, after)
            check_writable(folder)  # does not touch it
            check_saving(old, folder)  # the next run finishes it before it begins
            weights = loaded_weights(folder)
            assert weights is not None and same(weights, after) and not left.exists()
        save_compacted(new, folder)
        weights = loaded_weights(folder)
        assert weights is not None and same(weights, after)
    assert outcomes[0] == "old" and "none" in outcomes and outcomes[-1] == "new" and len(outcomes) >= 6


@pytest.mark.parametrize(("operation", "failures"), [("link", 2), ("replace", 1)])  # a link is tried as a copy
def test_an_error_at_any_file_operation_leaves_the_folder_as_it_was(
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    failures: int,
) -> None:
    old, new = compacted(tiny_bert.config, 1, 3), compacted(tiny_bert.config, 2, 5)
    folder = tmp_path / "saved"
    old.save_pretrained(folder, max_shard_size="20KB")
    (folder / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real = getattr(os, operation)
    for failing in range(1, 30):
        calls = 0

        def fails(*args: Any, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if failing <= calls < failing + failures:
                raise PermissionError(1, "Operation not permitted")
            real(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, operation, fails)
            patched.setattr(shutil, "copyfile", fails)
            try:
                save_compacted(new, folder)
            except OSError:
                assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
            else:
                break
    assert failing > 1
    weights = loaded_weights(folder)
    assert weights is not None and same(weights, new.state_dict())


def test_a_file_system_without_links(
    tiny_bert: BertForSequenceClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    model = compacted(tiny_bert.config, 1, 3)
    save_compacted(model, tmp_path / "saved")
    weights = loaded_weights(tmp_path / "saved")
    assert weights is not None and same(weights, model.state_dict())


WRITER = """
import sys
sys.path[:0] = [{tests!r}]
import torch
from checkpoint.test_interrupted_save import compacted
from transformers import BertConfig
from rankdyna_trainer.checkpoint.output_folder import check_writable
from rankdyna_trainer.checkpoint.saving import check_saving, save_compacted
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = compacted(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes), {seed}, {kept})
for _ in range(40):
    save_compacted(model, {folder!r})
"""


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_that_save_into_one_folder_take_turns(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    folder = tmp_path / "saved"
    codes = [WRITER.format(tests=tests, seed=seed, kept=kept, folder=str(folder)) for seed, kept in ((1, 3), (2, 5))]
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for code in codes]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    weights = loaded_weights(folder)
    assert weights is not None
    sizes = BertForSequenceClassification.config_class(
        vocab_size=64,
        max_position_embeddings=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    assert any(same(weights, compacted(sizes, seed, kept).state_dict()) for seed, kept in ((1, 3), (2, 5)))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
