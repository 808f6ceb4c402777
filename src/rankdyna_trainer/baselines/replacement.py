"""What the baselines share: which layers, how many groups in each, and their exchange for P and Q."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, cast

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import RankDynaConfig
from ..layers.architecture import module_places
from ..layers.compaction import compact, has_compacted_layers
from ..layers.dense import EXPECTS_GROUPS, DenseLayer, dense_weight
from ..layers.factor_cache import Factors
from ..layers.interruption import interrupt_held_back
from ..layers.low_rank import LowRankLinear
from ..layers.offloaded import place_like
from ..layers.singular_group import SingularGroupLinear
from ..layers.targets import checked_targets
from ..method.budget import uniform_rank
from .fisher import fisher_information


def dense_targets(model: nn.Module, config: RankDynaConfig, offloaded: bool = False) -> dict[str, DenseLayer]:
    """
    [`~rankdyna_trainer.layers.targets.checked_targets`] of a model that was never compressed.

    Raises:
        TypeError: as there.
        ValueError: as there, or the model is already compressed, or the config has several sizes.
    """
    check_one_size(config)
    if isinstance(model, nn.Module) and has_compacted_layers(model):
        raise ValueError(
            "The model is already compressed, and a baseline starts from a dense one: call merge(model) first."
        )
    return cast(dict[str, DenseLayer], checked_targets(model, config, offloaded))


def check_one_size(config: RankDynaConfig) -> None:
    """
    Check that a config names one size.

    Raises:
        ValueError: it has a list of several.
    """
    if isinstance(config, RankDynaConfig) and len(config.ratios) > 1:
        raise ValueError(
            f"What is factored at once has one size: give {config.ratio_name} one number (got {list(config.ratios)})."
        )


def ranks_to_factor(targets: Mapping[str, DenseLayer], config: RankDynaConfig) -> dict[str, int]:
    """The rank of each layer that does not stay dense, by name."""
    ranks: dict[str, int] = {}
    for name, layer in targets.items():
        out_features, in_features = dense_weight(layer).shape
        rank = uniform_rank(config, out_features, in_features)
        if rank * (out_features + in_features) <= out_features * in_features:
            ranks[name] = rank
    return ranks


@contextmanager
def exchanged_for_a_while(model: nn.Module) -> Iterator[Callable[[DenseLayer, nn.Module], None]]:
    """
    Gives a function that puts another module in the place of a layer, wherever that stands in the model. At the end
    all layers are back.
    """
    places = module_places(model)
    exchanged: list[DenseLayer] = []

    def put(layer: DenseLayer, module: nn.Module) -> None:
        for parent, attribute in places[layer]:
            setattr(parent, attribute, module)

    def exchange(layer: DenseLayer, module: nn.Module) -> None:
        exchanged.append(layer)
        put(layer, module)

    try:
        yield exchange
    finally:
        with interrupt_held_back():
            for layer in exchanged:
                put(layer, layer)


def pair_of(layer: DenseLayer, groups: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """
    P `(out_features, rank)` and Q `(rank, in_features)` of a layer's first groups: of an offloaded one, on the CPU.
    """
    u, sigma, v = groups
    p, q = (u[:rank].t() * sigma[:rank]).contiguous(), v[:rank].clone()
    return (p.cpu(), q.cpu()) if has_offloaded_params(layer) else (p, q)


def truncated(layer: DenseLayer, p: Tensor, q: Tensor, rank: int) -> LowRankLinear:
    """
    What a layer computes with its first groups, in evaluation mode; the bias is the layer's own.

    Args:
        layer: dense.
        p: `(out_features, most)`, of at least `rank` groups.
        q: `(most, in_features)`.
        rank: how many of the groups.
    """
    out_features, in_features = dense_weight(layer).shape
    with align_module_device(layer):
        bias = layer.bias
    has_bias = bias is not None
    low_rank = LowRankLinear(in_features, out_features, rank, has_bias, type(layer), p.device, p.dtype)
    if rank:
        low_rank.p.weight, low_rank.q.weight = nn.Parameter(p[:, :rank].contiguous()), nn.Parameter(q[:rank])
    if has_bias:
        low_rank.p.bias = bias
    place_like(layer, low_rank)
    return low_rank.eval()


def factor_by_groups(
    model: nn.Module,
    targets: dict[str, DenseLayer],
    config: RankDynaConfig,
    groups_of: Callable[[dict[str, DenseLayer]], Generator[tuple[str, Factors]]],
) -> nn.Module:
    """
    Replace each target layer by the P and Q of its first singular groups, in place.

    Args:
        model: dense.
        targets: its layers, by name, from [`dense_targets`].
        config: which has the ratio.
        groups_of: from layers by name to their groups, one after another.

    Returns:
        The same model.
    """
    ranks = ranks_to_factor(targets, config)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    with closing(groups_of({name: targets[name] for name in ranks})) as factorized:
        for name, groups in tqdm(factorized, "Factorizing", total=len(ranks), unit="layer", delay=10):
            factors[name] = pair_of(targets[name], groups, ranks[name])
    return replace_layers(model, targets, factors)


def factor_by_fisher(
    model: nn.Module,
    config: RankDynaConfig,
    dataloader: Iterable[Mapping[str, Any]] | Mapping[str, Tensor],
    per_example: bool,
    factors_of: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> nn.Module:
    """
    Estimate the Fisher information of the target layers, and replace each by the P and Q that it leads to, in place.

    Args:
        model: dense.
        config: chooses the layers, and the ratio.
        dataloader: as for [`~rankdyna_trainer.baselines.fisher.fisher_information`], or what that has returned.
        per_example: as there.
        factors_of: from a weight, its Fisher information (both `(out_features, in_features)`) and a rank to P
            `(out_features, rank)` and Q `(rank, in_features)`, in the weight's dtype.

    Returns:
        The same model.

    Raises:
        TypeError: as [`dense_targets`] and `fisher_information`.
        ValueError: likewise; then nothing was replaced.
    """
    targets = dense_targets(model, config)
    ranks = ranks_to_factor(targets, config)
    chosen = {name: targets[name] for name in ranks}
    if isinstance(dataloader, Mapping):
        fisher = _checked_fisher(chosen, dataloader)
    else:
        fisher = fisher_information(model, chosen, dataloader, per_example)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, rank in tqdm(ranks.items(), "Factorizing", unit="layer", delay=10):
        factors[name] = factors_of(dense_weight(targets[name]).detach(), fisher.pop(name), rank)
    return replace_layers(model, targets, factors)


def _checked_fisher(layers: Mapping[str, DenseLayer], fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if missing := [name for name in layers if not isinstance(fisher.get(name), Tensor)]:
        raise ValueError(
            f"The Fisher information has no tensor for {len(missing)} of {len(layers)} target layers ({missing[0]}, "
            "...): estimate it for all of them, or give a dataloader."
        )
    for name, layer in layers.items():
        values, shape = fisher[name], dense_weight(layer).shape
        if values.shape != shape or not (torch.isfinite(values) & (values >= 0)).all():
            raise ValueError(
                f"The Fisher information of {name} must be {tuple(shape)}, finite and not negative: it is "
                f"{tuple(values.shape)}, from {values.min():.3g} to {values.max():.3g}. Is it of another model?"
            )
    return {name: fisher[name].to(layer.weight.device) for name, layer in layers.items()}


@torch.no_grad()
def replace_layers(
    model: nn.Module, targets: dict[str, DenseLayer], factors: dict[str, tuple[Tensor, Tensor]]
) -> nn.Module:
    """
    Put P and Q in the place of the target layers, as [`compact`] does: a layer without them stays dense.

    Args:
        model: in which the layers are replaced, in place.
        targets: by name.
        factors: by name P `(out_features, rank)` and Q `(rank, in_features)`, in the weight's dtype; empty afterwards,
            so that none is held twice.

    Returns:
        The same model.

    Raises:
        ValueError: a factor has inf or nan; then nothing was replaced.
    """
    for name, pair in factors.items():
        if not all(torch.isfinite(factor).all() for factor in pair):
            raise ValueError(f"P or Q of {name} exceeds {pair[0].dtype}: load the model in float32.")
    places = module_places(model)
    with interrupt_held_back():
        for name, layer in targets.items():
            if name not in factors:
                layer.__dict__[EXPECTS_GROUPS] = min(layer.weight.shape)
                continue
            p, q = factors.pop(name)
            with align_module_device(layer):
                bias = layer.bias
            replacement = SingularGroupLinear(p.t().contiguous(), q.new_ones(len(q)), q, bias, type(layer))
            del p, q
            for parent, attribute in places[layer]:
                setattr(parent, attribute, replacement.train(layer.training))
        compact(model)
        for name, layer in targets.items():
            if (replaced := model.get_submodule(name)) is not layer:
                place_like(layer, replaced)
    return model
