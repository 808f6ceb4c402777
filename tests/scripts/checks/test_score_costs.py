import pytest
from checks import score_costs
from transformers import BertConfig


@pytest.mark.parametrize("at_once", [False, True])
def test_each_score_is_timed(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = []
    training = score_costs.RankDyna

    def watched(*arguments: object) -> object:
        trainings.append(training(*arguments))
        return trainings[-1]

    monkeypatch.setattr(score_costs, "RankDyna", watched)
    times = score_costs.step_times(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32), at_once, rounds=2
    )
    assert list(times) == [rankdyna.config.importance_score for rankdyna in trainings]
    assert all(seconds > 0 for seconds in times.values())
    assert all(rankdyna.meets_final_budget == at_once for rankdyna in trainings)
