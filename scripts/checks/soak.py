"""
Kill a compression run with SIGKILL again and again, at random moments and while it saves, resume it each time from its
last complete checkpoint, and compare what it ends with, to the last bit, with a run that nothing stopped.

    python scripts/checks/soak.py --kills 50

After each kill the compacted model of the folder must be whole, or refused. Exits with 1 if any of that is not so.
"""

import argparse
import contextlib
import filecmp
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import save
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

# Whole epochs: a Trainer that resumes after the last step of a run, but inside of an epoch, does one step more.
EPOCHS, STEPS, SAVE_STEPS, BATCH = 3, 60, 2, 8
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
    "adafactor": (transformers.Adafactor, {"lr": 1e-3, "scale_parameter": False, "relative_step": False}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
}
WEIGHTS = ("model.safetensors", f"checkpoint-{STEPS}/model.safetensors")
SAVE_SECONDS = {"checkpoint-": 0.02, "_rankdyna-": 0.006}  # about, by the prefix of the folder that is written
# Each training is a new process, forked from a server that has imported the libraries but computed nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["rankdyna_trainer", "transformers.trainer", "transformers.models.bert.modeling_bert"]


class Case(NamedTuple):
    """What is trained."""

    optimizer: str
    load_best_model_at_end: bool
    seed: int
    sizes: tuple[float, ...]


@dataclass
class Counts:
    """The table that is printed."""

    runs: int = 0
    kills: int = 0
    kills_in_a_checkpoint_save: int = 0
    kills_in_the_compacted_save: int = 0
    resumes: int = 0
    half_written_models_loaded: int = 0
    runs_that_differ: int = 0
    largest_weight_difference: float = 0.0
    largest_score_difference: float = 0.0


def main() -> None:
    """Run, kill and resume until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many in all")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rank_ratio", type=float, nargs="+", default=[0.3], help="several: the model of each size is compared too"
    )
    parser.add_argument("--output_dir", type=Path, help="where the runs stay; by default they are deleted")
    options = parser.parse_args()
    random.seed(options.seed)
    quiet()
    PROCESSES.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as temporary:
        root, sizes = options.output_dir or Path(temporary), tuple(options.rank_ratio)
        counts = soak(root, options.kills, options.optimizers, options.seed, sizes)
    print(pd.Series({key.replace("_", " "): str(value) for key, value in vars(counts).items()}).to_string())
    if counts.half_written_models_loaded or counts.runs_that_differ:
        sys.exit("A killed run ended with another model, or left a half-written one.")


def soak(root: Path, kills: int, optimizers: list[str], seed: int, sizes: tuple[float, ...]) -> Counts:
    """One killed run after another: each optimizer in turn, in every second round with the best checkpoint."""
    counts = Counts()
    _, old = finished(root / "old", Case(optimizers[0], False, seed + 1, sizes))
    with tqdm(total=kills, unit="kill") as progress:
        while counts.kills < kills:
            best = counts.runs // len(optimizers) % 2 == 1
            case = Case(optimizers[counts.runs % len(optimizers)], best, seed, sizes)
            reference = root / f"reference-{case.optimizer}{'-best' if case.load_best_model_at_end else ''}"
            seconds, new = finished(reference, case)
            # The folder holds a compacted model already: its files and the new ones must not mix.
            folder = root / f"run-{counts.runs}"
            shutil.copytree(root / "old", folder, ignore=shutil.ignore_patterns("checkpoint-*"))
            # A kill in the save of the compacted model is the last: the training itself is over then.
            moments = [*random.sample(["any", "any", "checkpoint-"], 3), "_rankdyna-"][: kills - counts.kills]
            for moment in [*moments, "end"]:
                if not killed(folder, case, moment, seconds, counts):
                    break
                counts.half_written_models_loaded += load_compacted(folder) not in (None, old, new)
                progress.update()
            counts.runs += 1
            compare(folder, reference, sizes, counts)
    return counts


@cache
def finished(folder: Path, case: Case) -> tuple[float, bytes]:
    """Train without a kill; returns the seconds that it took, and the compacted model."""
    folder.mkdir(parents=True)
    started = time.perf_counter()
    trained(folder, case)
    seconds, compacted = time.perf_counter() - started, load_compacted(folder)
    if compacted is None:
        sys.exit(f"The compacted model in {folder} cannot be loaded, though nothing stopped its training.")
    return seconds, compacted


def killed(folder: Path, case: Case, moment: str, seconds: float, counts: Counts) -> bool:
    """Train on until the moment; false if the training ended before that."""
    before, started = set(os.listdir(folder)), time.time()
    if trained(folder, case, moment, seconds * (1 - step(last_complete(folder)) / STEPS)):
        return False
    counts.kills += 1
    counts.resumes += 1
    counts.kills_in_the_compacted_save += any(name.startswith("_rank") for name in {*os.listdir(folder)} - before)
    newest = max(folder.glob("checkpoint-*"), key=step, default=None)
    if newest is not None and not is_complete(newest):  # because of this kill, or of an earlier one
        written = [path.stat().st_mtime for path in (newest, *newest.iterdir())]
        counts.kills_in_a_checkpoint_save += max(written) >= started
    return True


def trained(folder: Path, case: Case, moment: str = "end", seconds: float = 0.0) -> bool:
    """Train in a process of its own until the moment, any of the next seconds or in a save; false if it was killed."""
    process = PROCESSES.Process(target=train, args=(folder, case))
    process.start()
    if moment in SAVE_SECONDS:
        wait_for_save(process, folder, moment)
    else:
        process.join(random.uniform(0, seconds) if moment == "any" else None)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        sys.exit(f"The training in {folder} failed with exit code {process.exitcode}.")
    return process.exitcode == 0


def wait_for_save(process: multiprocessing.process.BaseProcess, folder: Path, prefix: str) -> None:
    """Until it saves, after none or some other saves, into a new folder of that prefix."""
    seen, saves = set(os.listdir(folder)), random.randint(1, 6) if prefix == "checkpoint-" else 1
    while saves > 0 and process.is_alive():
        now = set(os.listdir(folder))
        saves -= sum(name.startswith(prefix) for name in now - seen)
        seen |= now
        time.sleep(0.0005)
    time.sleep(random.uniform(0, SAVE_SECONDS[prefix]))


def train(folder: Path, case: Case) -> None:
    """What is killed: an ordinary run, with dropout, that goes on from the last complete checkpoint."""
    quiet()
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    # The first batch would set the problem type, but none is left for a run that resumes after its last step.
    config = BertConfig(vocab_size=2000, problem_type="single_label_classification", **sizes)
    rows = [{"input_ids": row, "labels": row[0] % 2} for row in torch.randint(2, 2000, (BATCH * STEPS // EPOCHS, 12))]
    args = TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=SAVE_STEPS,
        load_best_model_at_end=case.load_best_model_at_end,
        seed=case.seed,
        disable_tqdm=True,
        use_cpu=True,
    )
    model, optimizer = AutoModelForSequenceClassification.from_config(config), OPTIMIZERS[case.optimizer]
    plugin = RankDynaCallback(RankDynaConfig(rank_ratio=[*case.sizes]))
    trainer = Trainer(
        model, args, train_dataset=rows, eval_dataset=rows[:16], callbacks=[plugin], optimizer_cls_and_kwargs=optimizer
    )
    with contextlib.redirect_stdout(None):
        trainer.train(resume_from_checkpoint=last_complete(folder))


def compare(folder: Path, reference: Path, sizes: tuple[float, ...], counts: Counts) -> None:
    """Count what differs in the compacted models and, for the scores, in the last checkpoint of the training."""
    weights = [*WEIGHTS, *(f"rank_ratio-{size:g}/model.safetensors" for size in sizes[:-1])]
    files = ["config.json", *weights]
    counts.runs_that_differ += not all(filecmp.cmp(folder / file, reference / file, shallow=False) for file in files)
    for file in weights:
        arrays, expected = load_file(folder / file), load_file(reference / file)
        for key, other in expected.items():
            name = f"largest_{'score' if key.endswith('.importance') else 'weight'}_difference"
            equal_shapes = key in arrays and arrays[key].shape == other.shape
            size = np.abs(arrays[key] - other.astype(float)).max(initial=0.0) if equal_shapes else float("inf")
            setattr(counts, name, max(getattr(counts, name), size))


def load_compacted(folder: Path) -> bytes | None:
    """The tensors of the model in the folder, loaded as a user loads it; none if that is refused."""
    with contextlib.suppress(OSError, ValueError):
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        return save(model.state_dict())
    return None


def last_complete(folder: Path) -> Path | None:
    """The checkpoint to resume from."""
    return max(filter(is_complete, folder.glob("checkpoint-*")), key=step, default=None)


def is_complete(checkpoint: Path) -> bool:
    """Whether all was written: the Trainer writes this file last."""
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    return False


def step(checkpoint: Path | None) -> int:
    """At which it was saved, 0 without one."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def quiet() -> None:
    """Leave the screen to the progress bar of the kills."""
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own lock spans processes, and would be leaked by those that are killed


if __name__ == "__main__":
    main()
