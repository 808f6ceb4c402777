"""The exchange of a model's target layers for singular groups."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import RankDynaConfig
from .architecture import module_places
from .dense import EXPECTS_GROUPS, expects_groups
from .distributed import local_part, of_local_groups
from .factor_cache import FactorizationCache
from .factorization import factorize_layers
from .hooks import Hook
from .input_moments import input_moments, parts_that_fit
from .low_rank import STANDS_FOR_WEIGHT, LowRankLinear
from .rank_record import forget_ranks
from .singular_group import SingularGroupLinear, singular_group_layers
from .start import first_groups, start_ranks
from .targets import TargetLayer, checked_targets, dense_shape, find_targets
from .whitening import observed_roots, whitened_factors

# What the tensors of singular groups are called.
OF_GROUPS = (".u", ".sigma", ".v", ".importance", ".remaining")


def inject_singular_groups(
    model: nn.Module, config: RankDynaConfig, batches: Iterable[Mapping[str, Any]] | None = None
) -> nn.Module:
    """
    Replace the target layers of a model by [`SingularGroupLinear`], in place. The model computes what it did before,
    but for what `start_ratio` leaves out.

    For a `model_init`, or a training loop without a `Trainer`: the [`RankDynaCallback`] does it by itself otherwise.

    Args:
        model: any module, dense, or compacted before: `rank_ratio` and `param_ratio` are then still parts of the dense
            model that it stands for.
        config: chooses the layers by `target_modules` and `exclude_modules`, and the groups by `group_basis`.
        batches: of the training set, as a data collator of `transformers` gives them: a few hundred rows, on which the
            model is run in evaluation mode. Without them the groups are those of the weights.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module, `config` no [`RankDynaConfig`], or a batch no mapping.
        ValueError: no layer matches; a weight has inf or nan, or no values yet; a target is quantized or sharded; the
            model is wrapped by peft, or already has singular groups; `group_basis="activations"` without batches;
            `start_ratio` has no room for a layer's groups, or for those of `rank_ratio`; the environment variable
            `RANKDYNA_CACHE_SIZE_GB` is no size.
    """
    targets = checked_targets(model, config)
    observe = None
    if config.group_basis == "activations" or (config.group_basis is None and batches is not None):
        observe = partial(input_moments, model, batches=_checked_batches(batches))
    inject_targets(model, config, targets, observe)
    return model


def inject_targets(
    model: nn.Module,
    config: RankDynaConfig,
    targets: dict[str, TargetLayer],
    observe: Callable[[Mapping[str, nn.Module]], dict[str, Tensor]] | None = None,
    replaced: Callable[[TargetLayer, SingularGroupLinear], None] | None = None,
    room: int | None = None,
) -> None:
    """
    [`inject_singular_groups`] for those who hold parameters of the model, or know how to run it.

    Args:
        model: in which the layers are replaced.
        config: the choices.
        targets: from [`checked_targets`]; empty afterwards.
        observe: from layers by name to the second moments of their inputs; without it, or for layers that it has none
            of, the groups are those of the weights.
        replaced: called with each layer and the one that took its place.
        room: the bytes that what `observe` gives at once may hold, if that is not what is usual.
    """
    ranks = start_ranks(config, targets)
    places = module_places(model)
    cache = None if config.factorization_cache is None or observe else FactorizationCache(config.factorization_cache)
    progress = tqdm(desc="Factorizing", total=len(targets), unit="layer", delay=10)
    with progress:
        for names in [[*targets]] if observe is None else parts_that_fit(targets, room):
            part = {name: targets.pop(name) for name in names}
            roots = {} if observe is None else observed_roots(part, observe)
            with closing(factorize_layers(part, cache, roots)) as factorized:
                for name, factors in factorized:
                    if not torch.isfinite(factors[1]).all():
                        raise ValueError(
                            f"The singular values of {name} exceed {factors[1].dtype}: load the model in float32."
                        )
                    layer = part.pop(name)
                    replacement = _in_groups(layer, *first_groups(factors, ranks[name])).train(layer.training)
                    del factors  # of which a few groups may have been taken
                    for parent, attribute in places.pop(layer):
                        setattr(parent, attribute, replacement)
                    if replaced is not None:
                        replaced(layer, replacement)
                    del layer  # so that its weight is freed before the next one is factorized
                    progress.update()
    forget_ranks(model)
    _save_under_own_names(model)
    model.register_load_state_dict_pre_hook(_check_saved_layers)  # type: ignore[no-untyped-call]


def inject_without_values(model: nn.Module, config: RankDynaConfig) -> nn.Module:
    """
    The exchange of [`inject_singular_groups`] for groups that are all zero, or, where the weights have none, without
    values: for whoever asks what a run holds.

    Args:
        model: whose target layers are exchanged, in place.
        config: chooses the layers, and by `start_ratio` how many groups each begins with.

    Returns:
        The same model.

    Raises:
        ValueError: no layer matches, or `start_ratio` has no room for a layer's groups.
    """
    targets = find_targets(model, config)
    ranks = start_ranks(config, targets)
    places = module_places(model)
    for name, layer in targets.items():
        for parent, attribute in places[layer]:
            setattr(parent, attribute, _without_values(layer, ranks[name]))
    return model


def expect_groups(
    model: nn.Module,
    config: RankDynaConfig,
    replaced: Callable[[TargetLayer, SingularGroupLinear], None] | None = None,
) -> nn.Module:
    """
    Prepare a model whose layers are to be injected later in its training: a checkpoint of a step at which they were
    can be loaded into it, and makes them so, in place.

    Args:
        model: that can be injected at once.
        config: the choices.
        replaced: called with each layer that such a checkpoint makes a layer of singular groups, and with that layer.

    Returns:
        The same model.

    Raises:
        TypeError: as [`inject_singular_groups`].
        ValueError: as [`inject_singular_groups`].
    """
    targets = checked_targets(model, config)
    ranks = start_ranks(config, targets)
    for module in model.modules():
        module.__dict__.pop(EXPECTS_GROUPS, None)  # of a run that was given up
    for layer, rank in zip(targets.values(), ranks.values(), strict=True):
        layer.__dict__[EXPECTS_GROUPS] = rank
    _save_under_own_names(model)
    model.register_load_state_dict_pre_hook(Hook(partial(_make_expected_groups, replaced)))  # type: ignore[no-untyped-call]
    return model


def _make_expected_groups(
    replaced: Callable[[TargetLayer, SingularGroupLinear], None] | None,
    model: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    *_: Any,
) -> None:
    # Of a checkpoint in several files, each may hold other tensors of the layer.
    saved = {key.removeprefix(prefix).rpartition(".")[0] for key in state_dict if key.endswith(OF_GROUPS)}
    modules = model.named_modules(remove_duplicate=False)  # a shared layer may be saved under any of its names
    expecting = {name: layer for name, layer in modules if expects_groups(layer)}
    dense = [name for name, layer in expecting.items() if not isinstance(layer, LowRankLinear)]
    saved |= {name for name in dense if _stands_for_weight(state_dict.get(f"{prefix}{name}.weight"))}
    places = module_places(model)
    layers: dict[Any, None] = dict.fromkeys(expecting[name] for name in expecting if name in saved)
    for layer in layers:
        groups = _without_values(layer, layer.__dict__[EXPECTS_GROUPS]).train(layer.training)
        for parent, attribute in places[layer]:
            setattr(parent, attribute, groups)
        if replaced is not None:
            replaced(layer, groups)
    if saved or any(isinstance(module, SingularGroupLinear) for module in model.modules()):
        forget_ranks(model)
        _check_saved_layers(model, state_dict, prefix)


def _stands_for_weight(weight: Tensor | None) -> bool:
    """Whether a saved weight is what a compressed layer has instead."""
    return weight is not None and weight.shape == STANDS_FOR_WEIGHT


def _save_under_own_names(model: nn.Module) -> None:
    """
    For some models transformers saves under other names than the model's own, which a `Trainer` that resumes does not
    find. Compacted models are saved as usual.
    """
    if isinstance(model, PreTrainedModel) and "_rankdyna_weight_conversions" not in vars(model):
        model._rankdyna_weight_conversions = getattr(model, "_weight_conversions", None)
        model._weight_conversions = []


@torch.no_grad()
def refactor_groups(model: nn.Module, observe: Callable[[Mapping[str, nn.Module]], dict[str, Tensor]]) -> None:
    """
    Give each layer of singular groups those that its weight has in the metric of its inputs, in the same tensors.

    Args:
        model: with singular groups, none of which was removed; if FSDP2 shards it, all processes have to call this.
        observe: from layers by name to the second moments of their inputs.
    """
    layers = {name: layer for name, layer in singular_group_layers(model).items() if layer.initial_rank}
    for names in parts_that_fit(layers):
        part = {name: layers[name] for name in names}
        for name, root in observed_roots(part, observe).items():
            p, q = part[name].to_factors()
            for factor, new in zip(part[name].factors().values(), whitened_factors(p, q, root), strict=True):
                local_part(factor).copy_(of_local_groups(new, factor))
            part[name].importance.zero_()  # of other groups


def _checked_batches(batches: Iterable[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    if batches is None:
        raise ValueError(
            'group_basis="activations" needs to see what enters the layers: give inject_singular_groups a few hundred '
            'rows of the training set as batches, or use group_basis="weights".'
        )
    return list(batches)


def _without_values(layer: TargetLayer, rank: int) -> SingularGroupLinear:
    """A layer in so many groups, all of them zero."""
    weight = layer.p.weight if isinstance(layer, LowRankLinear) else layer.weight
    out_features, into = dense_shape(layer)
    u, sigma, v = (weight.new_zeros(rank, *size) for size in ((out_features,), (), (into,)))
    return _in_groups(layer, u, sigma, v)


def _in_groups(layer: TargetLayer, u: Tensor, sigma: Tensor, v: Tensor) -> SingularGroupLinear:
    if not isinstance(layer, LowRankLinear):
        return SingularGroupLinear(u, sigma, v, layer.bias, type(layer))
    if layer.rank:
        return SingularGroupLinear(u, sigma, v, layer.bias, layer.original_class)
    # Optimizers want a row: that of a group which was removed, and is not trained.
    u, sigma, v = (factor.new_zeros(1, *factor.shape[1:]) for factor in (u, sigma, v))
    empty = SingularGroupLinear(u, sigma, v, layer.bias, layer.original_class)
    empty.set_remaining(torch.zeros_like(empty.remaining))
    empty.initial_rank = 0
    for factor in empty.factors().values():
        factor.requires_grad_(False)
    return empty


def _check_saved_layers(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse a checkpoint of which a `Trainer` that resumes would load only a part: that of other target layers."""
    # A layer that stands in several places is saved under each name, or under one of them.
    modules = model.named_modules(remove_duplicate=False)
    groups = {f"{prefix}{name}" for name, module in modules if isinstance(module, SingularGroupLinear)}
    saved = {key.removesuffix(".importance") for key in state_dict if key.endswith(".importance")}
    misfits = {
        "in singular groups there, but not in this model": {
            s for s in saved - groups if f"{s}.remaining" in state_dict
        },
        "compacted there": {name for name in groups if {f"{name}.p.weight", f"{name}.p.bias"} & state_dict.keys()},
        "dense there": {name for name in groups if getattr(state_dict.get(f"{name}.weight"), "ndim", 1) > 1},
    }
    if any(misfits.values()):
        found = "; ".join(f"{len(names)} {what} ({min(names)}, ...)" for what, names in misfits.items() if names)
        raise ValueError(
            f"The checkpoint's layers are not those that this run compresses: {found}. Resume with the target_modules "
            "and exclude_modules that it was written with. One that was written without the RankDynaCallback, or "
            "after the end of its run, can only be loaded with from_pretrained, for a new run."
        )
