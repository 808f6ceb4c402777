"""The exchange of a model's target layers for singular groups."""

from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import RankDynaConfig
from .architecture import module_places
from .factor_cache import FactorizationCache
from .factorization import factorize_layers
from .low_rank import LowRankLinear
from .rank_record import forget_ranks
from .singular_group import SingularGroupLinear
from .targets import TargetLayer, checked_targets


def inject_singular_groups(model: nn.Module, config: RankDynaConfig) -> nn.Module:
    """
    Replace the target layers of a model by [`SingularGroupLinear`], in place. The model computes what it did before.

    For a `model_init`, or a training loop without a `Trainer`: the [`RankDynaCallback`] does it by itself otherwise.

    Args:
        model: any module, dense, or compacted before: `rank_ratio` and `param_ratio` are then still parts of the dense
            model that it stands for.
        config: chooses the layers by `target_modules` and `exclude_modules`.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module, or `config` no [`RankDynaConfig`].
        ValueError: no layer matches; a weight has inf or nan, or no values yet; a target is quantized or sharded; the
            model is wrapped by peft, or already has singular groups; the environment variable `RANKDYNA_CACHE_SIZE_GB`
            is no size.
    """
    targets = checked_targets(model, config)
    places = module_places(model)
    cache = None if config.factorization_cache is None else FactorizationCache(config.factorization_cache)
    with closing(factorize_layers(targets, cache)) as factorized:
        for name, (u, sigma, v) in tqdm(factorized, "Factorizing", total=len(targets), unit="layer", delay=10):
            if not torch.isfinite(sigma).all():
                raise ValueError(f"The singular values of {name} exceed {sigma.dtype}: load the model in float32.")
            layer = targets.pop(name)
            replacement = _in_groups(layer, u, sigma, v).train(layer.training)
            for parent, attribute in places.pop(layer):
                setattr(parent, attribute, replacement)
            del layer  # so that its weight is freed before the next one is factorized
    forget_ranks(model)
    # For some models transformers saves under other names than the model's own, which a Trainer that resumes does not
    # find. Compacted models are saved as usual.
    if isinstance(model, PreTrainedModel):
        model._rankdyna_weight_conversions = getattr(model, "_weight_conversions", None)
        model._weight_conversions = []
    model.register_load_state_dict_pre_hook(_check_saved_layers)  # type: ignore[no-untyped-call]
    return model


def _in_groups(layer: TargetLayer, u: Tensor, sigma: Tensor, v: Tensor) -> SingularGroupLinear:
    if not isinstance(layer, LowRankLinear):
        return SingularGroupLinear(u, sigma, v, layer.bias, type(layer))
    if layer.rank:
        return SingularGroupLinear(u, sigma, v, layer.bias, layer.original_class)
    # Optimizers want a row: that of a group which was removed.
    u, sigma, v = (factor.new_zeros(1, *factor.shape[1:]) for factor in (u, sigma, v))
    empty = SingularGroupLinear(u, sigma, v, layer.bias, layer.original_class)
    empty.set_remaining(torch.zeros_like(empty.remaining))
    empty.initial_rank = 0
    return empty


def _check_saved_layers(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse a checkpoint of which a `Trainer` that resumes would load only a part: that of other target layers."""
    groups = {f"{prefix}{name}" for name, m in model.named_modules() if isinstance(m, SingularGroupLinear)}
    saved = {key.removesuffix(".importance") for key in state_dict if key.endswith(".importance")}
    misfits = {
        "in singular groups there, but not in this model": {
            s for s in saved - groups if f"{s}.remaining" in state_dict
        },
        "compacted there": {name for name in groups if f"{name}.p.weight" in state_dict},
        "dense there": {name for name in groups if len(state_dict.get(f"{name}.weight", ()))},
    }
    if any(misfits.values()):
        found = "; ".join(f"{len(names)} {what} ({min(names)}, ...)" for what, names in misfits.items() if names)
        raise ValueError(
            f"The checkpoint's layers are not those that this run compresses: {found}. Resume with the target_modules "
            "and exclude_modules that it was written with. One that was written without the RankDynaCallback, or "
            "after the end of its run, can only be loaded with from_pretrained, for a new run."
        )
