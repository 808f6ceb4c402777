"""scripts/run_image_classification.py: the data that it takes, what it leaves, and what it refuses."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import run_image_classification
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from support.stand_ins import with_images
from tasks.tiny_tasks import TRAINING, write
from transformers import AutoImageProcessor, AutoModelForImageClassification

from rankdyna_trainer import LowRankLinear

pytestmark = with_images

SIZES = ["--num_train_epochs=6", "--learning_rate=3e-3"]


def save_images(folder: Path, classes=("dark", "light"), count=8) -> str:
    """Noise that is dark or light, in folders of the classes."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 100, (20, 24, 3)) + (150 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return save_images(tmp_path_factory.mktemp("images") / "all")


@pytest.fixture
def plain(folder_of) -> list[str]:
    return [f"--model_name_or_path={folder_of('vit')}", "--method=none"]


def predictions(folder: Path) -> list[str]:
    return [line.split("\t")[1] for line in (folder / "test_predictions.tsv").read_text().splitlines()[1:]]


def test_a_compressed_model_learns_and_is_loaded_again(folder_of, images, run_script, tmp_path):
    data, output = [f"--train_dir={images}", f"--validation_dir={images}"], tmp_path / "out"
    options = ["--param_ratio=0.4", f"--model_name_or_path={folder_of('vit')}", "--do_train", "--do_eval", *SIZES]
    run = run_script("run_image_classification", output, *data, *options)
    assert run["scores"]["final"] == {"accuracy": 1.0}
    assert 0 < run["target_parameter_ratio"] <= 0.4 < run["all_parameter_ratio"] < 1

    model = AutoModelForImageClassification.from_pretrained(output)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    with Image.open(f"{images}/light/0.png") as image:
        inputs = AutoImageProcessor.from_pretrained(output)(image, return_tensors="pt")
    with torch.no_grad():
        assert model.config.id2label[int(model(**inputs).logits.argmax())] == "light"

    # The labels of a run that does not train are those of the model: here one of the classes is not there.
    light = save_images(tmp_path / "some", ["light"])
    options = ["--method=none", f"--model_name_or_path={output}", "--do_eval", "--do_predict"]
    again = run_script(
        "run_image_classification", tmp_path / "again", *options, f"--validation_dir={light}", f"--test_dir={light}"
    )
    assert again["scores"] == {"final": {"accuracy": 1.0}, "test": {"accuracy": 1.0}}
    assert predictions(tmp_path / "again") == ["light"] * 8


def test_lists_of_files_and_rows_without_labels(images, plain, run_script, tmp_path):
    (tmp_path / "pictures").symlink_to(images)
    rows = [{"file": f"pictures/{name}/{i}.png", "kind": name} for i in range(8) for name in ("light", "dark")]
    train = write(tmp_path / "train.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [{"file": row["file"]} for row in rows])
    columns = ["--image_column_name=file", "--label_column_name=kind"]
    options = [*plain, *columns, *SIZES, f"--train_file={train}", f"--test_file={test}", "--do_train", "--do_predict"]
    assert "test" not in run_script("run_image_classification", tmp_path / "out", *options)["scores"]
    assert predictions(tmp_path / "out") == ["light", "dark"] * 8


def test_a_set_of_the_hub_has_its_own_names(images, plain, run_script, tmp_path, monkeypatch):
    """The order of the classes is another one in each split, and the images are in the rows."""

    def split(names):
        rows = []
        for i, name in enumerate(names):
            rows += [{"image": {"bytes": Path(f"{images}/{name}/{k}.png").read_bytes()}, "label": i} for k in range(8)]
        features = Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        return Dataset.from_list(rows, features=features)

    splits = {"train": split(["light", "dark"]), "validation": split(["dark", "light"])}
    monkeypatch.setattr("tasks.media.load_dataset", lambda *_: splits)
    options = [*plain, *SIZES, "--dataset_name=some/images", "--do_train", "--do_eval"]
    run = run_script("run_image_classification", tmp_path / "out", *options)
    assert run["scores"]["final"] == {"accuracy": 1.0}
    names = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label
    assert names == {0: "dark", 1: "light"}


def test_fisher_information_of_images(images, folder_of, run_script, tmp_path):
    """A file of it is refused for images which differ only where `repr` of an array shows nothing."""
    file = tmp_path / "fisher.safetensors"
    options = [f"--model_name_or_path={folder_of('vit')}", "--method=fwsvd", "--param_ratio=0.4", "--do_train"]
    options += ["--num_train_epochs=0", "--second_round_epochs=0", f"--fisher_file={file}"]
    other = Path(save_images(tmp_path / "other"))
    run_script("run_image_classification", tmp_path / "a", *options, f"--train_dir={images}", "--seed=1")
    run_script("run_image_classification", tmp_path / "b", *options, f"--train_dir={other}", "--seed=1")
    with Image.open(other / "dark" / "3.png") as image:
        image.putpixel((12, 10), (255, 255, 255))
        image.save(other / "dark" / "3.png")
    with pytest.raises(ValueError, match="for other training rows"):
        run_script("run_image_classification", tmp_path / "c", *options, f"--train_dir={other}", "--seed=1")


class TestRefusals:
    NAME = "run_image_classification"

    def test_folders(self, refuse, plain, images, tmp_path):
        plain = [*plain, "--do_train"]
        refuse(self.NAME, "No data: give --dataset_name", *plain)
        refuse(self.NAME, "--train_dir no/folder is not a folder", *plain, "--train_dir=no/folder")
        refuse(self.NAME, f"{tmp_path} holds no file of a kind", *plain, f"--train_dir={tmp_path}")
        both = [f"--train_dir={images}", "--train_file=a.csv"]
        refuse(self.NAME, "--train_dir and --train_file are both given", *plain, *both)
        refuse(self.NAME, "needs --validation_dir or --validation_file", *plain, f"--train_dir={images}", "--do_eval")

    def test_classes(self, refuse, plain, images, tmp_path):
        plain = [*plain, "--do_train"]
        refuse(self.NAME, "expected labels ('dark', 'light') or their indices, found {'grey'}", *plain, "--do_eval",
               f"--train_dir={images}", f"--validation_dir={save_images(tmp_path / 'other', ['grey'])}")  # fmt: skip
        refuse(self.NAME, "at least two, all text or all numbers: found {'light'}", *plain,
               f"--train_dir={save_images(tmp_path / 'one', ['light'])}")  # fmt: skip

    def test_files(self, refuse, plain, images, tmp_path):
        plain = [*plain, "--do_train"]
        broken = Path(save_images(tmp_path / "broken"))
        (broken / "light" / "3.png").write_bytes(b"no image")
        whole = (broken / "dark" / "5.png").read_bytes()
        (broken / "dark" / "5.png").write_bytes(whole[:-40])
        refuse(self.NAME, "2 of 16 files cannot be read. The first: row", *plain, f"--train_dir={broken}")
        jpeg = Path(save_images(tmp_path / "jpeg"))
        with Image.open(jpeg / "light" / "3.png") as image:
            image.resize((200, 200)).save(jpeg / "light" / "cut.jpg")
        (jpeg / "light" / "cut.jpg").write_bytes((jpeg / "light" / "cut.jpg").read_bytes()[:2000])
        with pytest.raises(ValueError, match=r"light/cut\.jpg cannot be read: .*truncated"):
            run_image_classification.main(
                [*TRAINING, *plain, f"--train_dir={jpeg}", f"--output_dir={tmp_path / 'cut'}"]
            )
        gone = write(tmp_path / "gone.jsonl", [{"image": f"{i}.png", "label": i} for i in range(2)])
        refuse(self.NAME, f"2 of 2 files cannot be read. The first: row 0, {tmp_path}/0.png", *plain,
               f"--train_file={gone}")  # fmt: skip
        nothing = write(tmp_path / "nothing.jsonl", [{"image": None, "label": "a"}, {"image": "a.png", "label": "b"}])
        refuse(self.NAME, "the column image is to hold a path in each row", *plain, f"--train_file={nothing}")
        refuse(self.NAME, "has no column picture", *plain, f"--train_file={gone}", "--image_column_name=picture")

    def test_a_column_of_the_hub_without_images(self, refuse, plain, monkeypatch):
        rows = Dataset.from_dict({"image": ["a", "b"], "label": [0, 1]})
        monkeypatch.setattr("tasks.media.load_dataset", lambda *_: {"train": rows})
        options = [*plain, "--do_train", "--dataset_name=some/set"]
        refuse(self.NAME, f"some/set (train): the column image holds no files, but {Value('string')}", *options)


def test_a_png_is_checked_to_its_end_and_other_modes_are_converted(folder_of):
    run_image_classification.check(io.BytesIO(png("L")))
    with pytest.raises((OSError, SyntaxError)):
        run_image_classification.check(io.BytesIO(png("RGB")[:-20]))


def png(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, "png")
    return file.getvalue()
