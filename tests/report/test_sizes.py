import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import tiny_tasks
from torch import nn
from transformers import PreTrainedModel

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, compact, inject_singular_groups
from rankdyna_trainer.baselines import svd
from rankdyna_trainer.checkpoint.empty_model import empty_model
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.method.allocation import select_groups
from rankdyna_trainer.report.sizes import dense_size, least_parameters, most_parameters, sizes_at_ratio

KINDS = ["bert", "gpt2", "llama", "bart", "t5"]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def emptied(model: PreTrainedModel) -> PreTrainedModel:
    model.config.architectures = [type(model).__name__]
    return empty_model(model.config)


def compacted_by(scores_of: str, model: PreTrainedModel, config: RankDynaConfig) -> PreTrainedModel:
    """The global choice at the end of training, for scores that favour dear or cheap groups, or none."""
    inject_singular_groups(model, config)
    layers = [module for module in model.modules() if isinstance(module, SingularGroupLinear)]
    price = {"dear": 1, "cheap": -1, "random": 0}[scores_of]
    scores = [
        torch.rand(layer.width) + (10 * price * layer.group_parameters + 10**4 if price else 0) for layer in layers
    ]
    dense = [layer.dense_parameters for layer in layers]
    if config.param_ratio is not None:
        costs, caps = [layer.group_parameters for layer in layers], dense
        budget = int(config.param_ratio * sum(dense))
    else:
        costs, caps = [1] * len(layers), [layer.full_rank for layer in layers]
        budget = -int(-(config.rank_ratio or 1) * sum(caps) // 1)
    for layer, kept in zip(layers, select_groups(scores, costs, caps, budget), strict=True):
        layer.set_remaining(kept)
    return compact(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["rank_ratio", "param_ratio"])
def test_sizes_are_those_of_models_that_are_compressed(kind: str, option: str) -> None:
    config = RankDynaConfig(**{option: 0.25})
    empty = emptied(tiny_tasks.model(kind))
    sizes = sizes_at_ratio(empty, find_targets(empty, config), config)
    assert sizes.local.all_parameters == parameters(svd(tiny_tasks.model(kind), config))
    found = {
        case: parameters(compacted_by(case, tiny_tasks.model(kind), config)) for case in ("dear", "cheap", "random")
    }
    assert all(sizes.least.all_parameters <= size <= sizes.most.all_parameters for size in found.values())
    assert sizes.least.all_parameters < sizes.most.all_parameters


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_size_counts_shared_weights_once(kind: str) -> None:
    model = tiny_tasks.model(kind)
    empty = emptied(model)
    targets = find_targets(model, RankDynaConfig(rank_ratio=0.5))
    size = dense_size(empty, find_targets(empty, RankDynaConfig(rank_ratio=0.5)))
    assert size.all_parameters == parameters(model)
    assert size.target_parameters == sum(layer.weight.numel() for layer in targets.values())
    assert size.file_bytes == 4 * size.all_parameters


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_bounds_of_all_choices(shapes: list[tuple[int, int]], part: float) -> None:
    groups = round(part * sum(map(min, shapes)))
    sizes = [
        sum(min(rank * (out + into), out * into) for rank, (out, into) in zip(ranks, shapes, strict=True))
        for ranks in itertools.product(*(range(min(shape) + 1) for shape in shapes))
        if sum(ranks) == groups
    ]
    assert most_parameters(shapes, groups) == max(sizes)
    # Below the least by no more than what a part of one matrix can cost.
    assert 0 <= min(sizes) - least_parameters(shapes, groups) <= max(out * into for out, into in shapes)


def test_the_whole_model() -> None:
    empty = empty_model(tiny_tasks.model("bert").config)
    for config in (RankDynaConfig(rank_ratio=1.0), RankDynaConfig(param_ratio=1.0)):
        sizes = sizes_at_ratio(empty, find_targets(empty, config), config)
        assert sizes.local == sizes.least == sizes.most == dense_size(empty, find_targets(empty, config))


def test_the_file_is_in_the_precision_of_the_model() -> None:
    half = tiny_tasks.model("llama").config
    half.dtype = torch.bfloat16
    empty = empty_model(half)
    sizes = sizes_at_ratio(empty, find_targets(empty, RankDynaConfig(rank_ratio=0.5)), RankDynaConfig(rank_ratio=0.5))
    assert sizes.local.file_bytes == 2 * sizes.local.all_parameters
