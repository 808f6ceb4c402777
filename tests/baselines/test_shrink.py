import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import make_albert
from support.scored import best_for_the_outputs, compacted_with_scores, groups_in_the_metric
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rankdyna_trainer import LowRankLinear, RankDynaConfig, merge, rank_report
from rankdyna_trainer.baselines import shrink, shrink_on_data
from rankdyna_trainer.layers.dense import dense_weight
from rankdyna_trainer.layers.group_importance import compacted_rank, noted_importance
from rankdyna_trainer.layers.input_moments import input_moments

Batch = dict[str, Tensor]
BY_RANK = {"rank_ratio": 0.1, "block_floor": 0.0}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Of the compacted layers, each as one matrix in float64."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LowRankLinear):
            found[name] = layer.p.weight.detach().double() @ layer.q.weight.detach().double()
        elif compacted_rank(layer) is not None:
            assert isinstance(layer, nn.Linear)
            found[name] = dense_weight(layer).detach().double()
    return found


def moments_of_inputs(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Of the layers with groups; one that follows a layer of rank 0 sees zeros, and all directions count alike."""
    seen = {name: layer for name, layer in model.named_modules() if compacted_rank(layer)}
    moments = input_moments(model, seen, batches)
    return {name: m if m.any() else torch.eye(len(m), dtype=m.dtype) for name, m in moments.items()}


def best_of_all(scores: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Of all groups together those of the largest scores, as numbers of the groups of each layer."""
    everything = sorted(((score, name, i) for name, values in scores.items() for i, score in enumerate(values)))[::-1]
    return {name: np.sort([i for _, n, i in everything[:count] if n == name]).astype(int) for name in scores}


def test_the_least_important_groups_go_and_the_others_stay_to_the_last_bit(tiny_bert: nn.Module) -> None:
    model = compacted_with_scores(tiny_bert)
    before, importance = copy.deepcopy(model), noted_importance(model)
    kept = best_of_all({name: values.numpy() for name, values in importance.items()}, 39)  # a tenth of 384, rounded up
    removed = shrink(model, RankDynaConfig(**BY_RANK), importance)  # type: ignore[arg-type]
    for name, numbers in kept.items():
        old, new = before.get_submodule(name), model.get_submodule(name)
        assert new.rank == len(numbers)
        if isinstance(old, LowRankLinear) and len(numbers):
            assert torch.equal(new.p.weight, old.p.weight[:, numbers]) and torch.equal(
                new.q.weight, old.q.weight[numbers]
            )
            assert torch.equal(noted_importance(model)[name], importance[name][numbers])
        elif len(numbers):  # of a layer that was kept dense the largest singular values are taken for the best
            u, sigma, vt = np.linalg.svd(old.weight.detach().double().numpy(), full_matrices=False)
            expected = (u[:, : len(numbers)] * sigma[: len(numbers)]) @ vt[: len(numbers)]
            np.testing.assert_allclose(weights(model)[name], expected, atol=1e-6)
            best = importance[name].sort(descending=True).values[: len(numbers)]
            assert torch.equal(noted_importance(model)[name], best)
    total, left = (
        sum(float(values.sum()) for values in found.values()) for found in (importance, noted_importance(model))
    )
    assert removed == pytest.approx(1 - left / total)
    assert any(compacted_rank(layer) for layer in before.modules() if not isinstance(layer, LowRankLinear))


@pytest.mark.parametrize("options", [{}, {"rank_scope": "local"}, {"rank_multiple_of": 4}, {"block_floor": 0.0}])
@pytest.mark.parametrize("family", ["tiny_bert", "tiny_gpt2", "albert"])
def test_the_ratio_is_one_of_the_dense_model(
    options: dict[str, object], family: str, batches: list[Batch], request: pytest.FixtureRequest
) -> None:
    dense = make_albert() if family == "albert" else request.getfixturevalue(family)
    model = compacted_with_scores(dense)
    present = rank_report(model)["parameters"].sum() / rank_report(model)["dense_parameters"].sum()
    config = RankDynaConfig(param_ratio=0.15, **options)  # type: ignore[arg-type]
    assert present > 0.3
    for cut, data in ((shrink, noted_importance(model)), (shrink_on_data, batches)):
        smaller = copy.deepcopy(model)
        assert 0 < cut(smaller, config, data) < 1
        report = rank_report(smaller)
        assert 0.05 < report["parameters"].sum() / report["dense_parameters"].sum() <= 0.15
        if "rank_multiple_of" in options:
            assert (report["rank"] % 4 == 0).all() and report["rank"].any()
        assert smaller.config.rankdyna["ranks"] == report.loc[report["form"] == "low rank", "rank"].to_dict()
        assert noted_importance(smaller).keys() == set(report.index)
        merge(smaller)


@pytest.mark.parametrize("with_importance", [False, True])
def test_on_data_the_best_groups_of_all_layers_remain_in_their_best_form(
    with_importance: bool, tiny_bert: nn.Module, batches: list[Batch]
) -> None:
    model = compacted_with_scores(tiny_bert)
    before = weights(model)
    moments = moments_of_inputs(model, batches)
    importance = noted_importance(model)
    energies, scores = {}, {}
    for name, moment in moments.items():
        _, s, _, _ = groups_in_the_metric(before[name], moment)
        energies[name] = (s**2 / np.sum(s**2))[: compacted_rank(model.get_submodule(name))]
        total = float(importance[name].sum()) if with_importance else 1.0
        scores[name] = total * np.sqrt(energies[name]) / np.sqrt(energies[name]).sum()
    kept = best_of_all(scores, 39)
    config = RankDynaConfig(**BY_RANK)  # type: ignore[arg-type]
    removed = shrink_on_data(model, config, batches, importance if with_importance else None)
    lost = []
    for name, numbers in kept.items():
        assert compacted_rank(model.get_submodule(name)) == len(numbers), name
        expected = best_for_the_outputs(before[name], moments[name], len(numbers))
        np.testing.assert_allclose(weights(model)[name], expected, atol=2e-6)
        lost.append(1 - energies[name][numbers].sum())
        if not isinstance(model.get_submodule(name), nn.Linear):
            np.testing.assert_allclose(noted_importance(model)[name], scores[name][numbers], rtol=1e-4)
    assert removed == pytest.approx(np.mean(lost), rel=1e-4)


def test_what_it_tells_is_what_the_outputs_lose(tiny_bert: nn.Module, batches: list[Batch]) -> None:
    """Of each layer alone, given the inputs that it had."""
    model = compacted_with_scores(tiny_bert)
    before = weights(model)
    moments = moments_of_inputs(model, batches)
    removed = shrink_on_data(model, RankDynaConfig(param_ratio=0.15), batches)
    parts = []
    for name, moment in moments.items():
        difference = before[name] - weights(model)[name]
        energy = [torch.trace(w @ moment @ w.t()) for w in (difference, before[name])]
        parts.append(float(energy[0] / energy[1]))
    assert removed == pytest.approx(np.mean(parts), rel=0.05)  # but for the small part of the plain error


def test_a_smaller_model_is_loaded_and_cut_again(tiny_bert: nn.Module, tmp_path: object) -> None:
    model = compacted_with_scores(tiny_bert)
    for ratio in (0.2, 0.1):
        shrink(model, RankDynaConfig(param_ratio=ratio), noted_importance(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def with_nan(model: nn.Module) -> None:
    next(layer for layer in model.modules() if isinstance(layer, LowRankLinear)).q.weight.data[0, 0] = torch.nan


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize(
    ("choices", "change", "message"),
    [
        ({"rank_ratio": 0.9}, None, r"holds 0\.\d+ of the dense one, no more than rank_ratio=0.9: give a smaller"),
        ({"param_ratio": 0.9}, None, r"holds 0\.\d+ of the dense one, no more than param_ratio=0.9: give a smaller"),
        ({"param_ratio": [0.2, 0.1]}, None, r"has one size: give param_ratio one number \(got \[0.2, 0.1\]\)"),
        ({"param_ratio": 0.1}, merge, "has no compacted layers to cut further: call compact"),
        ({"param_ratio": 0.1}, lambda model: model.requires_grad_(False), "Frozen weights"),
        ({"param_ratio": 0.1}, with_nan, "has inf or nan"),
    ],
)
def test_a_model_that_does_not_fit_is_left_as_it_was(
    choices: dict[str, Any],
    change: Callable[[nn.Module], object] | None,
    message: str,
    by_data: bool,
    tiny_bert: nn.Module,
    batches: list[Batch],
) -> None:
    model = compacted_with_scores(tiny_bert)
    importance = noted_importance(model)
    if change is not None:
        change(model)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        (shrink_on_data if by_data else shrink)(model, RankDynaConfig(**choices), batches if by_data else importance)  # type: ignore[arg-type]
    assert list(model.modules()) == modules


def test_scores_that_do_not_fit_are_named(tiny_bert: nn.Module) -> None:
    model, config = compacted_with_scores(tiny_bert), RankDynaConfig(param_ratio=0.1)
    importance = noted_importance(model)
    name = next(iter(importance))
    for wrong, message in (
        ({}, f"one score for each of the .* groups of {name}: got none"),
        ({name: torch.ones(3)}, r"got a tensor of \(3,\)"),
        ({name: torch.full_like(importance[name], torch.nan)}, f"The importance of {name} has scores that are neg"),
    ):
        given = {key: value for key, value in (importance | wrong).items() if wrong or key != name}
        with pytest.raises(ValueError, match=message):
            shrink(model, config, given)
    with pytest.raises(ValueError, match="No batch of the dataloader told anything"):
        shrink_on_data(model, config, [])
