"""
Fine-tunes an image classifier on folders of images, or on a set of the Hub, and compresses it on the way.

    python scripts/run_image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --train_dir images/train --validation_dir images/validation --rank_ratio 0.2 --do_train --do_eval

A folder has a folder for each class, which has its name. `--tiny` needs none of it: see `tasks/tiny_run.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import datasets
from PIL import Image
from tasks.arguments import parse_args
from tasks.media import MediaArguments, MediaFile, Medium, make_media_run
from tasks.run import Run
from tasks.tiny_run import complete
from tasks.tiny_tasks import tiny_images
from transformers import AutoImageProcessor, AutoModelForImageClassification


@dataclass
class ScriptArguments(MediaArguments):
    image_column_name: str = field(default="image", metadata={"help": "The column with the images, or their paths."})


def check(file: MediaFile) -> None:
    """That there is an image; whether all its pixels are there, only some formats tell without being decoded."""
    with Image.open(file) as image:
        image.verify()


def make_run(args: list[str] | None = None) -> Run:
    choices = parse_args(args, ScriptArguments)
    processor = AutoImageProcessor.from_pretrained(choices.script.model_name_or_path)

    def encode(file: MediaFile) -> dict[str, Any]:
        with Image.open(file) as image:
            encoded = processor(image.convert("RGB"), return_tensors="pt")
        return {key: values[0] for key, values in encoded.items()}

    column, suffixes = choices.script.image_column_name, Image.registered_extensions()
    medium = Medium(column, datasets.Image(decode=False), suffixes, check, encode)
    return make_media_run("run_image_classification", choices, medium, AutoModelForImageClassification, processor)


def main(args: list[str] | None = None) -> None:
    complete(make_run, args, tiny_images)


if __name__ == "__main__":
    main()
