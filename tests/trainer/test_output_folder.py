"""What stands in the way of the compacted model is said before training; what comes later costs no model."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.networks import make_gpt2
from support.paper import PAPER
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from rankdyna_trainer import RankDynaCallback, RankDynaConfig, rank_report

MakeTrainer = Callable[..., Trainer]
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.1, rank_cooldown_steps=0.4, **PAPER)


class At(TrainerCallback):
    """Does something once, at the end of a step."""

    def __init__(self, step: int, act: Callable[[torch.nn.Module], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: torch.nn.Module, **_: Any) -> None:
        if state.global_step == self.step:
            self.act(model)


def fill(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("mine")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "importance.safetensors", "README.md", "ranks.png"]
)
def test_a_folder_in_the_place_of_a_file_is_named_before_training(
    name: str, make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    fill(tmp_path / "output" / name)
    with pytest.raises(IsADirectoryError, match=rf"{name} is a folder, and the compacted model needs a file of this"):
        trainer.train()
    assert trainer.state.global_step == 0 and (tmp_path / "output" / name / "mine.txt").exists()


def test_a_link_to_nowhere_is_named_before_training(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    (tmp_path / "output").rename(tmp_path / "away")
    (tmp_path / "output").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"No model can be saved in .*output .*give another one"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("relative", [False, True])
def test_what_appears_while_training_runs_costs_no_model(
    relative: bool,
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    obstacle = tmp_path / "output" / "model.safetensors"
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path / "output")
    place = "." if relative else str(tmp_path / "output")
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), At(15, lambda _: fill(obstacle)), output_dir=place)
    trainer.train()
    beside = tmp_path / "output-compacted"
    assert f"it is in {beside}" in caplog.text and (obstacle / "mine.txt").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(beside)
    assert rank_report(loaded)["rank"].sum() == math.ceil(0.2 * 384)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["classifier.bias", "bert.embeddings.word_embeddings.weight"])
def test_weights_that_are_not_finite_stop_the_run_at_the_next_logging_step(
    name: str, make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    def break_it(model: torch.nn.Module) -> None:
        model.get_parameter(name).data.view(-1)[-1] = math.nan

    trainer = make_trainer(tiny_bert, At(7, break_it), RankDynaCallback(CONFIG), logging_steps=4)
    with pytest.raises(ValueError, match=r"Training diverged: at step 8 the model's weights have inf or nan"):
        trainer.train()
    assert not (tmp_path / "output" / "config.json").exists()


def test_a_model_that_cannot_be_saved_is_refused_before_training(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(make_gpt2())
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    trainer = make_trainer(model, RankDynaCallback(CONFIG))
    with pytest.raises(ValueError, match=r"(?s)could not be saved after its training, which is why .*temperature"):
        trainer.train()
    assert trainer.state.global_step == 0 and not any((tmp_path / "output").iterdir())
    model.generation_config.do_sample = True
    model.config.note = object()
    with pytest.raises(ValueError, match=r"could not be saved after its training.*object"):
        make_trainer(model, RankDynaCallback(CONFIG)).train()


def test_a_generation_config_that_is_broken_in_training_costs_no_model(
    make_trainer: MakeTrainer, rows: list[dict[str, torch.Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def break_it(model: Any) -> None:
        model.generation_config.temperature, model.generation_config.do_sample = 0.5, False

    texts = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    data: dict[str, object] = {"train_dataset": texts}
    model = GPT2LMHeadModel(make_gpt2())
    trainer = make_trainer(model, RankDynaCallback(CONFIG), At(7, break_it), trainer_arguments=data)
    trainer.train()
    assert "saved with another generation config, since its own is refused" in caplog.text
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "output")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert model.generation_config.temperature == 0.5


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_in_the_place_of_the_tokenizer_is_named_before_training(
    name: str,
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), trainer_arguments={"processing_class": tokenizer})
    fill(tmp_path / "output" / name)
    with pytest.raises(IsADirectoryError, match=rf"{name} is a folder"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_disk_without_room_is_named_before_training(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    kept = 4 * sum(p.numel() for name, p in tiny_bert.named_parameters() if ".encoder." not in name)
    free = SimpleNamespace(free=kept)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match=r"There is no room in .*: the compacted model has at least 0\.0 MB"):
        trainer.train()
    assert trainer.state.global_step == 0
    free.free = 10 * kept
    trainer.train()
    assert trainer.state.global_step == 20


@pytest.mark.parametrize("broken", ["drawing", "card", "sizes", "trackers", "evaluation"])
def test_what_only_shows_the_model_ends_no_run(
    broken: str,
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"no {broken}")

    ending, card = "rankdyna_trainer.trainer.ending", "rankdyna_trainer.trainer.card"
    places = {"drawing": f"{ending}.ranks_image", "card": f"{card}.model_card", "sizes": f"{ending}.print_summary"}
    places |= {"trackers": f"{ending}.send_heatmap", "evaluation": f"{card}.scores_of_saved_model"}
    if broken == "trackers":
        monkeypatch.setattr(f"{ending}.ranks_image", lambda model: b"image")
    monkeypatch.setattr(places[broken], fail)
    make_trainer(tiny_bert, RankDynaCallback(CONFIG)).train()
    output = tmp_path / "output"
    assert f"The model is saved in {output}, but it was not possible to" in caplog.text
    assert f"no {broken}" in caplog.text
    assert rank_report(AutoModelForSequenceClassification.from_pretrained(output))["rank"].sum() == math.ceil(
        0.2 * 384
    )
    assert (output / "README.md").exists() is (broken not in ("card", "evaluation"))


def test_the_place_beside_is_none_of_the_users(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fill(tmp_path / "output-compacted")
    obstacle = tmp_path / "output" / "config.json"
    make_trainer(tiny_bert, RankDynaCallback(CONFIG), At(15, lambda _: fill(obstacle))).train()
    assert [path.name for path in (tmp_path / "output-compacted").iterdir()] == ["mine.txt"]
    assert f"it is in {tmp_path / 'output-compacted-2'}" in caplog.text
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "output-compacted-2")


def test_a_folder_of_the_users_with_the_name_of_the_teachers(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    config = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=0.2, rank_cooldown_steps=0.4, teacher="self")
    trainer = make_trainer(tiny_bert, RankDynaCallback(config))
    fill(tmp_path / "output" / "rankdyna_teacher")
    with pytest.raises(FileExistsError, match=r"rankdyna_teacher is not of a run"):
        trainer.train()
    assert (tmp_path / "output" / "rankdyna_teacher" / "mine.txt").exists()


@pytest.mark.parametrize("write_in_training", [False, True])
def test_a_card_that_a_person_wrote_survives_the_run_and_the_trainers_own(
    write_in_training: bool, make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    readme, beside = tmp_path / "output" / "README.md", tmp_path / "output" / "README.rankdyna.md"
    readme.parent.mkdir(exist_ok=True)
    readme.write_text("---\n- broken: [yaml\n---\n\n- rankdyna\n")
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    if write_in_training:  # as trl does, with each checkpoint
        trainer.create_model_card()
        assert "generated_from_trainer" in beside.read_text() and "## Ranks" not in beside.read_text()
    trainer.train()
    assert "## Ranks" in beside.read_text() and "generated_from_trainer" not in beside.read_text()
    trainer.create_model_card(model_name="new")
    assert "## Ranks" in beside.read_text() and "generated_from_trainer" in beside.read_text()
    assert readme.read_text() == "---\n- broken: [yaml\n---\n\n- rankdyna\n"
    assert sorted(path.name for path in readme.parent.glob("README*")) == ["README.md", "README.rankdyna.md"]


def test_a_generated_card_that_a_person_changed_survives_the_next_run(
    make_trainer: MakeTrainer, tiny_bert: BertForSequenceClassification, tmp_path: Path
) -> None:
    readme = tmp_path / "output" / "README.md"
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG))
    trainer.train()
    trainer.create_model_card()
    generated = readme.read_text()
    make_trainer(BertForSequenceClassification(tiny_bert.config), RankDynaCallback(CONFIG)).train()
    assert readme.read_text() != generated and not (readme.parent / "README.rankdyna.md").exists()
    readme.write_text(readme.read_text() + "\nWhat I found out.\n")
    changed = readme.read_text()
    again = make_trainer(BertForSequenceClassification(tiny_bert.config), RankDynaCallback(CONFIG))
    again.train()
    again.create_model_card()
    assert readme.read_text() == changed and "## Ranks" in (readme.parent / "README.rankdyna.md").read_text()


def test_a_model_that_can_be_saved_nowhere_stays_in_memory(
    make_trainer: MakeTrainer,
    tiny_bert: BertForSequenceClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankdyna_trainer.trainer.ending.save_compacted", full)
    trainer = make_trainer(tiny_bert, RankDynaCallback(CONFIG), save_strategy="steps", save_steps=12)
    with pytest.raises(OSError, match=r"saved nowhere .*No space left.* in trainer\.model as .*checkpoint-20\."):
        trainer.train()
    monkeypatch.undo()
    trainer.model.save_pretrained(tmp_path / "rescued")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "rescued")
