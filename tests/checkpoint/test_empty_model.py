import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tasks import tiny_tasks
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedModel,
    ViTConfig,
    WhisperConfig,
)

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.checkpoint.empty_model import empty_model, model_class, read_config
from rankdyna_trainer.layers.targets import find_targets


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "bart", "t5", "encoder-decoder"])
def test_has_the_shapes_and_ties_of_the_model(kind: str, tmp_path: Path) -> None:
    model = tiny_tasks.model(kind)
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [type(model).__name__]}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    empty = empty_model(read_config(tmp_path))
    assert type(empty) is type(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    buffers = dict(empty.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("config", [ViTConfig(num_hidden_layers=1), WhisperConfig(encoder_layers=1, decoder_layers=1)])
def test_a_configuration_that_names_no_class(config: ViTConfig | WhisperConfig) -> None:
    empty = empty_model(config)
    assert isinstance(empty, PreTrainedModel)
    assert len(find_targets(empty, RankDynaConfig(rank_ratio=0.5))) == {"vit": 6, "whisper": 16}[config.model_type]


def test_a_class_with_its_own_forward_is_tried_out_without_values() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10}
    config = FalconConfig(**sizes, architectures=["FalconForCausalLM"])
    names = {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
    targets = find_targets(empty_model(config), RankDynaConfig(rank_ratio=0.5))
    assert set(targets) == {f"transformer.h.0.{name}" for name in names}
    assert set(targets) == set(find_targets(FalconForCausalLM(config), RankDynaConfig(rank_ratio=0.5)))


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_class_that_computes_something_else_is_left_alone_without_values() -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=10))
        model.encoder.layer[0].output.dense = _Doubled(3072, 32)
    targets = find_targets(model, RankDynaConfig(rank_ratio=0.5))
    assert "encoder.layer.0.output.dense" not in targets
    assert "encoder.layer.0.intermediate.dense" in targets


def write(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda folder: None, OSError, r"has no config\.json: it holds no saved model"),
        (write("{"), OSError, "not a valid JSON"),
        (write("{}"), ValueError, "model_type"),
        (write('{"model_type": "bert", "architectures": ["Nope"]}'), ValueError, "architecture Nope, which"),
        (write('{"model_type": "bert", "architectures": ["Trainer"]}'), ValueError, "architecture Trainer, which"),
        (write('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}'), ValueError, "custom code"),
    ],
)
def test_what_cannot_be_used(
    tmp_path: Path, prepare: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('this code was run')")
    prepare(tmp_path)
    with pytest.raises(error, match=message):
        model_class(read_config(tmp_path))


@pytest.mark.parametrize("source", ["/no/such/folder", "./none", "a/b/c"])
def test_no_folder(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"There is no folder {source}"):
        read_config(source)
