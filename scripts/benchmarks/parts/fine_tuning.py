"""The parts that train: time, launches and memory of a step."""

import argparse
import copy
import gc
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
from rankdyna_trainer.method.schedule import RankBudgetSchedule
from rankdyna_trainer.report.timing import timed

from ..bench import Bench
from ..launches import profile_steps
from ..measuring import Rows
from ..memory import forget_peak, peak_memory
from ..models import DEVICE, load_model, random_batch
from ..operations import count_operations
from ..quick_groups import Decompose, gram_groups, groups_from, random_groups
from ..sides import DenseFirstSide, RankDynaSide, Run, Side
from ..turns import details_of, phases, run_in_turns, whole_runs

Kinds = Mapping[str, tuple[type[Side], RankDynaConfig]]
CONFIG = RankDynaConfig(param_ratio=0.2, rank_warmup_steps=0.2, rank_cooldown_steps=0.6)
SELDOM = replace(CONFIG, rank_update_interval=10, rank_multiple_of=8)


def train(bench: Bench) -> None:
    """A step of an encoder in each phase, beside a dense one."""
    seldom = replace(CONFIG, rank_update_interval=10)
    kinds: Kinds = {
        "dense": (Side, CONFIG),
        "dense-first": (DenseFirstSide, CONFIG),
        "dense-first, every 10 steps": (DenseFirstSide, seldom),
        "rankdyna": (RankDynaSide, CONFIG),
    }
    _train(bench, bench.sizes.encoder, kinds, Run(CONFIG, bench.sizes.steps, True), gram_groups)


def llama_train(bench: Bench) -> None:
    """A step of a decoder in each phase, beside a dense one. Its groups are random: only the time counts."""
    kinds: Kinds = {"dense": (Side, CONFIG), "dense-first, every 10 steps, multiples of 8": (DenseFirstSide, SELDOM)}
    _train(bench, bench.sizes.decoder, kinds, Run(CONFIG, bench.sizes.decoder_steps, True), random_groups)


def compiled_train(bench: Bench) -> None:
    """As `train`, with a compiled forward pass on both sides. A step before which it is compiled anew is slow."""
    kinds: Kinds = {"dense": (Side, CONFIG), "dense-first, every 10 steps, multiples of 8": (DenseFirstSide, SELDOM)}
    run = Run(CONFIG, bench.sizes.compiled_steps, True, backend=bench.sizes.backend)
    _train(bench, bench.sizes.encoder, kinds, run, gram_groups)


def _train(bench: Bench, name: str, kinds: Kinds, run: Run, decompose: Decompose) -> None:
    sizes = bench.sizes
    of_encoder = name == sizes.encoder
    batch = sizes.encoder_batch if of_encoder else sizes.decoder_batch
    length = sizes.encoder_length if of_encoder else sizes.decoder_length
    model = load_model(name, bench.seed)
    make_batch = partial(random_batch, model, batch, length)
    work = count_operations(model, CONFIG, make_batch())
    run = replace(run, rows=[make_batch() for _ in range(math.ceil(512 / batch))])
    with groups_from(decompose):
        sides: dict[str, Side] = {}
        for label, (kind, config) in kinds.items():
            own = copy.deepcopy(model)
            if kind.takes_groups:
                inject_singular_groups(own, config)
            sides[label] = kind(own, replace(run, config=config))
        first = {label: timed(partial(side.warm_up, make_batch())) for label, side in sides.items()}
        noted = run_in_turns(sides, run.steps, sizes.turn, work, make_batch)
    details = {label: details_of(side, noted[label]) for label, side in sides.items()}
    bench.results |= {"seconds of the first pass": first, "sides": details}
    schedule = RankBudgetSchedule.of(CONFIG, run.steps)
    bench.show("phases", phases(details, schedule, bench.rate, bench.bandwidth))
    bench.show("runs", whole_runs(details))


def launches(bench: Bench) -> None:
    """Operators, kernels and waits of a step of each kind."""
    sizes = bench.sizes
    options = argparse.Namespace(
        model=sizes.encoder, seed=bench.seed, batch=sizes.encoder_batch, length=sizes.encoder_length
    )
    results = profile_steps(options, Run(CONFIG, sizes.profiled_steps, True))
    bench.results["details"] = results["details"]
    bench.show("steps", results["tables"]["steps"])


def memory(bench: Bench) -> None:
    """The peak of each step, and what its numbers take in theory: weights, gradients and Adam's moments."""
    sizes = bench.sizes
    peaks: dict[str, dict[str, float]] = {}
    for label, kind in (("dense", Side), ("dense-first", DenseFirstSide)):
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        forget_peak()
        before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else peak_memory()
        model = load_model(sizes.encoder, bench.seed)
        make_batch = partial(random_batch, model, sizes.encoder_batch, sizes.encoder_length)
        rows = [make_batch() for _ in range(math.ceil(512 / sizes.encoder_batch))]
        side = kind(model, Run(CONFIG, sizes.memory_steps, True, rows=rows))
        peaks[label] = {"in theory, first step": side.bytes_held() / 1e6}
        for number in range(1, sizes.memory_steps + 1):
            forget_peak()
            with groups_from(gram_groups):
                side.step(number, make_batch())
            peaks[label][f"step {number}"] = (peak_memory() - before) / 1e6
        peaks[label]["in theory, last step"] = side.bytes_held() / 1e6
        if isinstance(side, RankDynaSide):
            bench.results["factored in step"] = side.first_in_groups - 1
        del side, model
    bench.results["details"] = peaks
    stages = list(dict.fromkeys(stage for sizes_of in peaks.values() for stage in sizes_of))
    table: Rows = [{"peak, MB": stage} | {label: peaks[label].get(stage, "") for label in peaks} for stage in stages]
    bench.show("memory", table)
