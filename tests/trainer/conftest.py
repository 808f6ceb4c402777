import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from rankdyna_trainer import SingularGroupLinear, rank_report

Row = dict[str, torch.Tensor]


@pytest.fixture
def check_compressed(tmp_path: Path) -> Callable[..., None]:
    """Checks that a finished run met a `rank_ratio` of 0.2, and that its folder loads as the trained model."""

    def check(trainer: Trainer, inputs: Row) -> None:
        model = trainer.model
        assert not any(isinstance(module, SingularGroupLinear) for module in model.modules())
        report = rank_report(model)
        groups = int(report[["out_features", "in_features"]].min(axis=1).sum())
        assert report["rank"].sum() == math.ceil(0.2 * groups) > 0
        loaded = type(model).from_pretrained(tmp_path / "output", dtype=model.dtype)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)

    return check
