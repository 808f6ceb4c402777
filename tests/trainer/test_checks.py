"""Uses of the callback that it refuses, in the constructor of the Trainer or before the first step."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.networks import small_bert
from support.paper import PAPER
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, inject_singular_groups

MakeTrainer = Callable[..., Trainer]
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)


def test_wrong_use_fails_before_the_first_step(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    class NoStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            raise AssertionError("a step began")

    late = make_trainer(tiny_bert, NoStep())
    late.add_callback(RankDynaCallback(CONFIG))
    with pytest.raises(ValueError, match="constructor"):
        late.train()

    foreign = torch.optim.SGD(tiny_bert.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizers=\(optimizer, \.\.\.\) holds the weights in whose place"):
        make_trainer(tiny_bert, RankDynaCallback(CONFIG), trainer_arguments={"optimizers": (foreign, None)})

    injected = inject_singular_groups(small_bert(), CONFIG)
    by_name = [p for name, p in injected.named_parameters() if name.endswith((".weight", ".bias"))]
    chosen = (torch.optim.SGD(by_name, lr=0.1), None)
    with_some = make_trainer(injected, RankDynaCallback(CONFIG), NoStep(), trainer_arguments={"optimizers": chosen})
    with pytest.raises(
        ValueError, match=r"does not hold \d+ factors.*or its groups were chosen by names such as weight"
    ):
        with_some.train()

    no_adjusting = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=8, rank_cooldown_steps=12)
    with pytest.raises(ValueError, match="8 warm-up and 12 cool-down steps of 20"):
        make_trainer(small_bert(), RankDynaCallback(no_adjusting), NoStep()).train()


def test_wrong_models_fail_in_the_constructor(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    with pytest.raises(TypeError, match="takes a RankDynaConfig"):
        RankDynaCallback({"rank_ratio": 0.2})
    with pytest.raises(ValueError, match="merge_and_unload"):
        make_trainer(get_peft_model(small_bert(), LoraConfig(target_modules=["query"])), RankDynaCallback(CONFIG))
    frozen = small_bert().requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen .*can be trained again after model\.requires_grad_\(True\)"):
        make_trainer(frozen, RankDynaCallback(CONFIG))
    with pytest.raises(ValueError, match=r"linear layers are: bert\.encoder\.layer\.0\.attention\.self\.query, "):
        make_trainer(
            tiny_bert,
            RankDynaCallback(
                RankDynaConfig(
                    rank_ratio=0.2, target_modules="nothing.*", rank_warmup_steps=0.1, rank_cooldown_steps=0.4
                )
            ),
        )
    with torch.no_grad():
        tiny_bert.bert.encoder.layer[1].output.dense.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\.output\.dense has inf or nan"):
        make_trainer(tiny_bert, RankDynaCallback(CONFIG))


def test_deepspeed_is_refused(make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification) -> None:
    trainer = make_trainer(tiny_bert)
    trainer.args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="cannot run under DeepSpeed"):
        RankDynaCallback(CONFIG).on_init_end(trainer.args, trainer.state, trainer.control, model=tiny_bert)


def test_fsdp1_is_refused(make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification) -> None:
    trainer = make_trainer(tiny_bert)
    trainer.args.fsdp, trainer.args.fsdp_plugin_args = True, {"fsdp_version": 1}
    with pytest.raises(ValueError, match=r'cannot run under FSDP1.*got \{"version": 1\}'):
        RankDynaCallback(CONFIG).on_init_end(trainer.args, trainer.state, trainer.control, model=tiny_bert)


def test_two_callbacks_are_refused(make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification) -> None:
    with pytest.raises(ValueError, match="two RankDynaCallbacks"):
        make_trainer(
            tiny_bert,
            RankDynaCallback(CONFIG),
            RankDynaCallback(RankDynaConfig(rank_ratio=0.5, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)),
        )


def test_a_layer_that_was_frozen_after_the_trainer_was_made(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    trainer.model.bert.encoder.layer[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"18 factors .*frozen \(requires_grad=False\)"):
        trainer.train()


def test_a_state_of_another_step_is_refused(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    factor = trainer.model.bert.encoder.layer[0].output.dense.u
    zeros = torch.zeros(5, factor.shape[1])
    trainer.create_optimizer().state[factor] = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros}
    with pytest.raises(ValueError, match=r"exp_avg of .* has 5 groups, but the layer has 32"):
        trainer.train()


class Holder:
    """As setfit's model: it holds a module, and is none."""

    def __init__(self, body: nn.Module) -> None:
        self.model_body, self.model_head = body, object()


@pytest.mark.parametrize(
    ("held", "advice"),
    [(True, "compress model.model_body with a Trainer of its own"), (False, "Compress the module in it")],
)
def test_a_model_that_is_no_module(held: bool, advice: str, tiny_bert: nn.Module, tmp_path: Path) -> None:
    model = Holder(tiny_bert if held else object())  # type: ignore[arg-type]
    callback = RankDynaCallback(RankDynaConfig(rank_ratio=0.2))
    handler = CallbackHandler([callback], model, None, None, None)
    with pytest.raises(TypeError, match=rf"is a Holder, which is no torch\.nn\.Module: .*{advice}"):
        handler.on_init_end(SimpleNamespace(output_dir=tmp_path), TrainerState(), TrainerControl())  # type: ignore[arg-type]


@pytest.mark.parametrize("hopeless", [False, True])
def test_a_run_without_hope_is_warned_of(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    caplog: pytest.LogCaptureFixture,
    hopeless: bool,
) -> None:
    steps = {"max_steps": 3} if hopeless else {}
    config = RankDynaConfig(rank_ratio=0.5, rank_warmup_steps=1, rank_cooldown_steps=1)
    make_trainer(tiny_bert.bfloat16() if hopeless else tiny_bert, RankDynaCallback(config), **steps).train()
    assert ("This run has 3 steps" in caplog.text) is hopeless and ("This run has" in caplog.text) is hopeless
    assert ("are trained are in bfloat16, in which small updates are rounded away" in caplog.text) is hopeless
