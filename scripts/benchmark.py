"""
How long a RankDyna run takes and how much memory, and how fast its model is, beside dense fine-tuning and other ways.

    python scripts/benchmark.py train --model minilm --batch 32 --length 64 --param_ratio 0.2 --output train.json

Subcommands: train, inference, factorization, memory, selection, profile. Each prints Markdown tables; the JSON file
also has every single timing. What is compared is timed in turns: what else the machine does then falls on all of it.

A whole table of a GPU, in one command, into a JSON and a Markdown file:

    python scripts/benchmark.py --suite h100 --output h100.json
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from benchmarks.device_time import WARM_UP, marked, wait
from benchmarks.launches import profile_steps
from benchmarks.measuring import Results, Rows, median_ratio, spread, started
from benchmarks.models import DEVICE, SHAPES, load_model, random_batch, singular_group_layers, truncate
from benchmarks.operations import Workload, compacted, count_operations
from benchmarks.sides import SIDES
from benchmarks.sizes import SIZES
from benchmarks.suite import PARTS, output_file, suite
from benchmarks.training import memory, run_of, train
from benchmarks.writing import markdown, write_json
from torch import Tensor, nn

from rankdyna_trainer import RankDynaConfig, inject_singular_groups, rank_report
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.method.allocation import select_groups
from rankdyna_trainer.report.timing import timed

# Output and input sizes of the linear layers of Llama 7B: 32 times q, k, v, o, gate, up, down.
LLAMA = 32 * [*4 * [(4096, 4096)], (11008, 4096), (11008, 4096), (4096, 11008)]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The choices. `--suite NAME` is short for `suite --name NAME`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if any(word.partition("=")[0] == "--suite" for word in words):
        words = ["suite", *(word.replace("--suite", "--name", 1) for word in words)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.add_argument("--threads", type=int, help="of torch in each process")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--output", type=Path, required=True, help="JSON file to write")
        if name == "suite":
            _add_choices_of_suite(command)
            continue
        if name != "selection":
            shapes = f"{', '.join(SHAPES)} or LAYERSxHIDDENxFFNxHEADS with random weights, or a folder or Hub name"
            command.add_argument("--model", default="minilm", help=shapes)
        if name in ("train", "inference", "memory", "profile"):
            several = {"nargs": "+", "default": [1, 32]} if name == "inference" else {"default": 32}
            command.add_argument("--batch", type=int, **several)
            command.add_argument("--length", type=int, default=128 if name == "inference" else 64, help="in tokens")
            command.add_argument("--dtype", choices=["float32", "bf16"], default="float32", help="bf16 is autocast")
        if name in ("train", "memory", "profile"):
            command.add_argument("--steps", type=int, default=60, help="of the whole run")
            command.add_argument(
                "--warmup", type=float, default=0.05, help="the part of them before the first removal"
            )
            command.add_argument("--cooldown", type=float, default=0.6, help="their part at the final budget")
            start = "the part of the target layers' parameters with which the groups begin"
            command.add_argument("--start_ratio", type=float, help=start)
            ratio = command.add_mutually_exclusive_group(required=True)
            ratio.add_argument("--rank_ratio", type=float)
            ratio.add_argument("--param_ratio", type=float)
        else:
            command.add_argument("--repeats", type=int, default=3 if name == "factorization" else 30)
        if name == "train":
            command.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="dense is always run")
        if name == "memory":
            command.add_argument(
                "--sides",
                nargs="+",
                choices=["rankdyna", "dense-first"],
                default=["rankdyna"],
                help="beside dense; dense-first is how a Trainer does it by default",
            )
        if name == "inference":
            command.add_argument("--param_ratios", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.05])
        if name == "selection":
            command.add_argument("--groups", type=int, default=1_000_000)
            command.add_argument("--layers", type=int, default=224)
            command.add_argument("--ratio", type=float, default=0.2, help="the budget, of all groups or numbers")
    options = parser.parse_args(words)
    if options.command == "suite":
        options.output = output_file(options.output, options.name)
    return options


def _add_choices_of_suite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", choices=SIZES, required=True, help="of the sizes")
    command.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these, and the ceilings")
    command.add_argument("--budget", type=float, default=360, help="seconds after which no part is begun")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    options = parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = COMMANDS[options.command](options)
    write_json(options, results)
    print("\n\n".join(markdown(rows) for rows in results["tables"].values() if rows))


def inference(options: argparse.Namespace) -> Results:
    """Time compacted models beside the dense one: the whole model, and its target layers alone."""
    dense = load_model(options.model, options.seed).eval()
    config = RankDynaConfig(param_ratio=0.5)
    names = list(find_targets(dense, config))
    injected = inject_singular_groups(copy.deepcopy(dense), config)
    models: dict[str, nn.Module] = {"dense": dense}
    ranks = {"dense": [layer.full_rank for layer in singular_group_layers(injected)]}
    for ratio in options.param_ratios:
        models[str(ratio)] = truncate(copy.deepcopy(injected), RankDynaConfig(param_ratio=ratio))
        ranks[str(ratio)] = rank_report(models[str(ratio)])["rank"].tolist()
    rows: Rows = []
    slower: Rows = []
    details: Rows = []
    for size in options.batch:
        batch = random_batch(dense, size, options.length)
        work = count_operations(dense, config, batch)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=options.dtype == "bf16"):
            seconds = time_models(models, names, batch["input_ids"], work, options.repeats)
        linear = {label: np.sum([times[name] for name in names], axis=0) for label, times in seconds.items()}
        for label, times in seconds.items():
            operations = work.of_targets(compacted, ranks[label])
            row = {
                "batch": size,
                "param_ratio": label,
                "model, ms": spread(times["model"]),
                "speed-up": median_ratio(seconds["dense"]["model"], times["model"]),
                "promised": (work.dense + work.rest) / (operations + work.rest),
                "target layers, ms": spread(linear[label]),
                "their speed-up": median_ratio(linear["dense"], linear[label]),
                "promised to them": work.dense / operations,
            }
            rows.append(row)
            details.append({"batch": size, "param_ratio": label, "ranks": ranks[label], "seconds": times})
            if size == 1:
                behind = {name: median_ratio(times[name], seconds["dense"][name]) for name in names}
                slower += [
                    {"param_ratio": label, "slower than dense at batch 1": name, "time / dense": ratio}
                    for name, ratio in behind.items()
                    if ratio > 1
                ]
    return {"tables": {"models": rows, "slower": slower}, "timings": details}


@torch.inference_mode()
def time_models(
    models: dict[str, nn.Module], names: list[str], tokens: Tensor, work: Workload, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """The seconds of each model's forward passes, under "model", and of those of its target layers, by name."""
    inputs = [torch.randn(rows, into, device=DEVICE) for rows, _, into in work.layers]
    seconds: dict[str, dict[str, list[float]]] = {label: {part: [] for part in ("model", *names)} for label in models}
    for number in range(-WARM_UP, repeats):
        for label in models if number % 2 else reversed(models):
            marks = {"model": marked(partial(models[label], input_ids=tokens))}
            for name, x in zip(names, inputs, strict=True):
                marks[name] = marked(partial(models[label].get_submodule(name), x))
            wait()
            if number >= 0:
                for part, (start, end) in marks.items():
                    seconds[label][part].append(end.seconds_since(start))
    return seconds


def factorization(options: argparse.Namespace) -> Results:
    """Time the injection without a cache, with an empty and a filled one, and in two processes that share one."""
    model = load_model(options.model, options.seed)
    seconds: dict[str, list[float]] = {}
    cache_bytes = 0
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for case, folder in (("no cache", None), ("empty cache", cache), ("filled cache", cache)):
                seconds.setdefault(case, []).append(injection_seconds(model, folder))
            cache_bytes = sum(file.stat().st_size for file in Path(cache).iterdir())
        with tempfile.TemporaryDirectory() as cache:
            both = [started(inject_in_child, options, cache) for _ in range(2)]
            for child in both:
                child.recv()
            for child in both:
                child.send("start")
            seconds.setdefault("each of two processes, empty cache", []).extend(child.recv() for child in both)
    rows = [{"case": case, "injection, ms": spread(times)} for case, times in seconds.items()]
    return {"tables": {"injections": rows}, "seconds": seconds, "cache_bytes": cache_bytes}


def injection_seconds(model: nn.Module, cache: str | None) -> float:
    """Of a copy of the model."""
    config = RankDynaConfig(rank_ratio=0.5, factorization_cache=cache)
    return timed(partial(inject_singular_groups, copy.deepcopy(model), config))


def inject_in_child(options: argparse.Namespace, cache: str, connection: Connection) -> None:
    """Tell when the model is loaded, wait for the other process, and tell the seconds."""
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(options.model, options.seed)
    connection.send("ready")
    connection.recv()
    connection.send(injection_seconds(model, cache))


def selection(options: argparse.Namespace) -> Results:
    """Time the choice of the groups that remain, over many groups, and say what a 7B model needs."""
    torch.manual_seed(options.seed)
    sizes = [len(part) for part in np.array_split(np.arange(options.groups), options.layers)]
    models = {"square layers": [(size, size) for size in sizes], "Llama 7B": LLAMA}
    timings: Rows = []
    rows: Rows = []
    for label, shapes in models.items():
        scores = [torch.rand(min(shape), device=DEVICE) for shape in shapes]
        groups = sum(map(len, scores))
        # A weight, its gradient and Adam's two moments for each number, in float32.
        dense = 16 * sum(out * into for out, into in shapes)
        factored = 16 * sum(min(out, into) * (out + into + 1) for out, into in shapes)
        row = {"model": label, "layers": len(shapes), "groups": groups, "scores, MB": 4 * groups / 1e6}
        row |= {"trained dense, GB": dense / 1e9, "trained in groups, GB": factored / 1e9}
        budgets = {
            "rank": ([1] * len(shapes), [min(shape) for shape in shapes]),
            "param": ([out + into for out, into in shapes], [out * into for out, into in shapes]),
        }
        for budget, (costs, caps) in budgets.items():
            select = partial(select_groups, scores, costs, caps, int(options.ratio * sum(caps)))
            seconds = [timed(select) for _ in range(options.repeats)]
            row[f"{budget} budget, ms"] = spread(seconds)
            timings.append({"model": label, "budget": budget, "seconds": seconds})
        rows.append(row)
    return {"tables": {"selections": rows}, "timings": timings}


def profile(options: argparse.Namespace) -> Results:
    """Count the operators, kernels and waits of a training step of each kind, and those of the method itself."""
    return profile_steps(options, run_of(options))


COMMANDS: dict[str, Callable[[argparse.Namespace], Results]] = {
    function.__name__: function for function in (train, inference, factorization, memory, selection, profile, suite)
}

if __name__ == "__main__":
    main()
