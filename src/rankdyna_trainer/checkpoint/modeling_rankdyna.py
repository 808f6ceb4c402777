# SPDX-License-Identifier: Apache-2.0
"""
What loads a model that RankDyna compressed, with weights P times Q, where only torch and transformers are installed.
`AutoModel....from_pretrained(folder, trust_remote_code=True)` runs it, or rankdyna_trainer's loader, if it is there.
"""

from importlib import import_module
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "rankdyna"
# What transformers answers by a class's source file: here by the file that has the layers.
BY_SOURCE_FILE = ("is_custom_code", "_can_set_attn_implementation", "_can_set_experts_implementation")


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


class CheckpointConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the ranks of the low-rank layers, and of those that were kept dense."""

    def __init__(self, /, ranks: Any = None, dense: Any = None, quant_method: str = METHOD, **_: Any) -> None:
        self.quant_method, self.ranks, self.dense = quant_method, ranks, {} if dense is None else dense
        for layers in (self.ranks, self.dense):
            if not isinstance(layers, dict):
                raise ValueError(f"config.json is damaged: RankDyna's ranks must be by layer, got {layers!r:.200}.")
            if wrong := [name for name, rank in layers.items() if type(rank) is not int or rank < 0]:  # True is none
                raise ValueError(
                    f"config.json is damaged: {wrong[0]:.200} cannot have rank {layers[wrong[0]]!r:.200}."
                )


class Loader(HfQuantizer):
    """Exchanges the low-rank layers before the weights are read, where transformers exchanges quantized ones."""

    is_trainable = is_qat_trainable = True
    is_serializable = staticmethod(lambda *_, **__: True)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        modules = list(model.named_modules(remove_duplicate=False))
        linear = {name: module for name, module in modules if isinstance(module, (nn.Linear, Conv1D))}
        saved = self.quantization_config
        saved.ranks, saved.dense = (_in_model(layers, model, linear) for layers in (saved.ranks, saved.dense))
        for name, rank in saved.ranks.items():
            low_rank = LowRankLinear(linear[name], rank)
            for place in [place for place, module in modules if module is linear[name]]:
                model.set_submodule(place, low_rank)
        self.shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # transformers 5.6 to 5.22 take a tensor of any size here.
        _refuse([key for key, tensor in model.state_dict().items() if tensor.shape != self.shapes[key]])
        del model.hf_quantizer
        model.is_quantized = False  # an ordinary model from here on: it may be cast and trained
        return model


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

    @classmethod
    def from_pretrained(cls: Any, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As in transformers, but a compressed layer is never made at random."""
        model, info = super().from_pretrained(*arguments, output_loading_info=True, **options)  # type: ignore[misc]
        record = dict(getattr(model.config, "quantization_config", None) or {})
        compressed = tuple(f"{name}." for kind in ("ranks", "dense") for name in record.get(kind, ()))
        mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
        _refuse([key for key in (*info["missing_keys"], *mismatched) if key.startswith(compressed)])
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
        AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, CheckpointConfig)
        AUTO_QUANTIZER_MAPPING.setdefault(METHOD, Loader)
    answers = {question: getattr(stock, question) for question in BY_SOURCE_FILE if hasattr(stock, question)}
    return globals().setdefault(name, type(stock.__name__, (SavedWithThisFile, stock), answers))
