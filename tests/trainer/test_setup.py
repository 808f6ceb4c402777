"""How a model is prepared when its Trainer is made."""

from pathlib import Path

from support.networks import small_bert
from transformers import TrainingArguments

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear
from rankdyna_trainer.trainer.setup import prepare_model


def begins_in_groups(folder: Path) -> bool:
    args = TrainingArguments(str(folder), use_cpu=True)
    model = prepare_model(small_bert(), RankDynaConfig(rank_ratio=0.5), args)
    return any(isinstance(module, SingularGroupLinear) for module in model.modules())


def test_a_single_process_stays_dense_at_first(tmp_path: Path) -> None:
    assert not begins_in_groups(tmp_path)


def test_a_process_that_ddp_wraps_begins_in_groups_even_if_it_is_alone(process_group: None, tmp_path: Path) -> None:
    """The wrapper holds its parameters, and takes no others later."""
    assert begins_in_groups(tmp_path)
