"""The plugin in a real Trainer against Algorithm 1 written a second time, in float64, from the equations."""

from itertools import product
from pathlib import Path

import pytest
import torch
from support.paper import PAPER
from support.reference_network import build_dense, make_batches, run_reference
from support.training_runs import SequentialTrainer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, SingularGroupLinear, rank_report

STEPS, BATCH = 40, 16


class RankRecorder(TrainerCallback):
    """The ranks of all layers after each step."""

    def __init__(self) -> None:
        self.ranks: list[tuple[int, ...]] = []

    def on_step_end(self, args, state, control, model, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.ranks.append(tuple(m.rank for m in model.modules() if isinstance(m, SingularGroupLinear)))


def train(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    config: RankDynaConfig,
    folder: Path,
    teacher: nn.Module | None = None,
    **arguments: object,
) -> tuple[Trainer, list[tuple[int, ...]]]:
    args = TrainingArguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(BATCH)]
    recorder = RankRecorder()
    trainer = SequentialTrainer(
        model, args, train_dataset=rows, callbacks=[RankDynaCallback(config, teacher), recorder]
    )
    trainer.train()
    return trainer, recorder.ranks


@pytest.mark.parametrize(
    ("ratio", "scope", "kind", "optimizer"),
    [
        # Each scope of each kind with each optimizer at one ratio; the other one with the long ones.
        pytest.param(*case, marks=() if (case[0] == 0.2) == (case[1:3] != ("local", "param")) else pytest.mark.long)
        for case in product([0.2, 0.6], ["global", "local"], ["rank", "param"], ["sgd", "adamw"])
    ],
)
def test_same_ranks_and_weights_as_the_equations(
    scope: str, kind: str, optimizer: str, ratio: float, tmp_path: Path
) -> None:
    learning_rate = {"sgd": 0.1, "adamw": 0.005}[optimizer]
    batches = make_batches(1, STEPS, BATCH)
    expected = run_reference(
        build_dense(0),
        batches,
        kind=kind,
        c=ratio,
        scope=scope,
        t0=5,
        t1=10,
        optimizer=optimizer,
        lr=learning_rate,
        max_grad_norm=1.0,
    )
    config = RankDynaConfig(
        **{f"{kind}_ratio": ratio}, rank_scope=scope, rank_warmup_steps=5, rank_cooldown_steps=10, **PAPER
    )
    model = build_dense(0)
    optim = {"sgd": "sgd", "adamw": "adamw_torch"}[optimizer]
    trainer, ranks = train(model, batches, config, tmp_path, optim=optim, learning_rate=learning_rate)

    assert ranks == expected.ranks
    logged = [entry["rank_budget"] for entry in trainer.state.log_history if "rank_budget" in entry]
    assert logged == expected.budgets
    assert list(rank_report(model).index) == list(expected.weights)
    for name, weight in expected.weights.items():
        layer = model.get_submodule(name)
        found = layer.weight if isinstance(layer, nn.Linear) else layer.to_dense_weight()
        torch.testing.assert_close(found, weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.classifier.weight, expected.head, rtol=0, atol=1e-9, check_dtype=True)


def test_rank_update_interval_waits_but_meets_the_final_budget(tmp_path: Path) -> None:
    config = RankDynaConfig(
        rank_ratio=0.2, rank_warmup_steps=5, rank_cooldown_steps=13, **PAPER | {"rank_update_interval": 5}
    )
    _, ranks = train(build_dense(0), make_batches(1, STEPS, BATCH), config, tmp_path, learning_rate=0.005)
    totals = [sum(layer_ranks) for layer_ranks in ranks]
    changes = [step for step in range(2, STEPS + 1) if totals[step - 1] != totals[step - 2]]
    assert changes == [10, 15, 20, 25, 27]
    assert totals[-1] == 15
