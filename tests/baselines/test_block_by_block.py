"""Sequential factoring against a second one, which runs the whole model for each block."""

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import Block, Network, make_albert
from support.scored import best_for_the_outputs
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from rankdyna_trainer import LowRankLinear, RankDynaConfig
from rankdyna_trainer.baselines import whitened_svd
from rankdyna_trainer.layers.architecture import names_by_block
from rankdyna_trainer.layers.dense import dense_weight
from rankdyna_trainer.layers.input_moments import input_moments
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.method.budget import uniform_rank

Batch = dict[str, Tensor]
CONFIG = RankDynaConfig(rank_ratio=0.2)


def t5() -> nn.Module:
    sizes: Any = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)).eval()


@torch.no_grad()
def expected_products(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Each block's layers from the moments of whole runs of a model whose blocks before it are truncated."""
    model = copy.deepcopy(model)
    targets = find_targets(model, CONFIG)
    products: dict[str, Tensor] = {}
    for names in names_by_block(model, targets).values():
        moments = input_moments(model, {name: targets[name] for name in names}, batches)
        for name in names:
            weight = dense_weight(targets[name])
            product = best_for_the_outputs(weight, moments[name], uniform_rank(CONFIG, *weight.shape))
            products[name] = torch.tensor(product, dtype=weight.dtype)
        for name in names:
            dense_weight(targets[name]).copy_(products[name])
    return products


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_gpt2", "albert", "t5"])
def test_layers_of_a_model(family: str, batches: list[Batch], request: pytest.FixtureRequest) -> None:
    """Those of GPT-2 are `Conv1D`, those of ALBERT are called by each block, and T5 has a decoder, too."""
    made = {"albert": make_albert, "t5": t5}
    model: nn.Module = made[family]() if family in made else request.getfixturevalue(family)
    if family == "t5":
        batches = [batch | {"labels": batch["input_ids"]} for batch in batches]
    expected = expected_products(model, batches)
    biases = {name: model.get_submodule(name).bias for name in expected}
    assert whitened_svd(model, CONFIG, iter(batches)) is model
    for name, product in expected.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankLinear) and layer.rank == -(-min(product.shape) // 5)
        assert layer.bias is biases[name] or torch.equal(layer.bias, biases[name])
        torch.testing.assert_close(layer.to_dense_weight(), product, rtol=0, atol=2e-4 * float(product.abs().max()))


def test_layers_outside_of_blocks_come_last() -> None:
    torch.manual_seed(3)
    model, inputs = Network(Block(), Block()), {"x": torch.randn(50, 6) @ torch.randn(6, 6)}
    config = RankDynaConfig(rank_ratio=0.5, target_modules=["proj", "head"])
    weight = model.head.weight.detach().clone()
    smaller = whitened_svd(copy.deepcopy(model), config, [inputs])
    entering = smaller.blocks[1](smaller.blocks[0](inputs["x"])).detach().double()
    expected = best_for_the_outputs(weight, entering.T @ entering, 1)
    assert isinstance(smaller.head, LowRankLinear)
    np.testing.assert_allclose(smaller.head.to_dense_weight().detach().numpy(), expected, atol=1e-4)


def test_a_model_that_cannot_be_run_by_block_is_factored_likewise() -> None:
    class Skipping(Network):
        def forward(self, x: Tensor) -> Tensor:
            first = self.blocks[0](x)
            return self.head(self.blocks[2](self.blocks[1](first) + first) + first)

    torch.manual_seed(0)
    model, batches = Skipping(Block(), Block(), Block()), [{"x": torch.randn(40, 6)} for _ in range(2)]
    expected = expected_products(model, batches)
    whitened_svd(model, CONFIG, batches)
    for name, product in expected.items():
        found = model.get_submodule(name).to_dense_weight()
        torch.testing.assert_close(found, product, rtol=0, atol=1e-4)


def test_one_line_names_all_layers_that_were_not_seen(caplog: pytest.LogCaptureFixture) -> None:
    class Half(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](x))

    with caplog.at_level(logging.WARNING):
        whitened_svd(Half(Block(), Block(), Block()), CONFIG, [{"x": torch.randn(9, 6)}])
    assert caplog.text.count("No input of") == 1
    assert "No input of 2 layers was seen, or it was not finite (blocks.1.proj, ...)" in caplog.text
