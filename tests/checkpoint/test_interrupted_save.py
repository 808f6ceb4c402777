"""A save that dies at any file operation leaves the old model, the new one, or none: never a mixture."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from rankdyna_trainer import RankDynaConfig, compact, inject_singular_groups
from rankdyna_trainer.checkpoint.saving import save_compacted
from rankdyna_trainer.layers.singular_group import SingularGroupLinear


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
                if operations == deadline:
                    raise Killed
                return operation(*args, **kwargs)

            return run

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", counted(os.replace))
            patched.setattr(Path, "unlink", counted(Path.unlink))
            patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # who is killed does not tidy up
            try:
                save_compacted(new, folder)
            except Killed:
                weights = loaded_weights(folder)
                outcomes.append("none" if weights is None else "old" if same(weights, before) else "new")
                assert weights is None or same(weights, before) or same(weights, after)
                save_compacted(new, folder)  # the next run makes it whole
        weights = loaded_weights(folder)
        assert weights is not None and same(weights, after)
        if operations < deadline:
            break
    assert outcomes[0] == "old" and "none" in outcomes and len(outcomes) >= 4
