"""What is printed of a compression, in a terminal without cutting off anything, or in a notebook."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..layers.singular_group import singular_group_layers
from ..layers.targets import choose_layers
from ..method.algorithm import RankDyna
from ..options import AUTO
from .layer_names import by_matrix
from .operations import linear_operations
from .tables import compression_summary, parameters_elsewhere, rank_report

# What a table needs beside its first column, so that the names in that one are not broken.
OTHER_COLUMNS = 30


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", notes: str = "") -> None:
    """
    Print a table, in which numbers stand on the right. A notebook shows it as HTML; a progress bar goes on below.

    Args:
        columns: their names.
        rows: numbers and texts. Whole numbers get commas, others four digits; what is `None` is left out.
        title: a line above it.
        notes: lines below it.
    """
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        numeric = all(isinstance(row[number], (int, float, type(None))) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_shown, row))
    with tqdm.external_write_mode():
        console = Console(markup=False, highlight=False, emoji=False)
        longest = max((len(_shown(row[0])) for row in rows), default=0)
        table.columns[0].no_wrap = longest + OTHER_COLUMNS <= console.width
        # Where nobody looks on, a line stays one: it may be searched for.
        whole_lines = not (console.is_terminal or console.is_jupyter)
        if title:
            console.print(f"\n{title}", soft_wrap=whole_lines)
        console.print(table)
        if notes:
            console.print(notes, soft_wrap=whole_lines)


def print_outline(rankdyna: RankDyna, teacher: str | None) -> None:
    """
    Print what a run will do, before its first step: what is there, what will be left, and when.

    Args:
        rankdyna: of the run.
        teacher: by whom it is taught, or `None`.
    """
    config, budget, schedule = rankdyna.config, rankdyna.rank_budget, rankdyna.schedule
    target, final = rankdyna.remaining_parameters, budget.final
    others = parameters_elsewhere(rankdyna)
    by_rank = config.rank_ratio is not None
    ends = [(rankdyna.remaining_groups, final if by_rank else None)]
    ends += [(target, None if by_rank else final), (target + others, None if by_rank else final + others)]
    names = ("singular groups", "parameters of the target layers", "parameters of the whole model")
    rows = [[name, now, end, end and end / now] for name, (now, end) in zip(names, ends, strict=True)]
    found = " (at the latest: when the loss is flat)" if config.rank_warmup_steps == AUTO else ""
    notes = (
        f"Groups are removed from step {schedule.warmup_steps:,}{found} to step {schedule.final_step:,} of "
        f"{schedule.total_steps:,}. "
    )
    notes += "Each layer keeps the same part." if config.rank_scope == "local" else "All layers share one budget."
    if not rankdyna.layers:
        notes += " Basis: what enters the layers (activations)."
    elif config.group_basis == "weights":
        notes += " Basis: the weights."
    if config.start_ratio is not None:
        unit = "of them" if by_rank else "parameters of the target layers"
        notes += f" start_ratio={config.start_ratio:g}: the groups begin with {budget.initial:,} {unit}."
    if len(config.ratios) > 1:
        stays = [f"{ratio:g} (step {at.left:,})" for ratio, at in zip(config.ratios, schedule.stations, strict=True)]
        notes += f" {config.ratio_name}, each saved at its last step: {', '.join(stays)}."
    title = f"RankDyna compresses {_layers_in_words(rankdyna)}"
    print_table(["", "now", "at the end", "kept"], rows, title, f"{notes} Teacher: {teacher or 'none'}.")


def _layers_in_words(rankdyna: RankDyna) -> str:
    model = rankdyna.model
    names = [*(singular_group_layers(model) or choose_layers(model, rankdyna.config).targets)]
    kinds = [kind.rpartition(".*.") for kind in by_matrix(names)]
    places = dict.fromkeys(blocks.partition(".*.")[0] for blocks, _, _ in kinds if blocks)
    within = f" in {' and '.join(places)}" if places else ""
    return f"{len(names)} layers{within}: {', '.join(dict.fromkeys(name for _, _, name in kinds))}"


def print_summary(model: nn.Module, file_bytes: int | None = None, peak_bytes: int | None = None) -> None:
    """
    Print what a compressed model is beside the dense one that it stands for.

    Args:
        model: with singular groups, or compacted; its parameters may be without values.
        file_bytes: size of the saved weights, left out if they are not those of a compacted model.
        peak_bytes: from [`peak_memory`], left out if it is not known.

    Raises:
        ValueError: the model has no compressed layers.
    """
    layers, summary, operations = rank_report(model), compression_summary(model), linear_operations(model)
    sizes: list[tuple[str, float, float]] = [
        ("singular groups", int(layers["full_rank"].sum()), int(layers["rank"].sum())),
        ("parameters of the target layers", summary.dense_target_parameters, summary.target_parameters),
        ("parameters of the whole model", summary.dense_all_parameters, summary.all_parameters),
        ("multiply-adds of the target layers, a token", operations.dense_target, operations.target),
        ("multiply-adds of all linear layers, a token", operations.dense_linear, operations.linear),
    ]
    if file_bytes is not None:
        sizes.append(("saved weights, MB", summary.dense_bytes(file_bytes) / 1e6, file_bytes / 1e6))
    notes = summary.layers_in_words
    if peak_bytes is not None:
        notes += f"\npeak memory of this process: {peak_bytes / 1e6:,.0f} MB"
    print_table(["", "before", "after", "kept"], [[*row, row[2] / row[1]] for row in sizes], notes=notes)


def print_place(model: nn.Module, directory: Path) -> None:
    """
    Print where a compacted model is, and the lines that load it.

    Args:
        model: that was saved.
        directory: where.
    """
    lines = [f"Saved in {directory}"]
    if isinstance(model, PreTrainedModel):
        name = type(model).__name__.removeprefix("FSDP")
        lines += ["", "import rankdyna_trainer", f"from transformers import {name}"]
        lines += [f'model = {name}.from_pretrained("{directory}")', ""]
        lines += [f"Next: rankdyna benchmark {directory}"]
    with tqdm.external_write_mode():
        print("\n".join(lines))


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
