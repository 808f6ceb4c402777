"""Weight decay through all phases of a run: dense, in singular groups, compacted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

MakeTrainer = Callable[..., Trainer]
LR, DECAY = 0.01, 0.1


class Norms(TrainerCallback):
    """What each step of the optimizer leaves of the norms of the weights."""

    def __init__(self) -> None:
        self.before = torch.zeros(0)
        self.forms: set[str] = set()
        self.left: list[torch.Tensor] = []

    def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
        layers = [model.bert.encoder.layer[i].intermediate for i in range(2)]

        def norms() -> torch.Tensor:
            targets = [layer.dense for layer in layers]
            self.forms |= {type(target).__name__ for target in targets}
            weights = [t.weight if isinstance(t, torch.nn.Linear) else t.to_dense_weight() for t in targets]
            return torch.stack([weight.detach().double().norm() for weight in weights])

        def before_step(*_: Any) -> None:
            self.before = norms()

        optimizer.optimizer.register_step_pre_hook(before_step)
        optimizer.optimizer.register_step_post_hook(lambda *_: self.left.append(norms() / self.before))


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_each_step_shrinks_a_target_as_a_dense_layer(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, optim: str
) -> None:
    norms = Norms()
    config = RankDynaConfig(rank_ratio=0.5, rank_warmup_steps=10, rank_cooldown_steps=6, rank_scope="local")
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(config),
        norms,
        trainer_arguments={"compute_loss_func": lambda outputs, *_, **__: 0 * outputs.logits.sum()},
        optim=optim,
        learning_rate=LR,
        weight_decay=DECAY,
        lr_scheduler_type="constant",
    )
    trainer.train()
    trainer.train()  # on, at the ranks that the model has
    assert norms.forms == {"Linear", "SingularGroupLinear", "LowRankLinear"}
    assert len(trainer.optimizer.param_groups) == 2
    left = torch.stack(norms.left)
    assert len(left) >= 40
    torch.testing.assert_close(left, torch.full_like(left, 1 - LR * DECAY), rtol=1e-6, atol=0)
