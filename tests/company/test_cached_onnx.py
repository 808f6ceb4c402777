"""ONNX graphs of a compacted decoder that hand on the cache of keys and values."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig
from transformers.exporters import OnnxConfig, OnnxExporter

# As what a graph takes and gives it, whatever the cache is called: `past_key_values` before transformers 5.24.
TAKEN, GIVEN = "input.", "output."


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_reads_the_prompt_and_generates(
    make_compacted: Any, inputs_of: Any, assert_differs_less: Any, tmp_path: Path
) -> None:
    model = make_compacted("llama")
    ids = inputs_of(model)["input_ids"]
    OnnxExporter().export_for_generation(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        OnnxConfig(dynamic=True),
        generation_config=GenerationConfig(pad_token_id=0),
        multi_token_decode=True,
    ).save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "decode.onnx")
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    empty = np.zeros((len(ids), heads, 0, size), np.float32)
    cache: dict[str, NDArray[np.float32]] = {
        given.name.removeprefix(TAKEN): empty for given in session.get_inputs() if given.name.startswith(TAKEN)
    }
    assert len(cache) == 2 * model.config.num_hidden_layers
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **settings, output_logits=True, return_dict_in_generate=True)
    names = [output.name for output in session.get_outputs()]
    given, past = ids.numpy(), 0
    for logits, token in zip(expected.logits, expected.sequences[:, ids.shape[1] :].T, strict=True):
        positions = np.broadcast_to(np.arange(past, past + given.shape[1]), given.shape)
        feed = {f"{TAKEN}{name}": tensor for name, tensor in cache.items()}
        outputs = dict(
            zip(names, session.run(None, feed | {"input_ids": given, "position_ids": positions}), strict=True)
        )
        last = torch.from_numpy(outputs["logits"][:, -1])
        assert_differs_less("onnxruntime", last, logits, 1e-4)
        assert torch.equal(last.argmax(-1), token)
        cache = {name.removeprefix(GIVEN): tensor for name, tensor in outputs.items() if name.startswith(GIVEN)}
        given, past = token[:, None].numpy(), past + given.shape[1]
    weights = onnx.load(tmp_path / "decode.onnx").graph.initializer
    held = sum(int(np.prod(weight.dims)) for weight in weights if weight.data_type == onnx.TensorProto.FLOAT)
    assert held < sum(parameter.numel() for parameter in model.parameters()) + 100  # low-rank in the graph
