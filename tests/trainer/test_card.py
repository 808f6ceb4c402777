"""What the card is told of a run's history and data, for such as no short training would give."""

import pytest
from datasets import Dataset

from rankdyna_trainer.trainer.card import dataset_id
from rankdyna_trainer.trainer.scores import evaluated_scores, scores_of_saved_model


def evaluation(step: int, accuracy: float, prefix: str = "eval") -> dict[str, float]:
    return {f"{prefix}_accuracy": accuracy, f"{prefix}_runtime": 1.0, f"{prefix}_steps_per_second": 2.0, "step": step}


TRAINED = {"train_runtime": 9.0, "train_loss": 0.5, "step": 20}


@pytest.mark.parametrize(
    ("history", "best_step", "expected"),
    [
        ([], None, ({}, None)),
        ([{"loss": 1.0, "step": 20}, TRAINED], None, ({}, None)),
        ([evaluation(14, 0.7), evaluation(20, 0.8), TRAINED], None, ({"eval_accuracy": 0.8}, 20)),
        ([evaluation(14, 0.7), evaluation(20, 0.8), TRAINED], 14, ({"eval_accuracy": 0.7}, 14)),
        ([evaluation(14, 0.7), TRAINED, evaluation(20, 0.6)], 14, ({"eval_accuracy": 0.6}, 20)),
        ([evaluation(13, 0.9), TRAINED], None, ({}, None)),  # of a larger model
        ([evaluation(19, 0.8), evaluation(21, 0.9), TRAINED], None, ({"eval_accuracy": 0.8}, 19)),  # of a smaller one
        ([TRAINED, evaluation(20, 0.6, "test")], None, ({"test_accuracy": 0.6}, 20)),
        (
            [evaluation(20, 0.8, "eval_a"), evaluation(20, 0.7, "eval_b"), TRAINED],
            None,
            ({"eval_a_accuracy": 0.8, "eval_b_accuracy": 0.7}, 20),
        ),
    ],
)
def test_scores_are_of_the_model_that_was_saved(
    history: list[dict[str, float]], best_step: int | None, expected: tuple[dict[str, float], int | None]
) -> None:
    assert scores_of_saved_model(history, settled_step=14, left_step=20, best_step=best_step) == expected


def test_scores_of_a_step() -> None:
    assert evaluated_scores([evaluation(0, 0.5), evaluation(9, 0.8)], step=0) == {"eval_accuracy": 0.5}


def test_dataset_ids() -> None:
    data = Dataset.from_dict({"text": ["a"]})
    assert dataset_id(data) is None and dataset_id([1, 2]) is None and dataset_id(None) is None
    data.info.builder_name = "parquet"
    assert dataset_id(data) is None
    data.info.download_checksums = {"hf://datasets/stanfordnlp/sst2@8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb/a": {}}
    assert dataset_id(data) == "stanfordnlp/sst2"
    data.info.download_checksums, data.info.builder_name = None, "glue"
    assert dataset_id(data) == "glue"
