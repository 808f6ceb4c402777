"""Compacted models in OpenVINO: an encoder, and a decoder with its cache of keys and values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

pytest.importorskip("openvino", reason="openvino is installed by make test-serving alone: it is 180 MB")
from transformers.exporters import OpenVINOConfig, OpenVINOExporter
from transformers.exporters.base import ExportedModel

# Where the processor multiplies in bfloat16, OpenVINO does too unless it is told not to: dense models differ as well.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}


def bytes_in(folder: Path) -> int:
    """How large the weights of an export are."""
    return sum(file.stat().st_size for file in folder.glob("*.bin"))


@pytest.mark.slow
@torch.no_grad()
def test_encoder(make_compacted: Any, inputs_of: Any, assert_differs_less: Any, tmp_path: Path) -> None:
    model = make_compacted("classifier")
    OpenVINOExporter().export(model, inputs_of(model), OpenVINOConfig(dynamic=True)).save_pretrained(tmp_path)
    exported = ExportedModel.from_pretrained(tmp_path, config=EXACT)
    for shape in ((2, 10), (3, 7), (1, 5)):
        inputs = inputs_of(model, *shape)
        assert_differs_less("openvino", exported(**inputs).logits, model(**inputs).logits, 1e-4)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert bytes_in(tmp_path) < 4 * parameters + 4096  # low-rank in the graph


@pytest.mark.slow
@torch.no_grad()
def test_decoder_with_cache(make_compacted: Any, inputs_of: Any, assert_differs_less: Any) -> None:
    model = make_compacted("llama")
    ids: Tensor = inputs_of(model)["input_ids"]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = OpenVINOConfig(dynamic=True, stateful=False)
    exported = OpenVINOExporter().export_for_generation(
        model, given, config, generation_config=GenerationConfig(pad_token_id=0), multi_token_decode=True
    )
    exported.to(config=EXACT)
    prefill, decode = exported.runners["prefill"], exported.runners["decode"]
    expected = model(input_ids=ids).logits
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    first = prefill(input_ids=ids[:, :6], position_ids=positions[:, :6])
    assert_differs_less("openvino", first.logits[:, -1], expected[:, 5], 1e-4)
    cache = first.past_key_values
    for place in range(6, ids.shape[1]):
        step = decode(
            input_ids=ids[:, place : place + 1], position_ids=positions[:, place : place + 1], past_key_values=cache
        )
        assert_differs_less("openvino", step.logits[:, -1], expected[:, place], 1e-4)
        cache = step.past_key_values
