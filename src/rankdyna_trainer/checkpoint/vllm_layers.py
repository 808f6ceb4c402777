"""The layers of a compacted model in vLLM. Imported by vLLM's plugin alone: it needs vLLM."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..layers.served import WEIGHT, P, Q, ServedFactors
from ..options import METHOD
from .loader import RankDynaCheckpointConfig

# How vLLM calls the parts of what it joins.
_QUERY_KEY_VALUE = ("q", "k", "v")


@register_quantization_config(METHOD)
class ServedRanks(QuantizationConfig):
    """
    Which layers of a model are low-rank, for vLLM.

    Args:
        ranks: of the low-rank layers, by the names that they were saved by.
    """

    def __init__(self, ranks: dict[str, int]) -> None:
        super().__init__()
        self.ranks = ranks

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ServedRanks":
        """
        From what the plugin has put into `quantization_config`.

        Raises:
            ValueError: the ranks are damaged.
        """
        record = config[METHOD]
        return cls(RankDynaCheckpointConfig(**record if isinstance(record, dict) else {"ranks": record}).ranks)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """
        What a layer computes with.

        Args:
            layer: of vLLM, linear or not.
            prefix: its name.

        Raises:
            ValueError: the layer is low-rank in the checkpoint, but none for which vLLM lets it be so.
        """
        parent, dot, own = prefix.rpartition(".")
        names = [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(own, [own])]
        ranks = [self.ranks.get(name) for name in names]
        if not isinstance(layer, LinearBase):
            if any(rank is not None for rank in ranks):
                raise ValueError(
                    f"{prefix} is compressed, and vLLM has a {type(layer).__name__} there, which has to be dense: "
                    "compress without it (exclude_modules), or serve the model that `merge` makes."
                )
            return None
        return LowRankMethod(names, ranks) if any(rank is not None for rank in ranks) else UnquantizedLinearMethod()


class LowRankMethod(LinearMethodBase):
    """
    What a layer of vLLM computes with, if one of those that it joins is low-rank.

    Args:
        names: of the joined layers, as they were saved.
        ranks: of each; `None` if it is dense.
    """

    def __init__(self, names: list[str], ranks: list[int | None]) -> None:
        self.names, self.ranks = names, ranks

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """
        Give a layer the factors, and parameters with the names of the saved tensors, by which vLLM hands those over.

        Raises:
            ValueError: the layer was one in the checkpoint too, of parts that would have to be shared out by
                themselves.
        """
        sizes = output_partition_sizes if len(self.ranks) > 1 else [sum(output_partition_sizes)]
        if len(sizes) != len(output_partition_sizes) and layer.tp_size > 1:
            raise ValueError(f"{self.names[0]} is joined in the checkpoint: serve it with tensor_parallel_size=1.")
        layer.factors = ServedFactors(
            sizes, self.ranks, input_size_per_partition, params_dtype, layer.tp_rank, layer.tp_size
        )
        layer.register_parameter(WEIGHT, _door(layer, WEIGHT, params_dtype, self._load))
        for end in (P, Q):
            factor = nn.Module()
            factor.register_parameter("weight", _door(layer, end, params_dtype, self._load))
            layer.add_module(end.partition(".")[0], factor)
        if layer.has_bias:
            layer.p.register_parameter("bias", _door(layer, "bias", params_dtype, _load_bias))

    def _load(self, layer: Any, end: str, saved: Tensor, *shard: Any) -> None:
        part = _QUERY_KEY_VALUE.index(shard[0]) if shard and shard[0] in _QUERY_KEY_VALUE else (*shard, 0)[0] or 0
        try:
            layer.factors.load(end, part, saved)
        except ValueError as error:
            raise ValueError(f"{self.names[part]}: {error}. Copy or download the checkpoint again.") from error

    def process_weights_after_loading(self, layer: Any) -> None:
        """
        Check that the files had all that the ranks want.

        Raises:
            ValueError: they had not.
        """
        missing = [f"{self.names[part]}.{end}" for part, end in layer.factors.missing()]
        if missing:
            raise ValueError(f"The files lack {', '.join(missing)}: copy or download the checkpoint again.")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`, of this process."""
        output: Tensor = layer.factors(x)
        return output if bias is None else output + bias


def _door(layer: Any, end: str, dtype: torch.dtype, load: Any) -> nn.Parameter:
    """An empty parameter: its loader, which vLLM calls with a saved tensor of its name, keeps that elsewhere."""
    door: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def weight_loader(parameter: nn.Parameter, saved: Tensor, *shard: Any) -> None:
        load(layer, end, saved, *shard)

    door.weight_loader = weight_loader
    return door


def _load_bias(layer: Any, end: str, saved: Tensor, *shard: Any) -> None:
    layer.bias.weight_loader(layer.bias, saved, *shard)
