"""A model that is compressed by a loop of one's own on the device, and saved from there."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.on_gpu import random_tokens
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from rankdyna_trainer import RankDyna, RankDynaConfig, compact, inject_singular_groups, merge, rank_report

Row = dict[str, torch.Tensor]
STEPS = 12


@pytest.fixture
def compressed(
    device: torch.device, tiny_bert: BertForSequenceClassification, batch: Row
) -> Callable[[bool], BertForSequenceClassification]:
    """A compacted classifier on the device, whose groups are those of its inputs, or of its weights."""

    def make(sees_inputs: bool) -> BertForSequenceClassification:
        config = RankDynaConfig(param_ratio=0.2, rank_warmup_steps=4, rank_cooldown_steps=4)
        model = tiny_bert.to(device).train()
        if not sees_inputs:
            inject_singular_groups(model, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batches = [batch] if sees_inputs else None  # in main memory, as a data loader has them
        rankdyna = RankDyna(model, config, optimizer, STEPS, batches=batches)
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        for step in range(1, STEPS + 1):
            model(**inputs).loss.backward()
            rankdyna.update_importance()
            optimizer.step()
            rankdyna.enforce_budget(step)
            optimizer.zero_grad()
        assert rankdyna.meets_final_budget
        return compact(model).eval()

    return make


@pytest.mark.parametrize("sees_inputs", [True, False])
def test_what_is_saved_from_the_device_loads_in_main_memory(
    compressed: Callable[..., Any], device: torch.device, tmp_path: Path, sees_inputs: bool
) -> None:
    model = compressed(sees_inputs).requires_grad_(False)
    exactly = copy.deepcopy(model).double()  # kernels of two devices round float32 each in their way
    kept = rank_report(model)["parameters"].sum() / rank_report(model)["dense_parameters"].sum()
    assert 0 < kept <= 0.2, f"{kept} of the target layers' parameters remain"
    tokens = random_tokens(64, 16, 10, device)
    logits = exactly(tokens).logits.cpu()

    logits_in_float32 = model(tokens).logits
    model.save_pretrained(tmp_path / "compacted")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compacted").eval().requires_grad_(False)
    weights = loaded.state_dict()
    assert all(torch.equal(value.cpu(), weights[name]) for name, value in model.state_dict().items())
    merge(model).save_pretrained(tmp_path / "merged")
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval().requires_grad_(False)
    again = loaded.to(device)(tokens).logits - logits_in_float32
    assert float(again.abs().max()) < 1e-6
    for name, other, bound in (("compacted", loaded.cpu(), 1e-9), ("merged", stock, 1e-5)):
        difference = float((other.double()(tokens.cpu()).logits - logits).abs().max())
        assert difference < bound, f"{name}: the logits differ by {difference} from those on the device"
