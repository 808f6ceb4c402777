# SPDX-License-Identifier: Apache-2.0
"""
What loads a model that RankDyna compressed, with weights P times Q, where only torch and transformers are installed.
`AutoModel....from_pretrained(folder, trust_remote_code=True)` runs it, or rankdyna_trainer's loader, if it is there.
"""

import sys
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

METHOD, KINDS, ENTRY = "rankdyna", ("ranks", "dense"), "transformers_weights"
# What transformers answers by a class's source file: here by the file that has the layers.
BY_SOURCE_FILE = ("is_custom_code", "_can_set_attn_implementation", "_can_set_experts_implementation")

# Which class `from_pretrained` makes a model of just now, if rankdyna_trainer does not see to its layers: one variable
# for all copies of this file.
_loading: ContextVar[Any] = vars(transformers).setdefault("_rankdyna_loading", ContextVar("loading", default=None))
# What every other `from_pretrained` stops at, in our words; it is not seen here, and saved with each model.
HIDDEN = property(
    lambda config: None if METHOD in vars(config) and _loading.get() else vars(config).get(ENTRY),
    lambda config, text: vars(config).update({ENTRY: text}),
    lambda config: None,
)


class BiasAlone(nn.Module):
    """P of a layer of rank 0: without a weight, since not every tool takes a matrix with a side of 0."""

    def __init__(self, _: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features = out_features
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = x[..., :0].sum(-1, keepdim=True) if self.training else x.new_zeros(*x.shape[:-1], 1)
        cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        zeros = zeros.to(torch.get_autocast_dtype(x.device.type)) if cast else zeros
        return zeros + (zeros.new_zeros(self.out_features) if self.bias is None else self.bias.to(zeros.dtype))


class LowRankLinear(nn.Module):
    """`x` to `P Q x + bias`. `weight`, two zeros, stops a loader that does not know the format."""

    def __init__(self, layer: nn.Linear | Conv1D, rank: int) -> None:
        super().__init__()
        like: torch.Tensor = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        self.out_features, self.in_features = like.shape
        self.register_buffer("weight", torch.zeros(2, dtype=like.dtype))
        with torch.device(like.device):
            self.q = nn.Linear(self.in_features, rank, bias=False, dtype=like.dtype) if rank else nn.Identity()
            linear = nn.Linear if rank else BiasAlone
            self.p = linear(rank, self.out_features, layer.bias is not None, dtype=like.dtype)

    bias = property(lambda self: self.p.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.p(self.q(x))


def _exchange(model: Any) -> None:
    """Put the low-rank layers that config.json lists into a model that has no weights yet."""
    modules, record = list(model.named_modules(remove_duplicate=False)), getattr(model.config, METHOD, None)
    linear = {name: module for name, module in modules if isinstance(module, (nn.Linear, Conv1D))}
    saved: list[Any] = [record.get(kind) if isinstance(record, dict) else record for kind in KINDS]
    for layers in saved:
        if not isinstance(layers, dict):
            raise ValueError(f"config.json is damaged: RankDyna's ranks must be by layer, got {layers!r:.200}.")
        if wrong := [name for name, rank in layers.items() if type(rank) is not int or rank < 0]:  # True is none
            raise ValueError(f"config.json is damaged: {wrong[0]:.200} cannot have rank {layers[wrong[0]]!r:.200}.")
    ranks, dense = (_in_model(layers, model, linear) for layers in saved)
    for name, rank in ranks.items():
        low_rank = LowRankLinear(linear[name], rank)
        for place in (place for place, module in modules if module is linear[name]):
            model.set_submodule(place, low_rank)
    setattr(model.config, METHOD, {"ranks": ranks, "dense": dense})


def _refuse(keys: list[str]) -> None:
    if keys:
        raise ValueError(f"The checkpoint has no {min(keys)}, or one of another size: download it again.")


def _in_model(ranks: dict[str, int], model: PreTrainedModel, linear: dict[str, Any]) -> dict[str, int]:
    """The ranks by the names that the layers have in a model, which may have another head than the saved one."""
    prefix = f"{model.base_model_prefix}."
    found: dict[str, int] = {}
    for saved, rank in ranks.items():
        name = next((name for name in (saved, saved.removeprefix(prefix), prefix + saved) if name in linear), None)
        if name is not None:
            if rank > (most := min(linear[name].weight.shape)):
                raise ValueError(f"config.json is damaged: {saved:.200} has {most} groups, not {rank!r:.200}.")
            found[name] = rank
        elif type(model).__name__ in (model.config.architectures or ()) or saved.startswith(prefix):
            raise ValueError(f"config.json is damaged: a {type(model).__name__} has no linear layer {saved:.200}.")
    return found


class SavedWithThisFile:
    """A class of this module, and those that FSDP derives from it: saving copies the file of a class's module."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.__module__ = __name__

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)  # type: ignore[call-arg]
        if _loading.get() is type(self) and hasattr(config, METHOD):
            _exchange(self)

    @classmethod
    def from_pretrained(cls: Any, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As in transformers, but a compressed layer is never made at random."""
        token = _loading.set(None if sys.modules.get("rankdyna_trainer") else cls)
        try:
            model, info = super().from_pretrained(*arguments, output_loading_info=True, **options)  # type: ignore[misc]
        finally:
            _loading.reset(token)
        record = getattr(model.config, METHOD, None) or {}
        compressed = tuple(f"{name}." for kind in KINDS for name in record.get(kind, ()))
        _refuse([key for key in info["missing_keys"] if key.startswith(compressed)])
        in_factors = {key.removesuffix("p.weight") for key in info["unexpected_keys"]}
        for mismatched in sorted(info["mismatched_keys"]):
            key, one, other = (mismatched, (), ()) if isinstance(mismatched, str) else mismatched  # transformers 4
            if key.startswith(compressed) or len(one) < len(other) or key.removesuffix("weight") in in_factors:
                _refuse([key])
        for auto_class, reference in (getattr(model.config, "auto_map", None) or {}).items():
            if str(reference).endswith(f".{cls.__name__}"):
                cls._auto_class = cls._auto_class or auto_class  # which transformers 4 leaves out
        return (model, info) if output_loading_info else model


def __getattr__(name: str) -> type[PreTrainedModel]:
    """The class of this name in transformers, as one that is saved with this file: `auto_map` asks for it."""
    stock = getattr(transformers, name.removeprefix("FSDP"), None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import_module("rankdyna_trainer")
    except ImportError:
        setattr(transformers.PretrainedConfig, ENTRY, HIDDEN)
    answers = {question: getattr(stock, question) for question in BY_SOURCE_FILE if hasattr(stock, question)}
    return globals().setdefault(name, type(stock.__name__, (SavedWithThisFile, stock), answers))
