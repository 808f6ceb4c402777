"""How a run begins, goes on, is looked into, and begins again: the plugin stays right in each of them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.paper import PAPER
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, get_worker_info
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from rankdyna_trainer import LowRankLinear, RankDynaCallback, RankDynaConfig, SingularGroupLinear, rank_report

MakeTrainer = Callable[..., Trainer]
Check = Callable[..., None]
Row = dict[str, torch.Tensor]
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    values, others = one.state_dict(), other.state_dict()
    return values.keys() == others.keys() and all(torch.equal(value, others[key]) for key, value in values.items())


class Ranks(TrainerCallback):
    """How many groups there are before each step."""

    def __init__(self) -> None:
        self.ranks: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        layers = (module for module in model.modules() if isinstance(module, SingularGroupLinear))
        self.ranks.append(sum(layer.rank for layer in layers))


def test_a_batch_size_that_shrinks_while_groups_are_removed(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, check_compressed: Check, batch: Row
) -> None:
    sizes: list[int] = []
    history = Ranks()

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        sizes.append(len(labels))
        if len(labels) == 16 or (len(labels) == 14 and sizes.count(14) == 7):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return F.cross_entropy(outputs.logits, labels)

    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(CONFIG),
        history,
        auto_find_batch_size=True,
        per_device_train_batch_size=16,
        max_steps=-1,
        num_train_epochs=4,
        trainer_arguments={"compute_loss_func": compute_loss},
    )
    trainer.train()
    assert sizes[0] == 16 and 14 in sizes and max(sizes[-20:]) == 12
    # 1 step of 16; 8 of 14, one of them the rest of an epoch, of which the last one fails; all of 12.
    assert len(history.ranks) == 1 + 8 + 24
    assert 77 < history.ranks[8] < 384, "it did not fail in the adjusting phase"
    # Nothing comes back, and nothing more is removed until the new run's budget is below what is left.
    assert history.ranks[8:12] == history.ranks[8:9] * 4
    assert sorted(history.ranks, reverse=True) == history.ranks
    assert trainer.state.global_step == 24
    check_compressed(trainer, batch)


def test_a_model_init_that_returns_a_dense_model(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, check_compressed: Check, batch: Row
) -> None:
    made: list[nn.Module] = []

    def dense() -> nn.Module:
        made.append(copy.deepcopy(tiny_bert))
        return made[-1]

    history = Ranks()
    trainer = make_trainer(None, RankDynaCallback(CONFIG), history, trainer_arguments={"model_init": dense})
    trainer.train()
    assert len(made) == 2 and trainer.model is made[1]
    assert history.ranks[0] == 384
    check_compressed(trainer, batch)

    again = Ranks()
    trainer.add_callback(again)
    trainer.train()
    assert len(made) == 3 and again.ranks[0] == 384, "the second run did not begin with a fresh model"
    assert same_weights(trainer.model, made[1])
    check_compressed(trainer, batch)


def test_a_second_train_trains_the_compacted_model_on(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    check_compressed: Check,
    batch: Row,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    trainer.train()
    ranks = rank_report(tiny_bert)
    layers = [module for module in tiny_bert.modules() if isinstance(module, LowRankLinear) and module.rank]
    factors = [weight for layer in layers for weight in (layer.p.weight, layer.q.weight)]
    before = [factor.detach().clone() for factor in factors]
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in tiny_bert.parameters()}

    trainer.train()
    assert "compacted already: it is trained on at the ranks that it has" in caplog.text
    assert rank_report(tiny_bert).equals(ranks)
    now = [weight for layer in layers for weight in (layer.p.weight, layer.q.weight)]
    assert all(one is other for one, other in zip(now, factors, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(now, before, strict=True))
    check_compressed(trainer, batch)


def test_train_again_after_an_interruption(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, check_compressed: Check, batch: Row
) -> None:
    class InterruptOnce(TrainerCallback):
        done = False

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 7 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    history = Ranks()
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), history, InterruptOnce())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(history.ranks) == 7
    trainer.train()
    assert len(history.ranks) == 27
    assert 77 < history.ranks[7] < 384, "it was not interrupted in the adjusting phase"
    assert sorted(history.ranks, reverse=True) == history.ranks
    check_compressed(trainer, batch)


def test_evaluation_in_the_middle_changes_nothing(
    make_trainer: MakeTrainer, still_bert: BertForSequenceClassification, check_compressed: Check, batch: Row
) -> None:
    class Evaluate(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % 3 == 0:
                loss = self.trainer.evaluate()["eval_loss"]
                prediction = self.trainer.predict(self.trainer.eval_dataset)
                with torch.no_grad():
                    outputs = self.trainer.model.eval()(**batch)
                assert loss == pytest.approx(float(outputs.loss), rel=1e-4)
                assert prediction.predictions == pytest.approx(outputs.logits.numpy(), abs=1e-5)
                self.losses.append(loss)

    def run(*callbacks: TrainerCallback) -> Trainer:
        trainer = make_trainer(copy.deepcopy(still_bert), RankDynaCallback(CONFIG), *callbacks)
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train()
        check_compressed(trainer, batch)
        return trainer

    evaluated = run(evaluate := Evaluate())
    assert len(evaluate.losses) == len(set(evaluate.losses)) == 6
    assert same_weights(evaluated.model, run().model)


class InWorkers:
    """Says by which worker process each row was read."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        worker = get_worker_info()
        return self.rows[index] | {"worker": torch.tensor(-1 if worker is None else worker.id)}


def test_rows_from_worker_processes(
    make_trainer: MakeTrainer,
    still_bert: BertForSequenceClassification,
    check_compressed: Check,
    rows: list[Row],
    batch: Row,
) -> None:
    def run(workers: int) -> tuple[nn.Module, set[int]]:
        seen: set[int] = set()

        def note_workers(module: nn.Module, inputs: Any, keywords: Row) -> Any:
            seen.update(keywords["worker"].tolist())
            return inputs, {key: value for key, value in keywords.items() if key != "worker"}

        model = copy.deepcopy(still_bert)
        hook = model.register_forward_pre_hook(note_workers, with_kwargs=True)
        trainer = make_trainer(
            model,
            RankDynaCallback(CONFIG),
            dataloader_num_workers=workers,
            remove_unused_columns=False,
            trainer_arguments={"train_dataset": InWorkers(rows)},
        )
        trainer.train()
        hook.remove()
        check_compressed(trainer, batch)
        return model, seen

    alone, by_main_process = run(0)
    together, by_workers = run(2)
    assert (by_main_process, by_workers) == ({-1}, {0, 1})
    assert same_weights(alone, together)


def test_a_dataset_without_a_length(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    check_compressed: Check,
    rows: list[Row],
    batch: Row,
) -> None:
    read = 0

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Row]:
            nonlocal read
            for row in rows:
                read += 1
                yield row

    history = Ranks()
    trainer = make_trainer(
        tiny_bert, RankDynaCallback(CONFIG), history, trainer_arguments={"train_dataset": Stream()}, max_steps=20
    )
    trainer.train()
    assert read >= 20 * 8 and len(history.ranks) == 20
    assert history.ranks[0] == 384 and len(set(history.ranks)) > 3
    check_compressed(trainer, batch)
