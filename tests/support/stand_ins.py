"""Tiny models and data sets under the names that the documentation has for real ones."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tasks import tiny_tasks
from transformers import (
    AutoImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

# transformers 5.6 to 5.17, where torchvision is not installed.
with_images = pytest.mark.skipif(
    "torchvision" in getattr(AutoImageProcessor, "_backends", ()),
    reason="this version of transformers prepares images with torchvision only",
)

Rows = Callable[[int], list[dict[str, Any]]]

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# What MODEL and train.jsonl stand for in the commands of a page.
TASKS: dict[str, tuple[str, Rows]] = {
    "tag.md": ("bert", tiny_tasks.entities),
    "summarise.md": ("t5", tiny_tasks.dialogues),
    "language-model.md": ("gpt2", tiny_tasks.lines),
}


def make_stand_ins(page: str, text: str) -> None:
    """A folder for each name of the Hub in a text: `from_pretrained` and `load_dataset` take it for the real one."""
    kind, rows = TASKS.get(page, ("bert", tiny_tasks.sentences))
    tiny_tasks.save_model(kind, Path("MODEL"))
    save_rows(rows, Path())
    for name, save in STAND_INS.items():
        if name in text:
            save(Path(name))


def save_rows(rows: Rows, folder: Path, **more: Any) -> None:
    """A data set of JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        tiny_tasks.write(folder / f"{split}.jsonl", [row | more for row in rows(8)])


def save_wikitext(folder: Path) -> None:
    """A data set with a named configuration, of texts that fill a few blocks."""
    save_rows(lambda count: tiny_tasks.lines(24 * count), folder / "raw")
    configuration = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_dir: raw\n---\n"
    (folder / "README.md").write_text(configuration, encoding="utf-8")


def save_images(folder: Path) -> None:
    """A data set of noise in two classes."""
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        for i in range(8):
            path = folder / split / ["apple_pie", "waffles"][i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def save_vit(folder: Path) -> None:
    """For images of 16 x 16."""
    ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


def save_wav2vec2(folder: Path) -> None:
    """With two convolutions."""
    sizes = SIZES | {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4), "mask_time_prob": 0.0}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


STAND_INS: dict[str, Callable[[Path], object]] = {
    "sentence-transformers/all-MiniLM-L6-v2": partial(tiny_tasks.save_model, "bert"),
    "google-bert/bert-base-uncased": partial(tiny_tasks.save_model, "bert"),
    "google-bert/bert-base-cased": partial(tiny_tasks.save_model, "bert"),
    "facebook/bart-base": partial(tiny_tasks.save_model, "bart"),
    "openai-community/gpt2": partial(tiny_tasks.save_model, "gpt2"),
    "google/vit-base-patch16-224-in21k": save_vit,
    "facebook/wav2vec2-base": save_wav2vec2,
    "stanfordnlp/sst2": partial(save_rows, tiny_tasks.sentences, idx=0),
    "knkarthick/samsum": partial(save_rows, tiny_tasks.dialogues),
    "Salesforce/wikitext": save_wikitext,
    "ethz/food101": save_images,
}
