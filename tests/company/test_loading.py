"""Where and in which type `from_pretrained` puts a model, and what a mixed precision makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

KINDS = ["classifier", "gpt2", "t5", "bart"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 0), ("bfloat16", 0.1)], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_offloaded_by_accelerate(
    kind: str, dtype: str, limit: float, make_compacted: Any, inputs_of: Any, assert_differs_less: Any, tmp_path: Path
) -> None:
    model = make_compacted(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = type(model).from_pretrained(
        tmp_path,
        dtype=dtype,
        device_map="auto",
        max_memory={"cpu": model.get_memory_footprint() // (2 if dtype == "float32" else 4)},
        offload_folder=tmp_path / "offloaded",
    )
    assert "disk" in loaded.hf_device_map.values()
    assert loaded.dtype == getattr(torch, dtype)
    inputs = inputs_of(model)
    assert_differs_less("accelerate", loaded(**inputs).logits, model(**inputs).logits, limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_autocast(
    kind: str, dtype: torch.dtype, make_compacted: Any, inputs_of: Any, assert_differs_less: Any
) -> None:
    """Layers of rank 0 give the type that the others do, or attention would refuse them."""
    model = make_compacted(kind)
    inputs = inputs_of(model)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(**inputs).logits
    assert_differs_less("torch", logits, model(**inputs).logits, 0.1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_row_and_a_row_of_padding_only(
    kind: str, make_compacted: Any, inputs_of: Any, assert_differs_less: Any
) -> None:
    model = make_compacted(kind)
    one = inputs_of(model, rows=1)
    expected = model(**one).logits
    both = {name: torch.cat([tensor, tensor]) for name, tensor in one.items()}
    both["attention_mask"][1] = 0
    logits = model(**both).logits
    assert torch.isfinite(logits).all()
    assert_differs_less("transformers", logits[:1], expected, 1e-5)
