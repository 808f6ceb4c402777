"""Half precision with what a GPU has for it: autocast, half weights, and the real loss scaler."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.on_gpu import layers_of
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

MakeTrainer = Callable[..., Trainer]
Check = Callable[[Trainer], None]
# The warm-up ends after step 4, with groups from step 2 on, and the final budget is met at step 12.
WHEN: dict[str, Any] = {"rank_warmup_steps": 4, "rank_cooldown_steps": 8}
# One in each phase, counted from zero: with groups that gather scores, while groups are removed, and afterwards.
OVERFLOWS = (3, 7, 15)


@pytest.mark.parametrize("basis", [None, "weights"])
@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [(torch.float32, {}), (torch.float32, {"bf16": True}), (torch.float32, {"fp16": True}), (torch.bfloat16, {})],
    ids=["float32", "bf16 autocast", "fp16 with a loss scaler", "bf16 weights"],
)
def test_trains_and_meets_the_budget(
    make_trainer: MakeTrainer,
    check_compressed: Check,
    tiny_bert: BertForSequenceClassification,
    dtype: torch.dtype,
    arguments: dict[str, Any],
    basis: Any,
) -> None:
    config = RankDynaConfig(rank_ratio=0.2, group_basis=basis, **WHEN)
    trainer = make_trainer(tiny_bert.to(dtype), RankDynaCallback(config), **arguments)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}
    check_compressed(trainer)


class Step(NamedTuple):
    finite: bool
    skipped: bool
    ranks: list[int]
    scores: list[torch.Tensor]


class Record(TrainerCallback):
    """What each step did to the model."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        self.weight = model.classifier.weight.detach().clone()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        layers = layers_of(model)
        scores = [layer.importance[layer.remaining].clone() for layer in layers]
        # A fused optimizer skips by itself, unknown to accelerate's step_was_skipped.
        skipped = torch.equal(model.classifier.weight, self.weight)
        self.steps.append(Step(self.finite, skipped, [layer.rank for layer in layers], scores))


class Overflowing(Trainer):
    """The loss of some steps is so large that its gradients are no numbers of float16."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * 1e30 if self.model.training and self.state.global_step in OVERFLOWS else loss


@pytest.mark.parametrize(("basis", "optim"), [(None, "adamw_torch_fused"), ("weights", "adamw_torch")])
def test_steps_that_overflow_change_no_score_and_remove_nothing(
    make_trainer: MakeTrainer,
    check_compressed: Check,
    tiny_bert: BertForSequenceClassification,
    basis: Any,
    optim: str,
) -> None:
    config = RankDynaConfig(rank_ratio=0.2, group_basis=basis, **WHEN)
    record = Record()
    trainer = make_trainer(
        tiny_bert, RankDynaCallback(config), record, trainer_class=Overflowing, fp16=True, optim=optim
    )
    trainer.train()
    assert trainer.accelerator.scaler is not None
    overflowed = [number for number, step in enumerate(record.steps) if not step.finite]
    assert set(OVERFLOWS) <= set(overflowed) and len(overflowed) < 10, f"steps without finite gradients: {overflowed}"
    assert [number for number, step in enumerate(record.steps) if step.skipped] == overflowed
    for number in OVERFLOWS:
        before, after = record.steps[number - 1], record.steps[number]
        assert after.ranks == before.ranks != []
        largest = max(float((a - b).abs().max()) for a, b in zip(after.scores, before.scores, strict=True) if len(a))
        assert largest == 0, f"step {number}: the scores changed by {largest}"
    # A later step makes up for it.
    assert sum(record.steps[OVERFLOWS[1] + 1].ranks) < sum(record.steps[OVERFLOWS[1]].ranks)
    check_compressed(trainer)
