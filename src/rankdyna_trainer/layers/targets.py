"""Which layers of a model are compressed."""

import copy
import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import NamedTuple, TypeAlias

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import RankDynaConfig
from .architecture import block_prefixes, layers_read_by_parents, output_layers
from .dense import DenseLayer, dense_weight
from .distributed import is_sharded
from .low_rank import LowRankLinear
from .offloaded import has_own_forward, refuse_offloaded
from .singular_group import SingularGroupLinear

TargetLayer: TypeAlias = DenseLayer | LowRankLinear

logger = logging.getLogger(__name__)


def checked_targets(model: nn.Module, config: RankDynaConfig, offloaded: bool = False) -> dict[str, TargetLayer]:
    """
    [`find_targets`] of a model that can be compressed at once; if `offloaded`, of one that `device_map` has offloaded.

    Raises:
        TypeError: `model` is no module, or `config` no [`RankDynaConfig`].
        ValueError: no layer matches; a weight has inf or nan, or no values yet; a target is quantized or sharded; the
            model is wrapped by peft, already has singular groups, or is offloaded and must not be.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, RankDynaConfig):
        raise TypeError(
            "Compression takes a model and a RankDynaConfig, such as RankDynaConfig(rank_ratio=0.2): got a "
            f"{type(model).__name__} and a {type(config).__name__}."
        )
    _check_model(model)
    if not offloaded:
        refuse_offloaded(model)
    targets = find_targets(model, config)
    check_values(targets)
    return targets


def check_values(targets: Mapping[str, TargetLayer]) -> None:
    """
    Check that layers can be factored.

    Raises:
        ValueError: a weight has inf or nan, or no values yet.
    """
    for name, layer in targets.items():
        with align_module_device(layer):
            weights = _weights(layer)
        if any(weight.is_meta for weight in weights):
            raise ValueError(f"The weight of {name} has no values (device meta): load it with from_pretrained first.")
        if not all(torch.isfinite(weight).all() for weight in weights):
            raise ValueError(f"The weight of {name} has inf or nan: the checkpoint is damaged, or training diverged.")


def dense_shape(layer: TargetLayer) -> tuple[int, int]:
    """`(out_features, in_features)` of the dense weight that a layer holds or stands for."""
    if isinstance(layer, LowRankLinear):
        return layer.out_features, layer.in_features
    out_features, in_features = dense_weight(layer).shape
    return out_features, in_features


FROZEN = "frozen (requires_grad=False)"
ADVICE_ON_FROZEN = (
    " Frozen weights, as peft's merge_and_unload() leaves them, can be trained again after model.requires_grad_(True)."
)


class LayerChoice(NamedTuple):
    """
    What becomes of the linear layers of a model.

    Attributes:
        targets: the layers that are compressed, by name, in the model's order.
        left_alone: of those that match the names of layers that cannot be compressed, by reason; with them the
            weights of experts, which are no layers.
        unmatched: of all others, by reason.
    """

    targets: dict[str, TargetLayer]
    left_alone: dict[str, list[str]]
    unmatched: dict[str, list[str]]


def find_targets(model: nn.Module, config: RankDynaConfig) -> dict[str, TargetLayer]:
    """
    The layers that a run with this config compresses, by name, in the model's order.

    Raises:
        ValueError: no layer matches, or a layer that matches is quantized or sharded.
    """
    targets, left_alone, _ = choose_layers(model, config)
    if left_alone:
        reasons = (f"{len(names)} {reason} ({names[0]}, ...)" for reason, names in left_alone.items())
        logger.warning("RankDyna leaves layers alone: %s.", "; ".join(reasons))
    # Layers of rank 0 have no weight to be frozen.
    if not targets or (FROZEN in left_alone and not any(map(_weights, targets.values()))):
        linear = _linear_layers(model)
        raise ValueError(
            f"No layer to compress matches target_modules={config.target_modules!r} and "
            f"exclude_modules={config.exclude_modules!r}. "
            f"Left alone: {left_alone or 'none'}. The model's linear layers are: {', '.join(linear) or 'none'}."
            + ADVICE_ON_FROZEN
            * (FROZEN in left_alone)
        )
    return targets


def choose_layers(model: nn.Module, config: RankDynaConfig) -> LayerChoice:
    """
    Sort the linear layers of a model by what a run with this config does to them. They need no values.

    Raises:
        ValueError: a layer that matches is quantized or sharded.
    """
    matching, unmatched = _matching(model, config)
    read_by_parents = layers_read_by_parents(model)
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1

    targets: dict[str, TargetLayer] = {}
    left_alone: dict[str, list[str]] = {}
    classes: dict[type, bool] = {}
    for name, layer in matching.items():
        weights = _weights(layer)
        _refuse_quantized(name, layer)
        if 0 in dense_shape(layer):
            reason = "without outputs or inputs"
        elif any(type(weight) is Tensor for weight in weights) or _carries_something(layer):
            reason = "with hooks, a parametrization or a forward of their own"
        elif not all(weight.requires_grad for weight in weights):
            reason = FROZEN
        elif any(users[id(weight)] > 1 for weight in weights):
            reason = "tied to another layer"
        elif layer in read_by_parents:
            reason = "read by their parent instead of called"
        elif not _computes_a_product(layer, classes):
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
    return LayerChoice(targets, left_alone, unmatched)


def _carries_something(layer: nn.Module) -> bool:
    """Whether a user, or another library, has hung something on a layer or its parameters that another would lack."""
    of_modules = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_tensors = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(
        has_own_forward(module) or any(getattr(module, name) for name in of_modules) for module in layer.modules()
    ) or any(getattr(parameter, name) for parameter in layer.parameters() for name in of_tensors)


def _matching(model: nn.Module, config: RankDynaConfig) -> tuple[dict[str, TargetLayer], dict[str, list[str]]]:
    """The linear layers that match by name, and the names of the others, by reason."""
    from peft.tuners.tuners_utils import check_target_module_exists

    structural = config.target_modules is None or config.target_modules == "all-linear"
    outputs = output_layers(model) if structural else set()
    prefixes = block_prefixes(model) if config.target_modules is None else ("",)
    # A shared layer has several names: it is a target under any of them, and excluded under any.
    named = SimpleNamespace(target_modules=".*" if structural else config.target_modules, exclude_modules=None)
    not_excluded = SimpleNamespace(target_modules=".*", exclude_modules=config.exclude_modules)
    all_names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        all_names.setdefault(module, []).append(name)
    matching: dict[str, TargetLayer] = {}
    unmatched: dict[str, list[str]] = {}
    for name, layer in _linear_layers(model).items():
        if layer in outputs:
            reason = "of a head"
        elif not any(own.startswith(prefixes) for own in all_names[layer]):
            reason = "outside of the repeated blocks"
        elif not any(check_target_module_exists(named, own) for own in all_names[layer]):
            reason = "not in target_modules"
        elif not all(check_target_module_exists(not_excluded, own) for own in all_names[layer]):
            reason = "in exclude_modules"
        else:
            matching[name] = layer
            continue
        unmatched.setdefault(reason, []).append(name)
    return matching, unmatched


def _linear_layers(model: nn.Module) -> dict[str, TargetLayer]:
    low_rank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    factors = {f"{name}.{factor}" for name in low_rank for factor in ("p", "q")}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, LowRankLinear)) and name not in factors
    }


def _weights(layer: TargetLayer) -> list[Tensor]:
    return [*layer.factors()] if isinstance(layer, LowRankLinear) else [layer.weight]


def _check_model(model: nn.Module) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

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


def _refuse_quantized(name: str, layer: TargetLayer) -> None:
    for weight in _weights(layer):
        if is_sharded(weight):
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
def _computes_a_product(layer: TargetLayer, classes: dict[type, bool]) -> bool:
    """
    Whether the layer computes `W x + b`: a class derived from `nn.Linear` may do anything, so it is tried out. Of the
    layers without values the first of a class speaks for all, and the answer is noted in `classes`.
    """
    if isinstance(layer, LowRankLinear) or type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if layer.weight.is_meta and not has_offloaded_params(layer):
        if type(layer) not in classes:
            classes[type(layer)] = _computes_a_product(_with_values(layer), classes)
        return classes[type(layer)]
    with align_module_device(layer):
        weight, bias = dense_weight(layer), layer.bias
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
    expected = nn.functional.linear(x, weight, bias)
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    tolerance = max(1e-5, 2 * torch.finfo(weight.dtype).eps)
    size = expected.double().norm()
    return bool(size > 0 and (output - expected).double().norm() <= tolerance * size)


def _with_values(layer: DenseLayer) -> DenseLayer:
    """A copy of a layer whose parameters have no values, with some, none of which are zero or alike."""
    filled = copy.deepcopy(layer).to_empty(device="cpu")
    for tensor in (*filled.parameters(), *filled.buffers()):
        tensor.copy_(torch.linspace(0.5, 1.5, tensor.numel()).reshape(tensor.shape))
    return filled
