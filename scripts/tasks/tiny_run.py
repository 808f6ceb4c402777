"""
`--tiny`: a script shows all that it does, in a minute, on a CPU, with nothing downloaded.

    python scripts/run_image_classification.py --tiny

A tiny model with random weights and a task that it can learn are made in a folder. Then the script runs three times,
with the options that it prints: it trains the model, which from then on stands for a pre-trained one; it compresses
that one while it is fine-tuned; and it loads the compressed model again and evaluates it. The last must give the score
of the second. Further options go to the run that compresses: `--tiny --param_ratio 0.2`, `--tiny --method svd`.
"""

import argparse
import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import transformers

from .arguments import BASELINES
from .run import Run
from .tiny_tasks import read_run

MakeRun = Callable[[list[str] | None], Run]
# Makes the model and the task in a folder, and gives the folder of the model, and the options of data and training.
MakeTask = Callable[[Path], tuple[str, list[str]]]


def complete(make_run: MakeRun, args: list[str] | None, make_task: MakeTask) -> None:
    """What a script does: a run or, with `--tiny`, those of a tiny task."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true")
    given, others = parser.parse_known_args(args)
    if given.tiny:
        run_tiny(make_run, others, make_task)
    else:
        make_run(args).complete()


def run_tiny(make_run: MakeRun, args: list[str], make_task: MakeTask) -> None:
    """Train, compress and reload a tiny model, and print the scores and sizes of all three runs."""
    script = Path(inspect.getfile(make_run))
    usage = f"{script.name} --tiny [options of the compressing run]"
    parser = argparse.ArgumentParser(usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=Path("tiny-output") / script.stem)
    parser.add_argument("--method", choices=[*BASELINES, "rankdyna"], default="rankdyna")
    parser.add_argument("--rank_ratio", "--rank-ratio", nargs="+")
    parser.add_argument("--param_ratio", "--param-ratio", nargs="+")
    chosen, others = parser.parse_known_args(args)
    folder: Path = chosen.output_dir
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    model, task = make_task(folder)
    print(f"A tiny model and its task are in {folder}.")

    def run(name: str, source: str, *options: str) -> dict[str, Any]:
        given = [f"--model_name_or_path={source}", f"--output_dir={folder / name}", "--do_eval", *task, *options]
        print(f"\n{name}: python scripts/{script.name} {shlex.join(given)}", flush=True)
        make_run(given).complete()
        return read_run(folder / name)

    ratios = {"rank_ratio": chosen.rank_ratio, "param_ratio": chosen.param_ratio}
    ratios = {name: ratio for name, ratio in ratios.items() if ratio is not None} or {"param_ratio": ["0.3"]}
    compression = [f"--method={chosen.method}"]
    for name, parts in ratios.items():
        compression += [f"--{name}", *parts]
    # A baseline takes the dense model as it is for that of its first round.
    compression += ["--num_train_epochs=0"] if chosen.method in BASELINES else []
    runs = {"dense": run("dense", model, "--method=none", "--do_train")}
    runs["compressed"] = run("compressed", str(folder / "dense"), "--do_train", *compression, *others)
    runs["reloaded"] = run("reloaded", str(folder / "compressed"), "--method=none")

    sizes = {"part of target parameters": "target_parameter_ratio", "part of all parameters": "all_parameter_ratio"}
    rows = {
        name: of["scores"]["final"] | {title: of[key] for title, key in sizes.items()} for name, of in runs.items()
    }
    print("\n" + pd.DataFrame.from_dict(rows, "index").to_string(float_format="{:.3f}".format))
    if rows["reloaded"] != rows["compressed"]:
        sys.exit("The reloaded model is not the one that was trained.")
    print(f"The compressed model is in {folder / 'compressed'}.")
