"""Graphs of a compacted model: ONNX, `torch.export`, `torch.compile`."""

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from support.damage import compacted
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.exporters import OnnxConfig, OnnxExporter

from rankdyna_trainer import LowRankLinear


class LogitsOnly(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def run(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> Tensor:
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(arrays[names.index("logits")])


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_a_classifier(make_compacted: Any, inputs_of: Any, assert_differs_less: Any, tmp_path: Path) -> None:
    model = make_compacted("classifier")
    exported = OnnxExporter().export(model, inputs_of(model), config=OnnxConfig(dynamic=True))
    exported.save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((2, 10), (3, 7), (1, 5)):
        inputs = inputs_of(model, *shape)
        assert_differs_less("onnxruntime", run(session, inputs), model(**inputs).logits, 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_a_vision_model(assert_differs_less: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = compacted(
        ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, initializer_range=0.2, **sizes))
    )
    images = [torch.randn(count, 3, 32, 32) for count in (2, 1, 5)]
    exported = OnnxExporter().export(model, {"pixel_values": images[0]}, config=OnnxConfig(dynamic=True))
    exported.save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for image in images:
        assert_differs_less("onnxruntime", run(session, {"pixel_values": image}), model(image).logits, 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_torch_export_and_onnx_of_it(
    make_compacted: Any, inputs_of: Any, assert_differs_less: Any, tmp_path: Path
) -> None:
    model = LogitsOnly(make_compacted("llama")).eval()
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in ("input_ids", "attention_mask")}
    program = torch.export.export(model, (), inputs_of(model.model), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.onnx.export(program, f=tmp_path / "model.onnx", output_names=["logits"], verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((2, 10), (3, 7), (1, 5)):
        inputs = inputs_of(model.model, *shape)
        expected = model.model(**inputs).logits
        assert_differs_less("torch", loaded(**inputs), expected, 1e-5)
        assert_differs_less("onnxruntime", run(session, inputs), expected, 1e-4)


def without_sides_of_zero(file: Path) -> onnx.ModelProto:
    """The graph of a file, none of whose weights is empty."""
    graph = onnx.load(file)
    assert graph.graph.initializer and not [tensor.name for tensor in graph.graph.initializer if 0 in tensor.dims]
    return graph


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "gpt2", "llama"])
@pytest.mark.parametrize("dynamo", [False, True])
@torch.no_grad()
def test_onnx_in_int8_by_channel(
    dynamo: bool, kind: str, make_compacted: Any, inputs_of: Any, assert_differs_less: Any, tmp_path: Path
) -> None:
    model = LogitsOnly(make_compacted(kind)).eval()
    inputs = inputs_of(model.model)
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": ["logits"], "verbose": False}
    file, small = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    torch.onnx.export(model, tuple(inputs.values()), str(file), dynamo=dynamo, **names)
    graph = without_sides_of_zero(file)
    # Of the shapes that the exporter notes, ONNX Runtime's quantization refuses some, also those of a dense model.
    del graph.graph.value_info[:]
    quantize_dynamic(graph, small, per_channel=True, weight_type=QuantType.QInt8)
    without_sides_of_zero(small)
    expected = model.model(**inputs).logits
    assert_differs_less("onnxruntime", run(onnxruntime.InferenceSession(file), inputs), expected, 1e-4)
    limit = 0.1 * expected.abs().max().item()
    assert_differs_less("onnxruntime", run(onnxruntime.InferenceSession(small), inputs), expected, limit)


def tensors_without_numbers(file: Path) -> list[str]:
    """What a file of `torch.export` or `torch.jit` keeps as a record of no bytes."""
    with ZipFile(file) as records:
        weights = [record for record in records.infolist() if "/data/" in record.filename]
    assert weights
    return [record.filename for record in weights if not record.file_size]


@torch.no_grad()
def test_no_graph_holds_a_side_of_zero(
    make_compacted: Any, inputs_of: Any, assert_differs_less: Any, tmp_path: Path
) -> None:
    model = LogitsOnly(make_compacted("classifier")).eval()
    assert 0 in [layer.rank for layer in model.modules() if isinstance(layer, LowRankLinear)]
    inputs = inputs_of(model.model)
    program = torch.export.export(model, (), inputs)
    held = {**program.state_dict, **program.constants}
    assert held and not [name for name, tensor in held.items() if 0 in tensor.shape]
    torch.export.save(program, tmp_path / "model.pt2")
    assert tensors_without_numbers(tmp_path / "model.pt2") == []
    traced = torch.jit.trace(model, tuple(inputs.values()))
    torch.jit.save(traced, tmp_path / "model.pt")
    assert tensors_without_numbers(tmp_path / "model.pt") == []
    frozen = torch.jit.freeze(traced)
    constants = [
        node.t("value")
        for node in frozen.graph.findAllNodes("prim::Constant")
        if node.hasAttribute("value") and node.kindOf("value") == "t"
    ]
    assert constants and not [tensor for tensor in constants if 0 in tensor.shape]
    assert_differs_less("torch", frozen(**inputs), model.model(**inputs).logits, 1e-5)


def test_torch_compile_in_one_graph(make_compacted: Any, inputs_of: Any, assert_differs_less: Any) -> None:
    model = make_compacted("llama")
    inputs = inputs_of(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(**inputs).logits
    assert_differs_less("torch", logits, model(**inputs).logits, 1e-5)
    logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(**inputs).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
