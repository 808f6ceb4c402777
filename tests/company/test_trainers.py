"""Trainers of other libraries, and accelerate's launcher, with the callback."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from tasks import tiny_tasks
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import BEMACallback, DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, inject_singular_groups, rank_report

ARGUMENTS: dict[str, Any] = {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
ARGUMENTS |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)


def test_sentence_transformers(assert_differs_less: Any, tmp_path: Path) -> None:
    base, output = tiny_tasks.save_model("bert", tmp_path / "base"), tmp_path / "output"
    model = SentenceTransformer(base, device="cpu")
    texts = [row["sentence"] for row in tiny_tasks.sentences(32)]
    rows = {"one": texts, "other": texts[::-1], "score": [0.0, 1.0] * 16}
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(str(output), **ARGUMENTS, save_strategy="steps", save_steps=10),
        train_dataset=Dataset.from_dict(rows),
        loss=CosineSimilarityLoss(model),
        callbacks=[RankDynaCallback(CONFIG)],
    )
    trainer.train()
    report = rank_report(model)
    assert len(report) == 12 and report["rank"].sum() == 77
    saved = json.loads((output / "config.json").read_text())["rankdyna"]
    ranks = saved["ranks"] | saved["dense"]
    assert {f"0.model.{name}": rank for name, rank in ranks.items()} == report["rank"].to_dict()
    loaded = SentenceTransformer(str(output), device="cpu")
    assert_differs_less(
        "sentence-transformers", torch.from_numpy(loaded.encode(texts)), torch.from_numpy(model.encode(texts)), 0
    )
    trainer.save_model(str(tmp_path / "again"))
    assert rank_report(SentenceTransformer(str(tmp_path / "again"), device="cpu")).equals(rank_report(loaded))


def test_sentence_transformers_does_not_train_for_a_best_model_that_it_cannot_load(tmp_path: Path) -> None:
    model = SentenceTransformer(tiny_tasks.save_model("bert", tmp_path / "base"), device="cpu")
    rows = Dataset.from_dict({"one": ["alice"], "other": ["bob"], "score": [0.0]})
    best = {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10, "load_best_model_at_end": True}
    with pytest.raises(ValueError, match=r"of a SentenceTransformer .* load_best_model_at_end=False"):
        SentenceTransformerTrainer(
            model,
            SentenceTransformerTrainingArguments(str(tmp_path / "output"), **ARGUMENTS, **best),
            train_dataset=rows,
            eval_dataset=rows,
            loss=CosineSimilarityLoss(model),
            callbacks=[RankDynaCallback(CONFIG)],
        )


def test_supervised_fine_tuning_by_trl(assert_differs_less: Any, tmp_path: Path) -> None:
    output = tmp_path / "output"
    tokenizer = tiny_tasks.tokenizer(ends=False)
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    trainer = SFTTrainer(
        tiny_tasks.model("llama"),
        SFTConfig(str(output), **ARGUMENTS, max_length=16, packing=True, bf16=False, save_strategy="no"),
        train_dataset=Dataset.from_list(tiny_tasks.lines(64)),
        processing_class=tokenizer,
        callbacks=[RankDynaCallback(CONFIG)],
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 20
    # Its own numbers stand beside the plugin's.
    assert all({"mean_token_accuracy", "rank_budget"} <= entry.keys() for entry in logged)
    model, loaded = trainer.model.eval(), AutoModelForCausalLM.from_pretrained(output)
    assert rank_report(loaded)["rank"].sum() == 90
    tokens = AutoTokenizer.from_pretrained(output)("alice sees", return_tensors="pt")
    with torch.no_grad():
        assert_differs_less("trl", loaded(**tokens).logits, model(**tokens).logits, 0)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(**tokens, **settings), model.generate(**tokens, **settings))
    trainer.create_model_card(dataset_name="someone/texts", tags="mine")
    card = ModelCard.load(output / "README.md")
    assert {"mine", "trl", "sft", "rankdyna", "low-rank"} <= {*card.data.tags}
    assert (card.data.datasets, card.data.pipeline_tag) == (["someone/texts"], "text-generation")
    assert card.text.count("## Quick start") == card.text.count("## Ranks") == 1  # trl's section, and ours


@pytest.fixture
def make_preference_trainer(tmp_path: Path) -> Any:
    """trl's DPOTrainer with a reference model that follows the model every second step, or does not."""

    def make(config: RankDynaConfig, injected: bool = False, callbacks: Any = (), **arguments: Any) -> DPOTrainer:
        tiny_tasks.model("llama").save_pretrained(tmp_path / "base")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tiny_tasks.tokenizer(ends=False)
        tokenizer.add_special_tokens({"eos_token": "[SEP]"})
        reference = copy.deepcopy(inject_singular_groups(model, config)) if injected else None
        return DPOTrainer(
            model,
            reference,
            DPOConfig(str(tmp_path / "output"), **ARGUMENTS, bf16=False, save_strategy="no", **arguments),
            train_dataset=Dataset.from_list([{"prompt": "alice sees", "chosen": " bob", "rejected": " york"}] * 16),
            processing_class=tokenizer,
            callbacks=[RankDynaCallback(config), *callbacks],
        )

    return make


FIXED = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, fixed_shapes=True)
FOLLOWS = {"sync_ref_model": True, "ref_model_sync_steps": 20, "ref_model_mixup_alpha": 0.75}


def test_a_reference_model_follows_the_model_by_trl(make_preference_trainer: Any, tmp_path: Path) -> None:
    trainer = make_preference_trainer(FIXED, injected=True, **FOLLOWS)
    before = {name: value.clone() for name, value in trainer.ref_model.named_parameters()}
    ends: dict[str, torch.Tensor] = {}
    finish = trainer.callback_handler.callbacks[0].on_train_end

    def note_and_finish(*args: Any, model: torch.nn.Module, **named: Any) -> None:
        ends.update({name: value.detach().clone() for name, value in model.named_parameters()})
        finish(*args, model=model, **named)

    trainer.callback_handler.callbacks[0].on_train_end = note_and_finish
    trainer.train()
    for name, value in trainer.ref_model.named_parameters():  # once, after the last step
        torch.testing.assert_close(value, 0.25 * before[name] + 0.75 * ends[name])
    assert rank_report(AutoModelForCausalLM.from_pretrained(tmp_path / "output"))["rank"].sum() == 90


def test_a_fixed_reference_model_by_trl(make_preference_trainer: Any, tmp_path: Path) -> None:
    make_preference_trainer(CONFIG).train()
    assert rank_report(AutoModelForCausalLM.from_pretrained(tmp_path / "output"))["rank"].sum() == 90


def test_averages_of_trl_that_would_break_are_refused(make_preference_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"sync_ref_model=True mixes the model .* fixed_shapes=True .*deepcopy"):
        make_preference_trainer(CONFIG, **FOLLOWS)
    with pytest.raises(ValueError, match=r"SyncRefModelCallback\.ref_model has other tensors than the model"):
        make_preference_trainer(FIXED, **FOLLOWS).train()
    for config in (CONFIG, FIXED):
        with pytest.raises(ValueError, match="BEMACallback keeps its average in a dense model"):
            make_preference_trainer(config, callbacks=[BEMACallback()]).train()


@pytest.mark.slow
@pytest.mark.long
def test_accelerate_launch(assert_differs_less: Any, tmp_path: Path) -> None:
    """On CPUs the launcher starts several processes if it is told that there are several devices."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    program = Path(__file__).parent.parent / "support" / "distributed_runs.py"
    settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": 8}
    subprocess.run([*command, str(program), json.dumps([settings])], check=True, capture_output=True, timeout=240)
    one, other = (load_file(tmp_path / f"process-{i}.safetensors") for i in (0, 1))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert 0 < rank_report(loaded)["rank"].sum() <= 77
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(one[name], other[name])
        if tensor.numel():
            assert_differs_less("accelerate", tensor, one[name], 0)
