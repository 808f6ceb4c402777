"""What each group is expected to cost the loss, and the ranks that come of it."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.networks import Block, Network, make_albert
from support.scored import groups_in_the_metric
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

from rankdyna_trainer import RankDynaConfig, rank_report
from rankdyna_trainer.baselines import expected_loss as expected_loss_module
from rankdyna_trainer.baselines import whitened_svd
from rankdyna_trainer.baselines.expected_loss import expected_losses, ranks_by_expected_loss
from rankdyna_trainer.layers import input_moments as moments_module
from rankdyna_trainer.layers.dense import dense_weight
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.report.tables import compression_summary

Batch = dict[str, Tensor]
CONFIG = RankDynaConfig(param_ratio=0.3)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, pad_token_id=0)
    return GPT2LMHeadModel(config).eval()


def seen_by(model: nn.Module, name: str, batches: list[Batch]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The inputs and the gradients at the outputs of a layer, of all tokens, and which of them are no padding."""
    layer, inputs, gradients = model.get_submodule(name), [], []

    def note(_: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
        inputs.append(given[0].detach().flatten(0, -2).double().numpy())
        output.register_hook(lambda g: gradients.append(g.flatten(0, -2).double().numpy()))
        return output

    handle = layer.register_forward_hook(note)
    for batch in batches:
        model(**batch).loss.backward()
    handle.remove()
    model.zero_grad()
    tokens = np.concatenate([batch["attention_mask"].flatten().bool().numpy() for batch in batches])
    return np.concatenate(inputs), np.concatenate(gradients), tokens


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_is_what_the_definition_says(family: str, tiny_bert: nn.Module, batches: list[Batch]) -> None:
    model: nn.Module = tiny_bert if family == "bert" else gpt2()
    if family == "gpt2":
        batches = [batch | {"labels": batch["input_ids"]} for batch in batches]
    targets = find_targets(model, CONFIG)
    losses = expected_losses(model, targets, batches)
    assert list(losses) == list(targets)
    for name in targets:
        x, g, tokens = seen_by(model, name, batches)
        moment = x[tokens].T @ x[tokens]
        u, s, _, _ = groups_in_the_metric(dense_weight(targets[name]), torch.tensor(moment))
        scale = moment.diagonal().mean() / len(g)
        expected = s**2 * scale * ((g @ u) ** 2).sum(axis=0)
        found = losses[name].numpy()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.max())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_may_be_shared_by_blocks(batches: list[Batch]) -> None:
    model = make_albert()
    losses = expected_losses(model, find_targets(model, CONFIG), batches)
    assert all(torch.isfinite(values).all() and values.sum() > 0 for values in losses.values())


def test_a_large_model_is_looked_at_in_parts(
    tiny_bert: nn.Module, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = find_targets(tiny_bert, CONFIG)
    at_once = expected_losses(tiny_bert, targets, batches)
    monkeypatch.setattr(moments_module, "BYTES_AT_ONCE", 1)
    in_parts = expected_losses(tiny_bert, targets, batches)
    assert in_parts.keys() == at_once.keys() == targets.keys()
    for name, values in at_once.items():
        torch.testing.assert_close(in_parts[name], values)


@pytest.mark.parametrize(
    "choices", [{"param_ratio": 0.3}, {"rank_ratio": 0.2}, {"param_ratio": 0.3, "block_floor": 0.9}]
)
def test_the_budget_is_met_and_shared(choices: dict[str, float], tiny_bert: nn.Module, batches: list[Batch]) -> None:
    config = RankDynaConfig(**choices)
    smaller = whitened_svd(copy.deepcopy(tiny_bert), config, batches, rank_scope="global")
    local = whitened_svd(copy.deepcopy(tiny_bert), config, batches)
    ranks = rank_report(smaller)["rank"]
    assert ranks.nunique() > rank_report(local)["rank"].nunique()
    if "param_ratio" in choices:
        assert 0.27 < compression_summary(smaller).target_ratio <= 0.3
    else:
        assert ranks.sum() == -(-2 * 6 * 32 // 5)


def test_a_block_of_which_nothing_is_made_keeps_the_floor(tiny_bert: nn.Module, batches: list[Batch]) -> None:
    """The second block's change to the hidden states hardly counts."""
    with torch.no_grad():
        for name in ("attention.output.dense", "output.dense"):
            tiny_bert.get_submodule(f"bert.encoder.layer.1.{name}").weight.mul_(1e-4)
    parts = []
    for floor in (0.0, 0.5):
        config = RankDynaConfig(param_ratio=0.3, block_floor=floor)
        ranks = ranks_by_expected_loss(tiny_bert, config, find_targets(tiny_bert, config), batches)
        sizes = {name: rank * sum(tiny_bert.get_submodule(name).weight.shape) for name, rank in ranks.items()}
        parts.append(sum(size for name, size in sizes.items() if ".layer.1." in name) / sum(sizes.values()))
    assert parts[0] < 0.05 and 0.2 < parts[1] < 0.3


def test_a_language_model_is_given_its_own_tokens_as_labels(batches: list[Batch]) -> None:
    model = gpt2()
    targets = find_targets(model, CONFIG)
    texts = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    labelled = [text | {"labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)} for text in texts]
    found, expected = expected_losses(model, targets, texts), expected_losses(model, targets, labelled)
    assert all(torch.equal(found[name], expected[name]) for name in targets)


def test_layers_of_which_nothing_is_known_keep_their_ratio(
    tiny_bert: nn.Module, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = "bert.encoder.layer.1.output.dense"

    def losses(*arguments: Any) -> dict[str, Tensor]:
        return {name: values for name, values in expected_losses(*arguments).items() if name != unknown}

    monkeypatch.setattr(expected_loss_module, "expected_losses", losses)
    ranks = ranks_by_expected_loss(tiny_bert, CONFIG, find_targets(tiny_bert, CONFIG), batches)
    assert ranks[unknown] == int(0.3 * 32 * 64) // (32 + 64)
    total = sum(rank * sum(tiny_bert.get_submodule(name).weight.shape) for name, rank in ranks.items())
    assert total <= 0.3 * 2 * (4 * 32 * 32 + 2 * 32 * 64)


class Half(Network):
    """Its second block is not called, and its loss may be detached."""

    detached = False

    def forward(self, x: Tensor) -> Any:
        loss = self.head(self.blocks[0](x)).square().mean()
        return {"loss": loss.detach() if self.detached else loss}


def test_layers_that_no_batch_reaches_keep_their_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "BYTES_AT_ONCE", 1)  # each layer is looked at by itself
    model, batches = Half(Block(), Block()), [{"x": torch.randn(9, 6)}]
    targets, config = find_targets(model, RankDynaConfig(rank_ratio=0.5)), RankDynaConfig(rank_ratio=0.5)
    assert list(expected_losses(model, targets, batches)) == ["blocks.0.proj"]
    assert ranks_by_expected_loss(model, config, targets, batches) == {"blocks.0.proj": 3, "blocks.1.proj": 3}


def test_a_loss_that_depends_on_no_layer_is_refused() -> None:
    model = Half(Block(), Block())
    model.detached = True
    with pytest.raises(ValueError, match="The loss of the batches depends on no target layer"):
        whitened_svd(model, RankDynaConfig(rank_ratio=0.5), [{"x": torch.randn(9, 6)}], "global")


@pytest.mark.parametrize("kind", ["no labels", "no head", "not finite", "scope"])
def test_what_gives_no_loss_is_refused(
    kind: str, tiny_bert: BertForSequenceClassification, batches: list[Batch]
) -> None:
    model: nn.Module = tiny_bert
    texts = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    message = r'must have what it needs for one, which is labels for most models\. rank_scope="local" needs no loss'
    scope: Any = "global"
    if kind == "no head":
        model = BertModel(tiny_bert.config).eval()
        message = f"BertModel returned no loss for a batch with input_ids, attention_mask: .*{message[-30:]}"
    elif kind == "not finite":
        texts = batches
        with torch.no_grad():
            tiny_bert.classifier.weight.fill_(torch.inf)
        message = r"The loss of batch 1 is .* instead of one finite number"
    elif kind == "scope":
        scope, message = "uniform", "rank_scope must be one of global, local: got 'uniform'"
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        whitened_svd(model, CONFIG, texts, scope)
    assert list(model.modules()) == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
