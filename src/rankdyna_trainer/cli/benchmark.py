"""`rankdyna benchmark`: how fast a compacted model is beside the dense one."""

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..checkpoint.empty_model import read_config
from ..report.generated import CARD
from ..report.operations import linear_operations
from ..report.printed import print_table
from ..report.random_inputs import random_inputs
from ..report.speed import add_speed
from ..report.timing import dense_like, device_in_words, forward_pass, quartiles, timed_in_turns
from .console import AsJson, Checkpoint, TrustRemoteCode, Variant, local_folder, print_json
from .loading import load_compacted

Positive = partial(typer.Option, min=1)
CARD_BATCHES = (1, 32)


class Precision(StrEnum):
    """Of the weights and of what is computed with them."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Dtype = Annotated[
    Precision | None,
    typer.Option(
        "--dtype",
        metavar="<type>",
        help="Of the weights: float32, bfloat16 or float16; that of the checkpoint if left out.",
    ),
]


def benchmark(
    checkpoint: Checkpoint,
    batch_size: Annotated[int, Positive("--batch_size", help="Examples of a forward pass.")] = 1,
    length: Annotated[int, Positive("--length", help="Tokens of a text, or samples of a sound.")] = 128,
    generate: Annotated[int | None, Positive("--generate", help="Also time the generation of so many tokens.")] = None,
    dtype: Dtype = None,
    repeats: Annotated[int, Positive("--repeats", help="Timed passes of each model.")] = 20,
    card: Annotated[
        bool, typer.Option("--card", help="Time batches of 1 and 32, and write that into the model's card.")
    ] = False,
    variant: Variant = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Time a compacted model beside a dense one of the same configuration.

    The two take turns on random inputs, on the GPU if there is one. The dense
    model has random weights, which takes the same time. With --card the
    README.md of the folder tells the next reader.

    Examples:

    \b
      rankdyna benchmark ./compressed
      rankdyna benchmark ./compressed --batch_size 32 --dtype bfloat16
      rankdyna benchmark ./language-model --length 32 --generate 64 --json
      rankdyna benchmark ./compressed --card
    """
    if card and not Path(checkpoint, CARD).is_file():
        raise typer.BadParameter(f"--card writes into the {CARD} of a model's folder, and {checkpoint} has none.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = local_folder(checkpoint, trust_remote_code)
    precision = None if dtype is None else getattr(torch, dtype)
    compacted: Any = load_compacted(folder, precision, variant, trust_remote_code).to(device).eval()
    dense: Any = dense_like(compacted, read_config(folder, trust_remote_code)).to(device).eval()
    models = {"dense": dense, "compacted": compacted}
    timings = {}
    for batch in CARD_BATCHES if card else (batch_size,):
        inputs = random_inputs(compacted, batch, length)
        work = f"forward, batch {batch}" if card else "forward"
        timings[work] = timed_in_turns({name: forward_pass(model, inputs) for name, model in models.items()}, repeats)
    if generate is not None:
        if not compacted.can_generate():
            raise typer.BadParameter(f"--generate {generate}: a {type(compacted).__name__} generates nothing.")
        works = {name: _generation(model, inputs, generate) for name, model in models.items()}
        timings[f"generate {generate}"] = timed_in_turns(works, repeats)
    document = {"checkpoint": checkpoint, "repeats": repeats} | _document(compacted, inputs, timings)
    if card:
        document["card"] = str(_write_card(folder, document))
    if as_json:
        print_json(document)
    else:
        _print(document)


def _document(
    compacted: Any, inputs: dict[str, torch.Tensor], timings: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    operations = linear_operations(compacted)
    return {
        "class": type(compacted).__name__,
        "device": device_in_words(compacted.device),
        "dtype": str(compacted.dtype).removeprefix("torch."),
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
        "promised_ratio": operations.linear / operations.dense_linear,
        "timings": [_timing(work, seconds) for work, seconds in timings.items()],
    }


def _write_card(folder: Path, document: dict[str, Any]) -> Path:
    timed = document["timings"][: len(CARD_BATCHES)]
    rows = [
        (batch, timing["dense"]["median"], timing["compacted"]["median"])
        for batch, timing in zip(CARD_BATCHES, timed, strict=True)
    ]
    shapes = ", ".join(f"{name} of {' x '.join(map(str, shape[1:]))}" for name, shape in document["inputs"].items())
    how = (
        f"Medians of {document['repeats']} forward passes, in turns with a dense model of the same configuration, in "
        f"{document['dtype']} on {document['device']}, {shapes} (`rankdyna benchmark --card`)."
    )
    return add_speed(folder, rows, how)


def _generation(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> Callable[[], object]:
    prompt = {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids"}
    # Both have to make exactly as many tokens, whatever they are.
    counts = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    return partial(model.generate, **prompt, **counts, do_sample=False, num_beams=1)


def _timing(work: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    parts: dict[str, Any] = {"work": work}
    for name, times in seconds.items():
        low, median, high = quartiles(times)
        parts[name] = {"median": median, "quartiles": [low, high], "seconds": times}
    return parts | {"ratio": parts["compacted"]["median"] / parts["dense"]["median"]}


def _print(document: dict[str, Any]) -> None:
    inputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in document["inputs"].items())
    print(f"{document['checkpoint']}: {document['class']}, {document['dtype']}, {document['device']}; {inputs}")
    rows = [
        [timing["work"], _spread(timing["dense"]), _spread(timing["compacted"]), timing["ratio"]]
        for timing in document["timings"]
    ]
    print_table(["", "dense, ms", "compacted, ms", "ratio"], rows, f"Medians of {document['repeats']} and quartiles")
    print(f"by the multiply-adds of the linear layers: {document['promised_ratio']:.4g}")
    if "card" in document:
        print(f"Wrote {document['card']}.")


def _spread(times: dict[str, Any]) -> str:
    low, median, high = (
        f"{1000 * value:.4g}" for value in (times["quartiles"][0], times["median"], times["quartiles"][1])
    )
    return f"{median} [{low}, {high}]"
