"""Checkpoints with the code that loads them, where this library is installed."""

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from rankdyna_trainer.checkpoint import modeling_rankdyna
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
        "contextvars",
        "importlib",
        "sys",
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


def test_another_head_takes_the_place_of_the_saved_one(saved: Path, trusting: None) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(
        saved, num_labels=5, ignore_mismatched_sizes=True, trust_remote_code=True
    )
    assert loaded.classifier.weight.shape[0] == 5
    body = AutoModel.from_pretrained(saved).state_dict()
    found = loaded.base_model.state_dict()
    assert body and all(torch.equal(found[name], tensor) for name, tensor in body.items())


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


def trained(model: PreTrainedModel, folder: Path, **choices: Any) -> PreTrainedModel:
    rows = [{"input_ids": row, "labels": label} for label, row in enumerate(INPUT)]
    args = TrainingArguments(output_dir=folder, max_steps=3, use_cpu=True, report_to="none")
    plugin = RankDynaCallback(RankDynaConfig(rank_ratio=0.2, **choices))
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[plugin])
    trainer.train()
    return trainer.model.eval()


def test_a_trainer_writes_it_unless_it_is_told_not_to(
    tiny_bert: BertForSequenceClassification, tmp_path: Path, trusting: None
) -> None:
    model = trained(tiny_bert, tmp_path / "run", group_basis="weights")
    assert is_self_contained(tmp_path / "run") and is_self_contained(tmp_path / "run" / "checkpoint-3")
    options = {"trust_remote_code": True, "ignore_mismatched_sizes": True}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", **options)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="this is a checkpoint of a running compression with rankdyna-trainer"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-3", **options)
    again = trained(loaded, tmp_path / "again", self_contained=False)
    assert not is_self_contained(tmp_path / "again") and not is_self_contained(tmp_path / "again" / "checkpoint-3")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded), logits(again))


def test_a_trainer_saves_a_model_of_another_class_without_it(
    tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    model = OwnBert(tiny_bert.config)
    trained(model, tmp_path / "run")
    assert type(model) is OwnBert and not is_self_contained(tmp_path / "run")
    assert torch.equal(logits(OwnBert.from_pretrained(tmp_path / "run")), logits(model))


def test_a_model_saved_in_the_place_of_a_self_contained_one(self_contained: PreTrainedModel, tmp_path: Path) -> None:
    save_compacted(self_contained, tmp_path)
    save_compacted(merge(self_contained), tmp_path)
    assert not is_self_contained(tmp_path)


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


def test_of_tensors_that_do_not_fit_the_first_by_name_is_named() -> None:
    """transformers gives a set of them, in an order that differs from process to process."""

    class Stock:
        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> tuple[Any, dict[str, Any]]:
            mismatched = [(f"layer.{factor}.weight", (2, 3), (2, 4)) for factor in ("q", "p")]
            config = SimpleNamespace(rankdyna={"ranks": {"layer": 3}})
            info = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": mismatched}
            return SimpleNamespace(config=config), info

    class Saved(modeling_rankdyna.SavedWithThisFile, Stock):
        pass

    with pytest.raises(ValueError, match=r"The checkpoint has no layer\.p\.weight, or one of another size"):
        Saved.from_pretrained()
