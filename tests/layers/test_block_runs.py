"""Runs up to a block: each block is given what it is given in a whole run, and those before it are left out."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.networks import Block, Network, make_albert
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rankdyna_trainer.layers.architecture import blocks
from rankdyna_trainer.layers.block_runs import BlockRuns

Batch = dict[str, Tensor]
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
BART = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}


def bart() -> nn.Module:
    sizes: Any = BART | {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    return BartForConditionalGeneration(BartConfig(vocab_size=50, **sizes))


def t5() -> nn.Module:
    sizes: Any = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


def swin() -> nn.Module:
    sizes: Any = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2]}
    return SwinModel(SwinConfig(window_size=2, **sizes))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=16, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=16, **SIZES)),
    "albert": make_albert,
    "bart": bart,
    "t5": t5,
    "swin": swin,
}


def batches_for(family: str) -> list[Batch]:
    if family == "swin":
        return [{"pixel_values": torch.randn(size, 3, 16, 16)} for size in (2, 3)]
    made = []
    for width in (7, 9):
        mask = torch.ones(3, width, dtype=torch.long)
        mask[0, 4:] = 0
        made.append({"input_ids": torch.randint(1, 50, (3, width)), "attention_mask": mask})
        if family in ("bart", "t5"):
            made[-1]["labels"] = torch.randint(1, 50, (3, width - 2))
    return made


@contextmanager
def linear_inputs(block: nn.Module) -> Iterator[list[Tensor]]:
    """What enters the layers of a block: with its masks and positions, and what else it is given."""
    seen: list[Tensor] = []
    layers = [module for module in block.modules() if not list(module.children()) and list(module.parameters())]

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.extend(part.clone() for part in inputs)

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def change(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.mul_(1.1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_block_is_given_what_it_is_given_in_a_whole_run(family: str) -> None:
    """The blocks change one after another, as they do when they are compressed."""
    model, batches = FAMILIES[family]().eval(), batches_for(family)
    runs = BlockRuns(model, batches, lambda batch: model(**batch))
    assert runs.keeps and runs.blocks == blocks(model)
    for block in runs.blocks:
        for number, batch in enumerate(batches):
            with linear_inputs(block) as seen:
                runs.run_to(block, number)
            with linear_inputs(block) as expected:
                model(**batch)
            assert len(seen) == len(expected) > 0
            assert all(map(torch.equal, seen, expected))
        change(block)
        runs.finish(block)
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_a_finished_block_is_not_computed_again() -> None:
    model, batches = FAMILIES["llama"]().eval(), batches_for("llama")
    computed: Counter[nn.Module] = Counter()
    for block in blocks(model):
        block.mlp.register_forward_hook(lambda *_, block=block: computed.update([block]))
    model.lm_head.register_forward_hook(lambda *_: computed.update([model]))
    runs = BlockRuns(model, batches, lambda batch: model(**batch))
    computed.clear()
    for block in runs.blocks:
        for number in range(len(batches)):
            runs.run_to(block, number)
        runs.finish(block)
    assert computed == dict.fromkeys(blocks(model), 2 * len(batches))  # and the head not at all


class Skipping(Network):
    """The last block is given what the first one has given as well."""

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.blocks[0](x)
        for block in self.blocks[1:-1]:
            x = block(x)
        return self.head(self.blocks[-1](x + first))


class Refusing(Network):
    """It will have no zeros."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if not x.any():
                raise ValueError("zeros")
        return self.head(x)


class Noisy(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


@pytest.mark.parametrize("kind", [Skipping, Refusing, Noisy])
@torch.no_grad()
def test_a_model_that_is_not_content_is_run_as_a_whole(kind: type[Network]) -> None:
    model, batches = kind(Block(), Block(), Block(), Block()), [torch.randn(3, 6), torch.randn(2, 6)]
    runs = BlockRuns(model, batches, model)
    assert not runs.keeps
    for block in runs.blocks:
        with linear_inputs(block) as seen:
            torch.manual_seed(1)
            runs.run_to(block, 1)
        with linear_inputs(block) as expected:
            torch.manual_seed(1)
            model(batches[1])
        assert torch.equal(seen[0], expected[0])
        change(block)
        runs.finish(block)


class Overwriting(Network):
    """It writes into what its blocks have given."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).add_(1)
        return self.head(x)


@torch.no_grad()
def test_what_is_kept_is_not_written_into() -> None:
    model, batches = Overwriting(Block(), Block(), Block()), [torch.randn(3, 6)]
    runs = BlockRuns(model, batches, model)
    for block in runs.blocks:
        for _ in range(2):
            with linear_inputs(block) as seen:
                runs.run_to(block, 0)
            with linear_inputs(block) as expected:
                model(batches[0])
            assert torch.equal(seen[0], expected[0])
        runs.finish(block)


def test_an_error_leaves_no_trace() -> None:
    model, batches = Network(Block(), Block()), [torch.randn(3, 6), torch.randn(3, 5)]
    runs = BlockRuns(model, batches, model)
    with pytest.raises(RuntimeError):
        runs.finish(runs.blocks[0])
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())
