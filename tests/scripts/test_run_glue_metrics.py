"""scripts/run_glue.py: the scores, with and without the Hub."""

from types import SimpleNamespace

import numpy as np
import pytest
import run_glue

CLASSES = {"predictions": [1, 1, 1, 0, 0], "references": [1, 0, 0, 0, 0]}
NUMBERS = {"predictions": [1.0, 2.0, 3.0, 4.0], "references": [1.0, 2.0, 3.0, 10.0]}


class TestMetrics:
    @pytest.mark.parametrize(
        ("task", "data", "expected"),
        [
            # 1 true positive, 2 false positives, 2 true negatives: (1 * 2 - 2 * 0) / sqrt(3 * 1 * 4 * 2)
            ("cola", CLASSES, {"matthews_correlation": 2 / 24**0.5}),
            ("mnli", {"predictions": [0, 1, 2, 2], "references": [0, 2, 2, 2]}, {"accuracy": 3 / 4}),
            ("mrpc", CLASSES, {"accuracy": 3 / 5, "f1": 1 / 2}),
            ("qnli", CLASSES, {"accuracy": 3 / 5}),
            ("qqp", CLASSES, {"accuracy": 3 / 5, "f1": 1 / 2}),
            ("rte", CLASSES, {"accuracy": 3 / 5}),
            ("sst2", CLASSES, {"accuracy": 3 / 5}),
            ("stsb", NUMBERS, {"pearson": 14 / 250**0.5, "spearmanr": 1.0}),
            ("wnli", CLASSES, {"accuracy": 3 / 5}),
        ],
    )
    def test_without_the_hub(self, task, data, expected, monkeypatch):
        asked = []
        monkeypatch.setattr(run_glue.evaluate, "load", lambda *args, **_: asked.append(args))
        compute = run_glue.load_metric(task, run_glue.GLUE[task].metrics)
        assert compute(**{name: np.array(values) for name, values in data.items()}) == pytest.approx(expected)
        assert asked == []

    def test_every_task_of_glue(self):
        assert sorted(run_glue.GLUE) == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]

    def test_evaluate_is_used_when_the_hub_answers(self, monkeypatch):
        asked = []
        monkeypatch.setattr(run_glue.HfApi, "space_info", lambda *args, **options: asked.append(options["timeout"]))
        metric = SimpleNamespace(compute=lambda predictions, references: {"accuracy": 0.123})
        monkeypatch.setattr(run_glue.evaluate, "load", lambda *args, **_: asked.append(args) or metric)
        assert run_glue.load_metric("rte", ("accuracy",))(**CLASSES) == {"accuracy": 0.123}
        assert asked == [5, ("glue", "rte")]

    def test_a_metric_script_that_fails_is_replaced(self, monkeypatch, caplog):
        def fail(**_):
            raise ImportError("no such thing as load_metric")

        monkeypatch.setattr(run_glue.HfApi, "space_info", lambda *args, **_: None)
        monkeypatch.setattr(run_glue.evaluate, "load", lambda *args, **_: SimpleNamespace(compute=fail))
        assert run_glue.load_metric("rte", ("accuracy",))(**CLASSES) == {"accuracy": 3 / 5}
        assert "no such thing as load_metric" in caplog.text
