"""What vLLM is told of a configuration; that it serves the model is tried in tests/serving."""

from importlib.metadata import entry_points
from typing import Any

import pytest

from rankdyna_trainer.checkpoint.vllm_plugin import register, with_ranks
from rankdyna_trainer.layers.stock_refusal import COMPACTED, ENTRY, UNFINISHED

RECORD = {"ranks": {"model.layers.0.mlp.up_proj": 3}, "dense": {}}


def test_ranks_stand_where_vllm_looks_for_quantization() -> None:
    config: dict[str, Any] = {"model_type": "llama", "rankdyna": RECORD, ENTRY: COMPACTED}
    seen = with_ranks(config)
    assert seen.pop("quantization_config") == {"quant_method": "rankdyna", "rankdyna": RECORD}
    assert seen == config


def test_other_models_are_left_as_they_are() -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    assert with_ranks(config) is config


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot serve this folder: this is a checkpoint of a running compression"):
        with_ranks({ENTRY: UNFINISHED})
    with pytest.raises(ValueError, match="compacted and quantized, and vLLM can serve it as one of them only"):
        with_ranks({"rankdyna": RECORD, "quantization_config": {"quant_method": "torchao"}})


def test_vllm_finds_it() -> None:
    [plugin] = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "rankdyna"]
    assert plugin.load() is register
