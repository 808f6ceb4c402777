"""The scores of the groups, in a file beside the weights of a compacted model."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hub_server import HubServer
from support.scored import compacted_with_scores
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer

from rankdyna_trainer import LowRankLinear, RankDyna, RankDynaCallback, RankDynaConfig, compact, inject_singular_groups
from rankdyna_trainer.checkpoint.importance_file import read_importance
from rankdyna_trainer.checkpoint.saving import save_compacted
from rankdyna_trainer.layers.group_importance import noted_importance

NAME = "importance.safetensors"
Row = dict[str, torch.Tensor]


def test_a_run_leaves_the_scores_that_it_ended_with_beside_the_weights(
    tiny_bert: BertForSequenceClassification, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    ended_with: dict[str, torch.Tensor] = {}

    class Watching(RankDynaCallback):
        def on_train_end(self, *args: object, model: BertForSequenceClassification, **options: object) -> None:
            for name, layer in model.named_modules():
                if hasattr(layer, "importance"):
                    ended_with[name] = layer.importance[layer.remaining].clone()
            super().on_train_end(*args, model=model, **options)  # type: ignore[arg-type]

    trainer = make_trainer(tiny_bert, Watching(RankDynaConfig(param_ratio=0.3)))
    trainer.train()
    saved = load_file(tmp_path / "output" / NAME)
    ranks = tiny_bert.config.rankdyna["ranks"] | tiny_bert.config.rankdyna["dense"]
    assert {name: tuple(scores.shape) for name, scores in saved.items()} == {n: (rank,) for n, rank in ranks.items()}
    assert ended_with.keys() == saved.keys() and all(torch.equal(saved[name], ended_with[name]) for name in saved)
    trainer.save_model(str(tmp_path / "again"))
    assert load_file(tmp_path / "again" / NAME).keys() == saved.keys()


def test_a_loop_of_ones_own_saves_them_too(
    tiny_bert: BertForSequenceClassification, batch: Row, tmp_path: Path
) -> None:
    config = RankDynaConfig(rank_ratio=0.3, rank_warmup_steps=1, rank_cooldown_steps=1)
    model = inject_singular_groups(tiny_bert, config)
    optimizer = torch.optim.AdamW(model.parameters())
    rankdyna = RankDyna(model, config, optimizer, total_steps=4)
    for step in range(1, 5):
        model(**batch).loss.backward()
        rankdyna.update_importance()
        optimizer.step()
        rankdyna.enforce_budget(step)
        optimizer.zero_grad()
    compact(model)
    tiny_bert.save_pretrained(tmp_path)
    record = tiny_bert.config.rankdyna
    assert any(scores.any() for scores in read_importance(tmp_path, record["ranks"] | record["dense"]).values())


def test_each_score_is_that_of_a_column(tiny_bert: BertForSequenceClassification, batch: Row) -> None:
    """With the first group of each layer the largest in the scores, and all others left out."""
    inject_singular_groups(tiny_bert, RankDynaConfig(rank_ratio=0.5))
    expected = {}
    for name, layer in tiny_bert.named_modules():
        if hasattr(layer, "sigma"):
            layer.importance.copy_(layer.sigma)
            layer.set_remaining(torch.arange(layer.width) % 3 == 1)
            expected[name] = layer.sigma.detach()[1::3]
    compact(tiny_bert)
    for name, scores in noted_importance(tiny_bert).items():
        torch.testing.assert_close(scores, expected[name])
        layer = tiny_bert.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        torch.testing.assert_close(layer.p.weight.norm(dim=0), scores)  # u and v have length 1


def test_no_loader_takes_them_for_weights(tiny_bert: BertForSequenceClassification, tmp_path: Path) -> None:
    model = compacted_with_scores(tiny_bert)
    size = save_compacted(model, tmp_path)
    assert (tmp_path / NAME).is_file() and size == (tmp_path / "model.safetensors").stat().st_size
    loaded, found = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert not noted_importance(loaded)


def test_they_go_with_the_model_that_they_are_of(tiny_bert: BertForSequenceClassification, tmp_path: Path) -> None:
    compacted_with_scores(tiny_bert).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for save in (save_compacted, type(loaded).save_pretrained):
        shutil.rmtree(tmp_path)
        tiny_bert.save_pretrained(tmp_path)
        assert (tmp_path / NAME).is_file()
        save(loaded, tmp_path)
        assert not (tmp_path / NAME).exists() and (tmp_path / "model.safetensors").is_file()


def test_they_are_pushed_with_the_model(tiny_bert: BertForSequenceClassification, hub: HubServer) -> None:
    compacted_with_scores(tiny_bert).push_to_hub("alice/small")
    assert NAME in hub.files("alice/small")


def test_half_precision_leaves_the_scores_as_they_are(tiny_bert: BertForSequenceClassification) -> None:
    model = compacted_with_scores(tiny_bert)
    before = noted_importance(model)
    after = noted_importance(model.half())
    assert all(torch.equal(after[name], scores) and scores.dtype == torch.float32 for name, scores in before.items())


@pytest.mark.parametrize(
    ("content", "exception", "message"),
    [
        (None, FileNotFoundError, f"has no {NAME}, the scores that the end of a run leaves"),
        (b"x" * 50, ValueError, "is damaged: .* Copy or download it again"),
        ({"a": torch.ones(2)}, ValueError, "has not one score for each group of b, .* it is of another model"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, ValueError, "has not one score for each group of b, "),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, ValueError, "has not one .* of the layers, "),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    content: object, exception: type[Exception], message: str, tmp_path: Path
) -> None:
    if isinstance(content, bytes):
        (tmp_path / NAME).write_bytes(content)
    elif isinstance(content, dict):
        save_file(content, tmp_path / NAME)
    with pytest.raises(exception, match=message) as refusal:
        read_importance(tmp_path, {"a": 2, "b": 3})
    assert re.search(re.escape(str(tmp_path)), str(refusal.value))
