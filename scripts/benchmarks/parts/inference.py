"""How fast compacted encoders are."""

import copy
import itertools
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from rankdyna_trainer import RankDynaConfig, inject_singular_groups, rank_report

from ..bench import Bench, bytes_read
from ..device_time import captured, seconds_in_turns
from ..measuring import Rows, median_ratio, spread
from ..models import DEVICE, load_model, random_batch, singular_group_layers, truncate
from ..operations import compacted, count_operations
from ..quick_groups import groups_from, random_groups

Works = dict[str, Callable[[], object]]


def shrunk(
    dense: PreTrainedModel, ratios: tuple[float, ...], multiples: tuple[int, ...] = (8,)
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The dense model and compacted ones with random weights, by ratio and multiple, in bf16; and their ranks."""
    models: dict[str, Any] = {"dense": dense.eval().to(torch.bfloat16)}
    ranks: dict[str, list[int]] = {}
    for ratio, multiple in itertools.product(ratios, multiples):
        config = RankDynaConfig(param_ratio=ratio, rank_multiple_of=multiple)
        with groups_from(random_groups):
            model = inject_singular_groups(copy.deepcopy(dense), config)
        ranks["dense"] = [layer.full_rank for layer in singular_group_layers(model)]
        label = str(ratio) if multiple == 1 else f"{ratio}, multiples of {multiple}"
        models[label] = truncate(model, config)
        ranks[label] = rank_report(models[label])["rank"].tolist()
    return models, ranks


def inference(bench: Bench) -> None:
    """Forward passes of an encoder, one by one and as a CUDA graph."""
    models, ranks = shrunk(load_model(bench.sizes.encoder, bench.seed), bench.sizes.inference_ratios, (1, 8))
    _forward_passes(bench, models, ranks, bench.sizes.inference_batches, compiled=False)


def compiled_inference(bench: Bench) -> None:
    """Forward passes of an encoder that are compiled."""
    dense, ranks = shrunk(load_model(bench.sizes.encoder, bench.seed), (bench.sizes.compiled_ratio,))
    models = {label: torch.compile(model, backend=bench.sizes.backend) for label, model in dense.items()}
    _forward_passes(bench, models, ranks, bench.sizes.inference_batches[-1:], compiled=True)


@torch.inference_mode()
def _forward_passes(
    bench: Bench, models: dict[str, Any], ranks: dict[str, list[int]], sizes: tuple[int, ...], compiled: bool
) -> None:
    rows: Rows = []
    details: Rows = []
    ways: dict[str, Callable[[Works], Works]] = {"compiled" if compiled else "eager": lambda works: works}
    if DEVICE.type == "cuda":
        ways["CUDA graph of that"] = _captured if compiled else graphs
    else:
        bench.results["left out"] = "CUDA graphs: there is no GPU"
    encoder = load_model(bench.sizes.encoder, bench.seed)
    for size in sizes:
        batch = random_batch(encoder, size, bench.sizes.encoder_length)
        work = count_operations(encoder, RankDynaConfig(param_ratio=1.0), batch)
        for way, prepared in ways.items():
            works: Works = {label: partial(model, input_ids=batch["input_ids"]) for label, model in models.items()}
            try:
                seconds = seconds_in_turns(prepared(works), bench.sizes.repeats, calls=5)
            except Exception:  # a graph that cannot be captured is no reason to lose the others
                details.append({"batch": size, "way": way, "error": traceback.format_exc()})
                bench.results["left out"] = f"{way}: see details"
                continue
            for label, times in seconds.items():
                multiply_adds = work.of_targets(compacted, ranks[label]) + work.rest
                row = {"batch": size, "way": way, "param_ratio": label, "forward, ms": spread(times)}
                row |= {"speed-up": median_ratio(seconds["dense"], times)}
                row |= {"promised": (work.dense + work.rest) / multiply_adds}
                rows.append(row | _floor(bench, times, 2 * multiply_adds, bytes_read(models[label])))
            details.append({"batch": size, "way": way, "seconds": seconds})
            bench.results["details"] = details
            bench.show("forward passes", rows)
    bench.results["details"] = details


def graphs(works: Works) -> Works:
    """The same as CUDA graphs, with the kernels that they start otherwise: transformers would add a mask to them."""
    with patch("transformers.masking_utils.is_tracing", return_value=False):
        return _captured(works)


def _captured(works: Works) -> Works:
    return {label: captured(work) for label, work in works.items()}


def _floor(bench: Bench, seconds: list[float], operations: int, read: int) -> dict[str, float]:
    by_operations, by_bytes = operations / bench.rate, read / bench.bandwidth
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "operations / rate, ms": 1000 * by_operations,
        "weights' bytes / bandwidth, ms": 1000 * by_bytes,
        "time / the larger": median / max(by_operations, by_bytes),
    }
