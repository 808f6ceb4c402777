"""LoRA adapters of peft on P and Q."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, TaskType, get_peft_model
from tasks import tiny_tasks
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from rankdyna_trainer import LowRankLinear, rank_report


def of_rank_zero(model: nn.Module) -> list[str]:
    """An adapter has nothing to add to these. With one they compute the same, but peft warns when it is saved."""
    report = rank_report(model)
    return [f"{name}.{factor}" for name in report.index[report["rank"] == 0] for factor in ("p", "q")]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("target_modules", ["all-linear", ["p", "q"]], ids=str)
def test_an_adapter_is_trained_saved_loaded_and_merged(
    target_modules: str | list[str], make_compacted: Any, inputs_of: Any, assert_differs_less: Any, tmp_path: Path
) -> None:
    base = make_compacted("classifier")
    base.save_pretrained(tmp_path / "base")
    inputs = inputs_of(base)
    expected_base = base(**inputs).logits.detach()
    tokenizer = tiny_tasks.tokenizer()
    rows = Dataset.from_list(
        [tokenizer(row["sentence"]) | {"label": row["label"]} for row in tiny_tasks.sentences(16)]
    )
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"),
        LoraConfig(target_modules=target_modules, exclude_modules=of_rank_zero(base), r=2, task_type=TaskType.SEQ_CLS),
    )
    args = TrainingArguments(
        str(tmp_path / "output"), max_steps=5, learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True
    )
    Trainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    model.eval().save_pretrained(tmp_path / "adapter")
    trained = model(**inputs).logits.detach()
    assert (trained - expected_base).abs().max() > 1e-2

    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_differs_less("peft", loaded(**inputs).logits, trained, 0)
        # Finds the compacted model by the path that the adapter has noted.
        found = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
        assert_differs_less("peft", found(**inputs).logits, trained, 0)
        merged = loaded.merge_and_unload()
        assert_differs_less("peft", merged(**inputs).logits, trained, 1e-5)
        assert any(isinstance(module, LowRankLinear) for module in merged.modules())
        assert rank_report(merged).equals(rank_report(base))
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert_differs_less("peft", again(**inputs).logits, merged(**inputs).logits, 0)


def test_names_of_the_dense_model_are_answered_with_those_of_the_factors(make_compacted: Any) -> None:
    """An adapter belongs on P and Q: on the layer itself it could not be merged."""
    model = make_compacted("classifier")
    ranks = rank_report(model)["rank"]
    assert ranks.filter(like="query").tolist() == [0] and ranks.filter(like="value").tolist() == [5]
    message = (
        r"names layers that are compressed, .* give target_modules=\['classifier', 'query.q', 'query.p', 'value.q', "
        r"'value.p'\], and exclude_modules=\['bert.encoder.layer.0.attention.self.query.q', "
    )
    with pytest.raises(ValueError, match=message) as refusal:
        get_peft_model(model, LoraConfig(target_modules=["query", "value", "classifier"], task_type=TaskType.SEQ_CLS))
    given = re.search(r"target_modules=(\[[^]]*\]), and exclude_modules=(\[[^]]*\])", str(refusal.value))
    assert given is not None
    targets, excluded = map(ast.literal_eval, given.groups())
    config = LoraConfig(target_modules=targets, exclude_modules=excluded, task_type=TaskType.SEQ_CLS)
    adapted = get_peft_model(make_compacted("classifier"), config)
    assert {
        name.partition(".lora_A")[0].rpartition("self.")[2] for name in adapted.state_dict() if "lora_A" in name
    } >= {
        "value.q",
        "value.p",
    }


def test_other_refusals_of_peft_are_its_own(make_compacted: Any) -> None:
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        get_peft_model(make_compacted("classifier"), LoraConfig(target_modules=["nothing"]))
