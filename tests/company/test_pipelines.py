"""`pipeline(task, model=folder)` for the tasks of text, vision and speech."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.damage import compacted
from tasks import tiny_tasks
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def bert(model_class: Any) -> tuple[Any, Any]:
    tokenizer = tiny_tasks.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, initializer_range=0.2, **SIZES)
    return model_class(config), {"tokenizer": tokenizer}


def vit() -> tuple[Any, Any]:
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, initializer_range=0.2, **SIZES))
    return model, {"image_processor": ViTImageProcessorPil(size={"height": 32, "width": 32})}


def wav2vec2() -> tuple[Any, Any]:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "classifier_proj_size": 8}
    convolutions |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(vocab_size=22, **convolutions, **SIZES))
    return model, {"feature_extractor": Wav2Vec2FeatureExtractor()}


PIXELS = (np.arange(32 * 32 * 3) % 255).astype(np.uint8).reshape(32, 32, 3)
SOUND = np.sin(np.arange(4000) / 10).astype(np.float32)


CASES: dict[str, tuple[Callable[[], tuple[Any, Any]], Any]] = {
    "text-classification": (lambda: bert(BertForSequenceClassification), "alice sees rome"),
    "token-classification": (lambda: bert(BertForTokenClassification), "alice sees rome"),
    "fill-mask": (lambda: bert(BertForMaskedLM), "alice [MASK] rome"),
    "image-classification": (vit, Image.fromarray(PIXELS)),
    "audio-classification": (wav2vec2, SOUND),
}


@pytest.mark.parametrize("task", CASES)
def test_scores(task: str, assert_differs_less: Any, tmp_path: Path) -> None:
    make, content = CASES[task]
    model, processor = make()
    compacted(model).save_pretrained(tmp_path)
    next(iter(processor.values())).save_pretrained(tmp_path)
    expected = pipeline(task, model=model, **processor)(content)
    actual = pipeline(task, model=str(tmp_path))(content)
    assert [entry.keys() for entry in actual] == [entry.keys() for entry in expected]
    scores, expected_scores = (torch.tensor([float(entry["score"]) for entry in x]) for x in (actual, expected))
    assert_differs_less("transformers", scores, expected_scores, 1e-6)


def test_text_generation(make_compacted: Any, tmp_path: Path) -> None:
    model, tokenizer = make_compacted("llama"), tiny_tasks.tokenizer(ends=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    (answer,) = pipeline("text-generation", model=str(tmp_path))("alice sees", **settings)
    tokens = model.generate(**tokenizer("alice sees", return_tensors="pt"), **settings)
    assert tokens.shape == (1, 7)
    assert answer["generated_text"].endswith(tokenizer.decode(tokens[0, 2:], skip_special_tokens=True))
