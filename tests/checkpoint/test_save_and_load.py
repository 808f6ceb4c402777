"""Compacted checkpoints: saved, loaded in every way that users load models, and refused where they must be."""

import filecmp
import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.damage import compacted
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from rankdyna_trainer import LowRankLinear, RankDynaConfig, compact, inject_singular_groups, merge, rank_report
from rankdyna_trainer.checkpoint.saving import save_compacted

RunFresh = Callable[..., CompletedProcess[str]]


@pytest.fixture
def saved(small: nn.Module, tmp_path: Path) -> Path:
    save_compacted(small, tmp_path / "saved")
    return tmp_path / "saved"


INPUT = torch.arange(2, 22).reshape(2, 10)


def same(one: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(one(INPUT)[0], other(INPUT)[0])


def test_reload_is_exact_and_saves_the_same_again(small: nn.Module, saved: Path, tmp_path: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    assert same(loaded, small)
    assert rank_report(loaded).equals(rank_report(small))
    assert set(rank_report(loaded)["form"]) == {"low rank", "dense"}
    assert 0 in set(rank_report(loaded)["rank"])
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert filecmp.cmp(saved / name, tmp_path / "again" / name, shallow=False), name


def test_nothing_but_json_and_safetensors_is_written(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(saved / "model.safetensors", "pt") as tensors:
        shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    in_place_of_weights = [shape for key, shape in shapes.items() if key.endswith("self.query.weight")]
    assert in_place_of_weights and all(shape == [2] for shape in in_place_of_weights)
    assert not any(0 in shape for shape in shapes.values())


@pytest.mark.parametrize(
    "auto_class",
    [
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForQuestionAnswering,
        AutoModelForTokenClassification,
    ],
)
def test_loads_under_any_head_and_back(auto_class: type, small: nn.Module, saved: Path, tmp_path: Path) -> None:
    other = auto_class.from_pretrained(saved)
    body = other.base_model
    with torch.no_grad():
        assert torch.equal(body(INPUT).last_hidden_state, small.base_model(INPUT).last_hidden_state)
    other.save_pretrained(tmp_path / "other")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        assert torch.equal(again.base_model(INPUT).last_hidden_state, small.base_model(INPUT).last_hidden_state)


def test_the_base_model_of_a_classifier_can_be_saved_alone(small: nn.Module, tmp_path: Path) -> None:
    small.base_model.save_pretrained(tmp_path / "body")
    body = AutoModel.from_pretrained(tmp_path / "body")
    with torch.no_grad():
        assert torch.equal(body(INPUT).last_hidden_state, small.base_model(INPUT).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_device_map(dtype: torch.dtype, small: nn.Module, saved: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved, dtype=dtype, device_map="cpu")
    layer = next(module for module in loaded.modules() if isinstance(module, LowRankLinear) and module.rank)
    assert {layer.p.weight.dtype, layer.q.weight.dtype, layer.weight.dtype} == {dtype}
    with torch.no_grad():
        torch.testing.assert_close(loaded(INPUT).logits.float(), small(INPUT).logits, atol=1e-2, rtol=0)


def test_blocks_that_torch_checkpoints(tiny_bert: BertForSequenceClassification, tmp_path: Path) -> None:
    """As with FSDP2 and `activation_checkpointing` in its configuration."""
    layers = tiny_bert.bert.encoder.layer
    inject_singular_groups(tiny_bert, RankDynaConfig(rank_ratio=0.5))
    for i in range(len(layers)):
        layers[i] = checkpoint_wrapper(layers[i])
    save_compacted(compact(tiny_bert.eval()), tmp_path / "saved")
    assert same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"), tiny_bert)


def test_sharded(small: nn.Module, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "shards"), small)


def test_a_loaded_model_is_an_ordinary_model(small: nn.Module, saved: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(saved)
    assert not getattr(loaded, "is_quantized", False) and getattr(loaded, "hf_quantizer", None) is None
    assert same(
        loaded.half().float().bfloat16().float(),
        AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.float16).float().bfloat16().float(),
    )


@pytest.mark.slow
def test_merge_gives_a_stock_checkpoint(small: nn.Module, saved: Path, tmp_path: Path, run_fresh: RunFresh) -> None:
    merged = merge(AutoModelForSequenceClassification.from_pretrained(saved))
    merged.save_pretrained(tmp_path / "stock")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        "model = A.from_pretrained(sys.argv[1])\n"
        "assert 'rankdyna_trainer' not in sys.modules\n"
        "torch.save(model(torch.arange(2, 22).reshape(2, 10)).logits.detach(), sys.argv[2])\n"
    )
    run_fresh(code, tmp_path / "stock", tmp_path / "logits.pt")
    with torch.no_grad():
        expected = small(INPUT).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-6)


def test_merge_restores_conv1d(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    stock = {key: value.shape for key, value in model.state_dict().items()}
    compacted(model)
    with torch.no_grad():
        expected = model(INPUT).logits
    model.save_pretrained(tmp_path / "gpt2")
    merged = merge(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"))
    assert {key: value.shape for key, value in merged.state_dict().items()} == stock
    with torch.no_grad():
        torch.testing.assert_close(merged(INPUT).logits, expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(merged.config, "rankdyna")


@pytest.mark.slow
def test_loading_without_the_plugin_raises(saved: Path, run_fresh: RunFresh) -> None:
    code = (
        "import sys\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        "for options in {}, {'ignore_mismatched_sizes': True}:\n"
        "    try:\n"
        "        A.from_pretrained(sys.argv[1], **options)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    result = run_fresh(code, saved)
    refusal = "Install that, and `import rankdyna_trainer` before it is loaded."
    refusal = f"this model is compressed with rankdyna-trainer. {refusal}"
    assert [line.rpartition(": ")[2] for line in result.stdout.splitlines()] == [refusal, refusal]
    assert "quantization type" not in result.stderr and "LOAD REPORT" not in result.stderr


def edit_config(saved: Path, **changes: object) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["rankdyna"].update(changes)
    path.write_text(json.dumps(config))


def test_a_rank_that_disagrees_with_the_tensors_names_the_layer(saved: Path) -> None:
    ranks = json.loads((saved / "config.json").read_text())["rankdyna"]["ranks"]
    name = "bert.encoder.layer.0.attention.self.key"
    for rank, reason in ((4, "different checkpoints"), (10**12, "at most 32 groups")):
        edit_config(saved, ranks=ranks | {name: rank})
        with pytest.raises(ValueError, match=rf"layer {re.escape(name)} has rank {rank}.*{reason}"):
            AutoModelForSequenceClassification.from_pretrained(saved)
    for rank in (-1, "3", 2.5, True, None):
        edit_config(saved, ranks=ranks | {name: rank})
        with pytest.raises(ValueError, match=rf"rank of layer {re.escape(name)}"):
            AutoModelForSequenceClassification.from_pretrained(saved)


def test_layers_that_config_and_weights_do_not_share(saved: Path) -> None:
    ranks = json.loads((saved / "config.json").read_text())["rankdyna"]["ranks"]
    edit_config(saved, ranks=ranks | {"bert.pooler.dense": 3})
    with pytest.raises(ValueError, match=r"layer bert\.pooler\.dense has rank 3, .*\(2,\), but it is \(32, 32\)"):
        AutoModelForSequenceClassification.from_pretrained(saved)
    edit_config(saved, ranks=ranks | {"bert.encoder.layer.9.output.dense": 3})
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.9\.output\.dense"):
        AutoModelForSequenceClassification.from_pretrained(saved)
    missing = {name: rank for name, rank in ranks.items() if "layer.1" not in name}
    edit_config(saved, ranks=missing)
    with pytest.raises(ValueError, match=r"layer\.1\.attention.*compressed in the file"):
        AutoModelForSequenceClassification.from_pretrained(saved)


def test_a_truncated_file_is_named(
    saved: Path, assert_refused: Callable[[Callable[[], object], type[Exception], str], None]
) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(
        lambda: AutoModelForSequenceClassification.from_pretrained(saved), ValueError, r"model\.safetensors is damaged"
    )


def test_missing_factor(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.encoder.layer.0.attention.self.key.q.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for bert\.encoder\.layer\.0\.attention\.self\.key"):
        AutoModelForSequenceClassification.from_pretrained(saved)


def test_a_module_of_ones_own_around_a_pretrained_model(
    tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    class Wrapper(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

    wrapper = compacted(Wrapper(tiny_bert.bert))
    wrapper.encoder.save_pretrained(tmp_path / "encoder")
    loaded = AutoModel.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        assert torch.equal(loaded(INPUT).last_hidden_state, wrapper.encoder(INPUT).last_hidden_state)
