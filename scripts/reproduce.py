"""
Makes a table or a figure of the paper, and runs all that it needs.

    python scripts/reproduce.py table1 --scale small --output_dir reproduction

What is finished is never run again, by whichever table or figure: the output folder keeps the record of each run.
"""

import argparse
from pathlib import Path

from reproduction.cells import DENSE, METHODS, Grid
from reproduction.scales import SCALES


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["table1"])
    parser.add_argument("--scale", choices=list(SCALES), required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="ROLE=MODEL")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    choices = parser.parse_args(args)
    scale = SCALES[choices.scale]
    grid = Grid(scale, choices.output_dir, dict(pair.split("=", 1) for pair in choices.model), choices.data_dir)
    for seed in choices.seeds or scale.seeds:
        for task in choices.tasks or scale.table1:
            grid.cell(task, DENSE, seed=seed)
            for ratio in scale.ratios:
                for method in METHODS:
                    print(task, method, ratio, seed, grid.score(task, grid.cell(task, method, ratio, seed)))


if __name__ == "__main__":
    main()
