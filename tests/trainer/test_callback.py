"""The plugin through a real Trainer."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import small_bert
from support.paper import PAPER
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from rankdyna_trainer import (
    LowRankLinear,
    RankDynaCallback,
    RankDynaConfig,
    SingularGroupLinear,
    inject_singular_groups,
    rank_report,
)
from rankdyna_trainer.report.tables import compression_summary

MakeTrainer = Callable[..., Trainer]
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)


def logits(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.stack([row["input_ids"] for row in rows])).logits


def test_compresses_saves_and_stays_usable(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make_trainer(
        tiny_bert, RankDynaCallback(CONFIG), trainer_arguments={"processing_class": tokenizer}, max_steps=40
    )
    trainer.train()

    report = rank_report(trainer.model)
    assert report["rank"].sum() == math.ceil(0.2 * 12 * 32)
    assert not any(isinstance(module, SingularGroupLinear) for module in trainer.model.modules())
    output = tmp_path / "output"
    assert not list(output.glob("*.bin")) and not list(output.glob("*.pt"))
    reloaded = AutoModelForSequenceClassification.from_pretrained(output)
    assert torch.equal(logits(reloaded, rows), logits(trainer.model, rows))
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tokenizer.get_vocab()

    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(trainer.state.log_history[-1]["eval_loss"])
    trainer.save_model(str(tmp_path / "again"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, rows), logits(trainer.model, rows))

    printed = capsys.readouterr().out
    summary = compression_summary(trainer.model)
    for number in (summary.target_parameters, summary.all_parameters, summary.dense_all_parameters):
        assert f"{number:,}" in printed
    assert f"{(output / 'model.safetensors').stat().st_size / 1e6:.4g}" in printed
    assert f"layers at rank 0: {summary.layers_at_rank_zero} of 12" in printed


def test_the_compacted_model_computes_what_was_trained(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, rows: list[dict[str, torch.Tensor]]
) -> None:
    class LastLogits(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs) -> None:  # type: ignore[no-untyped-def]
            self.logits = logits(model, rows)

    last = LastLogits()
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), last)
    trainer.train()
    torch.testing.assert_close(logits(trainer.model, rows), last.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", ["rank_ratio", "param_ratio"])
def test_logs_reach_the_history_and_the_trackers(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path, ratio: str, monkeypatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(RankDynaConfig(**{ratio: 0.3}, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)),
        report_to="tensorboard",
        logging_steps=2,
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == list(range(2, 21, 2))
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    for key in ("kept", "kept_of_all"):
        sent = [event.value for event in events.Scalars(f"train/{key}")]
        assert sent == np.float32([entry[key] for entry in history]).tolist()
    assert not {"train/rank_budget", "train/remaining_groups"} & {*events.Tags()["scalars"]}
    assert [entry["kept"] for entry in history] == [entry["remaining_parameters"] / 16384 for entry in history]
    summary = compression_summary(trainer.model)
    assert history[-1]["kept"] == summary.target_ratio and history[-1]["kept_of_all"] == summary.all_ratio
    spent = "remaining_groups" if ratio == "rank_ratio" else "remaining_parameters"
    assert all(entry[spent] <= entry["rank_budget"] for entry in history)
    final = {"rank_ratio": math.ceil(0.3 * 384), "param_ratio": math.floor(0.3 * 2 * 8192)}[ratio]
    assert history[-1]["rank_budget"] == final
    assert history[0]["remaining_groups"] == 384


class RemovedGroupsAreInert(TrainerCallback):
    """Checks, at each step, that removed groups have no part in weights, gradients, their norm and the state."""

    def __init__(self) -> None:
        self.seen = 0
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs) -> None:  # type: ignore[no-untyped-def]
        squares = 0.0
        inside = set()
        for layer in (m for m in model.modules() if isinstance(m, SingularGroupLinear)):
            removed = ~layer.remaining
            self.seen += int(removed.sum())
            for factor in layer.factors().values():
                inside.add(id(factor))
                assert not factor[removed].any() and not factor.grad[removed].any()
                for value in optimizer.state.get(factor, {}).values():
                    if isinstance(value, torch.Tensor) and value.shape == factor.shape:
                        assert value[removed].abs().sum() < 1e-20  # Adafactor adds 1e-30 to each
                squares += float(factor.grad[layer.remaining].square().sum())
        squares += sum(
            float(p.grad.square().sum()) for p in model.parameters() if id(p) not in inside and p.grad is not None
        )
        self.norms.append(math.sqrt(squares))


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_removed_groups_are_inert(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, optim: str
) -> None:
    probe = RemovedGroupsAreInert()
    trainer = make_trainer(
        tiny_bert, RankDynaCallback(CONFIG), probe, optim=optim, max_grad_norm=1e9, weight_decay=0.01, max_steps=30
    )
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert probe.seen > 0
    assert logged == pytest.approx(probe.norms, rel=1e-4)


def test_training_leaves_the_tensors_of_removed_groups(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    class Sizes(TrainerCallback):
        def __init__(self) -> None:
            self.parameters: list[int] = []
            self.state: list[int] = []
            self.ranks: list[list[int]] = []
            self.widths: list[list[int]] = []

        def on_step_end(self, args, state, control, model, optimizer, **kwargs) -> None:  # type: ignore[no-untyped-def]
            self.parameters.append(sum(parameter.numel() for parameter in model.parameters()))
            self.state.append(sum(s["exp_avg"].numel() for s in optimizer.state.values()))
            layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
            self.ranks.append([layer.rank for layer in layers])
            self.widths.append([layer.width for layer in layers])

    sizes = Sizes()
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), sizes, max_steps=60)
    trainer.train()
    assert sizes.parameters == sizes.state
    # sigma is merged into P when the model is compacted: one number a group. Emptied layers held two rows, of zeros.
    report = rank_report(trainer.model).query("rank < 2")
    zeros = ((report["out_features"] + report["in_features"] + 1) * (2 - report["rank"])).sum()
    assert sizes.parameters[-1] - 77 - zeros == sum(parameter.numel() for parameter in trainer.model.parameters())
    assert sizes.widths[-1] == [max(rank, 2) for rank in sizes.ranks[-1]]
    removals, cuts = (
        sum(a != b for now, then in pairwise(record) for a, b in zip(now, then, strict=True))
        for record in (sizes.ranks, sizes.widths)
    )
    assert 12 <= cuts < removals / 2


def test_a_loss_that_the_user_keeps_survives_the_cuts(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    kept: list[torch.Tensor] = []

    def compute_loss(outputs, labels, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        kept.append(loss)
        return loss

    make_trainer(tiny_bert, RankDynaCallback(CONFIG), trainer_arguments={"compute_loss_func": compute_loss}).train()
    assert len(kept) == 20


def test_same_seed_same_model(make_trainer: MakeTrainer, rows: list[dict[str, torch.Tensor]]) -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(0)
        trainer = make_trainer(
            None,
            RankDynaCallback(CONFIG),
            trainer_arguments={"model_init": lambda: inject_singular_groups(fresh(), CONFIG)},
        )
        trainer.train()
        return logits(trainer.model, rows)

    def fresh() -> torch.nn.Module:
        return BertForSequenceClassification.from_pretrained(source)

    source = Path(make_trainer(None, trainer_arguments={"model_init": small_bert}).args.output_dir) / "dense"
    small_bert().save_pretrained(source)
    assert torch.equal(run(), run())


@pytest.mark.parametrize("stop", [3, 11, 17])
def test_resume_ends_with_the_same_model(
    make_trainer: MakeTrainer, rows: list[dict[str, torch.Tensor]], tmp_path: Path, stop: int
) -> None:
    def trainer_in(folder: str) -> Trainer:
        torch.manual_seed(0)
        return make_trainer(
            small_bert(),
            RankDynaCallback(CONFIG),
            output_dir=str(tmp_path / folder),
            save_strategy="steps",
            save_steps=stop,
        )

    whole = trainer_in("whole")
    whole.train()
    resumed = trainer_in("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert torch.equal(logits(resumed.model, rows), logits(whole.model, rows))
    assert rank_report(resumed.model).equals(rank_report(whole.model))


def test_stopping_early_says_which_budget_was_reached(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, caplog: pytest.LogCaptureFixture
) -> None:
    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            control.should_training_stop = state.global_step >= 6
            return control

    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), StopAt())
    trainer.train()
    budget = [entry["rank_budget"] for entry in trainer.state.log_history if "rank_budget" in entry][-1]
    assert "stopped at step 6, before the final budget is reached at step 12" in caplog.text
    assert f"budget that it has met, {budget} singular groups (final: 77)" in caplog.text
    assert rank_report(trainer.model)["rank"].sum() <= budget


def test_a_skipped_optimizer_step_removes_nothing(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    trainer = make_trainer(tiny_bert, callback := RankDynaCallback(CONFIG))
    trainer.create_optimizer()
    trainer.state.max_steps = 20
    context = (trainer.args, trainer.state, trainer.control)
    callback.on_train_begin(*context, model=tiny_bert, optimizer=trainer.optimizer)
    trainer.state.global_step = 15
    trainer.optimizer.step_was_skipped = True
    callback.on_optimizer_step(*context, optimizer=trainer.optimizer)
    assert sum(m.rank for m in tiny_bert.modules() if isinstance(m, SingularGroupLinear)) == 384
    trainer.optimizer.step_was_skipped = False
    callback.on_optimizer_step(*context, optimizer=trainer.optimizer)
    assert sum(m.rank for m in tiny_bert.modules() if isinstance(m, SingularGroupLinear)) == 77


def test_a_compacted_model_trains_on_in_a_plain_trainer(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    make_trainer(tiny_bert, RankDynaCallback(CONFIG)).train()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output")
    before = {name: parameter.clone() for name, parameter in loaded.named_parameters()}
    trainer = make_trainer(loaded, output_dir=str(tmp_path / "further"))
    trainer.train()
    changed = [name for name, parameter in loaded.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(".p.weight" in name for name in changed) and any(".q.weight" in name for name in changed)
    assert any(isinstance(module, LowRankLinear) for module in loaded.modules())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
