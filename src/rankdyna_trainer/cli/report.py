"""`rankdyna report`: what a compressed model holds."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd

from ..checkpoint.outline import Outline, outline
from ..checkpoint.run_state import TRAINER_STATE_NAME, read_run_state
from ..config import RankDynaConfig
from ..report.expected import shortfall_in_words
from ..report.layer_names import by_matrix, without_prefix
from ..report.operations import linear_operations
from ..report.printed import print_summary, print_table
from ..report.tables import compression_summary, rank_report
from ..trainer.scores import scores_of_saved_model
from .console import AsJson, Checkpoint, TrustRemoteCode, Variant, local_folder, print_json


def report(
    checkpoint: Checkpoint,
    variant: Variant = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Show the ranks, sizes and operation counts of a compressed model.

    It may be a compacted one, such as the output_dir of a finished run, or the
    checkpoint-N of a run that is not at its end. Weights are not loaded.

    Examples:

    \b
      rankdyna report ./compressed
      rankdyna report ./run/checkpoint-500 --json
    """
    folder = local_folder(checkpoint, trust_remote_code)
    found = outline(folder, variant, trust_remote_code)
    layers, summary, operations = (
        rank_report(found.model),
        compression_summary(found.model),
        linear_operations(found.model),
    )
    document = {
        "checkpoint": checkpoint,
        "class": type(found.model).__name__,
        "in_training": found.in_training,
        "summary": asdict(summary) | {"target_ratio": summary.target_ratio, "all_ratio": summary.all_ratio},
        "groups": {"remaining": int(layers["rank"].sum()), "initial": int(layers["full_rank"].sum())},
        "file_bytes": found.file_bytes,
        "multiply_adds_per_vector": asdict(operations),
        "run": _run(folder, found),
        "layers": layers.reset_index().to_dict(orient="records"),
    }
    if as_json:
        print_json(document)
    else:
        _print(document, found, layers)


def _run(folder: Path, found: Outline) -> dict[str, Any] | None:
    if not found.in_training and not (folder / TRAINER_STATE_NAME).is_file():
        return None
    state = read_run_state(folder)
    if state.config is None:
        return {"step": state.step, "total_steps": state.total_steps}
    budget = state.budget(found.model)
    unit = "groups" if state.config.param_ratio is None else "parameters"
    rates = [float(row["learning_rate"]) for row in state.log_history if "learning_rate" in row]
    return {
        "step": state.step,
        "total_steps": state.total_steps,
        "unit": unit,
        "budget": budget.at(state.step),
        "final_budget": budget.final,
        "config": state.config.to_dict(),
        "shortfall": []
        if found.in_training
        else shortfall_in_words(
            type(found.model).__name__,
            compression_summary(found.model).target_ratio,
            (
                state.dense_scores,
                scores_of_saved_model(state.log_history, min(budget.schedule.final_step, state.step), state.step)[0],
            ),
            state.config,
            budget.schedule.warmup_steps,
            f"{max(rates):g}" if rates else "",
        ),
    }


def _print(document: dict[str, Any], found: Outline, layers: pd.DataFrame) -> None:
    form = "in training" if document["in_training"] else "compacted"
    print(f"{document['checkpoint']}: {document['class']}, {form}, {document['file_bytes'] / 1e6:,.1f} MB on disk")
    if run := document["run"]:
        print(f"step {run['step']:,} of {run['total_steps']:,}")
        if "unit" in run:
            print(f"budget: {run['budget']:,} {run['unit']} now, {run['final_budget']:,} at the end")
            defaults = {entry.name: entry.default for entry in fields(RankDynaConfig)}
            chosen = [f"{name}={value!r}" for name, value in run["config"].items() if value != defaults[name]]
            print(f"chosen: {', '.join(chosen)}")
        for number, line in enumerate(run.get("shortfall", ())):
            print(f"  {number}. {line}" if number else f"FAR BELOW WHAT THIS SIZE SHOULD KEEP: {line}")
    print_summary(found.model, None if found.in_training else found.file_bytes)
    by_kind, kinds = by_matrix([str(name) for name in layers.index]), []
    place, short = without_prefix([*by_kind])
    for kind, names in zip(short, by_kind.values(), strict=True):
        of_kind = layers.loc[names]
        shapes = of_kind[["out_features", "in_features"]].drop_duplicates().itertuples(index=False)
        dense = of_kind["form"] == "dense"
        ranks = [f"{rank}{'*' if kept else ''}" for rank, kept in zip(of_kind["rank"], dense, strict=True)]
        kinds.append([kind, ", ".join(f"{out} x {into}" for out, into in shapes), " ".join(ranks)])
    print_table(
        ["layers", "out x in", "ranks (* one dense matrix)"], kinds, f"Ranks{place}, in the order of the blocks"
    )
