"""What it takes to decompose weights: one matrix by each way that there is, and all of a model."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rankdyna_trainer import RankDynaConfig, inject_singular_groups
from rankdyna_trainer.layers.decomposition import singular_groups
from rankdyna_trainer.layers.dense import dense_weight
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.report.timing import timed

from ..bench import Bench
from ..measuring import Rows
from ..models import DEVICE, SHAPES, load_model, random_batch
from ..quick_groups import gram_groups
from ..sides import DenseFirstSide, Run

Way = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Taken = dict[tuple[str, tuple[int, int]], float]  # seconds, by way and shape
CONFIG = RankDynaConfig(param_ratio=0.2, rank_warmup_steps=2, rank_cooldown_steps=0.6)


def decomposition(bench: Bench) -> None:
    """Each way on one matrix, then all of an encoder, as far as the time allows; last larger matrices."""
    start = time.monotonic()
    seconds = min(bench.sizes.decomposition_seconds, bench.remaining)
    rows: Rows = []
    taken: Taken = {}
    for shape in bench.sizes.matrices:
        _try_all(bench, shape, rows, taken, start + seconds / 2)
    _whole_models(bench, taken, start + seconds)
    for shape in bench.sizes.larger_matrices:
        _try_all(bench, shape, rows, taken, start + seconds)
    _sums(bench, taken)


def _try_all(bench: Bench, shape: tuple[int, int], rows: Rows, taken: Taken, ends: float) -> None:
    """The quickest ways first; those that failed on another matrix, or would not end in time, are left out."""
    worked = [name for name in ways() if not taken or any(way == name for way, _ in taken)]
    for name in sorted(worked, key=lambda each: _expected(taken, each, shape)):
        way, device, dtype = ways()[name]
        row: dict[str, Any] = {"matrix": f"{shape[0]}x{shape[1]}", "way": name}
        expected = _expected(taken, name, shape)
        if time.monotonic() + expected > ends:
            rows.append(row | {"s": "", "error": "", "left out": f"would take about {expected:.1f} s"})
        else:
            rows.append(row | _tried(way, torch.randn(*shape, device=device).to(dtype)))
        if isinstance(rows[-1]["s"], float):
            taken[name, shape] = rows[-1]["s"]
        bench.show("matrices", rows)


def ways() -> dict[str, tuple[Way, torch.device, torch.dtype]]:
    """By name, with the device and the type of the numbers."""
    cpu = torch.device("cpu")
    found: dict[str, tuple[Way, torch.device, torch.dtype]] = {
        "library, float64": (singular_groups, DEVICE, torch.float64),
        "library on the CPU, float64": (singular_groups, cpu, torch.float64),
    }
    for dtype in (torch.float64, torch.float32):
        label = str(dtype).removeprefix("torch.")
        found[f"eigenvectors of the smaller Gram matrix, {label}"] = (gram_groups, DEVICE, dtype)
        found[f"svd_lowrank to a quarter, {label}"] = (_lowrank, DEVICE, dtype)
        for driver in ("gesvdj", "gesvda", "gesvd") if DEVICE.type == "cuda" else ():
            found[f"{driver}, {label}"] = (partial(_by_driver, driver), DEVICE, dtype)
    return found


def _by_driver(driver: str, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    return u.t(), sigma, v


def _lowrank(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, v = torch.svd_lowrank(matrix, q=min(matrix.shape) // 4)
    return u.t(), sigma, v.t()


def _tried(way: Way, matrix: Tensor) -> dict[str, Any]:
    """The seconds, of a few the median where they are short, and how far the product is from the matrix."""
    found: list[Tensor] = []

    def work() -> None:
        found[:] = way(matrix)

    try:
        way(torch.randn(16, 8).to(matrix))  # what only the first call pays for
        seconds = [timed(work)]
        while len(seconds) < 3 and seconds[0] < 0.3:
            seconds.append(timed(work))
        exact = matrix.double()
        u, sigma, v = (part.double() for part in found)
        error = float(((u.t() * sigma) @ v - exact).norm() / exact.norm())
        return {"s": statistics.median(seconds), "error": error}
    except (RuntimeError, ValueError) as failure:
        return {"s": "", "error": "", "left out": str(failure).splitlines()[0]}


def _expected(taken: Taken, name: str, shape: tuple[int, int]) -> float:
    """Seconds, by the largest matrix that was tried: they grow as the operations do."""
    known = {other: seconds for (way, other), seconds in taken.items() if way == name}
    if not known:
        return 0.0
    nearest = max(known, key=lambda other: other[0] * other[1])
    return known[nearest] * shape[0] * shape[1] * min(shape) / (nearest[0] * nearest[1] * min(nearest))


def _whole_models(bench: Bench, taken: Taken, ends: float) -> None:
    layers, *rest = SHAPES[bench.sizes.encoder]
    model = load_model(bench.sizes.encoder, bench.seed)
    shapes = [tuple(dense_weight(layer).shape) for layer in find_targets(model, CONFIG).values()]
    of_a_layer = sum(_expected(taken, "library, float64", (max(s), min(s))) for s in shapes) / layers
    fitting = max(1, min(layers, int((ends - time.monotonic()) / 3 / max(of_a_layer, 1e-9))))
    name = "x".join(map(str, (fitting, *rest)))
    rows: Rows = []

    def note(what: str, seconds: float, count: int) -> None:
        rows.append({"what": what, "layers": count, "s": seconds, f"of {layers} layers, s": seconds * layers / count})
        bench.show("models", rows)

    note("injection on the CPU", timed(partial(inject_singular_groups, model.cpu(), CONFIG)), layers)
    model = load_model(name, bench.seed)
    note("injection, groups of the weights", timed(partial(inject_singular_groups, model, CONFIG)), fitting)
    model = load_model(name, bench.seed)
    size, length = bench.sizes.encoder_batch, bench.sizes.encoder_length
    batches = [random_batch(model, size, length) for _ in range(-(-512 // size))]
    side = DenseFirstSide(model, Run(CONFIG, 8, True, rows=batches))
    side.step(1, random_batch(model, size, length))
    note("512 rows and the groups in their metric", side.own_seconds[0], fitting)


def _sums(bench: Bench, taken: Taken) -> None:
    """Of a decoder of 16 layers, each four square matrices and three larger ones."""
    square, larger = bench.sizes.larger_matrices
    total = f"16 x (4 of {square[0]}x{square[1]} + 3 of {larger[0]}x{larger[1]}), a sum, s"
    rows: Rows = []
    for name in dict.fromkeys(way for way, _ in taken):
        measured = sum((name, shape) in taken for shape in (square, larger))
        seconds = 16 * (4 * _expected(taken, name, square) + 3 * _expected(taken, name, larger))
        rows.append({"way": name, total: seconds, "of these two measured": measured})
    bench.show("decoder of 1B", rows)
