"""
Makes a table or a figure of the paper, and runs all that it needs.

    python scripts/reproduce.py table1 --scale paper --output_dir reproduction
    python scripts/reproduce.py figure4 --scale small --output_dir reproduction --data_dir data --models encoder=MODEL

It writes Markdown, and figures as PNG and SVG, into the output folder, which also keeps the record of every run. What
is finished is never run again, by whichever table or figure, so that a command which was stopped is simply repeated.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from reproduction.cells import Grid, write_text
from reproduction.decoder import cells_of_decoder, decoder
from reproduction.figure_data import FIGURES, make_figure, save_figures
from reproduction.frontier import cells_of_frontier, draw_frontier, frontier
from reproduction.geometry import cells_of_geometry, geometry
from reproduction.parts import cells_of_parts, parts
from reproduction.scales import SCALES, Scale
from reproduction.side_by_side import Cell, run_side_by_side
from reproduction.stations import cells_of_stations, stations
from reproduction.tables import TABLES, cells_of_table

# What is run for a target, where it is known before: the other targets run one thing after the other.
CELLS: dict[str, Callable[[Grid, Sequence[str], Sequence[int]], list[Cell]]] = {
    name: partial(cells_of_table, name) for name in ("table1", "table2", "table3")
}
CELLS |= {"parts": cells_of_parts, "frontier": cells_of_frontier, "stations": cells_of_stations}
CELLS |= {"geometry": cells_of_geometry, "decoder": cells_of_decoder}
# What is not in the paper.
OWN = {"parts": ("Parts of the method", parts), "frontier": ("All methods by size", frontier)}
OWN |= {"stations": ("Several sizes from one run", stations), "geometry": ("Geometry and steps", geometry)}
OWN |= {"decoder": ("A language model by size", decoder)}


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TABLES, *FIGURES, "all", *OWN], help="what to make")
    parser.add_argument(
        "--scale",
        choices=list(SCALES),
        default="small",
        help="models, rows, epochs and seeds: tiny takes a minute, small hours on a CPU, paper is the paper's own",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("reproduction"), help="where all of it is kept")
    parser.add_argument(
        "--data_dir", type=Path, help="a folder TASK with train.jsonl and validation.jsonl for each task, not the Hub"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="ROLE=MODEL",
        help="other models than the scale's, from the Hub or local: encoder, tagger, encoder_decoder, decoder",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these of a table's tasks")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="run N cells of tables 1 to 3, parts, frontier, stations, geometry and decoder at once, as on one GPU",
    )
    parser.add_argument(
        "--float32", action="store_true", help="where a scale has bf16: float32, as CPUs want that have no bf16 units"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds")
    choices = parser.parse_args(args)
    scale = SCALES[choices.scale]
    try:
        choices.models = dict(pair.split("=", 1) for pair in choices.models)
    except ValueError:
        parser.error(f"--models takes ROLE=MODEL, with a role of {', '.join(scale.models)}: got {choices.models}")
    if unknown := choices.models.keys() - scale.models.keys():
        parser.error(f"--models: {choices.scale} has the roles {', '.join(scale.models)}, not {', '.join(unknown)}")
    if choices.tasks and (unknown := set(choices.tasks) - set(tasks_of(choices.target, scale))):
        has = ", ".join(tasks_of(choices.target, scale)) or "no choice of tasks"
        parser.error(f"--tasks: {choices.target} of {choices.scale} has {has}, not {', '.join(sorted(unknown))}")
    if choices.jobs < 1:
        parser.error(f"--jobs must be at least 1: got {choices.jobs}")
    if choices.data_dir is not None and not choices.data_dir.is_dir():
        parser.error(f"--data_dir {choices.data_dir} is no folder")
    return choices


def tasks_of(target: str, scale: Scale) -> tuple[str, ...]:
    """The tasks of a table."""
    return getattr(scale, target, ()) + (scale.table1_once if target == "table1" else ())


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the table or the figure."""
    choices = parse_args(args)
    scale: Scale = SCALES[choices.scale]
    if choices.seeds:
        scale = replace(scale, seeds=tuple(choices.seeds))
    grid = Grid(scale, choices.output_dir, choices.models, choices.data_dir, choices.float32)
    for target in (*TABLES, *FIGURES) if choices.target == "all" else (choices.target,):
        if target in FIGURES:
            paths = make_figure(target, grid, choices.output_dir)
        else:
            name, make = OWN.get(target) or (f"{target[:-1].capitalize()} {target[-1]}", TABLES[target])
            tasks = [task for task in tasks_of(target, scale) if task in (choices.tasks or scale.tasks)]
            # Tables 2 to 5 are of one seed, as in the paper.
            seeds = scale.seeds if target in ("table1", *OWN) else scale.seeds[:1]
            if choices.jobs > 1 and target in CELLS:
                cells = CELLS[target](grid, tasks, seeds)
                run_side_by_side(cells, choices.jobs, choices.output_dir / "logs")
            paths = [choices.output_dir / f"{target}.md"]
            write_text(paths[0], f"# {name}, scale {choices.scale}\n\n{make(grid, tasks, seeds)}\n")
            print(paths[0].read_text(encoding="utf-8"))
            if target == "frontier":
                paths += save_figures(target, {target: draw_frontier(grid, tasks, seeds)}, choices.output_dir)
        print("Written:", *paths)


if __name__ == "__main__":
    main()
