"""`rankdyna curve`: the models that one run has left at several ratios, side by side."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from ..checkpoint.empty_model import read_config
from ..checkpoint.output_folder import check_writable
from ..report.curve import DENSE, LAST, LATENCY, SIZES, chosen_metric
from ..report.generated import image_place
from ..report.printed import print_table
from ..report.random_inputs import random_inputs
from ..report.timing import dense_like, device_in_words, forward_pass, quartiles, timed_in_turns
from ..trainer.curve import read_curve, station_folders
from .console import PICTURE_FORMATS, AsJson, TrustRemoteCode, check_picture, print_json, write_picture
from .loading import load_compacted

Positive = partial(typer.Option, min=1)
PICTURES = ("curve.png", "curve.svg")


def curve(
    output_dir: Annotated[Path, typer.Argument(help="The output_dir of a run with several ratios.")],
    metric: Annotated[
        str | None, typer.Option("--metric", help="The score; if left out, the first one that is no loss.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help=f"One file to write instead: {', '.join(PICTURE_FORMATS)}."),
    ] = None,
    no_latency: Annotated[bool, typer.Option("--no_latency", help="Do not load and time the models.")] = False,
    batch_size: Annotated[int, Positive("--batch_size", help="Examples of a timed forward pass.")] = 1,
    length: Annotated[int, Positive("--length", help="Tokens of a text, or samples of a sound.")] = 128,
    repeats: Annotated[int, Positive("--repeats", help="Timed passes of each model.")] = 20,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Show and draw the score over the size of the models that a run has left at several ratios.

    The models and a dense one with random weights take turns on random
    inputs, on the GPU if there is one. The picture goes to curve.png and
    curve.svg in OUTPUT_DIR, with the dense model's score where it is known.

    Examples:

    \b
      rankdyna curve ./run
      rankdyna curve ./run --metric eval_f1 -o curve.pdf
      rankdyna curve ./run --no_latency --json
    """
    places = None if output is None else {output: check_picture(output)}
    folders = station_folders(output_dir)
    if places is None:
        check_writable(output_dir)
    from ..report.curve_plot import curve_figure  # needs matplotlib, which is said before the models are timed

    found = read_curve(output_dir, trust_remote_code)
    chosen = chosen_metric(found, metric)
    measured: dict[str, Any] = {}
    if not no_latency:
        measured = _timed(folders, batch_size, length, repeats, trust_remote_code)
        found[LATENCY] = {name: timing["median"] for name, timing in measured["latency"].items()}
    figure = curve_figure(found, chosen)
    if places is None:
        places = {place: place for place in (image_place(output_dir, name) for name in PICTURES)}
    for asked, place in places.items():
        write_picture(figure, asked, place)
    document = _document(output_dir, found, chosen, measured) | {"pictures": [str(asked) for asked in places]}
    if as_json:
        print_json(document)
    else:
        _print(document)


def _timed(
    folders: dict[str, Path], batch_size: int, length: int, repeats: int, trust_remote_code: bool
) -> dict[str, Any]:
    """How long a forward pass of each model takes, the dense one included, and on what."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: dict[str, Any] = {
        name: load_compacted(folder, trust_remote_code=trust_remote_code).to(device).eval()
        for name, folder in folders.items()
    }
    name, model = next(iter(models.items()))
    models[DENSE] = dense_like(model, read_config(folders[name], trust_remote_code)).to(device).eval()
    inputs = random_inputs(model, batch_size, length)
    works = {name: forward_pass(model, inputs) for name, model in models.items()}
    latency = {}
    for name, seconds in timed_in_turns(works, repeats).items():
        low, median, high = quartiles(seconds)
        latency[name] = {"median": median, "quartiles": [low, high], "seconds": seconds}
    return {
        "repeats": repeats,
        "device": device_in_words(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
        "latency": latency,
    }


def _document(output_dir: Path, found: pd.DataFrame, metric: str, measured: dict[str, Any]) -> dict[str, Any]:
    models = []
    for name, row in found.drop(columns=LATENCY, errors="ignore").to_dict(orient="index").items():
        known = {str(column): value for column, value in row.items() if not pd.isna(value)}
        model: dict[str, Any] = {"model": str(name)} | {column: known.get(column) for column in SIZES}
        model["scores"] = {column: value for column, value in known.items() if column not in SIZES}
        if measured:
            model["latency"] = measured["latency"][name]
        models.append(model)
    setting = {name: value for name, value in measured.items() if name != "latency"}
    return {"output_dir": str(output_dir), "metric": metric} | setting | {"models": models}


def _print(document: dict[str, Any]) -> None:
    metric, timed = document["metric"], "device" in document
    scores, sizes = [], []
    for model in document["models"]:
        row = [model["model"], model["target_ratio"], model["all_ratio"], model["scores"].get(metric)]
        scores.append([*row, 1000 * model["latency"]["median"]] if timed else row)
        sizes.append([model["model"], model["all_parameters"], model["file_bytes"] / 1e6, model["multiply_adds"]])
    timing = ""
    if timed:
        inputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in document["inputs"].items())
        timing = f"ms: medians of {document['repeats']}, {document['dtype']}, {document['device']}; {inputs}"
    columns = ["", "of targets", "of all", metric, *(["ms"] if timed else [])]
    print_table(columns, scores, "The score, and the parts of the parameters that are kept", timing)
    columns = ["", "parameters", "saved weights, MB", "multiply-adds"]
    notes = f"multiply-adds: of all linear layers, a token\n{LAST}: in {document['output_dir']} itself"
    print_table(columns, sizes, "Sizes", notes)
    print(f"Wrote {' and '.join(document['pictures'])}.")
