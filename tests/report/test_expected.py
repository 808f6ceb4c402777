"""When a run is said to have gone wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.report.expected import KINDS, expected_share, find_shortfall, shortfall_in_words

TEXTS, TAGS = "BertForSequenceClassification", "RobertaForTokenClassification"


def test_what_was_measured_is_expected() -> None:
    assert expected_share(TEXTS, 0.31) == pytest.approx(82.1 / 84.1, abs=1e-3)
    assert expected_share(TEXTS, 0.16) == pytest.approx(78.7 / 84.1, abs=1e-3)
    assert expected_share(TAGS, 0.15) == pytest.approx(48.4 / 55.9, abs=1e-3)
    assert expected_share(TEXTS, 0.235) == pytest.approx((0.976 + 0.936) / 2)


@pytest.mark.parametrize(
    ("architecture", "ratio"), [("GPT2LMHeadModel", 0.3), (TEXTS, 0.05), (TEXTS, 1.2), (TAGS, 0.1)]
)
def test_of_what_was_not_measured_nothing_is_expected(architecture: str, ratio: float) -> None:
    assert expected_share(architecture, ratio) is None
    assert find_shortfall(architecture, ratio, {"eval_accuracy": 0.9}, {"eval_accuracy": 0.1}) is None


@given(ratios=st.tuples(*[st.floats(0.15, 1)] * 2), kind=st.sampled_from(sorted(KINDS)))
def test_a_larger_model_should_keep_more(ratios: tuple[float, float], kind: str) -> None:
    smaller, larger = sorted(ratios)
    less, more = expected_share(kind, smaller), expected_share(kind, larger)
    assert less is not None and more is not None and 0 < less <= more <= 1


def test_a_run_at_chance_falls_short_and_a_good_one_does_not() -> None:
    before = {"eval_loss": 0.4, "eval_pearson": 0.857, "eval_spearmanr": 0.85}
    good = {"eval_loss": 0.5, "eval_pearson": 0.847, "eval_spearmanr": 0.84}
    assert find_shortfall(TEXTS, 0.15, before, good) is None
    worst = find_shortfall(TEXTS, 0.15, before, good | {"eval_spearmanr": 0.17})
    assert worst is not None
    assert (worst.metric, worst.kept) == ("eval_spearmanr", pytest.approx(0.2))
    assert worst.expected == expected_share(TEXTS, 0.15)


def test_what_seeds_make_of_a_difference_is_no_shortfall() -> None:
    assert find_shortfall(TAGS, 0.98, {"eval_f1": 0.5}, {"eval_f1": 0.476}) is None
    assert find_shortfall(TAGS, 0.98, {"eval_f1": 0.5}, {"eval_f1": 0.474}) is not None


def test_a_loss_that_grew_is_no_shortfall() -> None:
    assert find_shortfall(TEXTS, 0.15, {"eval_loss": 0.9, "eval_runtime": 9}, {"eval_loss": 0.1}) is None


def test_causes_name_what_the_run_had() -> None:
    scores = {"eval_f1": 0.9}, {"eval_f1": 0.3}
    plain = shortfall_in_words(TEXTS, 0.16, scores, RankDynaConfig(param_ratio=0.15), 1234, "5e-06, linear")
    assert len(plain) == 4
    assert "eval_f1 is 33% of the dense model's" in plain[0] and "about 94%" in plain[0]
    assert "at step 1,234" in plain[1] and "as teacher" in plain[1]
    assert "(5e-06, linear)" in plain[2]
    assert "larger ratio" in plain[3]
    paper = RankDynaConfig(param_ratio=0.15, group_basis="weights", block_floor=0, teacher="folder")
    causes = shortfall_in_words(TEXTS, 0.16, scores, paper, 0)
    assert "as teacher" not in causes[1] and "(" not in causes[2]
    assert "group_basis='weights' and block_floor=0.0: the defaults" in causes[3]
    assert shortfall_in_words(TEXTS, 0.16, (scores[0], scores[0]), paper, 0) == []
