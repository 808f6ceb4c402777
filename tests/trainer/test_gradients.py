"""The Trainer's ways to make gradients together with the plugin: accumulated, clipped, recomputed, compiled."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from support.damage import TRANSFORMERS_4
from support.networks import layers_of
from support.paper import PAPER
from support.probe import Probe
from torch import nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

OPTIONS = {option.name for option in fields(TrainingArguments)}
MakeTrainer = Callable[..., Trainer]
Check = Callable[..., None]
Row = dict[str, torch.Tensor]
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Of all weights; different ranks are different shapes, and fail here."""
    values, others = one.state_dict(), other.state_dict()
    assert {key: value.shape for key, value in values.items()} == {key: value.shape for key, value in others.items()}
    return max(float((value - others[key]).abs().max()) for key, value in values.items() if value.numel())


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_accumulated_small_batches_are_one_large_batch(
    make_trainer: MakeTrainer,
    still_bert: BertForSequenceClassification,
    check_compressed: Check,
    batch: Row,
    optim: str,
) -> None:
    def mean_over_all(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        # BERT's own loss takes the mean over each small batch, and the Trainer then adds them up.
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    def run(size: int, steps: int) -> tuple[nn.Module, Probe, list[float]]:
        # In float64, so that AdamW does not blow up the rounding of gradients that are near zero.
        model, probe = copy.deepcopy(still_bert).double(), Probe()
        trainer = make_trainer(
            model,
            RankDynaCallback(CONFIG),
            probe,
            optim=optim,
            learning_rate=0.1 if optim == "sgd" else 1e-3,
            max_grad_norm=0.5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            trainer_arguments={"compute_loss_func": mean_over_all},
        )
        trainer.train()
        check_compressed(trainer, batch)
        return model, probe, [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]

    large, of_large, norms = run(8, 1)
    small, of_small, accumulated_norms = run(2, 4)
    assert {len(batches) for batches in of_large.batches} == {1}
    assert {len(batches) for batches in of_small.batches} == {4}
    assert of_small.ranks == of_large.ranks and len({sum(ranks) for ranks in of_small.ranks}) > 3
    assert max(norms) > 0.5, "nothing was clipped"
    assert accumulated_norms == pytest.approx(norms, rel=1e-6)
    assert largest_difference(large, small) < 1e-9


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_scores_are_those_of_the_clipped_gradients(
    make_trainer: MakeTrainer,
    still_bert: BertForSequenceClassification,
    check_compressed: Check,
    batch: Row,
    max_grad_norm: float,
) -> None:
    class Scores(Probe):
        """Computes the loss of the batch anew, and from it the gradients, their norm, and the smoothed scores."""

        def __init__(self) -> None:
            super().__init__()
            self.norms: list[float] = []
            self.steps_of_other_scores = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control)
            self.before = [layer.importance.clone() for layer in layers_of(model)]

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            [inputs] = self.batches[-1]
            loss = model(**inputs).loss
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            computed = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = {id(p): g for p, g in zip(parameters, computed, strict=True) if g is not None}
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            self.norms.append(float(norm))
            scale = max_grad_norm / (norm + 1e-6) if max_grad_norm and norm > max_grad_norm else 1.0
            for layer, before in zip(layers_of(model), self.before, strict=True):
                unclipped = sum(
                    (factor.detach() * gradients[id(factor)]).abs().unsqueeze(-1).flatten(1).sum(1)
                    for factor in layer.factors().values()
                )
                smoothed = CONFIG.importance_beta * before + (1 - CONFIG.importance_beta) * scale * unclipped
                torch.testing.assert_close(layer.importance, smoothed, rtol=1e-3, atol=1e-7)

    with torch.no_grad():
        still_bert.classifier.weight *= 20
    scores = Scores()
    trainer = make_trainer(still_bert, RankDynaCallback(CONFIG), scores, max_grad_norm=max_grad_norm)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    if max_grad_norm or not TRANSFORMERS_4:  # which logs no norm where it clips nothing
        assert len(logged) == 20 and logged == pytest.approx(scores.norms, rel=1e-3)
    assert sum(norm > 2 for norm in scores.norms) > 5, "clipping at 1 would not matter"
    check_compressed(trainer, batch)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(
    make_trainer: MakeTrainer,
    still_bert: BertForSequenceClassification,
    check_compressed: Check,
    batch: Row,
    use_reentrant: bool,
) -> None:
    def run(**arguments: Any) -> tuple[nn.Module, int]:
        model = copy.deepcopy(still_bert)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        trainer = make_trainer(model, RankDynaCallback(CONFIG), **arguments)
        layers_of(model)[0].register_forward_pre_hook(count)
        trainer.train()
        calls_in_training = calls
        check_compressed(trainer, batch)
        return model, calls_in_training

    plain, calls = run()
    # transformers has renamed the option.
    option = next(f"{word}_checkpointing" for word in ("activation", "gradient") if f"{word}_checkpointing" in OPTIONS)
    checkpointed, calls_with_recomputation = run(
        **{option: True, f"{option}_kwargs": {"use_reentrant": use_reentrant}}
    )
    assert (calls, calls_with_recomputation) == (20, 40)
    assert largest_difference(plain, checkpointed) == 0


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_torch_compile_compiles_once_more_at_the_final_budget(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    check_compressed: Check,
    batch: Row,
    fresh_dynamo: None,
    backend: str,
) -> None:
    class Compilations(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.compilations: list[int] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end(*args, **kwargs)
            self.compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    tiny_bert.config.problem_type = "single_label_classification"  # else BERT sets it, and step 2 recompiles
    probe = Compilations()
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), probe, torch_compile_backend=backend)
    trainer.train()
    graphs = probe.compilations[0]
    assert graphs > 0
    # The budget is final after step 12, so that step 13 is the first on the smaller tensors.
    assert probe.compilations == [graphs] * 12 + [2 * graphs] * 8
    assert probe.widths == [[32] * 12] * 11 + [[max(rank, 2) for rank in probe.ranks[-1]]] * 9
    assert len({sum(ranks) for ranks in probe.ranks[:12]}) > 3
    check_compressed(trainer, batch)
    expected = tiny_bert.eval()(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
