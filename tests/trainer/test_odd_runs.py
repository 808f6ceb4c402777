"""Runs that take an unusual way, and must still end with the right model or a clear error."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import TRANSFORMERS_4
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report
from rankdyna_trainer.layers import compaction

CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)
FINAL = 77
MakeTrainer = Callable[..., Trainer]


class InterruptAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step == self.step:
            raise KeyboardInterrupt


def vision() -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    return model, [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 2)} for i in range(64)]


def language() -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, max_position_embeddings=32, **sizes))
    return model, [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (64, 10))]


@pytest.mark.parametrize("make", [vision, language])
def test_models_that_transformers_saves_under_other_names(
    make_trainer: MakeTrainer, make: Callable[[], Any], tmp_path: Path
) -> None:
    def run(folder: str, **arguments: Any) -> Trainer:
        model, rows = make()
        data = {"train_dataset": rows, "eval_dataset": rows[:8]}
        settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        callback, output = RankDynaCallback(CONFIG), str(tmp_path / folder)
        return make_trainer(model, callback, trainer_arguments=data, output_dir=output, **(settings | arguments))

    whole = run("whole")
    whole.train()
    expected = whole.model.state_dict()
    for stop in (2, 8, 14):
        resumed = run(f"from {stop}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        found = resumed.model.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    best = run("best", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    best.train()
    assert best.state.best_global_step >= 12
    if make is vision:
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "whole")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("step", [4, 11, *(pytest.param(step, marks=pytest.mark.long) for step in (8, 13, 18))])
def test_a_trainer_is_interrupted_and_resumes_itself(
    make_trainer: MakeTrainer,
    train_once: Callable[..., Path],
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    step: int,
) -> None:
    def run(folder: str, *callbacks: TrainerCallback) -> Trainer:
        torch.manual_seed(0)
        model = BertForSequenceClassification(tiny_bert.config)
        settings = {"output_dir": str(tmp_path / folder), "save_strategy": "steps", "save_steps": 3}
        return make_trainer(model, RankDynaCallback(CONFIG), *callbacks, **settings)

    train_once(run("whole").train, "whole")
    trainer = run("interrupted", InterruptAt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(InterruptAt)
    trainer.train(resume_from_checkpoint=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "interrupted" / name).read_bytes()


def test_what_a_resumed_run_says_when_it_is_interrupted_at_once(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, caplog: pytest.LogCaptureFixture
) -> None:
    class Now(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    settings = {"save_strategy": "steps", "save_steps": 5}
    first = make_trainer(tiny_bert, RankDynaCallback(CONFIG), InterruptAt(6), **settings)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = make_trainer(BertForSequenceClassification(tiny_bert.config), RankDynaCallback(CONFIG), Now(), **settings)
    with pytest.raises(KeyboardInterrupt):
        second.train(resume_from_checkpoint=True)
    compaction.compact(second.model)
    kept = rank_report(second.model)["rank"].sum()
    assert "stopped at step 5, before the final budget is reached at step 12: the model is compacted" in caplog.text
    assert f"the budget that it has met, {kept} singular groups" in caplog.text


def test_a_run_that_diverges_saves_nothing(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    class Diverge(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:  # type: ignore[no-untyped-def]
            if state.global_step == 3:
                model.classifier.weight.grad.fill_(math.nan)

    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), Diverge())
    with pytest.raises(ValueError, match="diverged: at step 4 the model's weights have inf or nan"):
        trainer.train()
    assert not list((tmp_path / "output").iterdir())


def test_a_checkpoint_of_the_model_only_is_not_resumed(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 5}
    make_trainer(tiny_bert, RankDynaCallback(CONFIG), save_only_model=True, **settings).train()
    again = make_trainer(BertForSequenceClassification(tiny_bert.config), RankDynaCallback(CONFIG), **settings)
    with pytest.raises(ValueError, match="step 20 was written with save_only_model=True"):
        again.train(resume_from_checkpoint=True)


def test_the_best_model_may_have_wider_tensors_and_trains_on(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification
) -> None:
    scores = iter(range(100, 0, -1))
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(RankDynaConfig(param_ratio=0.5, rank_warmup_steps=0.1, rank_cooldown_steps=0.4)),
        trainer_arguments={"compute_metrics": lambda _: {"score": next(scores)}},
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_global_step <= 12
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.args.load_best_model_at_end = False
    trainer.train()
    names = [name for name, parameter in before.items() if parameter.numel() and "embeddings" not in name]
    assert [name for name in names if torch.equal(before[name], trainer.model.get_parameter(name))] == []


class Combined(torch.optim.Optimizer):
    """Two optimizers behind one face, as users write it: its state and groups are made anew at each look."""

    def __init__(self, parameters: Any, lr: float) -> None:
        parameters = [p for entry in parameters for p in (entry["params"] if isinstance(entry, dict) else [entry])]
        super().__init__(parameters, {"lr": lr})
        self.parts = (
            torch.optim.SGD([p for p in parameters if p.ndim == 2], lr=lr, momentum=0.9),
            torch.optim.AdamW([p for p in parameters if p.ndim != 2], lr=lr),
        )

    parts: tuple[torch.optim.Optimizer, ...] = ()
    param_groups = property(lambda self: [g for p in self.parts for g in p.param_groups], lambda self, _: None)
    state = property(lambda self: {p: s for part in self.parts for p, s in part.state.items()}, lambda self, _: None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        pass

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state_dict[str(i)])


def test_an_optimizer_made_of_two_keeps_its_state(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        tiny_bert,
        RankDynaCallback(CONFIG),
        trainer_arguments={"optimizer_cls_and_kwargs": (Combined, {"lr": 1e-3})},
        lr_scheduler_type="constant",
    )
    trainer.create_scheduler = lambda *_, **__: setattr(  # type: ignore[method-assign]
        trainer,
        "lr_scheduler",
        torch.optim.lr_scheduler.LambdaLR(
            getattr(trainer.optimizer, "optimizer", trainer.optimizer).parts[0], lambda _: 1.0
        ),
    )
    trainer.train()
    assert caplog.text.count("Removed groups stay in the tensors") == 1 and "several states" in caplog.text
    assert rank_report(trainer.model)["rank"].sum() == FINAL
    for _ in range(2):  # each of the two goes on with P and Q, and is trained on
        parts = getattr(trainer.optimizer, "optimizer", trainer.optimizer).parts
        held = {id(parameter) for part in parts for group in part.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in tiny_bert.parameters()}
        assert all(id(parameter) in held for part in parts for parameter in part.state)
        trainer.train()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_in_the_final_compaction_waits_for_its_end(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    original, calls = compaction._compacted, []

    def interrupted(layer: Any) -> torch.nn.Module:
        calls.append(layer)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return original(layer)

    monkeypatch.setattr(compaction, "_compacted", interrupted)
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert compaction.is_compacted(trainer.model) and rank_report(trainer.model)["rank"].sum() == FINAL
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.skipif(
    TRANSFORMERS_4, reason="transformers 4 gives num_items_in_batch to a compiled model that takes none"
)
def test_a_model_that_the_user_has_compiled(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    settings = {"label_names": ["labels"], "remove_unused_columns": False}  # read off a signature, which it hides
    make_trainer(torch.compile(tiny_bert, backend="eager"), RankDynaCallback(CONFIG), **settings).train()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output")
    assert rank_report(loaded)["rank"].sum() == FINAL
    found = loaded.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in tiny_bert.state_dict().items())


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 allocates what config.json says before our code is asked")
def test_a_config_cannot_make_the_loader_allocate_more_than_the_checkpoint_holds(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    make_trainer(tiny_bert, RankDynaCallback(CONFIG)).train()
    file, config_file = tmp_path / "output" / "model.safetensors", tmp_path / "output" / "config.json"
    # Copied, since safetensors 0.4 reads them from the file only when they are used.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    whole, config = dict(tensors), json.loads(config_file.read_text())
    del tensors["bert.embeddings.word_embeddings.weight"]
    for change, kept in (({"vocab_size": 10**13}, tensors), ({"max_position_embeddings": 10**13}, whole)):
        save_file(kept, file, metadata={"format": "pt"})
        config_file.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"the model has \d+ numbers beside the \d+ of the checkpoint's tensors"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "output")
