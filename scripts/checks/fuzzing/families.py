"""Random tiny models of families of transformers."""

import random
from collections.abc import Callable, Mapping

import torch
import transformers

from .subjects import Batch, Subject

VOCABULARY = 24


def tokens(rows: int = 4) -> Batch:
    """Random tokens, the last of the first row padding."""
    ids = torch.randint(2, VOCABULARY, (rows, 6))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def classified(batch: Batch) -> Batch:
    """With one of two labels for each example."""
    return batch | {"labels": torch.arange(len(next(iter(batch.values())))) % 2}


def continued(batch: Batch) -> Batch:
    """With the tokens themselves as labels."""
    return batch | {"labels": batch["input_ids"].clone()}


def _of(
    name: str, head: str, config: Mapping[str, object], batch: Callable[[], Batch]
) -> tuple[transformers.PreTrainedModel, Callable[[], Batch]]:
    return getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**config)), batch


def random_family(draw: random.Random) -> Subject:
    """A model of some family and some size."""
    width, inner, layers = draw.choice([8, 12, 16]), draw.choice([4, 12, 20]), draw.randint(1, 2)
    kind = draw.choice([*FAMILIES])
    model, batch = FAMILIES[kind](width, inner, layers)
    return Subject(kind, model, batch, [f"width {width}, inner {inner}, {layers} blocks"])


def _stack(width: int, inner: int, layers: int) -> dict[str, object]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.0,
    }


def _text(width: int, inner: int, layers: int) -> dict[str, object]:
    return _stack(width, inner, layers) | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 0}


def _seq2seq(width: int, inner: int, layers: int) -> dict[str, object]:
    sizes: dict[str, object] = {"d_model": width, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": layers, f"{side}_attention_heads": 2, f"{side}_ffn_dim": inner}
    return sizes | {"pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}


def _gpt2(width: int, inner: int, layers: int) -> dict[str, object]:
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "n_embd": width,
        "n_inner": inner,
        "n_layer": layers,
        "n_head": 2,
    }
    return sizes | {"n_positions": 16, "bos_token_id": 1, "eos_token_id": 1}


def _t5(width: int, inner: int, layers: int) -> dict[str, object]:
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "d_model": width,
        "d_kv": 4,
        "d_ff": inner,
        "num_layers": layers,
    }
    return sizes | {"num_heads": 2, "decoder_start_token_id": 0}


def _whisper(width: int, inner: int, layers: int) -> dict[str, object]:
    sound = {"num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 16}
    return _seq2seq(width, inner, layers) | sound | {"suppress_tokens": None, "begin_suppress_tokens": None}


def _two_berts(width: int, inner: int, layers: int) -> tuple[transformers.PreTrainedModel, Callable[[], Batch]]:
    bert = transformers.BertConfig(**_text(width, inner, layers))
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config), lambda: continued(tokens())


Made = tuple[transformers.PreTrainedModel, Callable[[], Batch]]
FAMILIES: dict[str, Callable[[int, int, int], Made]] = {
    "BERT": lambda *sizes: _of("Bert", "ForSequenceClassification", _text(*sizes), lambda: classified(tokens())),
    "BERT, masked": lambda *sizes: _of("Bert", "ForMaskedLM", _text(*sizes), lambda: continued(tokens())),
    "ALBERT": lambda *sizes: _of(
        "Albert",
        "ForSequenceClassification",
        _text(*sizes) | {"embedding_size": 6, "num_hidden_groups": 1},
        lambda: classified(tokens()),
    ),
    "GPT-2": lambda *sizes: _of("GPT2", "LMHeadModel", _gpt2(*sizes), lambda: continued(tokens())),
    "OPT": lambda width, inner, layers: _of(
        "OPT",
        "ForCausalLM",
        _text(width, inner, layers) | {"ffn_dim": inner, "word_embed_proj_dim": 6},
        lambda: continued(tokens()),
    ),
    "Llama": lambda *sizes: _of(
        "Llama", "ForCausalLM", _text(*sizes) | {"num_key_value_heads": 1}, lambda: continued(tokens())
    ),
    "T5": lambda *sizes: _of("T5", "ForConditionalGeneration", _t5(*sizes), lambda: continued(tokens())),
    "BART": lambda *sizes: _of("Bart", "ForConditionalGeneration", _seq2seq(*sizes), lambda: continued(tokens())),
    "EncoderDecoder": _two_berts,
    "ViT": lambda *sizes: _of(
        "ViT",
        "ForImageClassification",
        _stack(*sizes) | {"image_size": 8, "patch_size": 4},
        lambda: classified({"pixel_values": torch.randn(4, 3, 8, 8)}),
    ),
    "Whisper": lambda *sizes: _of(
        "Whisper",
        "ForConditionalGeneration",
        _whisper(*sizes),
        lambda: {"input_features": torch.randn(4, 4, 12), "labels": tokens()["input_ids"]},
    ),
}
