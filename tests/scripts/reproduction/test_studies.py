"""What figures 1 and 4 look at, beside training loops that are written out here."""

import copy

import pytest
import torch
from reproduction.matrices import matrices_of
from reproduction.studies import importance_positions, kept_groups
from tasks.tiny_tasks import WORDS
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.method import cutting

STEPS, REMOVAL, RATE = 12, 6, 1e-3
REMOVED_FROM = ("query", "key", "value", "intermediate.dense")


@pytest.fixture
def model():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes, **still)
    )


@pytest.fixture
def batches():
    random = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, len(WORDS), (8, 6), generator=random) for _ in range(STEPS)]
    return [{"input_ids": part, "labels": part[:, 0] % 2} for part in ids]


class Layer(nn.Module):
    """Singular groups once more, which are never cut: a mask of those that count."""

    def __init__(self, linear):
        super().__init__()
        u, sigma, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.u, self.sigma, self.v, self.bias = *map(nn.Parameter, (u.T.contiguous(), sigma, v)), linear.bias
        self.mask, self.scores = torch.ones(len(sigma)), torch.zeros(len(sigma))

    def forward(self, x):
        return (x @ self.v.T * (self.sigma * self.mask)) @ self.u + self.bias

    def places(self):
        """Of each group, beginning with 1: how many are more important, and itself."""
        return (self.scores.unsqueeze(0) >= self.scores.unsqueeze(1)).sum(dim=1)


def reference_places(model, batches, removal_step):
    """`{layer: places at each step}`, and the layers, from a training loop of its own."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layer." in name]
    layers = {name: Layer(model.get_submodule(name)) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    found = {name: [] for name in layers}
    for step, batch in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = RATE * (1 - (step - 1) / len(batches))
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, layer in layers.items():
            by_group = ((p * p.grad).abs().reshape(len(p), -1).sum(1) for p in (layer.u, layer.sigma, layer.v))
            layer.scores = 0.85 * layer.scores + 0.15 * sum(by_group)
            found[name].append(layer.places())
        optimizer.step()
        if step == removal_step:
            for name, layer in layers.items():
                if name.endswith(REMOVED_FROM) and not name.endswith("output.dense"):
                    layer.mask = (layer.places() <= 6).float()  # a fifth of 32 is 6.4
    return found, layers


@pytest.mark.parametrize("removal_step", [None, REMOVAL])
def test_positions_are_the_places_by_importance(removal_step, model, batches):
    places, layers = reference_places(copy.deepcopy(model), batches, removal_step)
    found = importance_positions(model, batches, STEPS, removal_step, learning_rate=RATE)
    assert found["block"] == "bert.encoder.layer.1"
    names = {kind: matrix["layer"] for kind, matrix in found["matrices"].items()}
    block = "bert.encoder.layer.1"
    assert names == {"W_o": f"{block}.attention.output.dense", "W_f2": f"{block}.output.dense"}
    for matrix in found["matrices"].values():
        expected = torch.stack(places[matrix["layer"]])
        assert matrix["groups"] == 32 and list(matrix["positions"]) == ["1", "10"]  # there is no 40th of 32 groups
        for number, positions in matrix["positions"].items():
            chosen = expected[0].tolist().index(int(number))
            assert positions == pytest.approx((expected[:, chosen] / 32).tolist())
        moves = (expected[1:] - expected[:-1]).abs().float().mean(dim=1) / 32
        assert matrix["movement"] == pytest.approx(moves.tolist())

    for name, layer in layers.items():
        own = model.get_submodule(name)
        assert torch.equal(own.remaining, layer.mask.bool())
        assert found["removed"].get(name, 0) == 32 - own.rank
    assert len(found["removed"]) == (0 if removal_step is None else 8)
    assert set(found["removed"].values()) <= {26}


def test_the_runs_are_the_same_up_to_the_removal(model, batches):
    runs = [
        importance_positions(copy.deepcopy(model), batches, STEPS, step, learning_rate=RATE)
        for step in (REMOVAL, None)
    ]
    removed, untouched = (torch.tensor(run["matrices"]["W_f2"]["movement"]) for run in runs)
    assert torch.equal(removed[: REMOVAL - 1], untouched[: REMOVAL - 1])
    assert not torch.equal(removed, untouched)


def test_matrices_are_found_by_their_names(model):
    config = RankDynaConfig(rank_ratio=0.5)
    found = matrices_of(model, config)
    assert [matrix.type for matrix in found] == ["W_q", "W_k", "W_v", "W_o", "W_f1", "W_f2"] * 2
    assert [matrix.block for matrix in found] == ["bert.encoder.layer.0"] * 6 + ["bert.encoder.layer.1"] * 6
    assert len(matrices_of(model, config, {"any": ("output.dense",)})) == 4
    with pytest.raises(ValueError, match=r"No layer is of type W_v: .*attention\.self\.query"):
        matrices_of(model, config, {"W_v": ("v_proj",)})


def test_too_few_batches(model, batches):
    with pytest.raises(ValueError, match="13 steps need as many batches: there are only 12"):
        importance_positions(model, batches, STEPS + 1, None)


@pytest.mark.parametrize("choice", [{"rank_ratio": 0.3}, {"param_ratio": 0.2, "rank_scope": "local"}])
def test_kept_groups_are_those_of_a_run_that_cuts_nothing(choice, model, batches, monkeypatch):
    config = RankDynaConfig(**choice)
    uncut, cut = copy.deepcopy(model), model
    weights = {name: module.weight.detach().clone() for name, module in model.named_modules() if "value" in name}
    found = kept_groups(cut, batches, config, STEPS, learning_rate=RATE)
    monkeypatch.setattr(cutting, "cut_groups", lambda *_: None)
    kept_groups(uncut, batches, config, STEPS, learning_rate=RATE)
    assert list(found["layers"]) == list(weights) and len(weights) == 2
    for name, layer in found["layers"].items():
        values = torch.linalg.svdvals(weights[name])
        assert layer["singular_values"] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-5)
        remaining = uncut.get_submodule(name).remaining
        assert len(remaining) == 32 and layer["kept"] == remaining.nonzero().squeeze(1).tolist()
        assert cut.get_submodule(name).width == len(layer["kept"]) == found["ranks"][name] > 0
    assert len(found["ranks"]) == 12


def test_kept_groups_of_a_chosen_layer(model, batches):
    name = "bert.encoder.layer.0.output.dense"
    found = kept_groups(model, batches, RankDynaConfig(rank_ratio=0.3), STEPS, [name])
    assert list(found["layers"]) == [name]
    with pytest.raises(ValueError, match="classifier is not among the layers"):
        kept_groups(
            BertForSequenceClassification(model.config), batches, RankDynaConfig(rank_ratio=0.3), 3, ["classifier"]
        )
