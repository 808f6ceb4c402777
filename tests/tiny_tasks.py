"""Tiny models with a tokenizer, in folders as users have them, and tiny tasks which they learn in a few steps."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
NAMES, PLACES, VERBS = ["alice", "bob", "carol", "dave"], ["paris", "oslo", "rome", "york"], ["sees", "likes", "left"]
WORDS = [*SPECIAL, *NAMES, *PLACES, *VERBS, "new", "and", "the", "is", "good", "film", "day"]
TRAINING = ["--learning_rate=1e-2", "--per_device_train_batch_size=8", "--use_cpu", "--disable_tqdm=true"]
TRAINING += ["--save_strategy=no", "--report_to=none"]


def tokenizer(ends: bool = True) -> PreTrainedTokenizerFast:
    """A word a token; with `ends` it puts [CLS] before and [SEP] after a text."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    if ends:
        template = "[CLS] $A [SEP]"
        words.post_processor = TemplateProcessing(single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **tokens)


def model(kind: str, layers: int = 2) -> PreTrainedModel:
    """With random weights that are easy to train, and no dropout; BART, Marian and T5 have one layer on each side."""
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": len(WORDS), "max_position_embeddings": 40}
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    seq2seq: dict[str, Any] = {"d_model": 32, "dropout": 0.0, "max_position_embeddings": 40, "vocab_size": len(WORDS)}
    for part in ("encoder", "decoder"):
        seq2seq |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 64}
    seq2seq |= ends | {"decoder_start_token_id": 3, "forced_eos_token_id": None}
    if kind == "bert":
        return BertModel(BertConfig(**sizes, **still, initializer_range=0.2))
    if kind == "roberta":
        return RobertaModel(RobertaConfig(**sizes, **still, **ends, initializer_range=0.2))
    if kind == "encoder-decoder":
        config = BertConfig(**sizes, **still, initializer_range=0.2)
        joined = EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
        joined.decoder_start_token_id, joined.pad_token_id, joined.eos_token_id = 2, 0, 3
        return EncoderDecoderModel(joined)
    if kind == "bart":
        return BartForConditionalGeneration(BartConfig(**seq2seq))
    if kind == "marian":
        return MarianMTModel(MarianConfig(**seq2seq))
    if kind == "t5":
        t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        starts = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(**t5, **starts, vocab_size=len(WORDS)))
    if kind == "gpt2":
        gpt2 = {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": 40, "vocab_size": len(WORDS)}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**gpt2, **still, bos_token_id=2, eos_token_id=3))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **ends))
    raise ValueError(kind)


def save_model(kind: str, folder: Path) -> str:
    """The folder of a saved model."""
    model(kind).save_pretrained(folder)
    tokenizer(ends=kind not in ("gpt2", "llama")).save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_run(folder: Path) -> dict[str, Any]:
    """The record of a finished run."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def sentences(count: int) -> list[dict[str, Any]]:
    """Rows of `run_glue.py` with two classes, by their first word."""
    words = ["good", "new"]
    return [{"sentence": f"{words[i % 2]} {NAMES[i % 4]} {VERBS[i % 3]}", "label": i % 2} for i in range(count)]


def entities(count: int) -> list[dict[str, Any]]:
    """Rows of `run_ner.py`: a name is a person; a place, with or without "new" before it, is a location."""
    rows = []
    for i in range(count):
        place = (["new"] if i % 2 else []) + [PLACES[i % 4]]
        tags = ["B-PER", "O", "B-LOC", "I-LOC"][: 2 + len(place)]
        rows.append({"tokens": [NAMES[i // 4 % 4], VERBS[i % 3], *place], "ner_tags": tags})
    return rows


def dialogues(count: int) -> list[dict[str, Any]]:
    """Rows of `run_summarization.py`, all of them with the same summary."""
    texts = [f"{NAMES[i % 4]} {VERBS[i % 3]} {PLACES[i // 4 % 4]}" for i in range(count)]
    return [{"dialogue": text, "summary": "the film is good"} for text in texts]


def lines(count: int) -> list[dict[str, Any]]:
    """Rows of `run_clm.py`: the same words over and over."""
    return [{"text": "alice sees paris and bob likes rome"} for _ in range(count)]
