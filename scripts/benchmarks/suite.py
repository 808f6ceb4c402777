"""All parts of a suite one after another, each of which may fail without the others."""

import argparse
import gc
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from .bench import Bench
from .measuring import Results
from .models import DEVICE
from .parts.ceilings import ceilings
from .parts.compiled import compiled
from .parts.decode import decode
from .parts.decomposition import decomposition
from .parts.fine_tuning import launches, llama_train, memory, train
from .parts.inference import inference
from .sizes import SIZES
from .writing import markdown, replace_text, versions, write_json

# By importance: what comes last may find no time left. The others are shown beside the first.
PARTS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings,
    "train": train,
    "profile": launches,
    "memory": memory,
    "decomposition": decomposition,
    "inference": inference,
    "decode": decode,
    "llama-train": llama_train,
    "compiled": compiled,
}


def suite(options: argparse.Namespace) -> Results:
    """Measure a whole table in one command, and write what there is after each part: a JSON and a Markdown file."""
    sizes = SIZES[options.name]
    if options.name != "tiny" and DEVICE.type != "cuda":
        raise SystemExit(f"The suite {options.name} needs a GPU: --suite tiny runs everywhere.")
    parts: dict[str, Results] = {}

    def write() -> None:
        write_json(options, _results(parts))
        replace_text(options.output.with_suffix(".md"), _page(options.name, parts))

    bench = Bench(sizes, options.seed, time.monotonic() + options.budget, write)
    for name in PARTS:
        if name not in ("ceilings", *options.parts):
            continue
        part = parts[name] = bench.results = {}
        if bench.remaining <= (sizes.compiled_seconds if name == "compiled" else 0):
            part["left out"] = f"{max(0, bench.remaining):.0f} s of the budget were left"
        else:
            _run(name, bench)
        print(f"{name}: {part.get('seconds', 0):.1f} s {part.get('left out', '')} {part.get('error', '')}", flush=True)
        write()
    return _results(parts)


def _run(name: str, bench: Bench) -> None:
    start = time.monotonic()
    torch.manual_seed(bench.seed)
    try:
        PARTS[name](bench)
    except Exception:
        # As text: the traceback itself would keep the tensors of its frames.
        bench.results["error"] = traceback.format_exc()
    bench.results["seconds"] = time.monotonic() - start
    if name == "compiled":
        torch._dynamo.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def _results(parts: dict[str, Results]) -> Results:
    tables = {
        f"{name}: {title}": rows for name, part in parts.items() for title, rows in part.get("tables", {}).items()
    }
    others = {name: {key: value for key, value in part.items() if key != "tables"} for name, part in parts.items()}
    return {"tables": tables, "parts": others}


def _page(name: str, parts: dict[str, Results]) -> str:
    found = versions()
    lines = [f"# {name}", ", ".join(f"{key} {value}" for key, value in found.items())]
    for title, part in parts.items():
        lines.append(f"## {title}, {part.get('seconds', 0):.1f} s")
        lines += [f"Left out: {part['left out']}"] if "left out" in part else []
        lines += [f"```text\n{part['error'].strip()}\n```"] if "error" in part else []
        lines += [f"{table}\n\n{markdown(rows)}" for table, rows in part.get("tables", {}).items()]
    return "\n\n".join(lines) + "\n"


def output_file(output: Path, name: str) -> Path:
    """The JSON file: that of the suite's name in a folder, which is made."""
    if output.suffix == ".json":
        output.parent.mkdir(parents=True, exist_ok=True)
        return output
    output.mkdir(parents=True, exist_ok=True)
    return output / f"{name}.json"
