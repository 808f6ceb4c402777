"""`generate` with the cache of keys and values, and with beams."""

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart", "encoder-decoder"])
def test_with_and_without_cache(
    kind: str, beams: int, make_compacted: Any, inputs_of: Any, assert_differs_less: Any
) -> None:
    model = make_compacted(kind)
    inputs = inputs_of(model, rows=3)
    inputs.pop("decoder_input_ids", None)
    inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}  # padded on the left
    settings = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    cached, plain = (model.generate(**inputs, **settings, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences) and len(cached.logits) == 8
    assert_differs_less("transformers", torch.stack(cached.logits), torch.stack(plain.logits), 1e-5)
