"""A teacher's loss in a loop of one's own, against the formula, and without a trace when it is over."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.networks import Network, make_albert
from support.teaching import Batch, kl, other_weights, relative_error, without_dropout, written_out
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AlbertForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.layers.hooks import Hook
from rankdyna_trainer.method.teaching import Teaching

CONFIG = RankDynaConfig(rank_ratio=0.5)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def small(model_class: type = BertForSequenceClassification, **options: Any) -> Any:
    model = model_class(BertConfig(vocab_size=64, max_position_embeddings=16, **(SIZES | options)))
    return without_dropout(model).train()


def padded(lengths: tuple[int, ...] = (8, 3, 5, 8)) -> Batch:
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(64, mask.shape), "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("weights", "temperature"), [((0.5, 1.0), 2.0), ((0.9, 0.0), 4.0), ((0.0, 3.0), 1.0)])
def test_loss_and_gradients_are_those_of_the_formula(weights: tuple[float, float], temperature: float) -> None:
    model, batch = small(), padded()
    teacher = other_weights(model)
    expected = written_out(model, teacher, batch, weights, temperature)
    by_hand = gradients(model, expected)
    config = RankDynaConfig(
        rank_ratio=0.5, teacher_weight=weights[0], hidden_weight=weights[1], teacher_temperature=temperature
    )
    Teaching(model, teacher, config)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    found = gradients(model, loss)
    assert found.keys() == by_hand.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, by_hand[name], rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_a_student_comes_to_its_teacher() -> None:
    model, batch = small(), padded()
    teaching = Teaching(model, other_weights(model, by=1.0), RankDynaConfig(rank_ratio=0.5, teacher_weight=1.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts = []
    for _ in range(30):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        parts.append(teaching.take_parts())
    for name in ("teacher_logits_loss", "teacher_hidden_loss"):
        assert 0 < parts[-1][name] < 0.5 * parts[0][name]


def test_the_parts_are_means_since_they_were_last_taken() -> None:
    model = small()
    teacher = other_weights(model)
    teaching = Teaching(model, teacher, CONFIG)
    assert teaching.take_parts() == {}
    losses = [model(**padded()).loss for _ in range(3)]
    parts = teaching.take_parts()
    total = 0.5 * parts["task_loss"] + 0.5 * parts["teacher_logits_loss"] + parts["teacher_hidden_loss"]
    assert total == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert teaching.take_parts() == {}


def test_nothing_changes_in_evaluation_or_without_gradients() -> None:
    model, batch = small(), padded()
    plain = model(**batch).loss
    teaching = Teaching(model, other_weights(model), CONFIG)
    teaching.teacher.forward = None  # would fail if it were asked
    assert torch.equal(model.eval()(**batch).loss, plain)
    with torch.no_grad():
        assert torch.equal(model.train()(**batch).loss, plain)
    assert model.eval()(input_ids=batch["input_ids"]).loss is None
    assert teaching.take_parts() == {}


def test_the_teacher_is_asked_in_evaluation_mode() -> None:
    model = small()
    teacher = other_weights(model).train()
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    teaching, batch = Teaching(model, teacher, CONFIG), padded()
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    assert not teaching.teacher.training


def loss_of_its_own(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return logits.mean()


@pytest.mark.parametrize("own", [None, loss_of_its_own])
def test_release_leaves_no_trace(own: Callable[..., Tensor] | None) -> None:
    model, batch = small(), padded()
    if own is not None:
        model.loss_function = own
    before, attributes = model.loss_function, set(vars(model))
    teacher = other_weights(model)
    plain = model(**batch).loss
    teaching = Teaching(model, teacher, CONFIG)
    assert not torch.equal(model(**batch).loss, plain)
    teaching.release()
    assert torch.equal(model(**batch).loss, plain)
    assert model.loss_function is before and set(vars(model)) == attributes
    for module in (*model.modules(), *teacher.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs and not module._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_no_teacher(again: Callable[[Any], Any]) -> None:
    model, batch = small(), padded()
    plain, own = model(**batch).loss, model.loss_function
    teaching = Teaching(model, other_weights(model), CONFIG)
    other = again(model)
    assert other.loss_function is own
    assert torch.equal(other(**batch).loss, plain)
    assert teaching.take_parts() == {}
    assert not torch.equal(model(**batch).loss, plain)


def test_a_second_teacher_after_a_run_that_was_given_up() -> None:
    model, batch = small(), padded()
    teacher, own = other_weights(model), model.loss_function
    expected = written_out(model, teacher, batch, (0.5, 1.0), 2.0)
    for _ in range(2):
        teaching = Teaching(model, teacher, CONFIG)
    torch.testing.assert_close(model(**batch).loss, expected)
    teaching.release()
    assert model.loss_function is own
    modules = (*model.modules(), *teacher.modules())  # on which transformers may have left hooks of its own
    assert not any(isinstance(hook, Hook) for module in modules for hook in module._forward_hooks.values())


def test_blocks_that_are_shared_teach_at_each_call() -> None:
    model = without_dropout(make_albert()).train()
    teacher, batch = other_weights(model), padded()
    assert isinstance(model, AlbertForSequenceClassification)
    expected = written_out(model, teacher, batch, (0.5, 1.0), 2.0)
    Teaching(model, teacher, CONFIG)
    torch.testing.assert_close(model(**batch).loss, expected)


def test_several_labels_and_numbers() -> None:
    for problem, labels in (
        ("multi_label_classification", torch.randint(2, (4, 3)).float()),
        ("regression", torch.randn(4, 3)),
    ):
        model, batch = small(num_labels=3, problem_type=problem), padded() | {"labels": labels}
        teacher = other_weights(model)
        student = model(**batch)
        task, x, t = student.loss, student.logits, teacher(**batch).logits
        if problem == "regression":
            expected = (x - t).square().mean()
        else:
            pairs = torch.stack([x, torch.zeros_like(x)], -1), torch.stack([t, torch.zeros_like(t)], -1)
            expected = kl(*pairs, 2.0).mean()
        teaching = Teaching(model, teacher, CONFIG)
        model(**batch)
        parts = teaching.take_parts()
        assert parts["task_loss"] == pytest.approx(task.item())
        assert parts["teacher_logits_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_one_number() -> None:
    model, batch = small(num_labels=1), padded() | {"labels": torch.randn(4)}
    teacher = other_weights(model)
    expected = (model(**batch).logits - teacher(**batch).logits).square().mean().item()
    teaching = Teaching(model, teacher, CONFIG)
    model(**batch)
    assert teaching.take_parts()["teacher_logits_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_an_answer_has_a_start_and_an_end(as_tuple: bool) -> None:
    model = small(BertForQuestionAnswering)
    places = {"start_positions": torch.tensor([1, 0, 2, 3]), "end_positions": torch.tensor([2, 1, 3, 5])}
    batch = {key: value for key, value in padded().items() if key != "labels"} | places
    teacher = other_weights(model)
    x, t = model(**batch), teacher(**batch)
    pairs = [(x.start_logits, t.start_logits), (x.end_logits, t.end_logits)]
    expected = torch.stack([kl(one, other, 2.0).mean() for one, other in pairs]).mean()
    teaching = Teaching(model, teacher, CONFIG)
    model(**batch, return_dict=not as_tuple)
    assert teaching.take_parts()["teacher_logits_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_model_that_returns_tuples() -> None:
    model, batch = small(), padded()
    teacher = other_weights(model)
    expected = written_out(model, teacher, batch, (0.5, 1.0), 2.0)
    Teaching(model, teacher, CONFIG)
    torch.testing.assert_close(model(**batch, return_dict=False)[0], expected)


def test_hidden_states_without_any_mask_count_each_token() -> None:
    model, batch = small(), padded()
    del batch["attention_mask"]
    teacher = other_weights(model)
    pairs = zip(*(one(**batch, output_hidden_states=True).hidden_states[1:] for one in (model, teacher)), strict=True)
    expected = torch.stack([relative_error(*pair) for pair in pairs]).mean()
    teaching = Teaching(model, teacher, CONFIG)
    model(**batch)
    assert teaching.take_parts()["teacher_hidden_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 3}, r"blocks: 2 and 3, of the model and the teacher"),
        ({"hidden_size": 32}, r"hidden size: 16 and 32"),
        ({"vocab_size": 65}, r"vocabulary: 64 and 65"),
        ({"num_labels": 3}, r"labels: 2 and 3"),
        ({"num_labels": 3, "num_hidden_layers": 1}, r"blocks: 2 and 1; labels: 2 and 3"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    sizes = {"vocab_size": 64, "max_position_embeddings": 16} | SIZES | options
    teacher = BertForSequenceClassification(BertConfig(**sizes))
    with pytest.raises(ValueError, match=f"The teacher does not fit the model.*{message}"):
        Teaching(small(), teacher, CONFIG)


def test_only_models_of_transformers() -> None:
    with pytest.raises(TypeError, match=r"A teacher is for models of transformers.*the teacher is a Network"):
        Teaching(small(), Network(), CONFIG)
    with pytest.raises(TypeError, match="the model is a Network"):
        Teaching(Network(), small(), CONFIG)


def test_a_loss_outside_of_the_model_is_refused() -> None:
    model, batch = small(), padded()
    Teaching(model, other_weights(model), CONFIG)
    del batch["labels"]
    with pytest.raises(ValueError, match="BertForSequenceClassification returned no loss to which the teacher's"):
        model(**batch)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_changes_nothing() -> None:
    model, batch = small(), padded()
    Teaching(model, other_weights(model), CONFIG)
    plain = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(model, model(**batch).loss).items():
        assert torch.equal(gradient, plain[name])


def test_reentrant_checkpointing_around_a_block_is_refused() -> None:
    """Newer versions of transformers put it inside of a block, where it does no harm."""
    model, batch = small(), padded()
    encoder = model.bert.encoder
    forward = encoder.forward
    encoder.forward = lambda *inputs, **named: checkpoint(partial(forward, **named), *inputs, use_reentrant=True)
    Teaching(model, other_weights(model), CONFIG)
    with pytest.raises(ValueError, match=r'set gradient_checkpointing_kwargs=\{"use_reentrant": False\}'):
        model(**batch)
