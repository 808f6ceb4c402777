"""The card of the model that a `Trainer` compresses: what the `Trainer` knows of it, and its own card."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel, TrainerState

from ..layers.compaction import is_compacted
from ..layers.rank_record import TAGS
from ..method.algorithm import RankDyna
from ..method.budget import RankBudget
from ..report.card import CompressionRun, is_hub_id, model_card, write_card
from ..report.generated import CARD, card_place, is_unchanged, never_fatal
from ..report.staging import staging_folder

if TYPE_CHECKING:
    from transformers import Trainer

_CARD = "_rankdyna_card"
# What an evaluation measures beside the scores.
SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


def card_of(trainer: Trainer | None) -> TrainerCard | None:
    """The card of a `Trainer`, which [`prepare_card`] made: a callback may be that of several."""
    return None if trainer is None else vars(trainer).get(_CARD)


def prepare_card(trainer: Trainer) -> None:
    """Make the card of a `Trainer`."""
    vars(trainer)[_CARD] = TrainerCard(trainer)


class TrainerCard:
    """
    Writes the card at the end of training, and adds to the one that `trainer.create_model_card()` writes.

    Args:
        trainer: whose model is compressed. Its `create_model_card` is replaced.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._run: CompressionRun | None = None
        self._scores_before: dict[str, float] = {}
        self._budget: RankBudget | None = None  # of the run, while its ranks change
        self._settled_step = 0
        self._image: bytes | None = None
        trainer.create_model_card = self._adding(trainer.create_model_card)

    def begin(self, rankdyna: RankDyna, state: TrainerState, teacher: str | None) -> None:
        """Note the schedule of a run that begins, or goes on, and who teaches it."""
        if self._run is not None:  # scores of the run before
            self._scores_before = {}
        self._scores_before |= evaluated_scores(state.log_history, step=0)
        schedule = rankdyna.schedule
        self._run = CompressionRun(
            config=rankdyna.config,
            schedule=schedule,
            initial_budget=rankdyna.budget(0),
            final_budget=rankdyna.budget(schedule.total_steps),
            finished_steps=schedule.total_steps,
            teacher=teacher,
        )
        self._budget = rankdyna.rank_budget

    def train_on(self) -> None:
        """Note that the compacted model is trained on, at the ranks that it has."""
        self._budget, self._settled_step = None, 0

    def note_evaluation(self, state: TrainerState, metrics: Mapping[str, Any]) -> None:
        """Note the scores of the model that training is to begin with."""
        if state.global_step == 0:
            self._scores_before |= evaluated_scores([metrics])

    def end(self, model: nn.Module, directory: Path, image: bytes | None) -> None:
        """
        Write the card beside the saved model, and beside the one that a person wrote or changed.

        Args:
            model: compacted, as it was saved.
            directory: where.
            image: from [`ranks_image`].
        """
        if self._run is None:
            return
        self._image = image
        if self._budget is not None:
            schedule, finished = self._budget.schedule, self.trainer.state.global_step
            self._run = replace(self._run, schedule=schedule, finished_steps=finished)
            self._settled_step = min(schedule.final_step, finished)
        # Other than a transformer, a model may have written its own card, which knows more of it, when it was saved.
        if isinstance(model, PreTrainedModel) or not _is_of_the_model(card_place(directory)):
            write_card(self._card(model, self._run, directory, directory.resolve().name), directory, image)

    def _adding(self, create_model_card: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(create_model_card)
        def create(*args: Any, **kwargs: Any) -> None:
            if not self.trainer.is_world_process_zero():
                return
            directory = Path(self.trainer.args.output_dir)
            theirs = self._of_trainer(lambda: create_model_card(*args, **kwargs), directory)
            if theirs is None:
                return
            card, model = ModelCard(theirs, ignore_metadata_errors=True), self.trainer.model
            if self._run is not None and is_compacted(model):
                given = inspect.signature(create_model_card).bind(*args, **kwargs).arguments
                tasks = _listed(given.get("tasks"))
                names = ("dataset_tags", "dataset", "dataset_name")  # the last one is that of trl
                datasets = _listed(next((given[name] for name in names if given.get(name)), None))
                with never_fatal("add to its card how it was compressed", directory):
                    card = self._card(
                        model,
                        replace(self._run, datasets=[*filter(is_hub_id, datasets)]),
                        directory,
                        given.get("model_name") or directory.resolve().name,
                        pipeline_tag=tasks[0] if tasks else None,
                        trainer_card=theirs,
                    )
            write_card(card, directory, self._image)

        return create

    def _of_trainer(self, create: Callable[[], None], directory: Path) -> str | None:
        """The card that the `Trainer` writes, whatever stands in its place: it is written into another folder."""
        args, output_dir = self.trainer.args, self.trainer.args.output_dir
        directory.mkdir(parents=True, exist_ok=True)
        with staging_folder(directory) as staging:
            folder = staging / (directory.resolve().name or CARD)  # of which the card takes the name
            folder.mkdir()
            if is_unchanged(directory / CARD):
                shutil.copyfile(directory / CARD, folder / CARD)  # its tags are taken over
            args.output_dir = str(folder)
            try:
                create()
            finally:
                args.output_dir = output_dir
            return (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else None

    def _card(
        self, model: nn.Module, run: CompressionRun, directory: Path, name: str, **card_arguments: str | None
    ) -> ModelCard:
        state, args = self.trainer.state, self.trainer.args
        best_step = state.best_global_step if args.load_best_model_at_end else None
        scores, step = scores_of_saved_model(state.log_history, self._settled_step, best_step)
        return model_card(
            model,
            name,
            model_id=self.trainer.hub_model_id,
            run=replace(
                run,
                scores_before=self._scores_before,
                scores_after=scores,
                scored_step=step,
                datasets=run.datasets or _listed(dataset_id(self.trainer.train_dataset)),
            ),
            file_bytes=sum(path.stat().st_size for path in directory.glob("model*.safetensors")),
            has_image=self._image is not None,
            **card_arguments,
        )


def evaluated_scores(log_history: Sequence[Mapping[str, Any]], step: int | None = None) -> dict[str, float]:
    """
    The scores of the evaluations among some rows of `state.log_history`, by name.

    Args:
        log_history: rows, of which the last one counts for each score.
        step: only the rows of this step.
    """
    scores: dict[str, float] = {}
    for row in log_history:
        # Each evaluation, whatever the prefix of its scores, measures its time.
        prefixes = {name.removesuffix("_runtime") for name in row if name.endswith("_runtime")} - {"train"}
        if prefixes and step in (None, row.get("step")):
            others = {f"{prefix}_{speed}" for prefix in prefixes for speed in SPEEDS}
            starts = tuple(f"{prefix}_" for prefix in prefixes)
            scores |= {
                name: value
                for name, value in row.items()
                if name.startswith(starts) and name not in others and isinstance(value, (int, float))
            }
    return scores


def scores_of_saved_model(
    log_history: Sequence[Mapping[str, Any]], settled_step: int, best_step: int | None = None
) -> tuple[dict[str, float], int | None]:
    """
    The last evaluation of the model that was saved, and its step: after training if there was one, else at the step
    whose model was loaded as the best one, else the last in training.

    Args:
        log_history: of the `Trainer`'s state.
        settled_step: from which step on the ranks are those of the saved model. An earlier evaluation was of a
            larger model, and says nothing.
        best_step: the step of the checkpoint that was loaded at the end, if any.

    Returns:
        No scores and `None` if the saved model was not evaluated.
    """
    ended = max((i for i, row in enumerate(log_history) if "train_runtime" in row), default=len(log_history))
    during = [row for row in log_history[:ended] if row.get("step", 0) >= settled_step]
    if best_step is not None:
        during = [row for row in during if row.get("step") == best_step]
    for rows in (log_history[ended:], during):
        evaluations = [row for row in rows if evaluated_scores([row])]
        if evaluations:
            step = evaluations[-1].get("step")
            return evaluated_scores(evaluations, step), step
    return {}, None


def dataset_id(dataset: Any) -> str | None:
    """The id on the Hub of a dataset of the library `datasets`, or `None` if it is not from there."""
    for url in getattr(getattr(dataset, "info", None), "download_checksums", None) or ():
        if found := re.match(r"hf://datasets/([^@]+)@", str(url)):
            return found[1]
    builder = getattr(dataset, "builder_name", None)
    # Readers of files ("json", "imagefolder") are builders as well, but no datasets.
    if builder is None or importlib.util.find_spec(f"datasets.packaged_modules.{builder}") is not None:
        return None
    return str(builder)


def _is_of_the_model(card: Path) -> bool:
    return card.exists() and not set(ModelCard.load(card, ignore_metadata_errors=True).data.tags or []) & {*TAGS[:1]}


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else [*(value or [])]
