"""`rankdyna merge` and `rankdyna compact`: from one form of a checkpoint to another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.saving import save_compacted
from ..checkpoint.training import load_training_checkpoint
from ..layers.compaction import compact as compact_model
from ..layers.compaction import merge as merge_model
from ..report.card import model_card, ranks_image, write_card
from ..report.generated import never_fatal
from ..report.printed import print_place, print_summary
from ..report.tables import compression_summary, rank_report
from .console import (
    AsJson,
    Checkpoint,
    Output,
    TrustRemoteCode,
    Variant,
    check_output,
    local_folder,
    print_json,
    processing_class,
)
from .loading import load_compacted


def merge(
    checkpoint: Checkpoint,
    output_dir: Output,
    variant: Variant = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Make a stock dense checkpoint of a compacted one.

    It computes the same, is as large as the model was at first, and loads
    where this package is not installed. Tokenizer and processor go with it.

    Examples:

    \b
      rankdyna merge ./compressed -o ./dense
    """
    check_output(output_dir)
    folder = local_folder(checkpoint, trust_remote_code)
    model = load_compacted(folder, None, variant, trust_remote_code)
    layers = len(rank_report(model))
    file_bytes = save_compacted(merge_model(model), output_dir, processing_class(folder, trust_remote_code))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if as_json:
        print_json(_document(checkpoint, output_dir, file_bytes) | {"layers": layers, "parameters": parameters})
    else:
        print(f"Merged {layers} layers: {parameters:,} parameters, {file_bytes / 1e6:,.1f} MB in {output_dir}.")


def compact(
    checkpoint: Checkpoint,
    output_dir: Output,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Cut a checkpoint of a running compression off at its present ranks.

    CHECKPOINT is a checkpoint-N folder; the run may go on. What is written
    loads with from_pretrained. Tokenizer and processor go with it.

    Examples:

    \b
      rankdyna compact ./run/checkpoint-500 -o ./compressed
    """
    check_output(output_dir)
    folder = local_folder(checkpoint, trust_remote_code)
    model = compact_model(load_training_checkpoint(folder, trust_remote_code))
    save_and_tell(checkpoint, output_dir, model, processing_class(folder, trust_remote_code), as_json)


def save_and_tell(
    source: str, output_dir: Path, model: Any, processing: Any, as_json: bool, more: Mapping[str, Any] | None = None
) -> None:
    """
    Save a compacted model with its card, and print what was written, as a training does at its end.

    Args:
        source: what it was made of.
        output_dir: where it is saved.
        model: compacted.
        processing: the tokenizer or processor, or `None`.
        as_json: print one document.
        more: what that has beside the sizes.
    """
    file_bytes = save_compacted(model, output_dir, processing)
    image, name = None, output_dir.resolve().name
    with never_fatal("draw its ranks", output_dir):
        image = ranks_image(model)
    with never_fatal("write its card", output_dir):
        beside: Any = {"has_image": image is not None, "has_processing_class": processing is not None}
        write_card(model_card(model, name, file_bytes=file_bytes, **beside), output_dir, image)
    if as_json:
        summary = compression_summary(model)
        sizes = {"target_parameters": summary.target_parameters, "target_ratio": summary.target_ratio}
        sizes |= {"all_parameters": summary.all_parameters, "all_ratio": summary.all_ratio}
        print_json(_document(source, output_dir, file_bytes) | sizes | dict(more or {}))
    else:
        print_summary(model, file_bytes)
        print_place(model, output_dir)


def _document(source: str, output_dir: Path, file_bytes: int) -> dict[str, Any]:
    return {"source": source, "output_dir": str(output_dir), "file_bytes": file_bytes}
