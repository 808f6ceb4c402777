"""Models that `device_map` has offloaded, compressed a block at a time: the same numbers as in memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from support.damage import TRANSFORMERS_4
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rankdyna_trainer import LowRankLinear, RankDynaConfig, merge, rank_report
from rankdyna_trainer.baselines import svd, whitened_svd
from rankdyna_trainer.checkpoint.saving import save_compacted

Batch = dict[str, torch.Tensor]
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
OTHERS = {
    "llama": ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"],
    "gpt2": ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"],
}


def save_dense(kind: str, folder: Path, dtype: torch.dtype) -> None:
    """Llama with grouped queries, a gated MLP and tied embeddings; GPT-2 with `Conv1D`, which is tied too."""
    if kind == "llama":
        sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "initializer_range": 0.3}
        heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
    else:
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 16, "initializer_range": 0.3}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, bos_token_id=0, eos_token_id=0, **sizes))
    model.to(dtype).save_pretrained(folder)


def places(kind: str, where: str) -> dict[str, str]:
    """All on the disk, or one of three blocks in memory."""
    if where == "disk":
        if TRANSFORMERS_4:
            pytest.skip("transformers 4 cannot load a model that is on the disk as a whole")
        return {"": "disk"}
    blocks = {f"{BLOCKS[kind]}.{number}": "cpu" if number == 1 else "disk" for number in range(3)}
    return dict.fromkeys(OTHERS[kind], "cpu") | blocks


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | options).eval()


def batches() -> list[Batch]:
    return [{"input_ids": torch.randint(64, (2, 8)), "attention_mask": torch.ones(2, 8)} for _ in range(3)]


def compress(model: Any, method: str, config: RankDynaConfig, rows: list[Batch]) -> Any:
    return svd(model, config) if method == "svd" else whitened_svd(model, config, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["disk", "mixed"])
@pytest.mark.parametrize("method", ["svd", "whitened"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_equal_to_the_last_bit(kind: str, method: str, where: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_dense(kind, tmp_path / "dense", dtype)
    rows = batches()
    # At this ratio the square layers stay dense.
    config = RankDynaConfig(rank_ratio=0.55)
    expected = compress(load(tmp_path / "dense"), method, config, rows)
    model = load(tmp_path / "dense", device_map=places(kind, where), offload_folder=tmp_path / "offloaded")
    assert compress(model, method, config, rows) is model
    assert rank_report(model).equals(rank_report(expected))
    layer = model.get_submodule(f"{BLOCKS[kind]}.2").mlp
    factors = [part for part in layer.modules() if isinstance(part, LowRankLinear)]
    assert factors and all(part.p.weight.is_meta and part.q.weight.is_meta for part in factors)
    for folder, each in (("expected", expected), ("offloaded-small", model)):
        save_compacted(each, tmp_path / folder)
    saved, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("offloaded-small", "expected"))
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    for logits in (model(**rows[0]).logits, load(tmp_path / "offloaded-small")(**rows[0]).logits):
        assert torch.equal(logits, expected(**rows[0]).logits)


@pytest.mark.parametrize("config", [{"param_ratio": 0.01}, {"rank_ratio": 1.0}], ids=["rank 0", "dense"])
@pytest.mark.parametrize("method", ["svd", "whitened"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_at_either_end(kind: str, method: str, config: dict[str, Any], tmp_path: Path) -> None:
    save_dense(kind, tmp_path / "dense", torch.float32)
    rows = batches()
    expected = compress(load(tmp_path / "dense"), method, RankDynaConfig(**config), rows)
    model = load(tmp_path / "dense", device_map=places(kind, "mixed"))
    compress(model, method, RankDynaConfig(**config), rows)
    model.save_pretrained(tmp_path / "small")
    for logits in (model(**rows[0]).logits, load(tmp_path / "small")(**rows[0]).logits):
        assert torch.equal(logits, expected(**rows[0]).logits)


@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_in_the_memory_of_the_host(method: str, tmp_path: Path) -> None:
    """As a model that a GPU has no room for; the device that computes is the CPU here."""
    save_dense("llama", tmp_path, torch.float32)
    expected, rows = load(tmp_path), batches()
    model = cpu_offload(copy.deepcopy(expected), torch.device("cpu"))
    for each in (expected, model):
        compress(each, method, RankDynaConfig(rank_ratio=0.3), rows)
    assert torch.equal(model(**rows[0]).logits, expected(**rows[0]).logits)
    assert all(weight.is_meta for weight in model.parameters())


def test_only_a_few_weights_at_a_time_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dense("llama", tmp_path, torch.float32)
    model = load(tmp_path, device_map=places("llama", "mixed"))
    offloaded = [weight for weight in model.parameters() if weight.is_meta]
    most = 0
    forward = torch.nn.functional.linear

    def counting(*arguments: Any) -> Any:
        nonlocal most
        most = max(most, sum(not weight.is_meta for weight in model.model.layers[2].parameters()))
        return forward(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    whitened_svd(model, RankDynaConfig(rank_ratio=0.3), batches())
    assert offloaded and most == 1


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    save_dense("llama", tmp_path, torch.float32)
    broken = load(tmp_path)
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight[1, 2] = float("nan")
    broken.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weight of model\.layers\.2\.mlp\.up_proj has inf or nan"):
        svd(load(tmp_path, device_map=places("llama", "mixed")), RankDynaConfig(rank_ratio=0.3))


@pytest.mark.parametrize("ratio", [0.55, 0.01], ids=["", "rank 0"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_merged_again(kind: str, ratio: float, tmp_path: Path) -> None:
    save_dense(kind, tmp_path / "dense", torch.float32)
    svd(load(tmp_path / "dense"), RankDynaConfig(param_ratio=ratio)).save_pretrained(tmp_path / "small")
    expected, rows = load(tmp_path / "small"), batches()
    model = load(tmp_path / "small", device_map=places(kind, "mixed"))
    for each in (expected, model):
        merge(each)
    model.save_pretrained(tmp_path / "merged")
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    for logits in (model(**rows[0]).logits, load(tmp_path / "merged")(**rows[0]).logits):
        assert torch.equal(logits, expected(**rows[0]).logits)
