"""The loss of a student with a teacher, written out: what the library adds by itself."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

Batch = dict[str, Tensor]


def without_dropout(model: nn.Module) -> Any:
    """What it computes in training depends on no random numbers."""
    for module in model.modules():
        for name in ("p", "dropout", "dropout_prob", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def other_weights(model: PreTrainedModel, by: float = 0.3) -> Any:
    """A teacher for the model: a copy that computes something else."""
    teacher = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5)
    return teacher.eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, **special))


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes))


def tiny_t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of each row."""
    soft = F.softmax(teacher / temperature, -1)
    logs = F.log_softmax(student / temperature, -1)
    return temperature**2 * (soft * (soft.log() - logs)).sum(-1)


def relative_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of one hidden state `(batch, tokens, features)`, with a mask `(batch, tokens)`."""
    weight = torch.ones(student.shape[:2]) if mask is None else mask.float()
    squares = (student - teacher).square().sum(-1), teacher.square().sum(-1)
    return (squares[0] * weight).sum() / (squares[1] * weight).sum()


def written_out(model: Any, teacher: Any, batch: Batch, weights: tuple[float, float], temperature: float) -> Tensor:
    """The whole loss of a classifier of sentences, from hidden states that both models return."""
    student = model(**batch, output_hidden_states=True)
    with torch.no_grad():
        taught = teacher(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
    mask = batch.get("attention_mask")
    states = zip(student.hidden_states[1:], taught.hidden_states[1:], strict=True)
    hidden = torch.stack([relative_error(one, other, mask) for one, other in states]).mean()
    logits = kl(student.logits, taught.logits, temperature).mean()
    return (1 - weights[0]) * student.loss + weights[0] * logits + weights[1] * hidden
