"""
Compacted models in vLLM, which calls `register` in each of its processes: it is an entry point of the group
`vllm.general_plugins`. vLLM takes other layers by its interface for quantization, and our format for such a method.
"""

import functools
from importlib import import_module
from typing import Any

from ..layers.stock_refusal import ENTRY, UNFINISHED
from ..options import METHOD


def register() -> None:
    """Make the format known to vLLM, so that `vllm serve` takes a folder or repository as it is."""
    import_module(f"{__package__}.vllm_layers")
    configurations: Any = import_module("vllm.transformers_utils.config")
    _read_with_ranks(configurations.HFConfigParser)


def with_ranks(config: dict[str, Any]) -> dict[str, Any]:
    """
    What `config.json` says, with the ranks where vLLM looks for quantization.

    Raises:
        ValueError: the model is quantized as well, or a checkpoint of a running compression.
    """
    if config.get(ENTRY) == UNFINISHED:
        raise ValueError(f"vLLM cannot serve this folder: {UNFINISHED}")
    if METHOD not in config:
        return config
    if config.get("quantization_config"):
        raise ValueError(
            "This model is compacted and quantized, and vLLM can serve it as one of them only: give it the compacted "
            "model from before it was quantized."
        )
    return config | {"quantization_config": {"quant_method": METHOD, METHOD: config[METHOD]}}


def _read_with_ranks(parser: Any) -> None:
    parse = parser.parse
    if hasattr(parse, "__wrapped__"):  # vLLM may call plugins twice
        return

    @functools.wraps(parse)
    def parse_with_ranks(self: Any, *arguments: Any, **options: Any) -> tuple[dict[str, Any], Any]:
        values, config = parse(self, *arguments, **options)
        return with_ranks(values), config

    parser.parse = parse_with_ranks
