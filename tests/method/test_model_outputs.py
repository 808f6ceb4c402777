"""Which rows of logits and hidden states count, and which logits belong together: on the models themselves."""

from typing import Any

import pytest
import torch
from support.teaching import Batch, kl, other_weights, relative_error, tiny_gpt2, tiny_llama, tiny_t5, without_dropout
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForTokenClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.method.teaching import Teaching

CONFIG = RankDynaConfig(rank_ratio=0.5)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(model_class: Any) -> Any:
    return model_class(BertConfig(vocab_size=64, max_position_embeddings=16, num_labels=4, **SIZES))


def parts(model: Any, teacher: Any, batch: Batch) -> dict[str, float]:
    teaching = Teaching(model, teacher, CONFIG)
    model(**batch)
    teaching.release()
    return teaching.take_parts()


def some_labels(rows: int = 3, width: int = 6, classes: int = 4) -> torch.Tensor:
    labels = torch.randint(classes, (rows, width))
    return labels.masked_fill(torch.arange(width) >= torch.tensor([6, 2, 4])[:rows, None], -100)


@pytest.mark.parametrize("model_class", [BertForTokenClassification, BertForMaskedLM])
def test_a_token_counts_if_it_has_a_label(model_class: Any) -> None:
    model = without_dropout(bert(model_class)).train()
    teacher, labels = other_weights(model), some_labels()
    batch = {"input_ids": torch.randint(64, labels.shape), "labels": labels}
    x, t = model(**batch).logits, teacher(input_ids=batch["input_ids"]).logits
    expected = kl(x, t, 2.0)[labels != -100].mean().item()
    assert parts(model, teacher, batch)["teacher_logits_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_token_counts_if_the_one_after_it_has_a_label(make: Any) -> None:
    model = without_dropout(make()).train()
    teacher, labels = other_weights(model), some_labels(classes=64)
    labels[0, :3] = -100
    batch = {"input_ids": torch.randint(64, labels.shape), "labels": labels}
    x, t = model(**batch).logits[:, :-1], teacher(input_ids=batch["input_ids"]).logits[:, :-1]
    expected = kl(x, t, 2.0)[labels[:, 1:] != -100].mean().item()
    assert expected != pytest.approx(kl(x, t, 2.0)[labels[:, :-1] != -100].mean().item(), rel=1e-3)
    assert parts(model, teacher, batch)["teacher_logits_loss"] == pytest.approx(expected, rel=1e-4)


def test_an_encoder_decoder_has_padding_of_its_own_on_each_side() -> None:
    model = without_dropout(tiny_t5()).train()
    teacher, labels = other_weights(model), some_labels(classes=64)
    # Of the same width, so that the masks of both sides could be taken for each other.
    mask = (torch.arange(6) < torch.tensor([3, 6, 5])[:, None]).long()
    batch = {"input_ids": torch.randint(64, mask.shape), "attention_mask": mask, "labels": labels}
    # The models return the states of the last blocks with a norm and dropout behind them.
    seen: list[list[torch.Tensor]] = []
    for one in (model, teacher):
        states: list[torch.Tensor] = []
        blocks = [*one.encoder.block, *one.decoder.block]
        handles = [b.register_forward_hook(lambda _, x, y, states=states: states.append(y[0])) for b in blocks]
        output = one(**batch)
        seen.append([*states, output.logits])
        for handle in handles:
            handle.remove()
    (*x, x_logits), (*t, t_logits) = seen
    masks = [mask, mask, labels.ne(-100), labels.ne(-100)]
    errors = [relative_error(*states) for states in zip(x, t, masks, strict=True)]
    found = parts(model, teacher, batch)
    assert found["teacher_hidden_loss"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    expected = kl(x_logits, t_logits, 2.0)[labels != -100].mean().item()
    assert found["teacher_logits_loss"] == pytest.approx(expected, rel=1e-4)


def test_several_answers_to_a_question_have_a_mask_for_each() -> None:
    model = without_dropout(bert(BertForMultipleChoice)).train()
    teacher = other_weights(model)
    mask = (torch.arange(6) < torch.randint(1, 7, (2, 3, 1))).long()
    batch = {"input_ids": torch.randint(64, mask.shape), "attention_mask": mask, "labels": torch.tensor([0, 2])}
    x, t = (one(**batch, output_hidden_states=True) for one in (model, teacher))
    pairs = zip(x.hidden_states[1:], t.hidden_states[1:], strict=True)
    errors = [relative_error(*pair, mask.flatten(0, 1)) for pair in pairs]
    found = parts(model, teacher, batch)
    assert found["teacher_hidden_loss"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert found["teacher_logits_loss"] == pytest.approx(kl(x.logits, t.logits, 2.0).mean().item(), rel=1e-4)


def tiny_wav2vec2(**options: Any) -> Wav2Vec2ForSequenceClassification:
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2), "num_conv_pos_embeddings": 4}
    groups = {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SIZES, **convolutions, **groups, **options))


def test_blocks_that_are_left_out_at_random_teach_nothing() -> None:
    """As with the `layerdrop` of speech models: now and then all of them are."""
    model = tiny_wav2vec2(layerdrop=1.0).train()
    batch = {"input_values": torch.randn(2, 400), "labels": torch.tensor([0, 1])}
    found = parts(model, other_weights(model), batch)
    assert found["teacher_hidden_loss"] == 0 and found["teacher_logits_loss"] > 0
    some = tiny_wav2vec2(layerdrop=0.5).train()
    assert max(parts(some, other_weights(some), batch)["teacher_hidden_loss"] for _ in range(8)) > 0


def test_a_language_model_for_one_label_still_has_a_vocabulary() -> None:
    model = tiny_gpt2().eval()
    model.config.num_labels = 1
    without_dropout(model).train()
    teacher = other_weights(model)
    tokens = torch.randint(64, (2, 5))
    x, t = model(tokens).logits[:, :-1], teacher(tokens).logits[:, :-1]
    found = parts(model, teacher, {"input_ids": tokens, "labels": tokens})
    assert found["teacher_logits_loss"] == pytest.approx(kl(x, t, 2.0).mean().item(), rel=1e-4)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_parts_of_a_batch_add_up_as_the_task_does(make: Any) -> None:
    """With the count of all labels, as a Trainer gives it that accumulates gradients."""
    model: nn.Module = without_dropout(make()).train()
    teacher, labels = other_weights(model), some_labels(classes=64)
    tokens = torch.randint(64, labels.shape)
    Teaching(model, teacher, RankDynaConfig(rank_ratio=0.5, hidden_weight=0.0))
    whole = model(input_ids=tokens, labels=labels).loss
    count = labels[:, 1:].ne(-100).sum()
    rows = zip(tokens.split(1), labels.split(1), strict=True)
    summed = sum(model(input_ids=ids, labels=row, num_items_in_batch=count).loss for ids, row in rows)
    torch.testing.assert_close(summed, whole)
