"""P and Q in int8 and int4."""

import copy
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tasks import tiny_tasks
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    TorchAoConfig,
    dynamic_module_utils,
)

from rankdyna_trainer import LowRankLinear, RankDynaConfig, make_self_contained, merge, rank_report
from rankdyna_trainer.baselines import svd


def weights_only(model: nn.Module) -> nn.Module:
    quantize_(model, Int8WeightOnlyConfig())
    return model


def activations_too(model: nn.Module) -> nn.Module:
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def dynamically(model: nn.Module) -> nn.Module:
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def file_bytes(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def is_quantized(linear: nn.Module) -> bool:
    return type(linear) is not nn.Linear or type(linear.weight.data) is not torch.Tensor


@pytest.mark.parametrize("kind", ["classifier", "gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    ("tool", "quantized_by"),
    [("torchao", weights_only), ("torchao", activations_too), ("torch", dynamically)],
    ids=["torchao weights", "torchao dynamic", "torch dynamic"],
)
@torch.no_grad()
def test_int8(
    tool: str,
    quantized_by: Callable[[nn.Module], nn.Module],
    kind: str,
    make_compacted: Any,
    inputs_of: Any,
    assert_differs_less: Any,
) -> None:
    model = make_compacted(kind)
    inputs = inputs_of(model)
    expected = model(**inputs).logits
    quantized = quantized_by(copy.deepcopy(model))
    layers = [module for module in quantized.modules() if isinstance(module, LowRankLinear)]
    for layer in layers:
        if layer.rank:
            assert is_quantized(layer.p) and is_quantized(layer.q)
        else:
            assert isinstance(layer.p, nn.Linear) and layer.p.weight.numel() == 0
    assert not [
        name for name, tensor in quantized.state_dict().items() if isinstance(tensor, Tensor) and 0 in tensor.shape
    ]
    assert {layer.rank for layer in layers} == {0, 3, 5}
    assert_differs_less(tool, quantized(**inputs).logits, expected, 0.03 * expected.abs().max().item())
    if kind != "gpt2":  # what stays dense there is a Conv1D, which these tools do not quantize
        assert file_bytes(quantized) < file_bytes(model)


INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))


@pytest.mark.parametrize("method", [Int8WeightOnlyConfig(), INT4], ids=["int8", "int4"])
@torch.no_grad()
def test_compacted_and_quantized_on_disk(
    method: Any, inputs_of: Any, assert_differs_less: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is loaded at once: compacted in floats, quantized while it is loaded, and quantized in the file."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tiny_tasks.WORDS), **sizes)).eval()
    make_self_contained(svd(model, RankDynaConfig(param_ratio=0.6, rank_multiple_of=16)))
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path / "small")
    of = AutoModelForSequenceClassification.from_pretrained
    quantized = of(tmp_path / "small", quantization_config=TorchAoConfig(method))
    expected = quantized(**inputs).logits
    assert_differs_less("torchao", expected, model(**inputs).logits, 0.1)
    factors = [factor for m in quantized.modules() if isinstance(m, LowRankLinear) for factor in (m.p, m.q)]
    assert factors and all(is_quantized(factor) for factor in factors)

    quantized.save_pretrained(tmp_path / "quantized")
    sizes_on_disk = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("quantized", "small")]
    assert sizes_on_disk[0] < sizes_on_disk[1]
    loaded = of(tmp_path / "quantized")
    assert torch.equal(loaded(**inputs).logits, expected)
    assert rank_report(loaded).equals(rank_report(model))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert torch.equal(of(tmp_path / "quantized", trust_remote_code=True)(**inputs).logits, expected)

    merge(loaded).save_pretrained(tmp_path / "stock")
    saved = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert not {"rankdyna", "quantization_config", "auto_map", "transformers_weights"} & saved.keys()
    assert [path.name for path in sorted((tmp_path / "stock").iterdir())] == ["config.json", "model.safetensors"]
    torch.testing.assert_close(of(tmp_path / "stock")(**inputs).logits, expected)


@torch.no_grad()
def test_ranks_that_groups_do_not_divide_are_told(make_compacted: Any, inputs_of: Any, tmp_path: Path) -> None:
    model = make_compacted("classifier")
    model.save_pretrained(tmp_path / "small")
    of = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"Groups of 16 numbers do not divide .*: 3, .*PerAxis.*rank_multiple_of=16"):
        of(tmp_path / "small", quantization_config=TorchAoConfig(INT4))
    by_rows = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))
    quantized = of(tmp_path / "small", quantization_config=TorchAoConfig(by_rows))
    quantized.save_pretrained(tmp_path / "quantized")
    inputs = inputs_of(model)
    assert torch.equal(of(tmp_path / "quantized")(**inputs).logits, quantized(**inputs).logits)


def test_a_factor_that_a_quantized_file_lacks_is_missed(make_compacted: Any, tmp_path: Path) -> None:
    model = make_compacted("classifier")
    model.save_pretrained(tmp_path / "small")
    name = next(name for name, rank in rank_report(model)["rank"].items() if rank == 3)
    method = TorchAoConfig(Int8WeightOnlyConfig())
    of = AutoModelForSequenceClassification.from_pretrained
    of(tmp_path / "small", quantization_config=method).save_pretrained(tmp_path / "quantized")
    path = tmp_path / "quantized" / "model.safetensors"
    with safe_open(path, "pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(f"{name}.p._weight")}  # noqa: SIM118
        save_file(kept, path, file.metadata())
    with pytest.raises((ValueError, RuntimeError), match=re.escape(f"{name}.p.weight")):
        of(tmp_path / "quantized")
