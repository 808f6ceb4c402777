"""Compacted models in vLLM, for `make test-serving`, which has an environment of its own; elsewhere skipped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import compacted
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: `make test-serving` does it, beside the others")

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # no kernel of vLLM for CPUs takes less
    "intermediate_size": 192,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
GPT2 |= {name: SIZES[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
GPT2["tie_word_embeddings"] = False
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-bias": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}
PROMPTS = [[5, 6, 7, 8, 9], [44, 17, 90, 23, 61, 5, 5, 70, 12], [33]]
TOKENS = 20


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server of a few hundred megabytes, whose errors are ours."""
    for name, value in {"ENABLE_V1_MULTIPROCESSING": "0", "CPU_KVCACHE_SPACE": "1", "NO_USAGE_STATS": "1"}.items():
        monkeypatch.setenv(f"VLLM_{name}", value)
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def save(kind: str, folder: Path) -> None:
    model = MODELS[kind]()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "wpe.weight")):  # so that not all tokens are alike
            torch.nn.init.normal_(parameter)
    compacted(model).save_pretrained(folder)


def serve(folder: Path) -> Any:
    limits = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    return vllm.LLM(str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, **limits)


def generated_by_transformers(model: PreTrainedModel) -> list[list[int]]:
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize("kind", list(MODELS))
def test_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    ranks = json.loads((tmp_path / "config.json").read_text())["rankdyna"]["ranks"]
    # In one joined layer of vLLM there are parts of rank 0, of two other ranks, and dense ones; GPT-2 has it joined.
    first = "transformer.h.0." if kind == "gpt2" else ".layers.0.self_attn."
    assert {0, 3, 5} == {rank for name, rank in ranks.items() if first in name}
    greedy = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    answers = serve(tmp_path).generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy)
    served = [list(answer.outputs[0].token_ids) for answer in answers]
    expected = generated_by_transformers(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert served == expected and len({*expected[0]}) > 1


def test_files_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.v_proj.p.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"The files lack model\.layers\.0\.self_attn\.v_proj\.p\.weight"):
        serve(tmp_path)


def test_a_compressed_layer_that_vllm_wants_dense_is_refused() -> None:
    from rankdyna_trainer.checkpoint.vllm_layers import ServedRanks

    with pytest.raises(ValueError, match="lm_head is compressed, and vLLM has a Embedding there"):
        ServedRanks({"lm_head": 3}).get_quant_method(torch.nn.Embedding(8, 4), "lm_head")
