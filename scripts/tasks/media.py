"""
What the classification of images and of sounds share: where the files are, their labels, and the run.

The data are folders with a folder for each class (`--train_dir`), lists of files with their labels (`--train_file`, a
path in it is relative to the list), or a set of the Hub. A file is decoded when a batch needs it, but whether all can
be opened is checked before anything is trained.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from datasets import Dataset, load_dataset
from sklearn.metrics import accuracy_score
from transformers import AutoConfig, EvalPrediction, Trainer
from transformers.trainer_utils import set_seed

from .arguments import Choices, TaskArguments
from .class_labels import class_indices, class_names, labelled_rows
from .data import first_rows, needed_splits, read_files
from .run import Run

# What a library for images or sounds opens: a path, or the bytes of a file.
MediaFile = str | BytesIO
# What those libraries raise for a file that is damaged, empty, of another kind, or not there.
UNREADABLE = (OSError, RuntimeError, SyntaxError, TypeError, ValueError)


@dataclass
class MediaArguments(TaskArguments):
    """The options of both."""

    sources: ClassVar[str] = "--dataset_name for a set of the Hub, or --train_dir, --validation_dir"
    split_source: ClassVar[str] = "--{split}_dir or --{split}_file"

    task_name: str | None = field(default=None, init=False)  # there are no sets that the scripts know by name
    train_dir: str | None = field(default=None, metadata={"help": "A folder with a folder of files for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Likewise."})
    test_dir: str | None = field(default=None, metadata={"help": "Likewise, or just files, for --do_predict."})
    train_file: str | None = field(
        default=None, metadata={"help": "Instead of the folder a .jsonl, .json or .csv file with paths and labels."}
    )
    label_column_name: str = field(default="label", metadata={"help": "The column with the classes."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Put a new head on a model that was trained for other classes."}
    )

    def __post_init__(self) -> None:
        given = {"train": self.train_dir, "validation": self.validation_dir, "test": self.test_dir}
        self.folders = {split: path for split, path in given.items() if path is not None}
        super().__post_init__()

    def local_files(self) -> dict[str, str]:
        """The files and folders that are given, by split."""
        files = super().local_files()
        if twice := sorted(files.keys() & self.folders.keys()):
            raise ValueError(f"--{twice[0]}_dir and --{twice[0]}_file are both given: give only one of them.")
        return files | self.folders


class Medium(NamedTuple):
    """
    What the files are, and how they become the inputs of a model.

    Attributes:
        column: that holds them.
        feature: of a set of the Hub whose files are not decoded.
        suffixes: of the files that are looked for in a folder.
        check: raises an error for a file that cannot be opened.
        encode: the inputs of the model for one file.
    """

    column: str
    feature: Any
    suffixes: Collection[str]
    check: Callable[[MediaFile], None]
    encode: Callable[[MediaFile], dict[str, Any]]


def read_folder(folder: str, split: str, script: MediaArguments, medium: Medium) -> Dataset:
    """A row for each file; one in the folder itself has no label."""
    if not Path(folder).is_dir():
        raise ValueError(f"--{split}_dir {folder} is not a folder.")
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in medium.suffixes)
    if not files:
        kinds = " ".join(sorted(medium.suffixes))
        raise ValueError(f"--{split}_dir {folder} holds no file of a kind that can be read here: {kinds}.")
    labels = [None if path.parent == Path(folder) else path.parent.name for path in files]
    rows = Dataset.from_dict({medium.column: list(map(str, files)), script.label_column_name: labels})
    # The first --max_train_samples are to be of all classes. Predictions are in the order of the files.
    return rows if split == "test" else rows.shuffle(seed=0)


def read_list(path: str, split: str, medium: Medium) -> Dataset:
    """The rows of a file with paths, which are relative to that file."""
    rows = read_files({split: path})[split]
    if medium.column not in rows.column_names:
        return rows  # which is refused where the columns are checked
    if not all(isinstance(cell, str) for cell in rows[medium.column]):
        raise ValueError(f"{path}: the column {medium.column} is to hold a path in each row.")
    folder = Path(path).parent
    return rows.map(lambda row: {medium.column: str(folder / row[medium.column])})


def load_splits(script: MediaArguments, training: Any, medium: Medium) -> dict[str, Dataset]:
    """The splits that the run needs, with names as labels where the set has names."""
    splits = {
        split: read_folder(path, split, script, medium) if split in script.folders else read_list(path, split, medium)
        for split, path in script.files.items()
    }
    splits = splits or dict(load_dataset(script.dataset_name, script.dataset_config_name))
    return {split: with_names(rows, script) for split, rows in needed_splits(splits, script, training).items()}


def with_names(rows: Dataset, script: MediaArguments) -> Dataset:
    """The order of the classes may differ from split to split, so that only their names say what they are."""
    column = script.label_column_name
    names = getattr(rows.features.get(column), "names", None)
    if names is None:
        return rows
    labels = [None if label in (None, -1) else names[label] for label in rows[column][:]]
    return rows.remove_columns(column).add_column(column, labels)


def find_classes(splits: dict[str, Dataset], script: MediaArguments) -> tuple[str, ...]:
    """Those of all training rows, or, of a run that does not train, those of the checkpoint."""
    if "train" not in splits:
        return tuple(AutoConfig.from_pretrained(script.model_name_or_path).id2label.values())
    first_rows(splits["train"], "train", {script.label_column_name}, script)
    return class_names(splits["train"][script.label_column_name][:])


def open_cell(cell: str | dict[str, Any]) -> MediaFile:
    """The path of a file, or its bytes if the set holds them."""
    if isinstance(cell, str):
        return cell
    return cell["path"] if cell["bytes"] is None else BytesIO(cell["bytes"])


def name_of(cell: str | dict[str, Any] | None) -> str:
    """What a message calls a file."""
    return cell if isinstance(cell, str) else (cell or {}).get("path") or "a file without a name"


def check_files(rows: Dataset, source: str, medium: Medium) -> None:
    """Raise an error that names the first file that cannot be opened, if there is one."""
    broken = []
    for i, cell in enumerate(rows[medium.column]):
        try:
            medium.check(open_cell(cell))
        except UNREADABLE as error:
            broken.append(f"row {i}, {name_of(cell)}: {error}")
    if broken:
        raise ValueError(f"{source}: {len(broken)} of {len(rows)} files cannot be read. The first: {broken[0]}")


def prepare(rows: Dataset, split: str, classes: tuple[str, ...], script: MediaArguments, medium: Medium) -> Dataset:
    """The rows with indices of classes as labels, whose files are decoded when they are taken."""
    source, column, label = script.source(split), medium.column, script.label_column_name
    # A test row without a label is predicted too; some with and some without cannot be scored.
    labelled = split != "test" or (label in rows.column_names and not {None, -1} & set(rows[label][:]))
    rows = first_rows(rows, split, {column, *([label] if labelled else [])}, script)
    indices = class_indices(classes)
    if labelled:
        rows = labelled_rows(rows, source, label, indices)
    if split not in script.files:
        if not isinstance(rows.features[column], type(medium.feature)):
            raise ValueError(f"{source}: the column {column} holds no files, but {rows.features[column]}.")
        rows = rows.cast_column(column, medium.feature)
    check_files(rows, source, medium)
    labels = [indices[name] for name in rows[label][:]] if labelled else []
    rows = rows.select_columns([column])
    if labelled:
        rows = rows.add_column("labels", labels)

    def encode_file(cell: str | dict[str, Any]) -> dict[str, Any]:
        try:
            return medium.encode(open_cell(cell))
        except UNREADABLE as error:  # a file may begin well and be cut off
            raise ValueError(f"{source}: {name_of(cell)} cannot be read: {error}") from error

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = [encode_file(cell) for cell in batch[column]]
        inputs = {key: [one[key] for one in encoded] for key in encoded[0]}
        return inputs | ({"labels": batch["labels"]} if labelled else {})

    return rows.with_transform(encode)


def make_media_run(name: str, choices: Choices[Any], medium: Medium, model_class: Any, processor: Any) -> Run:
    """
    The run of a script.

    Args:
        name: of the script.
        choices: from `parse_args`.
        medium: what is classified.
        model_class: the `AutoModelFor` that classifies it.
        processor: that the medium encodes with; it is saved with the model.
    """
    script, training = choices.script, choices.training
    training.remove_unused_columns = False  # the column of the files is no input of the model
    with training.main_process_first(desc="data"):
        splits = load_splits(script, training, medium)
        classes = find_classes(splits, script)
        splits = {split: prepare(rows, split, classes, script, medium) for split, rows in splits.items()}

    set_seed(training.seed)
    model = model_class.from_pretrained(
        script.model_name_or_path,
        id2label=dict(enumerate(classes)),
        label2id={label: i for i, label in enumerate(classes)},
        ignore_mismatched_sizes=script.ignore_mismatched_sizes,
        dtype="float32",  # in the half precision of many checkpoints, small updates would be rounded away
    )
    model.accepts_loss_kwargs = False  # its loss is a mean: a Trainer divides it by the steps that it accumulates

    def decode(logits: Any, _: Any) -> Any:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def compute(output: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(output.label_ids, output.predictions))}

    def predict(trainer: Trainer) -> None:
        run.write_predictions(trainer, [classes[index] for index in run.predict(trainer).predictions])

    run = Run(
        *(name, choices, model, splits, ("accuracy",), predict),
        processing_class=processor,
        compute_metrics=compute,
        preprocess_logits_for_metrics=decode,
    )
    return run
