"""A model factored a block at a time, each on what enters it in the model that is compressed so far."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layers.block_runs import BlockRuns
from ..layers.dense import DenseLayer
from ..layers.factorization import factorize_layers
from ..layers.input_moments import as_it_was, calling, input_moments, parts_that_fit
from ..layers.offloaded import ties_kept
from ..layers.whitening import log_unseen, metric_roots
from .replacement import exchanged_for_a_while, pair_of, truncated

NOTHING_OBSERVED = (
    "No batch of the dataloader told anything about a target layer: it is empty, the model uses other layers for it, "
    "or what enters them is not finite."
)

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def factors_block_by_block(
    model: nn.Module, layers: Mapping[str, DenseLayer], ranks: Mapping[str, int], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Pair]:
    """
    P and Q of layers in the metric of their inputs, where the inputs of a block's layers are those that the blocks
    before it give once they are compressed, so that each block is fitted to the errors of those before.

    The model is left as it was. Each block is computed twice for each batch, dense and compressed; those before it are
    computed again only in a model that [`~rankdyna_trainer.layers.block_runs.BlockRuns`] cannot run without them.
    Layers outside of blocks, and those that the first batch does not reach, come last, with all blocks compressed. The
    second moments of one block at a time are in memory, and what it gives for all batches.

    Args:
        model: dense.
        layers: of this model, by name.
        ranks: of those that are to be factored, by name.
        batches: as a data collator of `transformers` gives.

    Returns:
        By name P `(out_features, rank)` and Q `(rank, in_features)`, in the weight's dtype.

    Raises:
        TypeError: a batch is no mapping.
        ValueError: no batch told anything about any layer.
    """
    call = calling(model)
    pairs: dict[str, Pair] = {}
    unseen: list[str] = []
    with ties_kept(model), as_it_was(model), exchanged_for_a_while(model) as exchange:

        def factor(names: Sequence[str], run: Callable[[int], object]) -> None:
            for part in parts_that_fit({name: layers[name] for name in names}):
                of_part = {name: layers[name] for name in part}
                roots = metric_roots(input_moments(model, of_part, range(len(batches)), run))
                unseen.extend(name for name in part if name not in roots)
                with closing(factorize_layers(of_part, roots=roots)) as factorized:
                    for name, groups in factorized:
                        pairs[name] = pair_of(layers[name], groups, ranks[name])
                for name in part:
                    exchange(layers[name], truncated(layers[name], *pairs[name], ranks[name]))

        waiting = list(ranks)
        runs = BlockRuns(model, batches, call)
        for block in tqdm(runs.blocks, "Factorizing", unit="block", delay=10):
            inside = set(block.modules())
            factor([name for name in waiting if layers[name] in inside], partial(runs.run_to, block))
            waiting = [name for name in waiting if name not in pairs]
            if not waiting:
                break
            runs.finish(block)
        del runs
        factor(waiting, lambda number: call(batches[number]))
    if ranks and len(unseen) == len(ranks):
        raise ValueError(NOTHING_OBSERVED)
    log_unseen(unseen)
    return pairs
