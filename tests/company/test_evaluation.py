"""lm-eval scores a compacted decoder by its own `hf` model type, on a task of a local file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import tiny_tasks

TASK = """\
task: tiny_lines
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
DOCUMENTS = [("alice sees", ["paris", "film"]), ("bob likes new", ["york", "the"]), ("carol left", ["oslo", "good"])]


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, text: str, choice: str) -> float:
    ids = tokenizer(f"{text} {choice}")["input_ids"]
    known = len(tokenizer(text)["input_ids"])
    logits = model(torch.tensor([ids])).logits[0].double()
    return sum(logits[i - 1].log_softmax(0)[ids[i]].item() for i in range(known, len(ids)))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lm_eval(
    kind: str, make_compacted: Any, assert_differs_less: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is in the extra company")
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model, tokenizer = make_compacted(kind), tiny_tasks.tokenizer(ends=False)
    model.save_pretrained(tmp_path / "small")
    tokenizer.eos_token = tokenizer.sep_token  # with which lm-eval begins an empty text
    tokenizer.save_pretrained(tmp_path / "small")
    rows = [{"text": text, "choices": choices, "label": 0} for text, choices in DOCUMENTS]
    (tmp_path / "tasks").mkdir()
    data = tiny_tasks.write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tasks" / "tiny_lines.yaml").write_text(TASK.format(data=json.dumps(data)))

    found = evaluator.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'small'},dtype=float32",
        tasks=["tiny_lines"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )

    expected = [[log_likelihood(model, tokenizer, text, choice) for choice in choices] for text, choices in DOCUMENTS]
    samples = sorted(found["samples"]["tiny_lines"], key=lambda sample: sample["doc_id"])
    scored = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
    assert_differs_less("lm_eval", torch.tensor(scored), torch.tensor(expected), 1e-5)
    right = sum(first > second for first, second in expected) / len(expected)
    assert math.isclose(found["results"]["tiny_lines"]["acc,none"], right)
