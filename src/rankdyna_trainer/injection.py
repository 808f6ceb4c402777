"""Which layers of a model are compressed, and their exchange for singular groups."""

import logging
from contextlib import closing
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architecture import block_prefixes, layers_read_by_parents, module_places, output_layers
from .config import RankDynaConfig
from .dense import DenseLayer, dense_weight
from .factor_cache import FactorizationCache
from .factorization import factorize_layers
from .layers import LowRankLinear, SingularGroupLinear
from .rank_record import forget_ranks

TargetLayer: TypeAlias = DenseLayer | LowRankLinear

logger = logging.getLogger(__name__)


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


def checked_targets(model: nn.Module, config: RankDynaConfig) -> dict[str, TargetLayer]:
    """
    [`find_targets`] of a model that can be compressed at once.

    Raises:
        TypeError: `model` is no module, or `config` no [`RankDynaConfig`].
        ValueError: no layer matches; a weight has inf or nan, or no values yet; a target is quantized or sharded; the
            model is wrapped by peft, or already has singular groups.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, RankDynaConfig):
        raise TypeError(
            "Compression takes a model and a RankDynaConfig, such as RankDynaConfig(rank_ratio=0.2): got a "
            f"{type(model).__name__} and a {type(config).__name__}."
        )
    _check_model(model)
    targets = find_targets(model, config)
    for name, layer in targets.items():
        if any(weight.is_meta for weight in _weights(layer)):
            raise ValueError(
                f"The weight of {name} has no values (device meta): it is not loaded yet, or offloaded. Load the "
                "model without device_map, or with one that keeps this layer in memory."
            )
        if not all(torch.isfinite(weight).all() for weight in _weights(layer)):
            raise ValueError(f"The weight of {name} has inf or nan: the checkpoint is damaged, or training diverged.")
    return targets


def find_targets(model: nn.Module, config: RankDynaConfig) -> dict[str, TargetLayer]:
    """
    The layers that a run with this config compresses, by name, in the model's order.

    Raises:
        ValueError: no layer matches, or a layer that matches is quantized or sharded.
    """
    linear = _linear_layers(model)
    matching = _matching(model, linear, config)
    read_by_parents = layers_read_by_parents(model)
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1

    targets: dict[str, TargetLayer] = {}
    left_alone: dict[str, list[str]] = {}
    for name, layer in matching.items():
        weights = _weights(layer)
        _refuse_quantized(name, layer)
        if any(type(weight) is Tensor for weight in weights) or layer._forward_hooks or layer._forward_pre_hooks:
            reason = "with hooks or a parametrization of their own"
        elif not all(weight.requires_grad for weight in weights):
            reason = "frozen (requires_grad=False)"
        elif any(users[id(weight)] > 1 for weight in weights):
            reason = "tied to another layer"
        elif layer in read_by_parents:
            reason = "read by their parent instead of called"
        elif not _computes_a_product(layer):
            reason = "of a class with another forward"
        else:
            targets[name] = layer
            continue
        left_alone.setdefault(reason, []).append(name)
    blocks = block_prefixes(model)
    experts = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and name.startswith(blocks)
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.conv._ConvNd)
    ]
    if experts:
        left_alone["3-dimensional weights, as of a mixture of experts"] = experts
    if left_alone:
        reasons = (f"{len(names)} {reason} ({names[0]}, ...)" for reason, names in left_alone.items())
        logger.warning("RankDyna leaves layers alone: %s.", "; ".join(reasons))
    if not targets:
        raise ValueError(
            f"No layer to compress matches target_modules={config.target_modules!r} and "
            f"exclude_modules={config.exclude_modules!r}. "
            f"Left alone: {left_alone or 'none'}. The model's linear layers are: {', '.join(linear) or 'none'}."
        )
    return targets


def _linear_layers(model: nn.Module) -> dict[str, TargetLayer]:
    low_rank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    factors = {f"{name}.{factor}" for name in low_rank for factor in ("p", "q")}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, LowRankLinear)) and name not in factors
    }


def _weights(layer: TargetLayer) -> list[Tensor]:
    return [layer.p.weight, layer.q.weight] if isinstance(layer, LowRankLinear) else [layer.weight]


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


def _matching(model: nn.Module, linear: dict[str, TargetLayer], config: RankDynaConfig) -> dict[str, TargetLayer]:
    structural = config.target_modules is None or config.target_modules == "all-linear"
    if structural:
        outputs = output_layers(model)
        prefixes = block_prefixes(model) if config.target_modules is None else ("",)
        linear = {n: layer for n, layer in linear.items() if n.startswith(prefixes) and layer not in outputs}
    rules = SimpleNamespace(
        target_modules=".*" if structural else config.target_modules, exclude_modules=config.exclude_modules
    )
    return {name: layer for name, layer in linear.items() if check_target_module_exists(rules, name)}


def _check_model(model: nn.Module) -> None:
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "The model is wrapped by peft, whose adapters would hide the weights to compress. Merge the adapter with "
            "merge_and_unload() first, or compress first and train an adapter on the compacted model."
        )
    if isinstance(model, (nn.Linear, Conv1D)):
        raise ValueError(
            "The model is a single linear layer, which cannot be replaced in place: put it into a module."
        )
    in_groups = [name for name, module in model.named_modules() if isinstance(module, SingularGroupLinear)]
    if in_groups:
        raise ValueError(
            f"The model already has singular groups ({in_groups[0]}, ... of {len(in_groups)} layers). "
            "Call compact(model) first if you want to compress it further."
        )


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


def _refuse_quantized(name: str, layer: TargetLayer) -> None:
    for weight in _weights(layer):
        if hasattr(weight, "device_mesh"):
            raise ValueError(
                f"The weight of {name} is sharded ({type(weight).__name__}), and a part of it cannot be factorized: "
                "inject before sharding. Load it without tp_plan and distributed_config: the Trainer can shard it "
                "later."
            )
        plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.element_size() >= 2
        if not plain or weight.ndim != 2:
            raise ValueError(
                f"{name} is a {type(layer).__name__} that holds a quantized weight ({type(weight).__name__} of "
                f"{weight.dtype}): compress the model before it is quantized, or name the layer in exclude_modules."
            )


@torch.no_grad()
def _computes_a_product(layer: TargetLayer) -> bool:
    """Whether the layer computes `W x + b`: a class derived from `nn.Linear` may do anything, so it is tried out."""
    if isinstance(layer, LowRankLinear) or type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight = dense_weight(layer)
    # No random numbers: the seed's sequence belongs to the user.
    x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).reshape(2, -1)
    training = layer.training
    try:
        with torch.random.fork_rng(devices=[]):
            output = layer.eval()(x)
    except Exception:
        return False
    finally:
        layer.train(training)
    expected = nn.functional.linear(x, weight, layer.bias)
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    tolerance = max(1e-5, 2 * torch.finfo(weight.dtype).eps)
    size = expected.double().norm()
    return bool(size > 0 and (output - expected).double().norm() <= tolerance * size)
