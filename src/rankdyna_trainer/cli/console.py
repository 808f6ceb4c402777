"""What all commands share: their options, what they print, and where they write."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import snapshot_download
from transformers import AutoProcessor

from ..checkpoint.empty_model import read_config
from ..checkpoint.output_folder import check_writable
from ..checkpoint.saving import check_saving
from ..config import RankDynaConfig
from ..report.card import PROCESSING_FILES
from ..report.generated import picture_metadata
from ..report.staging import staging_folder

PICTURE_FORMATS = ("png", "pdf", "svg")
# Weights in other formats than safetensors, and the checkpoints of the run.
NOT_NEEDED = ["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth", "checkpoint-*"]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Checkpoint = Annotated[str, typer.Argument(help="A folder, or the name of a Hub repository.")]
Output = Annotated[Path, typer.Option("-o", "--output_dir", help="The folder to write, new or empty.")]
Variant = Annotated[
    str | None, typer.Option("--variant", help="Of the weights: fp16 stands for the files with .fp16 in their names.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust_remote_code", help="Run the code that lies beside the model: read it before.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target_modules", help="A name ending (repeat for more), a regular expression, or 'all-linear'."),
]
Excluded = Annotated[
    list[str] | None, typer.Option("--exclude_modules", help="Likewise: layers to leave alone in any case.")
]


def chosen(**options: Any) -> RankDynaConfig:
    """A config of these options; a value that is out of range is an error of the command line."""
    try:
        return RankDynaConfig(**options)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def print_json(document: dict[str, Any]) -> None:
    """The one document on standard output."""
    print(json.dumps(document, indent=2))


def local_folder(checkpoint: str, trust_remote_code: bool = False) -> Path:
    """The folder of a checkpoint, downloaded if it is the name of a Hub repository."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    read_config(checkpoint, trust_remote_code)  # for its messages
    return Path(snapshot_download(checkpoint, ignore_patterns=NOT_NEEDED))


def check_output(directory: Path) -> None:
    """
    Refuse a folder that holds something already, or cannot be written, before any work is done.

    Raises:
        NotADirectoryError: it is a file.
        FileExistsError: it is not empty.
        OSError: it cannot be written.
    """
    if directory.is_file():
        raise NotADirectoryError(f"--output_dir {directory} is a file: name a new folder.")
    if directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(f"--output_dir {directory} is not empty, and nothing is overwritten: name a new folder.")
    with _left_as_it_was(directory):
        check_writable(directory)


def check_kept(model: Any, directory: Path, processing: Any) -> None:
    """
    Try to save all but the weights, before any work is done.

    Raises:
        ValueError: the configuration, the generation config or the tokenizer cannot be saved.
        OSError: there is no room.
    """
    with _left_as_it_was(directory):
        check_saving(model, directory, processing)


def check_picture(output: Path) -> Path:
    """
    Refuse a picture that cannot be written, before any work is done.

    Args:
        output: the option `--output`.

    Returns:
        The file to write: that to which `output` leads, if it is a link, which is kept.

    Raises:
        FileNotFoundError: it is no file in a folder that is there.
    """
    if picture_format(output) not in PICTURE_FORMATS:
        raise typer.BadParameter(f"--output {output} must end in .{', .'.join(PICTURE_FORMATS)}.")
    place = Path(os.path.realpath(output))
    if place.is_dir() or place.is_symlink() or not place.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: give a file in a folder that is there.")
    return place


def write_picture(figure: Any, output: Path, place: Path) -> None:
    """
    Write a figure whole, or not at all.

    Args:
        figure: of `report.plots`.
        output: the option, which an error names.
        place: from [`check_picture`].

    Raises:
        OSError: it cannot be written.
    """
    try:
        with staging_folder(place.parent) as staging:
            kind = picture_format(output)
            figure.savefig(staging / place.name, format=kind, dpi=150, metadata=picture_metadata(kind))
            os.replace(staging / place.name, place)
    except OSError as error:
        raise OSError(f"--output {output} cannot be written ({error}). What was there before is as it was.") from error


def picture_format(output: Path) -> str:
    """The format that the ending of a file stands for."""
    return output.suffix.removeprefix(".").lower()


@contextmanager
def _left_as_it_was(directory: Path) -> Iterator[None]:
    """Remove the folders again that a trial makes."""
    missing = [folder for folder in (directory, *directory.parents) if not os.path.lexists(folder)]
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def processing_class(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer or processor that lies beside a model, or `None`."""
    if not any((folder / name).is_file() for name in PROCESSING_FILES):
        return None
    return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
