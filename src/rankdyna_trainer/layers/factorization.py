"""The singular value decomposition of weights: exact, and of several at once where that is faster."""

import os
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from .decomposition import in_float64, singular_groups
from .dense import DenseLayer, dense_weight
from .factor_cache import FactorizationCache, Factors
from .low_rank import LowRankLinear
from .offloaded import device_of
from .whitening import whitened_factors

# What a decomposition holds while it runs, float64 copies and workspace, for each number of the weight.
_BYTES_PER_NUMBER = 64
# What all that run at once may hold: a weight of more than half of it is decomposed alone, by all of torch's threads.
_BYTES_AT_ONCE = 2**30


@torch.no_grad()
def factorize(weight: Tensor, cache: FactorizationCache | None = None) -> Factors:
    """
    The singular groups of a weight, largest `sigma` first, computed in float64 and given in the weight's dtype.

    Args:
        weight: `(out_features, in_features)`, finite.
        cache: in which the groups of this very weight are looked up and kept.

    Returns:
        `u` `(rank, out_features)`, `sigma` `(rank,)` and `v` `(rank, in_features)` with
        `rank = min(out_features, in_features)`, so that `weight = (u.T * sigma) @ v` (eq. 5).
    """
    if cache is None:
        return _decompose(weight)
    key = cache.key(weight)
    factors = cache.find(key, weight.device)
    if factors is None:
        factors = _decompose(weight)
        cache.keep(key, factors)
    return factors


@torch.no_grad()
def factorize_product(p: Tensor, q: Tensor) -> Factors:
    """
    The singular groups of `P Q`, largest `sigma` first, computed in float64 and without the product itself.

    Args:
        p: `(out_features, rank)`, finite.
        q: `(rank, in_features)`, finite; `rank` is at most `min(out_features, in_features)`.

    Returns:
        `u` `(rank, out_features)`, `sigma` `(rank,)` and `v` `(rank, in_features)`, in the dtype of P, so that
        `P Q = (u.T * sigma) @ v` (eq. 5).
    """
    left, left_triangle = torch.linalg.qr(in_float64(p))
    right, right_triangle = torch.linalg.qr(in_float64(q).t())
    u, sigma, v = torch.linalg.svd(left_triangle @ right_triangle.t())
    return (left @ u).t().to(p).contiguous(), sigma.to(p), (v @ right.t()).to(p).contiguous()


def factorize_layers(
    layers: Mapping[str, DenseLayer | LowRankLinear],
    cache: FactorizationCache | None = None,
    roots: Mapping[str, Tensor] | None = None,
) -> Generator[tuple[str, Factors]]:
    """
    The singular groups of the layers' weights, by name, as they get ready.

    On a CPU a decomposition gains little from several threads, so several run at once, on one thread each: the numbers
    do not depend on how many. At most one weight for each thread is held here, so that a caller who drops a layer when
    its groups are ready never has two copies of the model. Close the iterator if you leave it early.

    Args:
        layers: by name. A layer may be taken out when its groups are ready.
        cache: in which the groups of dense layers are looked up and kept.
        roots: by name, of the metric in which a layer is decomposed, from
            [`~rankdyna_trainer.layers.whitening.metric_roots`]; that of its own numbers for a layer without one.
    """
    roots = roots or {}
    names = list(layers)
    if cache is not None:
        # The processes of one machine start at different layers, and find those of the others in the cache.
        start = len(names) * int(os.environ.get("LOCAL_RANK", 0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        names = names[start:] + names[:start]
    weights = ((name, _values(layers[name])) for name in names)
    largest = max((sum(part.numel() for part in _weights(layer)) for layer in layers.values()), default=0)
    fitting = _BYTES_AT_ONCE // (_BYTES_PER_NUMBER * max(largest, 1))
    if fitting < 2 or any(device_of(layer).type != "cpu" for layer in layers.values()):
        for name, weight in weights:
            yield name, _factorize(weight, cache, roots.get(name))
        return
    threads = torch.get_num_threads()
    running: dict[Future[Factors], str] = {}
    try:
        with ThreadPoolExecutor(min(threads, fitting), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name, weight in weights:
                running[pool.submit(_factorize, weight, cache, roots.get(name))] = name
                del weight
                if len(running) == min(threads, fitting):
                    yield from _ready(running)
            while running:
                yield from _ready(running)
    finally:
        torch.set_num_threads(threads)  # the workers' number became that of the whole process


def _weights(layer: DenseLayer | LowRankLinear) -> tuple[Tensor, ...]:
    if isinstance(layer, LowRankLinear):
        return layer.p.weight.detach(), layer.q.weight.detach()
    return (dense_weight(layer).detach(),)


def _values(layer: DenseLayer | LowRankLinear) -> tuple[Tensor, ...]:
    with align_module_device(layer):
        return _weights(layer)


def _factorize(weights: tuple[Tensor, ...], cache: FactorizationCache | None, root: Tensor | None) -> Factors:
    if root is not None:
        p, q = weights if len(weights) == 2 else (None, weights[0])
        return whitened_factors(p, q, root)
    return factorize(*weights, cache) if len(weights) == 1 else factorize_product(*weights)


def _ready(running: dict[Future[Factors], str]) -> Iterator[tuple[str, Factors]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def _decompose(weight: Tensor) -> Factors:
    u, sigma, v = singular_groups(in_float64(weight))
    return u.to(weight).contiguous(), sigma.to(weight), v.to(weight).contiguous()
