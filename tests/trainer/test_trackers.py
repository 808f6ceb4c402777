"""What the trackers that a Trainer reports to have kept, read back from their files."""

import json
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import BertForSequenceClassification, Trainer
from transformers.integrations import TensorBoardCallback

from rankdyna_trainer import RankDynaCallback, RankDynaConfig
from rankdyna_trainer.trainer.trackers import CURVE, HEATMAP, send_picture

MakeTrainer = Callable[..., Trainer]
pytestmark = pytest.mark.heatmap
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
SCALARS = ("kept", "kept_of_all")


def train(
    make_trainer: MakeTrainer, model: BertForSequenceClassification, tracker: str, **arguments: str
) -> list[list[float]]:
    """The scalars of each step, as the Trainer's own history has them."""
    trainer = make_trainer(model, RankDynaCallback(CONFIG), report_to=tracker, run_name="small", **arguments)
    trainer.train()
    return [[row[name] for name in SCALARS] for row in trainer.state.log_history if "kept" in row]


def assert_same_picture(image: bytes, folder: Path) -> None:
    card, sent = (np.asarray(Image.open(file).convert("RGB")) for file in (folder / "ranks.png", BytesIO(image)))
    assert np.array_equal(card, sent)


def test_tensorboard(make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path) -> None:
    expected = train(make_trainer, tiny_bert, "tensorboard")
    (log,) = (tmp_path / "output").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(log.parent))
    events.Reload()
    kept = zip(*([event.value for event in events.Scalars(f"train/{name}")] for name in SCALARS), strict=True)
    assert [list(row) for row in kept] == np.float32(expected).tolist() and len(expected) == 20
    (image,) = events.Images("rank_heatmap")
    assert image.step == 20
    assert_same_picture(image.encoded_image_string, tmp_path / "output")


def test_a_second_picture_has_a_name_of_its_own(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_bert, report_to="tensorboard", max_steps=1)
    trainer.train()
    (board,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, TensorBoardCallback)]
    board.tb_writer = SummaryWriter(str(tmp_path / "pictures"))
    for name, shade in ((HEATMAP, 10), (CURVE, 200)):
        png = BytesIO()
        Image.new("RGB", (4, 3), (shade, shade, shade)).save(png, format="png")
        send_picture(name, png.getvalue(), trainer.callback_handler.callbacks, step=7)
    board.tb_writer.close()
    events = EventAccumulator(str(tmp_path / "pictures"))
    events.Reload()
    assert {name: [event.step for event in events.Images(name)] for name in events.Tags()["images"]} == {
        "rank_heatmap": [7],
        "score_curve": [7],
    }
    (curve,) = events.Images("score_curve")
    assert np.asarray(Image.open(BytesIO(curve.encoded_image_string))).tolist() == [[[200] * 3] * 4] * 3


def wandb_history(path: Path) -> Iterator[dict[str, object]]:
    """The logged rows of an offline run: records of protobuf in the blocks of a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), 7, b""  # a header first
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.slow
def test_weights_and_biases(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    try:
        expected = train(make_trainer, tiny_bert, "wandb")
    finally:
        wandb.teardown()  # ends the program that writes, too, and waits for it
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = list(wandb_history(log))
    kept = [[row[f"train/{name}"] for name in SCALARS] for row in rows if "train/kept" in row]
    assert kept == expected and len(expected) == 20
    (heatmap,) = [row for row in rows if "rank_heatmap/path" in row]
    assert heatmap["train/global_step"] == 20
    image = log.parent / "files" / str(heatmap["rank_heatmap/path"])
    assert_same_picture(image.read_bytes(), tmp_path / "output")


def test_trackio(make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="it wants a newer huggingface_hub than the library does")
    expected = train(make_trainer, tiny_bert, "trackio", project="heatmap")
    (database,) = Path(os.environ["TRACKIO_DIR"]).glob("heatmap.db")
    connection = sqlite3.connect(database)
    rows = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    connection.close()
    kept = [[row[f"train/{name}"] for name in SCALARS] for row in rows if "train/kept" in row]
    assert kept == expected and len(expected) == 20
    (heatmap,) = [row for row in rows if "rank_heatmap" in row]
    assert heatmap["train/global_step"] == 20
    image = database.parent / "media" / heatmap["rank_heatmap"]["file_path"]
    assert_same_picture(image.read_bytes(), tmp_path / "output")
