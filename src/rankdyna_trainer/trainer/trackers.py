"""Pictures, sent to the trackers that a `Trainer` reports to."""

from collections.abc import Iterable
from io import BytesIO
from typing import Any

from transformers import TrainerCallback

# Under which names the trackers show them.
HEATMAP, CURVE = "rank_heatmap", "score_curve"


def send_heatmap(image: bytes, callbacks: Iterable[TrainerCallback], step: int) -> None:
    """Send the heatmap of the ranks, from [`ranks_image`], as [`send_picture`] does."""
    send_picture(HEATMAP, image, callbacks, step)


def send_picture(name: str, image: bytes, callbacks: Iterable[TrainerCallback], step: int) -> None:
    """
    Send a picture to TensorBoard, Weights & Biases and trackio, as far as they are open.

    Args:
        name: under which they show it: `HEATMAP` or `CURVE`.
        image: a PNG file.
        callbacks: of the `Trainer`, among them those of its `report_to`, which hold what they write to.
        step: the optimizer step that the picture is of.
    """
    import numpy as np
    from PIL import Image  # which matplotlib, that drew the image, needs

    pixels = np.asarray(Image.open(BytesIO(image)).convert("RGB"))
    for callback in callbacks:
        if _is(callback, "tensorboard") and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, pixels, step, dataformats="HWC")
        elif _is(callback, "wandb") and callback._initialized and callback._wandb.run is not None:
            callback._wandb.log({name: callback._wandb.Image(pixels), "train/global_step": step})
        elif _is(callback, "trackio") and callback._initialized:
            callback._trackio.log({name: callback._trackio.Image(pixels), "train/global_step": step})


def _is(callback: Any, tracker: str) -> bool:
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    return isinstance(callback, INTEGRATION_TO_CALLBACK.get(tracker, ()))
