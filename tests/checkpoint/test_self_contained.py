"""Checkpoints with the code that loads them, where this library is installed."""

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import damage
from support.self_contained import FILE, INPUT, is_self_contained, logits
from tasks import tiny_tasks
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    GPT2DoubleHeadsModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    dynamic_module_utils,
)

from rankdyna_trainer import (
    LowRankLinear,
    RankDynaCallback,
    RankDynaConfig,
    compact,
    inject_singular_groups,
    make_self_contained,
    merge,
)
from rankdyna_trainer.checkpoint.saving import save_compacted, whole_state_dict


@pytest.fixture
def trusting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What checkpoints bring along is copied to the test's folder instead of the user's cache."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_the_file_is_small_and_needs_nothing_of_the_package() -> None:
    lines = FILE.read_text().splitlines()
    assert len(lines) < 150
    assert dynamic_module_utils.check_imports(FILE) == []  # no relative ones; those outside of a try are installed
    assert sorted(dynamic_module_utils.get_imports(FILE)) == [
        "importlib",
        "torch",
        "transformers",
        "typing",
    ]


def test_the_package_loads_it_without_trust_and_keeps_it_self_contained(
    self_contained: PreTrainedModel, saved: Path, tmp_path: Path
) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    assert torch.equal(logits(loaded), logits(self_contained))
    assert any(isinstance(module, LowRankLinear) for module in loaded.modules())
    loaded.save_pretrained(tmp_path / "again")
    assert is_self_contained(tmp_path / "again")
    AutoModel.from_pretrained(saved).save_pretrained(tmp_path / "body")
    assert is_self_contained(tmp_path / "body")


def test_where_the_package_is_installed_its_layers_and_checks_are_used(
    saved: Path, tmp_path: Path, trusting: None, assert_refused: Callable[..., None]
) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert any(isinstance(module, LowRankLinear) for module in loaded.modules())
    merge(loaded).save_pretrained(tmp_path / "dense")
    assert not is_self_contained(tmp_path / "dense")
    damage.rank(damage.KEY, 4)(saved)
    assert_refused(
        lambda: AutoModelForSequenceClassification.from_pretrained(saved, trust_remote_code=True),
        ValueError,
        damage.KEY,
    )


def test_merge_makes_a_stock_model_again(self_contained: PreTrainedModel, tmp_path: Path) -> None:
    self_contained.config.auto_map |= {"AutoModel": "user/repository--modeling_rankdyna.BertModel"}
    self_contained.config.auto_map |= {"AutoTokenizer": ["other.Slow", None]}
    merge(self_contained).save_pretrained(tmp_path / "dense")
    assert type(self_contained) is BertForSequenceClassification
    assert not is_self_contained(tmp_path / "dense")
    assert self_contained.config.auto_map == {"AutoTokenizer": ["other.Slow", None]}


def test_made_before_training_the_trainer_writes_it(
    tiny_bert: BertForSequenceClassification, tmp_path: Path, trusting: None
) -> None:
    rows = [{"input_ids": row, "labels": label} for label, row in enumerate(INPUT)]
    args = TrainingArguments(output_dir=tmp_path / "run", max_steps=3, use_cpu=True, report_to="none")
    plugin = RankDynaCallback(RankDynaConfig(rank_ratio=0.2))
    trainer = Trainer(make_self_contained(tiny_bert), args, train_dataset=rows, callbacks=[plugin])
    trainer.train()
    assert is_self_contained(tmp_path / "run") and is_self_contained(tmp_path / "run" / "checkpoint-3")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))


def test_copies_and_pickles_stay_self_contained(self_contained: PreTrainedModel, tmp_path: Path) -> None:
    assert make_self_contained(self_contained) is self_contained
    for i, model in enumerate((copy.deepcopy(self_contained), pickle.loads(pickle.dumps(self_contained)))):
        model.save_pretrained(tmp_path / str(i))
        assert is_self_contained(tmp_path / str(i))


def test_a_sharded_model(tiny_bert: BertForSequenceClassification, tmp_path: Path, trusting: None) -> None:
    """FSDP2 derives a class of its own."""
    model = inject_singular_groups(make_self_contained(tiny_bert), RankDynaConfig(rank_ratio=0.5))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model)
        compact(model)
        save_compacted(model, tmp_path / "saved", state_dict=whole_state_dict(model))
        expected = logits(model)
    finally:
        distributed.destroy_process_group()
    assert is_self_contained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(logits(loaded), expected)


def test_a_class_that_no_auto_class_makes_is_what_auto_model_loads(tmp_path: Path, trusting: None) -> None:
    config = tiny_tasks.model("gpt2").config
    model = make_self_contained(damage.compacted(GPT2DoubleHeadsModel(config)))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert isinstance(loaded, GPT2DoubleHeadsModel)
    assert torch.equal(logits(loaded), logits(model))


class OwnBert(BertForSequenceClassification):
    pass


def test_other_models_are_refused(
    tiny_bert: BertForSequenceClassification, assert_refused: Callable[..., None]
) -> None:
    assert_refused(
        lambda: make_self_contained(OwnBert(tiny_bert.config)), ValueError, "OwnBert is no class of transformers"
    )
    adapted = get_peft_model(tiny_bert, LoraConfig(target_modules=["query"]))
    assert_refused(lambda: make_self_contained(adapted), TypeError, "got a PeftModel")
    assert_refused(lambda: make_self_contained(nn.Linear(2, 2)), TypeError, "got a Linear")
