"""Each importance score in runs of the Trainer."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_processes import assert_same_in_all_processes, run, start
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, inject_singular_groups

pytestmark = pytest.mark.slow

SCORES = pytest.mark.parametrize("score", ["second_order", "fisher"])


def callback(score: str) -> RankDynaCallback:
    return RankDynaCallback(
        RankDynaConfig(rank_ratio=0.2, importance_score=score, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
    )


@SCORES
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"bf16": True},
        {"gradient_checkpointing": True},
    ],
    ids=["plain", "accumulation", "bf16", "checkpointing"],
)
def test_a_run(
    score: str,
    arguments: dict[str, Any],
    tiny_bert: Any,
    make_trainer: Callable[..., Trainer],
    check_compressed: Callable[..., None],
    batch: dict[str, torch.Tensor],
) -> None:
    trainer = make_trainer(tiny_bert, callback(score), **arguments)
    trainer.train()
    check_compressed(trainer, batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())


@SCORES
def test_scores_of_an_accumulation_are_those_of_the_batch(
    score: str, still_bert: Any, make_trainer: Callable[..., Trainer]
) -> None:
    """Fisher exactly; of the Hessian the part that no random signs are in, its size."""
    found = []
    for size, passes in ((8, 1), (4, 2), (2, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes, "max_steps": 20}
        added = callback(score)
        trainer = make_trainer(type(still_bert)(still_bert.config), added, **settings, max_grad_norm=1e-3)
        trainer.model.load_state_dict(still_injected(still_bert))
        scores: list[torch.Tensor] = []

        def stop(
            args: Any, state: Any, control: Any, scores: list[torch.Tensor] = scores, added: Any = added, **_: Any
        ):
            if not scores:
                scores += [layer.importance.clone() for layer in added._rankdyna.layers]

        added.on_step_end = stop
        trainer.train()
        found.append(torch.cat(scores))
    for other in found[1:]:
        if score == "fisher":
            torch.testing.assert_close(other, found[0], rtol=1e-4, atol=0)
        else:
            assert 0.5 < other.norm() / found[0].norm() < 2


def still_injected(model: Any) -> dict[str, torch.Tensor]:
    return inject_singular_groups(copy.deepcopy(model), callback("fisher").config).state_dict()


@SCORES
def test_a_resumed_run_ends_bit_identical(
    score: str, tiny_bert: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    config = copy.deepcopy(tiny_bert.config)
    state = {name: tensor.clone() for name, tensor in tiny_bert.state_dict().items()}
    make_trainer(tiny_bert, callback(score), **saving).train()
    whole = load_file(tmp_path / "output" / "model.safetensors")
    fresh = type(tiny_bert)(config)
    fresh.load_state_dict(state)
    checkpoint = str(Path(get_last_checkpoint(str(tmp_path / "output"))).with_name("checkpoint-4"))
    make_trainer(fresh, callback(score), **saving).train(resume_from_checkpoint=checkpoint)
    resumed = load_file(tmp_path / "output" / "model.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_second_order_refuses_what_it_cannot_see(tiny_bert: Any, make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(tiny_bert, callback("second_order"), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="needs the loss that BertForSequenceClassification returns"):
        trainer.train()


@SCORES
def test_torch_compile_is_refused(score: str, tiny_bert: Any, make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match=r"cannot be used with torch\.compile"):
        make_trainer(tiny_bert, callback(score), torch_compile=True).train()


def test_two_processes(tmp_path: Path) -> None:
    """Fisher sees the examples of both, as one process would; of the Hessian both agree on the estimate."""
    common = {"per_device_train_batch_size": 8}
    names = ("fisher", "second_order", "fisher sharded")
    settings = [common | {"output_dir": str(tmp_path / name), "score": name.split()[0]} for name in names]
    settings[2] |= {"sharded": "FULL_STATE_DICT"}
    run(2, *settings)
    for name in names:
        assert_same_in_all_processes(tmp_path / name, 2)
    run(1, {"output_dir": str(tmp_path / "one"), "score": "fisher", "per_device_train_batch_size": 16})
    one = load_file(tmp_path / "one" / "process-0.safetensors")
    for name in ("fisher", "fisher sharded"):
        several = load_file(tmp_path / name / "process-0.safetensors")
        assert {key: value.shape for key, value in several.items()} == {key: value.shape for key, value in one.items()}
        for key, value in several.items():
            torch.testing.assert_close(value, one[key], rtol=1e-4, atol=2e-6)

    result = start(2, settings[2] | {"score": "second_order"})
    assert result.returncode != 0 and "cannot be used under FSDP2" in result.stderr
