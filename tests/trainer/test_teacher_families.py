"""A teacher for each kind of model: a tiny run in which its loss falls."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.teaching import other_weights, tiny_gpt2, tiny_llama, tiny_t5, without_dropout
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report

MakeTrainer = Callable[..., Trainer]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def numbers(*shape: int) -> torch.Tensor:
    """The same ones whatever was drawn before: these are made when the file is read."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TOKENS = torch.randint(2, 64, (16, 8), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.arange(16) % 5 + 4
MASKS = (torch.arange(8) < LENGTHS[:, None]).long()
PADDED = TOKENS.where(MASKS.bool(), -100)


def bert(model_class: Any) -> Any:
    return model_class(BertConfig(vocab_size=64, max_position_embeddings=16, num_labels=4, **SIZES))


def vit() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES))


def wav2vec2() -> Wav2Vec2ForSequenceClassification:
    convolutions = {"conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2), "num_conv_pos_embeddings": 4}
    more = {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_length": 2}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SIZES, **convolutions, **more))


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor]]] = {
    "encoder-decoder": (tiny_t5, {"input_ids": TOKENS, "attention_mask": MASKS, "labels": PADDED[:, :5]}),
    "decoder with Conv1D": (tiny_gpt2, {"input_ids": TOKENS, "attention_mask": MASKS, "labels": PADDED}),
    "decoder": (tiny_llama, {"input_ids": TOKENS, "attention_mask": MASKS, "labels": PADDED}),
    "tagger": (
        lambda: bert(BertForTokenClassification),
        {"input_ids": TOKENS, "attention_mask": MASKS, "labels": (TOKENS % 4).where(MASKS.bool(), -100)},
    ),
    "masked language": (
        lambda: bert(BertForMaskedLM),
        {"input_ids": TOKENS, "attention_mask": MASKS, "labels": TOKENS.where(TOKENS % 2 == 0, -100)},
    ),
    "vision": (vit, {"pixel_values": numbers(16, 3, 8, 8), "labels": torch.arange(16) % 2}),
    "speech": (wav2vec2, {"input_values": numbers(16, 400), "labels": torch.arange(16) % 2}),
}


@pytest.mark.parametrize("basis", ["weights", "activations"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_the_teacher_falls(make_trainer: MakeTrainer, family: str, basis: str) -> None:
    make, columns = FAMILIES[family]
    model = make()
    config = RankDynaConfig(
        param_ratio=0.5, group_basis=basis, teacher_weight=0.9, rank_warmup_steps=0.3, rank_cooldown_steps=0.5
    )
    rows = [{name: column[i] for name, column in columns.items()} for i in range(16)]
    trainer = make_trainer(
        without_dropout(copy.deepcopy(model)),
        RankDynaCallback(config, teacher=other_weights(model, by=0.5)),
        trainer_arguments={"train_dataset": rows, "eval_dataset": None},
        max_steps=24,
        logging_steps=4,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
    )
    trainer.train()
    for name in ("teacher_logits_loss", "teacher_hidden_loss"):
        losses = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert len(losses) == 6 and 0 < losses[-1] < 0.8 * losses[0], (name, losses)
    assert (
        0
        < rank_report(trainer.model)["parameters"].sum()
        <= 0.5 * rank_report(trainer.model)["dense_parameters"].sum()
    )
