from typing import Any

import pytest
import torch
from support.damage import compacted
from tasks import tiny_tasks
from torch.utils.flop_counter import FlopCounterMode

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
from rankdyna_trainer.report.operations import linear_operations


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_counts_what_torch_counts(kind: str) -> None:
    def counted(model: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(input_ids=torch.tensor([[5]]))
        products = counter.get_flop_counts()["Global"]
        return sum(products.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)) // 2

    dense, small = tiny_tasks.model(kind), compacted(tiny_tasks.model(kind))
    operations = linear_operations(small)
    assert operations.dense_linear == counted(dense)
    assert operations.linear == counted(small)
    assert operations.dense_linear - operations.linear == operations.dense_target - operations.target > 0


def test_in_training_it_is_what_compacting_would_give() -> None:
    model = inject_singular_groups(tiny_tasks.model("bert"), RankDynaConfig(rank_ratio=0.5))
    operations = linear_operations(model)
    assert operations.target == operations.dense_target
    assert operations.linear == operations.dense_linear == operations.target + 32 * 32


def test_nothing_is_compressed() -> None:
    with pytest.raises(ValueError, match="no compressed layers"):
        linear_operations(tiny_tasks.model("bert"))
