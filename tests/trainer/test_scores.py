"""Each importance score in runs of the Trainer."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paper import PAPER
from support.processes import assert_same_as_one_process, assert_same_in_all_processes, run, start
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, SingularGroupLinear, rank_report
from rankdyna_trainer.layers.hooks import Hook
from rankdyna_trainer.method.hessian import hessian_diagonal, random_signs

pytestmark = pytest.mark.slow

SCORES = pytest.mark.parametrize("score", ["second_order", "fisher"])


def callback(score: str) -> RankDynaCallback:
    return RankDynaCallback(
        RankDynaConfig(rank_ratio=0.2, importance_score=score, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)
    )


ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
BF16, CHECKPOINTED = {"bf16": True}, {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("score", "arguments"),
    [
        ("second_order", {}),
        ("second_order", CHECKPOINTED),
        ("fisher", ACCUMULATED),
        ("fisher", BF16),
        pytest.param("second_order", ACCUMULATED, marks=pytest.mark.long),
        pytest.param("second_order", BF16, marks=pytest.mark.long),
        pytest.param("fisher", {}, marks=pytest.mark.long),
        pytest.param("fisher", CHECKPOINTED, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_run(
    score: str,
    arguments: dict[str, Any],
    tiny_bert: Any,
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer(tiny_bert, callback(score), **arguments)
    trainer.train()
    assert rank_report(trainer.model)["rank"].sum() == 77  # 0.2 of 384
    assert trainer.state.log_history[-2]["remaining_groups"] == 77
    for module in trainer.model.modules():
        assert not isinstance(module, SingularGroupLinear)
        assert not any(isinstance(hook, Hook) for hook in (module._forward_hooks | module._forward_pre_hooks).values())


class FirstStep(TrainerCallback):
    """What a run begins with, its batches, and the smoothed scores after its first step."""

    def __init__(self, rankdyna: RankDynaCallback) -> None:
        self.rankdyna = rankdyna
        self.batches: list[dict[str, torch.Tensor]] = []
        self.importance: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        copied = copy.deepcopy(model)
        self.model = lambda: copied  # a copy among the attributes would be taken for an average
        model.register_forward_pre_hook(lambda _, args, inputs: self.batches.append(inputs), with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.importance = [layer.importance.clone() for layer in self.rankdyna._rankdyna.layers]
        control.should_training_stop = True


@SCORES
def test_scores_of_an_accumulation_by_brute_force(
    score: str, still_bert: Any, make_trainer: Callable[..., Trainer]
) -> None:
    """Clipping is in both parts of eq. 10, and not in eq. 13."""
    added = callback(score)
    first = FirstStep(added)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_grad_norm": 0.01}
    trainer = make_trainer(still_bert, added, first, **settings)
    trainer.train()
    model = first.model()
    batches = [{name: inputs[name] for name in ("input_ids", "labels")} for inputs in first.batches]
    layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
    factors = [factor for layer in layers for factor in layer.factors().values()]
    values = [torch.zeros_like(factor) for factor in factors]
    with sdpa_kernel(SDPBackend.MATH):
        # Of some models transformers trains the sum of the batches' means.
        weight = trainer.state.log_history[0]["loss"] / (sum(model(**batch).loss.item() for batch in batches) / 3)
        if score == "fisher":
            for batch in batches:
                for i in range(4):
                    loss = model(**{name: tensor[i : i + 1] for name, tensor in batch.items()}).loss
                    for total, gradient in zip(values, torch.autograd.grad(loss, factors), strict=True):
                        total += (weight * gradient).square() / 12
        else:
            sum(model(**batch).loss for batch in batches).div(3).backward()
            clip = 0.01 / torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
            assert clip < 1
            for i, batch in enumerate(batches):
                signs = random_signs(factors, random.Random(f"0 {i} 0").getrandbits(32))
                for total, part in zip(values, hessian_diagonal(model(**batch).loss, factors, signs)[1], strict=True):
                    total += part / 3
            values = [
                (theta * theta.grad + theta**2 * h / 2).abs().detach() * clip
                for theta, h in zip(factors, values, strict=True)
            ]
    for found in first.importance:
        expected = sum(values.pop(0).unsqueeze(-1).flatten(1).sum(1) for _ in range(3))
        torch.testing.assert_close(found, 0.15 * expected, rtol=1e-3, atol=0)


@SCORES
def test_a_resumed_run_ends_bit_identical(
    score: str, tiny_bert: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    fresh = type(tiny_bert)(copy.deepcopy(tiny_bert.config))
    fresh.load_state_dict(tiny_bert.state_dict())
    make_trainer(tiny_bert, callback(score), **saving).train()
    resumed = make_trainer(fresh, callback(score), **saving, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-4"))
    files = [tmp_path / folder / "model.safetensors" for folder in ("output", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_second_order_refuses_what_it_cannot_see(tiny_bert: Any, make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(tiny_bert, callback("second_order"), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="needs the loss that BertForSequenceClassification returns"):
        trainer.train()


@SCORES
def test_torch_compile_is_refused(score: str, tiny_bert: Any, make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match=r"cannot be used with torch\.compile"):
        make_trainer(tiny_bert, callback(score), torch_compile=True).train()


@pytest.mark.long
def test_two_processes_end_as_one_does(tmp_path: Path) -> None:
    """Under DDP both scores, under FSDP2 the one that it can give; the Hessian times the same signs in all."""
    two, one = ({"per_device_train_batch_size": rows, "max_steps": 8} for rows in (8, 16))
    runs = {
        "fisher": two | {"score": "fisher"},
        "second_order": two | {"score": "second_order", "signs": 1},
        "sharded": two | {"score": "fisher", "sharded": "FULL_STATE_DICT"},
    }
    mixed = two | {"score": "second_order", "output_dir": str(tmp_path / "random signs")}
    run(2, *({"output_dir": str(tmp_path / name)} | settings for name, settings in runs.items()), mixed)
    assert_same_in_all_processes(tmp_path / "random signs", 2)
    scores = ("fisher", "second_order")
    run(1, *({"output_dir": str(tmp_path / f"one {score}"), **runs[score], **one} for score in scores))
    for name, settings in runs.items():
        assert_same_in_all_processes(tmp_path / name, 2)
        assert_same_as_one_process(tmp_path / name, tmp_path / f"one {settings['score']}")

    result = start(2, runs["sharded"] | {"score": "second_order", "output_dir": str(tmp_path / "refused")})
    assert result.returncode != 0 and "cannot be used under FSDP2" in result.stderr
