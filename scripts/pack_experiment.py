"""
Makes one folder of all that `reproduce.py` needs on a machine that has a GPU for minutes and no network.

    python scripts/pack_experiment.py parts --scale small --data_dir data --models tagger=MODEL --output packed \
        --wheels datasets evaluate dill multiprocess --python 3.12

Models are saved in half precision, which all runs load in float32; of the data the rows are taken that the runs see.
There, with the wheels installed:

    python scripts/reproduce.py parts --scale small --data_dir packed/data --models tagger=packed/models/tagger \
        --jobs 16
"""

import argparse
import importlib.metadata
import itertools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from reproduce import OWN, tasks_of
from reproduction.scales import SCALES, Scale
from reproduction.tables import TABLES
from safetensors.torch import load_file, save_file

SPLITS = {"train": "max_train_samples", "validation": "max_eval_samples"}
# Of a model's folder: its configuration, its tokenizer, and what a tokenizer may have.
KINDS = ("*.json", "*.txt", "*.model")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The choices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TABLES, *OWN], help="what is to be made there")
    parser.add_argument("--scale", choices=list(SCALES), default="small")
    parser.add_argument("--data_dir", type=Path, required=True, help="as for reproduce.py")
    parser.add_argument("--models", nargs="+", default=[], metavar="ROLE=MODEL", help="as for reproduce.py")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these of the table's tasks")
    parser.add_argument("--wheels", nargs="*", default=[], metavar="PACKAGE", help="in the versions that run here")
    parser.add_argument("--python", default="3.12", help="the version of Python there")
    parser.add_argument("--most", type=float, default=64, metavar="MIB", help="what the folder may hold")
    parser.add_argument("--output", type=Path, required=True, help="the folder, which is made anew")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the folder, and tell what it holds."""
    choices = parse_args(arguments)
    shutil.rmtree(choices.output, ignore_errors=True)
    for pair in choices.models:
        role, _, model = pair.partition("=")
        pack_model(model, choices.output / "models" / role)
    scale = SCALES[choices.scale]
    for task in choices.tasks or tasks_of(choices.target, scale):
        pack_rows(scale, choices.target, task, choices.data_dir / task, choices.output / "data" / task)
    if choices.wheels:
        pack_wheels(choices.wheels, choices.python, choices.output / "wheels")
    sizes = {str(f.relative_to(choices.output)): f.stat().st_size for f in choices.output.rglob("*") if f.is_file()}
    total = sum(sizes.values()) / 2**20
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 2**20:8.2f} MiB  {name}")
    print(f"{total:8.2f} MiB  in all")
    if total > choices.most:
        raise SystemExit(
            f"{choices.output} holds {total:.1f} MiB, more than --most {choices.most:g}: take fewer tasks."
        )


def pack_model(model: str, output: Path) -> None:
    """A model of the Hub or a folder, with its weights in float16."""
    folder = (
        Path(model)
        if Path(model).is_dir()
        else Path(snapshot_download(model, allow_patterns=["*.safetensors", *KINDS]))
    )
    output.mkdir(parents=True)
    for kind in KINDS:
        for file in folder.glob(kind):
            shutil.copy(file, output)
    for file in folder.glob("*.safetensors"):
        halves = {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(halves, output / file.name, {"format": "pt"})


def pack_rows(scale: Scale, target: str, task: str, source: Path, output: Path) -> None:
    """The rows that the runs of a task see."""
    options = scale.tasks[task].options | getattr(scale, f"{target}_options", {}).get(task, {})
    output.mkdir(parents=True)
    for split, limit in SPLITS.items():
        with (source / f"{split}.jsonl").open(encoding="utf-8") as rows:
            few = itertools.islice(rows, options.get(limit))
            (output / f"{split}.jsonl").write_text("".join(few), encoding="utf-8")
    for names in source.glob("*_names.json"):
        shutil.copy(names, output)


def pack_wheels(packages: Sequence[str], python: str, output: Path) -> None:
    """Wheels for Linux on a 64-bit PC, without what they need; made here of a package that has none."""
    platforms = [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_17", "2014", "1")]
    options = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    pip = [sys.executable, "-m", "pip"]
    for name in packages:
        wanted = ["--quiet", "--no-deps", f"{name}=={importlib.metadata.version(name)}"]
        found = subprocess.run([*pip, "download", *options, "--dest", str(output), *wanted], check=False)
        if found.returncode != 0:
            # One that is compiled here would not serve another Python.
            subprocess.run([*pip, "wheel", "--wheel-dir", str(output), *wanted], check=True)
            if any(not wheel.stem.endswith("-none-any") for wheel in output.glob(f"{name.replace('-', '_')}-*.whl")):
                raise SystemExit(f"{name} has no wheel for Python {python}, and is not of Python alone: leave it out.")


if __name__ == "__main__":
    main()
