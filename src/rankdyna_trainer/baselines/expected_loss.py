"""How many groups each layer keeps where all layers share one budget, by the loss that is expected to come of each."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RankDynaConfig
from ..layers.decomposition import in_float64
from ..layers.dense import DenseLayer, dense_weight, out_features
from ..layers.distributed import is_distributed
from ..layers.factorization import factorize_layers
from ..layers.input_moments import input_moments, of_all_processes, parts_that_fit
from ..layers.targets import dense_shape
from ..layers.whitening import group_energies, metric_roots
from ..method.budget import RankBudget
from .fisher import checked_examples, returned_loss
from .kept_groups import AT_ONCE, kept_groups
from .replacement import ranks_to_factor

# A model of these learns to predict the tokens that it is given, which are its labels.
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


def ranks_by_expected_loss(
    model: nn.Module, config: RankDynaConfig, targets: Mapping[str, DenseLayer], batches: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """
    The rank of each layer that does not stay dense, by name, where those groups remain whose loss per parameter (with
    `rank_ratio`, per group) is largest; see [`expected_losses`]. Layers of which these know nothing keep the same
    ratio as by [`ranks_to_factor`], and the others share what is left of the budget.

    Args:
        model: dense.
        config: has the ratio, `rank_multiple_of` and `block_floor`.
        targets: all layers, by name.
        batches: as for [`expected_losses`].

    Raises:
        TypeError: as [`expected_losses`].
        ValueError: likewise, or they know nothing of any layer.
    """
    try:
        losses = expected_losses(model, targets, batches)
    except ValueError as error:
        raise ValueError(f'{error} rank_scope="local" needs no loss.') from error
    if not losses:
        raise ValueError(
            "The loss of the batches depends on no target layer, so that it cannot tell which groups to keep: "
            'rank_scope="local" needs no loss.'
        )
    known = {name: targets[name] for name in losses}
    ranks = ranks_to_factor({name: layer for name, layer in targets.items() if name not in known}, config)
    shared = replace(config, rank_scope="global")
    full_ranks = [len(values) for values in losses.values()]
    budget = RankBudget(shared, AT_ONCE, [dense_shape(layer) for layer in known.values()], full_ranks)
    kept = kept_groups(model, shared, budget, losses)
    for name, mask in kept.items():
        rank, shape = int(mask.sum()), dense_weight(targets[name]).shape
        if rank * sum(shape) <= shape.numel():
            ranks[name] = rank
    return {name: ranks[name] for name in targets if name in ranks}


@torch.no_grad()
def expected_losses(
    model: nn.Module, layers: Mapping[str, DenseLayer], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """
    How much the loss is expected to rise if one group of a layer, in the metric of its inputs, is left out.

    Leaving out group `k` changes the layer's output by `-s_k (v_k^T z) u_k`, for inputs `x = L z` of which the second
    moment of `z` is 1. To second order, with the Fisher information in the place of the Hessian, and inputs and
    gradients taken as independent (as in K-FAC), the loss then rises by a multiple of `s_k^2 u_k^T G u_k`, where `G`
    is the mean of `g g^T` over the gradients `g` of the loss at the layer's output.

    The model is run forwards and backwards, once for each part of its layers of which the second moments fit into
    memory; no gradient of a weight is made.

    Args:
        model: dense.
        layers: of this model, by name.
        batches: with what the model needs to return a loss; a causal language model without labels is given its own
            tokens.

    Returns:
        By name `(rank,)` in float64, those groups first that matter most to the layer's output; none for a layer
        that the batches, or the gradients, do not reach. They can be compared between layers.

    Raises:
        TypeError: a batch is no mapping.
        ValueError: the model returns no loss, or none that is finite.
    """
    losses: dict[str, Tensor] = {}
    for names in parts_that_fit(layers, with_outputs=True):
        part = {name: layers[name] for name in names}
        gradients: dict[str, Tensor] = {}
        tokens = dict.fromkeys(names, 0)
        run = partial(_run_backwards, model, part, gradients, tokens)
        moments = input_moments(model, part, list(enumerate(batches, start=1)), run)
        if is_distributed():
            sizes = {name: out_features(layer) for name, layer in part.items()}
            gradients = of_all_processes(gradients, sizes, next(model.parameters()).device)
        _check_finite(gradients)
        scales = {name: float(moment.diagonal().mean()) for name, moment in moments.items()}
        roots = metric_roots(moments)
        reached = {name: part[name] for name in names if name in roots and name in gradients}
        with closing(factorize_layers(reached, roots=roots)) as factorized:
            for name, factors in factorized:
                u = in_float64(factors[0])
                towards_loss = ((u @ gradients[name].to(u.device)) * u).sum(dim=1)
                size = scales[name] / max(1, tokens[name])
                losses[name] = group_energies(factors, roots[name]).to(u.device) * size * towards_loss
    return {name: losses[name] for name in layers if name in losses}


def _run_backwards(
    model: nn.Module,
    layers: Mapping[str, DenseLayer],
    gradients: dict[str, Tensor],
    tokens: dict[str, int],
    numbered: tuple[int, Any],
) -> None:
    """Add the second moments of the gradients at the outputs of layers, and how many outputs they are of."""
    number, batch = numbered
    for example in checked_examples(batch, number, per_example=False):
        with _outputs_noted(layers) as outputs, torch.enable_grad():
            loss = returned_loss(model, _with_labels(model, example), f"batch {number}")
            if not (outputs and loss.requires_grad):
                continue
            found = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
        for (name, _), gradient in zip(outputs, found, strict=True):
            if gradient is not None:
                rows = gradient.reshape(-1, gradient.shape[-1]).float()
                moment = in_float64(rows.t() @ rows)
                gradients[name] = gradients[name].add_(moment) if name in gradients else moment
                tokens[name] += len(rows)


def _check_finite(gradients: Mapping[str, Tensor]) -> None:
    for name, moment in gradients.items():
        if not torch.isfinite(moment).all():
            raise ValueError(f"The gradient at the outputs of {name} has inf or nan: load the model in float32.")


def _with_labels(model: nn.Module, example: dict[str, Any]) -> dict[str, Any]:
    tokens, mask = example.get("input_ids"), example.get("attention_mask")
    if "labels" in example or tokens is None or not type(model).__name__.endswith(LANGUAGE_MODELS):
        return example
    return example | {"labels": tokens if mask is None else tokens.masked_fill(mask == 0, -100)}


@contextmanager
def _outputs_noted(layers: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    outputs: list[tuple[str, Tensor]] = []
    names = {layer: name for name, layer in layers.items()}

    def note(layer: nn.Module, inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            outputs.append((names[layer], output))

    handles = [layer.register_forward_hook(note) for layer in layers.values()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
