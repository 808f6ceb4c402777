"""What the device reaches at its best, and what the least thing costs."""

from functools import partial

import torch

from ..bench import Bench
from ..device_time import median_seconds
from ..models import DEVICE


def ceilings(bench: Bench) -> None:
    """The rate of a large product, the bandwidth of a large copy, a small operator, and a wait for its result."""
    size, repeats = bench.sizes.product, bench.sizes.repeats
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = median_seconds(partial(torch.mm, a, b, out=torch.empty_like(a)), repeats, calls=5)
    bench.rate = 2 * size**3 / product
    source = torch.randint(256, (bench.sizes.copy_bytes,), device=DEVICE, dtype=torch.uint8)
    copy = median_seconds(partial(torch.empty_like(source).copy_, source), repeats, calls=5)
    bench.bandwidth = 2 * source.nbytes / copy
    one = torch.ones(1, device=DEVICE)
    rows = [
        {"what": f"product of two matrices of {size} in bf16, TFLOP/s", "value": bench.rate / 1e12},
        {"what": f"copy of {source.nbytes / 1e6:.0f} MB, read and written, GB/s", "value": bench.bandwidth / 1e9},
        {"what": "operator on one number, us", "value": 1e6 * median_seconds(partial(one.add_, 1), repeats, 500)},
        {"what": "operator and wait for its result, us", "value": 1e6 * median_seconds(one.item, repeats, 100)},
    ]
    bench.show("ceilings", rows)
