"""What keeps a device busy: no step waits for it without need, and a compacted model can be captured as a graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.damage import compacted
from support.on_gpu import random_tokens
from transformers import BertForSequenceClassification

from rankdyna_trainer import RankDyna, RankDynaConfig, inject_singular_groups, rank_report

Row = dict[str, torch.Tensor]
STEPS, WARMUP, COOLDOWN = 12, 4, 5


@contextmanager
def no_wait() -> Iterator[None]:
    """Whatever makes the processor wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sees_inputs", [False, True])
@pytest.mark.parametrize("score", ["first_order", "second_order", "fisher"])
def test_a_step_that_removes_nothing_does_not_wait(
    device: torch.device, tiny_bert: BertForSequenceClassification, batch: Row, score: Any, sees_inputs: bool
) -> None:
    config = RankDynaConfig(
        rank_ratio=0.2, importance_score=score, rank_warmup_steps=WARMUP, rank_cooldown_steps=COOLDOWN
    )
    model = tiny_bert.to(device).train()
    if not sees_inputs:
        inject_singular_groups(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rankdyna = RankDyna(model, config, optimizer, STEPS, batches=[batch] if sees_inputs else None)
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    # Groups are made after step 2 of a run that sees its inputs, and the first steps set up what others find ready.
    guarded = [WARMUP, *range(STEPS - COOLDOWN + 2, STEPS + 1)]
    for step in range(1, STEPS + 1):
        model(**inputs).loss.backward()
        before = rankdyna.remaining_groups
        if step in guarded:
            with no_wait():
                rankdyna.update_importance()
            optimizer.step()
            with no_wait():
                rankdyna.enforce_budget(step)
            assert rankdyna.layers and rankdyna.remaining_groups == before
        else:
            rankdyna.update_importance()
            optimizer.step()
            rankdyna.enforce_budget(step)
        optimizer.zero_grad()
    assert rankdyna.meets_final_budget


@torch.no_grad()
def test_a_captured_graph_of_a_compacted_model_gives_the_same(
    device: torch.device, tiny_bert: BertForSequenceClassification
) -> None:
    """Last in this folder: a capture that fails may leave the device in a state that others do not expect."""
    model: Any = compacted(tiny_bert).to(device).eval()
    assert 0 in rank_report(model)["rank"].tolist()
    tokens, others = random_tokens(60, 4, 10, device), random_tokens(60, 8, 10, device)[4:]
    expected = [model(tokens).logits.clone(), model(others).logits.clone()]
    inputs = tokens.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(inputs).logits
    for given, wanted in zip((tokens, others), expected, strict=True):
        inputs.copy_(given)
        graph.replay()
        difference = float((logits - wanted).abs().max())
        assert difference < 1e-6, f"the logits differ by {difference}"
    assert not torch.equal(*expected)
