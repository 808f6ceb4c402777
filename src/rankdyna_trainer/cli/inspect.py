"""`rankdyna inspect`: what a compression would do to a model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from ..checkpoint.empty_model import empty_model, read_config
from ..config import RankDynaConfig
from ..layers.dense import dense_weight
from ..layers.targets import LayerChoice, choose_layers, find_targets
from ..report.layer_names import by_matrix, without_prefix
from ..report.printed import print_table
from ..report.sizes import ModelSize, dense_size, sizes_at_ratio
from .console import (
    AsJson,
    Checkpoint,
    Excluded,
    Targets,
    TrustRemoteCode,
    chosen,
    print_json,
)
from .inspect_training import memory_of_recipes, print_memory
from .loading import refuse_compressed
from .sensitivity_file import read_sensitivity, sensitivity_in_words

DEFAULT_RATIOS = (0.5, 0.2, 0.1, 0.05)


RankRatios = Annotated[
    list[float] | None, typer.Option("--rank_ratio", help="The part of all singular groups to keep; repeatable.")
]
ParamRatios = Annotated[
    list[float] | None,
    typer.Option("--param_ratio", help="The part of the target layers' parameters to keep; repeatable."),
]
Training = Annotated[bool, typer.Option("--training", help="Also show what training it would hold in memory.")]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Examples of a step, for --training.")]
Length = Annotated[
    int, typer.Option("--length", min=1, help="Tokens of a text, or samples of a sound, for --training.")
]


def inspect(
    model: Checkpoint,
    rank_ratio: RankRatios = None,
    param_ratio: ParamRatios = None,
    target_modules: Targets = None,
    exclude_modules: Excluded = None,
    training: Training = False,
    batch_size: BatchSize = 1,
    length: Length = 512,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Show which layers of a model would be compressed, and how small it would be, before anything is trained.

    Only the configuration is read; weights are neither downloaded nor loaded.

    Which groups the global choice (the default) keeps, training decides:
    its sizes are told as bounds. Those of the local choice
    (rank_scope="local"), which svd and fwsvd have too, are exact.

    If `rankdyna sensitivity` has left its file in the folder of the model,
    what it measured is shown.

    With --training: the memory of a step, dense, in singular groups, and with
    what makes them smaller, by the shapes alone.

    Examples:

    \b
      rankdyna inspect bert-base-uncased
      rankdyna inspect ./my-model --rank_ratio 0.2 --param_ratio 0.2
      rankdyna inspect ./llama-7b --training --batch_size 4 --length 1024
      rankdyna inspect gpt2 --target_modules c_attn --target_modules c_fc --json
    """
    if not rank_ratio and not param_ratio:
        rank_ratio = param_ratio = list(DEFAULT_RATIOS)
    modules: dict[str, Any] = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    configs = [chosen(rank_ratio=ratio, **modules) for ratio in rank_ratio or ()]
    configs += [chosen(param_ratio=ratio, **modules) for ratio in param_ratio or ()]

    model_config = read_config(model, trust_remote_code)
    refuse_compressed(model, model_config)
    empty = empty_model(model_config, trust_remote_code)
    choice = choose_layers(empty, configs[0])
    if not choice.targets:
        find_targets(empty, configs[0])  # which says what there is instead
    document = {"model": model} | _document(empty, choice, configs)
    document["sensitivity"] = read_sensitivity(Path(model), empty)
    if training:
        of_size = next((config for config in configs if config.rank_ratio is None), configs[0])
        document["training"] = memory_of_recipes(model_config, of_size, batch_size, length, trust_remote_code)
    if as_json:
        print_json(document)
    else:
        _print(document, choice, dense_size(empty, choice.targets))
        if training:
            print_memory(document["training"], batch_size, length)
        if document["sensitivity"]:
            print("\n" + "\n".join(sensitivity_in_words(document["sensitivity"])))


def _document(empty: PreTrainedModel, choice: LayerChoice, configs: list[RankDynaConfig]) -> dict[str, Any]:
    shapes = {name: tuple(dense_weight(layer).shape) for name, layer in choice.targets.items()}
    full_rank = sum(map(min, shapes.values()))
    sizes = []
    for config in configs:
        kind = "param_ratio" if config.rank_ratio is None else "rank_ratio"
        at_ratio = sizes_at_ratio(empty, choice.targets, config)
        sizes.append({"option": kind, "ratio": config.rank_ratio or config.param_ratio, **asdict(at_ratio)})
    return {
        "class": type(empty).__name__,
        "dtype": str(empty.dtype).removeprefix("torch."),
        "initial_groups": full_rank,
        "dense": asdict(dense_size(empty, choice.targets)),
        "targets": [
            {"layer": name, "out_features": out, "in_features": into, "full_rank": min(out, into)}
            for name, (out, into) in shapes.items()
        ],
        "left_alone": [
            {"layer": name, "reason": reason}
            for reasons in (choice.left_alone, choice.unmatched)
            for reason, names in reasons.items()
            for name in names
        ],
        "sizes": sizes,
    }


def _print(document: dict[str, Any], choice: LayerChoice, dense: ModelSize) -> None:
    print(f"{document['model']}: {document['class']}, {document['dtype']}")
    print(f"parameters: {dense.all_parameters:,}, of which {dense.target_parameters:,} in the target layers' weights")
    print(f"file of the weights: {dense.file_bytes / 1e6:,.1f} MB; {document['initial_groups']:,} singular groups")
    by_kind, rows = by_matrix(list(choice.targets)), []
    place, short = without_prefix([*by_kind])
    for kind, names in zip(short, by_kind.values(), strict=True):
        shapes = sorted({tuple(dense_weight(choice.targets[name]).shape) for name in names})
        listed = ", ".join(f"{out} x {into}" for out, into in shapes)
        rows.append([kind, len(names), listed, ", ".join(str(min(shape)) for shape in shapes)])
    print_table(
        ["target layers", "count", "out x in", "full rank"], rows, f"{len(choice.targets)} target layers{place}"
    )
    left = [
        [kind, len(names), reason]
        for reasons in (choice.left_alone, choice.unmatched)
        for reason, all_names in reasons.items()
        for kind, names in by_matrix(all_names).items()
    ]
    if left:
        print_table(["left alone", "count", "why"], left, "Linear layers that stay as they are")
    _print_sizes(document["sizes"], dense)


def _print_sizes(sizes: list[dict[str, Any]], dense: ModelSize) -> None:
    rows = []
    for size in sizes:
        ratio = f"{size['option']} {size['ratio']:g}"
        groups = "" if size["groups"] is None else f"{size['groups']:,}"
        for scope, least, most in (("global", "least", "most"), ("local", "local", "local")):
            low, high = size[least], size[most]
            rows.append(
                [
                    *((ratio, groups) if scope == "global" else ("", "")),
                    scope,
                    _range([each["target_parameters"] / dense.target_parameters for each in (low, high)]),
                    _range([each["all_parameters"] / dense.all_parameters for each in (low, high)]),
                    _range([each["file_bytes"] / 1e6 for each in (low, high)], ",.1f"),
                ]
            )
    columns = ["", "groups kept", "choice", "of targets", "of all", "MB"]
    print_table(columns, rows, "Sizes: parts of the parameters that are kept, and the file")


def _range(bounds: list[float], form: str = ".3f") -> str:
    return "-".join(dict.fromkeys(format(bound, form) for bound in bounds))
