"""The card of the model that a `Trainer` compresses: what the `Trainer` knows of it, and its own card."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel, TrainerState

from ..checkpoint.run_state import DENSE_SCORES, RUN_KEY
from ..layers.architecture import head_was_trained
from ..layers.compaction import is_compacted
from ..layers.rank_record import TAGS
from ..method.algorithm import RankDyna
from ..method.budget import RankBudget
from ..report.card import PROCESSING_FILES, is_hub_id, model_card, write_card
from ..report.card_sections import section_of
from ..report.compression_run import CompressionRun
from ..report.continuations import HEADING as TEXT
from ..report.curve import HEADING as CURVE
from ..report.generated import CARD, card_place, is_unchanged, never_fatal
from ..report.speed import HEADING as SPEED
from ..report.staging import staging_folder
from .scores import evaluated_scores, scores_at_full_rank, scores_of_saved_model

if TYPE_CHECKING:
    from transformers import Trainer

_CARD = "_rankdyna_card"
Scores = Mapping[str, float]


def card_of(trainer: Trainer | None) -> TrainerCard | None:
    """The card of a `Trainer`, which [`prepare_card`] made: a callback may be that of several."""
    return None if trainer is None else vars(trainer).get(_CARD)


def prepare_card(trainer: Trainer, dense_scores: Scores) -> None:
    """Make the card of a `Trainer`, beside the scores of a dense model, if the user knows them."""
    vars(trainer)[_CARD] = TrainerCard(trainer, dense_scores)


class TrainerCard:
    """
    Writes the card at the end of training, and adds to the one that `trainer.create_model_card()` writes.

    Args:
        trainer: whose model is compressed. Its `create_model_card` is replaced.
        dense_scores: of a dense model, if the user knows them.
    """

    def __init__(self, trainer: Trainer, dense_scores: Scores) -> None:
        self.trainer = trainer
        self._dense_scores, self._teacher_scores = dense_scores, dict[str, float]()
        self._head_was_trained = head_was_trained(trainer.model)
        self._run: CompressionRun | None = None
        self._scores_before: dict[str, float] = {}
        self._budget: RankBudget | None = None  # of the run, while its ranks change
        self._settled_step, self._left_step = 0, sys.maxsize
        self._image: bytes | None = None
        self._place: Path | None = None  # of the card that is ours alone, as long as its model is that of the trainer
        trainer.create_model_card = self._adding(trainer.create_model_card)

    def begin(
        self, rankdyna: RankDyna, state: TrainerState, teacher: str | None, teacher_scores: dict[str, float]
    ) -> None:
        """Note the schedule of a run that begins, or goes on, who teaches it, and what the teacher's scores are."""
        self._place = None
        self._teacher_scores = teacher_scores
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
        self._config, self._budget = rankdyna.config, rankdyna.rank_budget

    def train_on(self) -> None:
        """Note that the compacted model is trained on, at the ranks that it has."""
        self._budget, self._settled_step, self._left_step, self._place = None, 0, sys.maxsize, None

    def note_evaluation(self, state: TrainerState, metrics: Mapping[str, Any]) -> None:
        """Note the scores of the model that training is to begin with; those of the saved one, its card is to have."""
        if state.global_step == 0:
            self._scores_before |= evaluated_scores([metrics])
        elif self._run is not None and self._place is not None and is_unchanged(self._place / CARD):
            with never_fatal("add its scores to its card", self._place):
                name = self._place.resolve().name
                card = self._card(self.trainer.model, self._run, self._place, name, **self._sections(self._place))
                write_card(card, self._place, self._image)

    def settle(self, state: TrainerState, station: int = -1) -> None:
        """Note how the run ended, or came to a station, and in its state what its scores are to be compared with."""
        if self._run is None or self._budget is None:
            return
        finished = state.global_step
        schedule = self._budget.schedule.until(station, finished)
        before, source = self.dense_scores()
        self._run = replace(
            self._run,
            config=self._config.at_ratio(self._config.ratios[station]),
            schedule=schedule,
            final_budget=self._budget.finals[station],
            finished_steps=finished,
            scores_before=before,
            scored_before=source,
            training=training_in_words(self.trainer),
        )
        self._settled_step, self._left_step = min(schedule.final_step, finished), finished
        if RUN_KEY in state.stateful_callbacks:
            state.stateful_callbacks[RUN_KEY][DENSE_SCORES] = dict(before)

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
        # Other than a transformer, a model may have written its own card, which knows more of it, when it was saved.
        if isinstance(model, PreTrainedModel) or not _is_of_the_model(card_place(directory)):
            write_card(self._card(model, self._run, directory, directory.resolve().name), directory, image)
            if directory.resolve() == Path(self.trainer.args.output_dir).resolve():
                self._place = directory

    def dense_scores(self) -> tuple[Scores, str]:
        """The scores of a dense model, where such are known by now, and whose they are."""
        if self._dense_scores:
            return self._dense_scores, "dense, as given"
        if self._teacher_scores:
            return self._teacher_scores, "the teacher"
        at_the_start = self._scores_before if self._head_was_trained else {}
        if self._budget is None:
            return at_the_start, "before training"
        scores, step = scores_at_full_rank(self.trainer.state.log_history, self._budget, at_the_start)
        return scores, f"at full rank, at step {step}"

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
                        **self._sections(directory),
                    )
            self._place = None
            write_card(card, directory, self._image)

        return create

    def _sections(self, directory: Path) -> dict[str, Any]:
        """What others have added to the card of a folder."""
        headings = {"curve": CURVE, "speed": SPEED, "text": TEXT} if is_unchanged(directory / CARD) else {}
        return {name: section_of(directory / CARD, heading) for name, heading in headings.items()}

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
        self, model: nn.Module, run: CompressionRun, directory: Path, name: str, **card_arguments: Any
    ) -> ModelCard:
        state, args = self.trainer.state, self.trainer.args
        best_step = state.best_global_step if args.load_best_model_at_end else None
        scores, step = scores_of_saved_model(state.log_history, self._settled_step, self._left_step, best_step)
        return model_card(
            model,
            name,
            model_id=self.trainer.hub_model_id,
            run=replace(
                run,
                scores_after=scores,
                scored_step=step,
                datasets=run.datasets or _listed(dataset_id(self.trainer.train_dataset)),
            ),
            file_bytes=sum(path.stat().st_size for path in directory.glob("model*.safetensors")),
            has_image=self._image is not None,
            has_processing_class=any((directory / name).is_file() for name in PROCESSING_FILES),
            **card_arguments,
        )


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


def training_in_words(trainer: Trainer) -> dict[str, str]:
    """How a `Trainer` has trained: the hyper-parameters that a person would need to do it again."""
    args, state = trainer.args, trainer.state
    batch = f"{args.train_batch_size}"
    for count, unit in ((args.gradient_accumulation_steps, "accumulated steps"), (args.world_size, "processes")):
        batch += f" x {count} {unit}" if count > 1 else ""
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    weights = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    return {
        "learning rate": f"{args.learning_rate:g}, {schedule}",
        "batch": batch,
        "epochs": f"{state.epoch or 0:.4g} ({state.global_step:,} steps)",
        "seed": str(args.seed),
        "precision": f"{weights} with {precision} autocast" if precision else weights,
    }


def _is_of_the_model(card: Path) -> bool:
    return card.exists() and not set(ModelCard.load(card, ignore_metadata_errors=True).data.tags or []) & {*TAGS[:1]}


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else [*(value or [])]
