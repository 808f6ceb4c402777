from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference_parameters
from torch import Tensor

from rankdyna_trainer.method.allocation import select_groups, with_floor


@dataclass
class Case:
    """Matrices `(out, in)`, each with the scores `(groups,)` of the groups that it still has."""

    shapes: list[tuple[int, int]]
    scores: list[Tensor]

    @property
    def counts(self) -> list[int]:
        return [len(scores) for scores in self.scores]

    @property
    def everything(self) -> list[Tensor]:
        return [torch.ones(count, dtype=torch.bool) for count in self.counts]

    @property
    def groups(self) -> list[SimpleNamespace]:
        """As the reference has them."""
        parts = zip(self.shapes, self.everything, self.scores, strict=True)
        return [SimpleNamespace(shape=shape, remain=mask, I_bar=score.double()) for shape, mask, score in parts]

    def by_rank(self, budget: int) -> list[Tensor]:
        return select_groups(self.scores, [1] * len(self.shapes), [min(shape) for shape in self.shapes], budget)

    def by_parameters(self, budget: int) -> list[Tensor]:
        costs, caps = [out + in_ for out, in_ in self.shapes], [out * in_ for out, in_ in self.shapes]
        return select_groups(self.scores, costs, caps, budget)

    def cost(self, kept: list[Tensor]) -> int:
        return reference_parameters.parameters([int(mask.sum()) for mask in kept], self.shapes)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few different scores, so that many are equal; some groups of a matrix, or all, are gone already."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5))
    values = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e6, width=32))
    scores = [torch.tensor(draw(st.lists(values, max_size=min(shape)))) for shape in shapes]
    return Case(shapes, scores)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=150, deadline=None)
@given(case=cases(), data=st.data())
def test_choice_by_rank(case: Case, data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, sum(case.counts) + 1))
    kept = case.by_rank(budget)
    assert equal(kept, reference.keep_best(case.groups, budget))
    assert sum(int(mask.sum()) for mask in kept) == min(budget, sum(case.counts))


@settings(max_examples=150, deadline=None)
@given(case=cases(), data=st.data())
def test_choice_by_parameters(case: Case, data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, sum(out * in_ for out, in_ in case.shapes) + 1))
    kept = case.by_parameters(budget)
    assert equal(kept, reference_parameters.keep_best(case.groups, budget))


@settings(max_examples=100, deadline=None)
@given(case=cases(), data=st.data())
def test_budget_is_used_and_never_exceeded(case: Case, data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, case.cost(case.everything)))
    kept = case.by_parameters(budget)
    assert case.cost(kept) <= budget
    for mask in kept:
        for k in (~mask).nonzero().flatten().tolist():
            mask[k] = True
            assert case.cost(kept) > budget
            mask[k] = False


@settings(max_examples=60, deadline=None)
@given(case=cases(), data=st.data())
def test_floor_of_each_block(case: Case, data: st.DataObject) -> None:
    """The best of each block within its part of the budget, by the reference, then the best of all that is left."""
    whole = sum(out * in_ for out, in_ in case.shapes)
    budget, part = data.draw(st.integers(0, whole)), data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    cut = data.draw(st.integers(0, len(case.shapes)))
    halves = [[*range(cut)], [*range(cut, len(case.shapes))]][: data.draw(st.integers(0, 2))]
    blocks = [half for half in halves if half]
    costs, caps = [out + in_ for out, in_ in case.shapes], [out * in_ for out, in_ in case.shapes]
    raised = with_floor(case.scores, costs, caps, budget, blocks, part)
    for block in blocks:
        inside = Case([case.shapes[i] for i in block], [case.scores[i] for i in block])
        least = int(part * budget * sum(caps[i] for i in block)) // whole
        expected = reference_parameters.keep_best(inside.groups, least)
        assert equal([raised[i].isinf() for i in block], expected)
    assert all(torch.equal(one[~one.isinf()], of[~one.isinf()]) for one, of in zip(raised, case.scores, strict=True))
    kept = Case(case.shapes, raised).by_parameters(budget)
    assert case.cost(kept) <= budget
    assert not any((one.isinf() & ~mask).any() for one, mask in zip(raised, kept, strict=True))
    if not part or not blocks:
        assert equal(kept, case.by_parameters(budget))


def test_no_block_is_emptied_by_another_that_scores_more() -> None:
    """Two blocks of two matrices; a quarter of the equal share of 16 of 32 groups is 2 groups."""
    scores = [torch.arange(8.0) + 1000, torch.arange(8.0) + 1000, torch.arange(8.0), torch.arange(8.0)]
    costs, caps = [1] * 4, [8] * 4
    assert [int(mask.sum()) for mask in select_groups(scores, costs, caps, 16)] == [8, 8, 0, 0]
    raised = with_floor(scores, costs, caps, 16, [[0, 1], [2, 3]], 0.25)
    kept = select_groups(raised, costs, caps, 16)
    assert [mask.nonzero().flatten().tolist() for mask in kept[2:]] == [[7], [7]]
    assert sum(int(mask.sum()) for mask in kept) == 16
    by_eights = with_floor(scores, costs, caps, 16, [[0, 1], [2, 3]], 1.0, multiple_of=8)
    assert [int(mask.sum()) for mask in select_groups(by_eights, costs, caps, 16, 8)] == [8, 0, 8, 0]


@settings(max_examples=50, deadline=None)
@given(case=cases(), data=st.data())
def test_smaller_rank_budget_keeps_a_part_of_what_a_larger_one_keeps(case: Case, data: st.DataObject) -> None:
    smaller, larger = sorted(data.draw(st.tuples(*[st.integers(0, sum(case.counts))] * 2)))
    for less, more in zip(case.by_rank(smaller), case.by_rank(larger), strict=True):
        assert not (less & ~more).any()


@settings(max_examples=50, deadline=None)
@given(case=cases(), data=st.data())
def test_choosing_again_from_what_was_kept_changes_nothing(case: Case, data: st.DataObject) -> None:
    """Removal is step by step: a budget that has been met removes nothing further."""
    budget = data.draw(st.integers(0, case.cost(case.everything)))
    kept = case.by_parameters(budget)
    again = Case(case.shapes, [scores[mask] for scores, mask in zip(case.scores, kept, strict=True)])
    assert equal(again.by_parameters(budget), again.everything)


@settings(max_examples=50, deadline=None)
@given(case=cases(), data=st.data())
def test_better_groups_of_a_matrix_go_first(case: Case, data: st.DataObject) -> None:
    kept = case.by_parameters(data.draw(st.integers(0, case.cost(case.everything))))
    for scores, mask in zip(case.scores, kept, strict=True):
        if mask.any() and not mask.all():
            assert scores[mask].min() >= scores[~mask].max()


def test_no_budget_and_the_whole_budget() -> None:
    case = Case([(3, 4), (2, 2)], [torch.rand(3), torch.rand(2)])
    for choose in (case.by_rank, case.by_parameters):
        assert not any(mask.any() for mask in choose(0))
    assert equal(case.by_rank(5), case.everything)
    assert equal(case.by_parameters(12 + 4), case.everything)


def test_equal_scores_are_broken_by_matrix_then_by_group() -> None:
    case = Case([(4, 4)] * 3, [torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.ones(4), torch.ones(4)])
    assert [mask.nonzero().flatten().tolist() for mask in case.by_rank(6)] == [[0, 1, 2, 3], [0, 1], []]
    many = Case([(500, 500)] * 4, [torch.zeros(500)] * 4)  # an unstable sort shows only in long tensors
    assert equal(many.by_rank(777), [torch.arange(500 * i, 500 * (i + 1)) < 777 for i in range(4)])


def test_large_matrix_does_not_win_by_its_size() -> None:
    """Per parameter a score of 5 in 4 + 4 is more than one of 6 in 10 + 10; the rank budget sees 6 first."""
    case = Case([(10, 10), (4, 4)], [torch.tensor([6.0]), torch.tensor([5.0])])
    assert [mask.tolist() for mask in case.by_rank(1)] == [[True], [False]]
    assert [mask.tolist() for mask in case.by_parameters(20)] == [[False], [True]]


def test_groups_beyond_the_dense_size_are_free() -> None:
    """Two groups of 4 + 4 cost as much as the dense 4 x 4: the other two come for nothing, before a better one."""
    case = Case([(4, 4), (4, 4)], [torch.tensor([9.0, 8.0, 0.0, 0.0]), torch.tensor([1.0])])
    assert [mask.tolist() for mask in case.by_parameters(16)] == [[True] * 4, [False]]
    assert [mask.tolist() for mask in case.by_parameters(15)] == [[True, False, False, False], [False]]


def test_what_is_left_goes_to_smaller_groups() -> None:
    case = Case([(10, 10), (2, 2)], [torch.tensor([90.0, 80.0]), torch.tensor([1.0])])
    assert [mask.tolist() for mask in case.by_parameters(39)] == [[True, False], [True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_compared_as_they_are(dtype: torch.dtype) -> None:
    close = torch.tensor([1.0, 1.0 + torch.finfo(dtype).eps], dtype=dtype)
    assert Case([(2, 2)], [close]).by_rank(1)[0].tolist() == [False, True]


def test_matrices_without_groups() -> None:
    case = Case([(3, 3), (3, 3), (2, 2)], [torch.zeros(0), torch.ones(2), torch.zeros(0)])
    assert [mask.tolist() for mask in case.by_rank(1)] == [[], [True, False], []]
    assert [mask.tolist() for mask in Case([(3, 3)], [torch.zeros(0)]).by_parameters(9)] == [[]]


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    size=st.integers(2, 5),
    part=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_each_matrix_keeps_a_multiple_of_its_best_groups(counts: list[int], size: int, part: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(count, generator=generator) for count in counts]
    costs, caps = [i + 1 for i in range(len(counts))], [10**6] * len(counts)
    budget = int(part * sum(cost * count for cost, count in zip(costs, counts, strict=True)))
    masks = select_groups(scores, costs, caps, budget, size)
    kept = [int(mask.sum()) for mask in masks]
    assert all(rank % size == 0 for rank in kept)
    spent = sum(cost * rank for cost, rank in zip(costs, kept, strict=True))
    assert spent <= budget
    for values, mask, rank, cost in zip(scores, masks, kept, costs, strict=True):
        assert torch.equal(mask, torch.isin(torch.arange(len(values)), values.argsort(descending=True)[:rank]))
        assert rank + size > len(values) or spent + cost * size > budget  # no further block would have fitted
