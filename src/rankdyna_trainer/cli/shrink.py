"""`rankdyna shrink`: a compacted model is cut further, without training."""

from pathlib import Path
from typing import Annotated

import typer

from ..baselines.shrink import shrink as shrink_model
from ..baselines.shrink import shrink_on_data
from ..checkpoint.empty_model import read_config
from ..checkpoint.importance_file import read_importance
from ..checkpoint.output_folder import IMPORTANCE_FILE
from ..layers.rank_record import record_of
from .console import (
    AsJson,
    Checkpoint,
    Output,
    TrustRemoteCode,
    Variant,
    check_kept,
    check_output,
    chosen,
    local_folder,
    processing_class,
)
from .convert import save_and_tell
from .loading import load_compacted, quantization_method
from .text_rows import ROWS, MaxLength, TextColumns, read_examples

RankRatio = Annotated[
    float | None, typer.Option("--rank_ratio", help="The part of the dense model's singular groups to keep.")
]
ParamRatio = Annotated[
    float | None, typer.Option("--param_ratio", help="Instead: the part of the dense target layers' parameters.")
]
RankMultipleOf = Annotated[
    int, typer.Option("--rank_multiple_of", help="Each layer that is cut keeps a multiple of so many groups.")
]
TrainFile = Annotated[
    Path | None,
    typer.Option("--train_file", help="Score the groups on these rows as well: .jsonl, .json, .csv or .txt."),
]
MaxSamples = Annotated[int, typer.Option("--max_train_samples", min=1, help="Take the first rows only.")]


def shrink(
    checkpoint: Checkpoint,
    output_dir: Output,
    rank_ratio: RankRatio = None,
    param_ratio: ParamRatio = None,
    rank_multiple_of: RankMultipleOf = 1,
    train_file: TrainFile = None,
    text_column: TextColumns = ["text"],  # noqa: B006
    max_length: MaxLength = 128,
    max_train_samples: MaxSamples = ROWS,
    variant: Variant = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Cut a compacted model further without training.

    Groups go by the importance that the model's run ended with, which lies
    beside its weights. With rows, which need no labels, they go by what they
    add to the layers' outputs there too, and what remains is made the best
    for these. The ratio is a part of the dense model, as in the run. What is
    written loads with from_pretrained, and may be trained on or cut again.

    Examples:

    \b
      rankdyna shrink ./compressed --param_ratio 0.1 -o ./smaller
      rankdyna shrink ./compressed --param_ratio 0.1 --train_file a.csv -o ./s
    """
    config = chosen(rank_ratio=rank_ratio, param_ratio=param_ratio, rank_multiple_of=rank_multiple_of)
    if train_file is not None and not train_file.is_file():
        raise FileNotFoundError(f"There is no file {train_file}.")
    check_output(output_dir)
    folder = local_folder(checkpoint, trust_remote_code)
    if (method := quantization_method(read_config(folder, trust_remote_code))) is not None:
        raise ValueError(f"{checkpoint} is quantized ({method}): take the model that it was made from.")
    model = load_compacted(folder, None, variant, trust_remote_code).eval()
    processing = processing_class(folder, trust_remote_code)
    check_kept(model, output_dir, processing)
    record, importance = record_of(model.config), {}
    if train_file is None or (folder / IMPORTANCE_FILE).is_file():
        importance = read_importance(folder, record["ranks"] | record["dense"])
    if train_file is not None:
        rows = read_examples(model, processing, train_file, text_column, None, max_length, max_train_samples)
        removed = shrink_on_data(model, config, rows, importance or None)
        told = f"the layers lose {removed:.1%} of their output energy on {len(rows)} rows, on average"
    else:
        removed = shrink_model(model, config, importance)
        told = f"{removed:.1%} of the importance that the groups had is gone"
    told = f"Expected cost: {told}. How much of the score that is, an evaluation has to tell."
    expected = {"scored_by": "importance" if train_file is None else "rows", "removed": removed}
    save_and_tell(checkpoint, output_dir, model, processing, as_json, expected)
    if not as_json:
        print(told)
