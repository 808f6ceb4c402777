"""`rankdyna sensitivity`: what the compression of each layer would cost the loss."""

import os
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from ..report.layer_names import without_prefix
from ..report.printed import print_table
from ..report.sensitivity import (
    ALL_LAYERS,
    ALL_OTHERS,
    MEDIANS,
    PARAM_RATIOS,
    alone_at,
    cost_of_saving,
    each_alone,
    layer_sensitivity,
    middle_ratio,
    standing_out,
    unique_endings,
)
from ..report.staging import staging_folder
from .compress import LabelColumn
from .console import (
    AsJson,
    Checkpoint,
    Excluded,
    Targets,
    TrustRemoteCode,
    Variant,
    chosen,
    local_folder,
    print_json,
    processing_class,
)
from .loading import load_dense
from .sensitivity_file import NAME, write_sensitivity
from .text_rows import MaxLength, TextColumns, in_batches, read_examples

# MiniLM-L6 on 256 rows of SST-2, on one thread of a CPU: 1.2 s, as with 64 or with padding; 3.5 s with single rows.
ROWS_OF_A_BATCH = 16

LabelledFile = Annotated[Path, typer.Option("--train_file", help="Labelled rows: .jsonl, .json, .csv or .txt.")]
ParamRatios = Annotated[
    list[float], typer.Option("--param_ratio", help="The part of a layer's parameters to keep; repeatable.")
]
MaxRows = Annotated[int, typer.Option("--max_train_samples", min=2, help="Take the first rows only.")]
OutputFile = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="The .json file to write; by default one in the folder of MODEL."),
]


def sensitivity(
    model: Checkpoint,
    train_file: LabelledFile,
    param_ratio: ParamRatios = list(PARAM_RATIOS),  # noqa: B006
    target_modules: Targets = None,
    exclude_modules: Excluded = None,
    text_column: TextColumns = ["text"],  # noqa: B006
    label_column: LabelColumn = "label",
    max_length: MaxLength = 128,
    max_train_samples: MaxRows = 256,
    output: OutputFile = None,
    variant: Variant = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Measure how much the loss rises if a layer is truncated, for each layer alone, and for all together.

    MODEL is dense and fine-tuned: a sequence classifier, with texts that have
    a class, or a causal language model, with plain texts. Each layer keeps
    this part of its parameters in the way of `compress --method whitened`,
    without training. Layers that cost far more than others are named, for
    --exclude_modules. A heatmap is written beside FILE; `rankdyna inspect
    MODEL` shows what is in the folder of MODEL.

    Examples:

    \b
      rankdyna sensitivity ./model --train_file train.jsonl
      rankdyna sensitivity big --train_file a.csv --param_ratio .4 -o costs.json
    """
    modules: dict[str, Any] = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    for ratio in param_ratio:
        chosen(param_ratio=ratio, **modules)
    place = _place(model, output)
    if not train_file.is_file():
        raise FileNotFoundError(f"There is no file {train_file}.")
    folder = local_folder(model, trust_remote_code)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # In float32, since half precision rounds away what a layer costs.
    loaded: Any = load_dense(folder, variant, trust_remote_code).float().to(device).eval()
    processing = processing_class(folder, trust_remote_code)
    rows: Any = (train_file, text_column, label_column, max_length, max_train_samples)
    examples = read_examples(loaded, processing, *rows)
    if len(examples) < 2:
        raise ValueError(f"--train_file {train_file} has {len(examples)} rows with a loss: give some hundred.")
    batches = in_batches(examples, min(ROWS_OF_A_BATCH, (len(examples) + 1) // 2))
    costs = layer_sensitivity(loaded, batches, param_ratio, **modules)
    document = {"model": model, "class": type(loaded).__name__, "rows": len(examples)} | _document(loaded, costs)
    picture = write_sensitivity(place, document, costs)
    document |= {"output": str(place), "picture": None if picture is None else str(picture)}
    if as_json:
        print_json(document)
    else:
        _print(document, costs)


def _place(model: str, output: Path | None) -> Path:
    """The file to write, which can be written."""
    if output is None:
        if not Path(model).is_dir():
            raise typer.BadParameter(f"{model} is no folder on this machine: name the file to write with -o.")
        output = Path(model) / NAME
    if output.suffix != ".json":
        raise typer.BadParameter(f"--output {output} must end in .json.")
    place = Path(os.path.realpath(output))  # a link is followed, and kept
    if place.is_dir() or place.with_suffix(".png").is_dir() or not place.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: give a file in a folder that is there.")
    try:
        with staging_folder(place.parent):
            return place
    except OSError as error:
        raise OSError(f"--output {output} cannot be written ({error}): name another one.") from error


def _document(loaded: Any, costs: pd.DataFrame) -> dict[str, Any]:
    alone, out = each_alone(costs), standing_out(costs)
    first = costs.iloc[0]
    return {
        "dense_loss": float(first["loss"] - first["increase"]),
        "dense_parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "middle_ratio": middle_ratio(costs),
        "stand_out": out,
        "exclude_modules": unique_endings(out, [name for name, _ in loaded.named_modules()]),
        "layers": alone.reset_index().to_dict(orient="records"),
        "together": costs.drop(index=alone.index).reset_index().to_dict(orient="records"),
    }


def _print(document: dict[str, Any], costs: pd.DataFrame) -> None:
    middle, alone = document["middle_ratio"], each_alone(costs)
    print(f"{document['model']}: {document['class']}; loss {document['dense_loss']:.4f} on {document['rows']:,} rows")
    ratios = [float(ratio) for ratio in alone.index.unique("param_ratio")]
    at_middle = alone_at(costs, middle).sort_values("increase", ascending=False)
    price, rises = cost_of_saving(at_middle), {ratio: alone_at(costs, ratio)["increase"] for ratio in ratios}
    place, short = without_prefix([str(name) for name in at_middle.index])
    rows = [
        [
            f"{name}{' *' if layer in document['stand_out'] else ''}",
            *(_rounded(rises[ratio][layer]) for ratio in ratios),
            _rounded(at_middle["standard_error"][layer]),
            None if pd.isna(price[layer]) else _rounded(price[layer]),
        ]
        for name, layer in zip(short, at_middle.index, strict=True)
    ]
    columns = ["one layer", *(f"at {ratio:g}" for ratio in ratios), f"+- at {middle:g}", "a million saved"]
    print_table(columns, rows, f"Rise of the loss{place}, each layer alone, the dearest first")
    _print_together(document, alone)
    if document["stand_out"]:
        options = " ".join(f"--exclude_modules {ending}" for ending in document["exclude_modules"])
        print(
            f"\n* more than {MEDIANS} times the median layer, for each parameter saved, at {middle:g}. It may pay to "
            f"leave them dense:\n  {options}"
        )
    else:
        print(
            f"\nNo layer stands out: none costs more than {MEDIANS} times the median layer, for each parameter saved, "
            f"at {middle:g}, beyond chance and a hundredth of the loss."
        )
    written = [document["output"], *([document["picture"]] if document["picture"] else [])]
    print(f"Wrote {' and '.join(written)}.")


def _rounded(value: float) -> float:
    return round(float(value), 4) + 0.0  # which has no sign if it is zero


def _print_together(document: dict[str, Any], alone: pd.DataFrame) -> None:
    whole, targets = document["dense_parameters"], int(alone["dense_parameters"].groupby("layer").first().sum())
    sums = alone["increase"].groupby("param_ratio").sum()
    rows = []
    for row in document["together"]:
        others = row["layer"] == ALL_OTHERS
        kept = row["parameters"] + (targets - row["dense_parameters"])
        rows.append(
            [
                f"{'all others' if others else ALL_LAYERS} at {row['param_ratio']:g}",
                kept / targets,
                (whole - targets + kept) / whole,
                _rounded(row["increase"]),
                _rounded(row["standard_error"]),
                None if others else _rounded(sums[row["param_ratio"]]),
            ]
        )
    title = "All together: the parts of the parameters that are kept, and the rise of the loss"
    print_table(["", "of targets", "of all", "rise", "+-", "sum of each alone"], rows, title)
