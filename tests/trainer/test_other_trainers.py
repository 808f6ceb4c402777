"""Classes derived from the Trainer, and its search for hyperparameters."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from huggingface_hub import ModelCard
from support.paper import PAPER
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, SingularGroupLinear, rank_report
from rankdyna_trainer.checkpoint.run_state import read_run_state

MakeTrainer = Callable[..., Trainer]
Check = Callable[..., None]
Row = dict[str, torch.Tensor]
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "output"),
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def tiny_t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))


def tiny_bart() -> BartForConditionalGeneration:
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDES.items()}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=64, d_model=32, max_position_embeddings=32, forced_eos_token_id=None, **layers)
    )


SIDES = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}


@pytest.mark.parametrize("make_model", [tiny_t5, tiny_bart])
def test_sequence_to_sequence(
    make_model: Callable[[], nn.Module], check_compressed: Check, rows: list[Row], tmp_path: Path
) -> None:
    pairs = [{"input_ids": row["input_ids"], "labels": row["input_ids"][:4]} for row in rows]
    generated: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        generated.append(prediction.predictions)
        return {"same_tokens": float((prediction.predictions[:, 1:5] == prediction.label_ids[:, :4]).mean())}

    torch.manual_seed(0)
    model = make_model()
    model.generation_config.max_length = 5
    args = Seq2SeqTrainingArguments(
        **arguments(tmp_path),
        predict_with_generate=True,
        eval_strategy="steps",
        eval_steps=10,
    )
    trainer = Seq2SeqTrainer(
        model,
        args,
        train_dataset=pairs,
        eval_dataset=pairs,
        compute_metrics=compute_metrics,
        callbacks=[RankDynaCallback(CONFIG)],
    )
    trainer.train()
    layers = rank_report(model).index
    assert any("encoder" in name for name in layers) and any("decoder" in name for name in layers)
    batch = {key: torch.stack([pair[key] for pair in pairs]) for key in pairs[0]}
    check_compressed(trainer, batch)

    assert "eval_same_tokens" in trainer.evaluate()
    assert len(generated) == 3, "at steps 10 and 20, and now"
    with torch.no_grad():
        expected = model.eval().generate(batch["input_ids"])
        loaded = type(model).from_pretrained(tmp_path / "output")
        assert torch.equal(loaded.generate(batch["input_ids"]), expected)
    predicted = torch.from_numpy(generated[-1])
    assert torch.equal(predicted[:, : expected.shape[1]], expected)
    assert (predicted[:, expected.shape[1] :] == model.config.pad_token_id).all()


def test_a_search_for_hyperparameters(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, batch: Row, tmp_path: Path
) -> None:
    class Trials(TrainerCallback):
        """The groups at the beginning and the model at the end of each trial."""

        def __init__(self) -> None:
            self.first_ranks: list[int] = []
            self.rates: list[float] = []
            self.logits: list[torch.Tensor] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            layers = (module for module in model.modules() if isinstance(module, SingularGroupLinear))
            self.first_ranks.append(sum(layer.rank for layer in layers))
            self.rates.append(args.learning_rate)

        def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            with torch.no_grad():
                self.logits.append(model.eval()(**batch).logits)

    def model_init(trial: optuna.Trial | None) -> nn.Module:
        return copy.deepcopy(tiny_bert)

    rates = [1e-4, 1e-2]
    trainer = make_trainer(
        None, RankDynaCallback(CONFIG), trials := Trials(), trainer_arguments={"model_init": model_init}
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        backend="optuna",
        n_trials=2,
        direction="minimize",
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}, seed=0),
    )
    assert trials.first_ranks == [384, 384]
    assert sorted(trials.rates) == rates and best.hyperparameters["learning_rate"] in rates
    output = tmp_path / "output"
    assert sorted(path.name for path in output.iterdir()) == ["run-0", "run-1"]
    for number, logits in enumerate(trials.logits):
        loaded = BertForSequenceClassification.from_pretrained(output / f"run-{number}").eval()
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, logits)
        ranks = rank_report(loaded)["rank"]
        assert ranks.sum() == math.ceil(0.2 * 384)
        saved = json.loads((output / f"run-{number}" / "config.json").read_text())["rankdyna"]
        assert {**saved["ranks"], **saved["dense"]} == ranks.to_dict()
        card = ModelCard.load(output / f"run-{number}" / "README.md")
        assert all(f"| {name} | " in card.text and f" | {rank} | " in card.text for name, rank in ranks.items())
    assert not torch.equal(*trials.logits)


def test_a_search_over_the_choices_of_the_config(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    callback = RankDynaCallback(CONFIG)
    settings = {"model_init": lambda: copy.deepcopy(tiny_bert)}
    trainer = make_trainer(None, callback, trainer_arguments=settings, save_strategy="steps", save_steps=20)
    space = {"rank_ratio": [0.25, 0.5], "rank_scope": ["local"]}
    trainer.hyperparameter_search(
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in space.items()},
        backend="optuna",
        n_trials=2,
        direction="minimize",
        sampler=optuna.samplers.GridSampler(space, seed=0),
    )
    found = set()
    for folder in (tmp_path / "output").iterdir():
        run = read_run_state(folder / "checkpoint-20").config
        ranks = rank_report(BertForSequenceClassification.from_pretrained(folder))["rank"]
        assert ranks.sum() == 384 * run.rank_ratio
        assert (ranks.nunique() == 1) == (run.rank_scope == "local")
        found.add((run.rank_ratio, run.rank_scope))
    assert found == {(0.25, "local"), (0.5, "local")}
    assert (CONFIG.rank_ratio, CONFIG.rank_scope) == (0.2, "global")


def test_a_callback_of_two_trainers_keeps_their_cards_apart(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    callback = RankDynaCallback(CONFIG, teacher=copy.deepcopy(tiny_bert))
    trainers = [
        make_trainer(copy.deepcopy(tiny_bert), callback, output_dir=str(tmp_path / name), max_steps=steps)
        for name, steps in (("first", 6), ("second", 8))
    ]
    for trainer, name, steps in zip(trainers, ("first", "second"), (6, 8), strict=True):
        trainer.train()
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        phases = re.findall(r"^\| (?:warm-up|adjusting|cool-down) \| (\d+) \|", card, re.MULTILINE)
        assert "ended at step" not in card and sum(map(int, phases)) == steps
