"""
The rounds of training that a method asks for, and the record of a run, for the scripts of all tasks.

The baselines follow the paper's protocol (section 4.2): fine-tune, factor, fine-tune again. The model of the first
round stays in the folder `fine_tuned` of the output folder; `--num_train_epochs 0` takes such a model as it is.

Each run leaves three files in the output folder, of the same form for all scripts and methods. `settings.yaml` has the
options that `--config` takes to do it again. `results.json`, if the model was evaluated, is the line that is printed
at the end. `run.json` has it all: the arguments, the scores of the fine-tuned, the factored and the final model, both
parameter ratios, the seconds and optimizer steps that led to each model and the bytes that a GPU held meanwhile, what
each compressed layer holds, and what the last round of training logged.
"""

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import set_seed

from rankdyna_trainer import LowRankLinear, RankDynaCallback, RankDynaConfig, baselines
from rankdyna_trainer.baselines.fisher import fisher_information
from rankdyna_trainer.layers.compaction import is_compacted
from rankdyna_trainer.layers.targets import find_targets
from rankdyna_trainer.report.tables import compression_summary, rank_report
from rankdyna_trainer.trainer.training_rows import TrainingRows

from .arguments import BASELINES, Choices
from .fisher_file import fisher_from_file
from .settings import SETTINGS
from .taught_round import TaughtRound


class PresetSchedule(RankDynaCallback):
    """RankDyna whose budget stops falling at a given step, as in table 5: the cool-down is what is left after it."""

    def __init__(self, config: RankDynaConfig, final_step: int, **options: Any) -> None:
        super().__init__(config, **options)
        self.final_step = final_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """The number of steps is known only now."""
        if state.max_steps < self.final_step:
            raise ValueError(
                f"The preset ends the adjusting at step {self.final_step}, but this run has only {state.max_steps} "
                "steps. Give --rank_warmup_steps and --rank_cooldown_steps, or train for longer."
            )
        self.config.rank_cooldown_steps = float(state.max_steps - self.final_step)
        super().on_train_begin(args, state, control, **rest)


class Run:
    """
    The training that the method asks for, and what is to be told of it.

    Args:
        name: of the script.
        choices: from [`parse_args`].
        model: that is trained; of the baselines, in both rounds.
        splits: the rows, prepared.
        scores: which of the metrics are scores of the task, by the ends of their names.
        predict: writes what a `Trainer`'s model predicts for the test rows.
        evaluate: the metrics of a `Trainer`'s model on the validation rows, by default those that it computes.
        trainer_class: what trains the model.
        observe: what else is to be told of the final model in `run.json`; called if it is evaluated or predicts, when
            it is saved, with its card, and not yet pushed.
        options: what else the `Trainer` is made of.
    """

    def __init__(
        self,
        name: str,
        choices: Choices[Any],
        model: Any,
        splits: Mapping[str, Dataset],
        scores: Iterable[str],
        predict: Callable[[Trainer], None],
        evaluate: Callable[[Trainer], dict[str, float]] = lambda trainer: trainer.evaluate(),
        trainer_class: type[Trainer] = Trainer,
        observe: Callable[[Trainer], dict[str, Any]] = lambda trainer: {},
        **options: Any,
    ) -> None:
        self.name = name
        self.script, self.training, self.rankdyna, self.final_step, self.settings = choices
        self.model, self.splits, self.score_names, self.evaluate = model, splits, tuple(scores), evaluate
        self.write_test, self.trainer_class, self.options = predict, trainer_class, options
        self.observe, self.observed = observe, dict[str, Any]()
        self.scores: dict[str, dict[str, float | None]] = {}
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}

    def complete(self) -> None:
        """Train, predict and evaluate, as far as the choices ask for it."""
        trainer = self.train()
        if self.training.do_predict:
            self.write_test(trainer)
        self.finish(trainer)

    def train(self) -> Trainer:
        """Train as the method asks, save the model, and return the `Trainer` that holds it."""
        baseline = self.rankdyna if self.script.method in BASELINES else None
        trainer = self._train_once() if baseline is None else self._fine_tune_factor_fine_tune(baseline)
        if self.training.do_eval or self.training.do_predict:
            self.observed = self.observe(trainer)
        if baseline is None and self.rankdyna is not None and self.training.push_to_hub:
            trainer.push_to_hub()
        return trainer

    def _train_once(self) -> Trainer:
        callbacks: list[TrainerCallback] = []
        if self.rankdyna is not None:
            dense_scores = self.script.dense_scores
            callbacks = [RankDynaCallback(self.rankdyna, dense_scores=dense_scores)]
            if self.final_step is not None:
                callbacks = [PresetSchedule(self.rankdyna, self.final_step, dense_scores=dense_scores)]
        trainer = self.make_trainer(self.training, callbacks)
        if self.training.do_train:
            self._train(trainer, "final")
            if self.rankdyna is None:  # otherwise the callback has saved the compressed model
                trainer.save_model()
        return trainer

    def note(self, stage: str, metrics: Mapping[str, float]) -> None:
        """Keep the scores of the fine-tuned, factored or final model, or of the final one on the test rows."""
        found = {key.partition("_")[2]: metrics[key] for key in metrics if key.endswith(self.score_names)}
        # A constant prediction has no correlation, and JSON has no NaN.
        self.scores[stage] = {key: score if math.isfinite(score) else None for key, score in found.items()}

    def note_test(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Keep, log and save the metrics of the final model on labelled test rows."""
        trainer.log_metrics("test", metrics)
        trainer.save_metrics("test", metrics)
        self.note("test", metrics)

    def predict(self, trainer: Trainer) -> Any:
        """What the final model predicts for the test rows; where they have labels, its metrics are kept."""
        output = trainer.predict(self.splits["test"])
        if "labels" in self.splits["test"].column_names:
            self.note_test(trainer, output.metrics)
        return output

    def write_predictions(self, trainer: Trainer, predictions: Iterable[object], split: str = "test") -> None:
        """A line for each row, which has no line break in it."""
        if trainer.is_world_process_zero():
            lines = [f"{i}\t{prediction}\n" for i, prediction in enumerate(predictions)]
            self._write(f"{split}_predictions.tsv", "index\tprediction\n" + "".join(lines))

    def finish(self, trainer: Trainer) -> None:
        """Evaluate the final model, and write and print what there is to tell."""
        if self.training.do_eval:
            metrics = self.evaluate(trainer)
            trainer.log_metrics("eval", metrics)
            trainer.save_metrics("eval", metrics)
            self.note("final", metrics)
        model: Any = trainer.model
        factored = self.rankdyna or any(isinstance(module, LowRankLinear) for module in model.modules())
        sizes = compression_summary(model) if factored else None
        run = {"task": self.script.task_name, "method": self.script.method}
        run |= {"model": self.script.model_name_or_path, "seed": self.training.seed}
        ratios = {"target_parameter_ratio": sizes.target_ratio if sizes else 1.0}
        ratios |= {"all_parameter_ratio": sizes.all_ratio if sizes else 1.0}
        cost = {"train_seconds": sum(self.seconds.values(), 0.0), "train_steps": sum(self.steps.values())}
        if not trainer.is_world_process_zero():
            return
        if self.training.do_eval:
            results = run | self.scores["final"] | ratios | cost
            self._write("results.json", json.dumps(results) + "\n")
            print(json.dumps(results), flush=True)
        arguments = {"script": asdict(self.script), "training": self.training.to_dict()}
        arguments["rankdyna"] = self.rankdyna.to_dict() if self.rankdyna else None
        layers = json.loads(rank_report(model).to_json(orient="index")) if factored else {}
        details = {"layers": layers, "history": trainer.state.log_history}
        stages: dict[str, Any] = {"scores": self.scores, "seconds": self.seconds, "steps": self.steps}
        stages["peak_bytes"] = self.peak_bytes
        everything = {"script": self.name} | run | ratios | stages | self.observed | {"arguments": arguments} | details
        self._write(SETTINGS, yaml.safe_dump(self.settings, sort_keys=False))
        self._write("run.json", json.dumps(everything, indent=1, default=str) + "\n")

    def make_trainer(self, training: Any, callbacks: list[TrainerCallback]) -> Trainer:
        """A `Trainer` of the model, the rows, and what else the task has."""
        train, validation = self.splits.get("train"), self.splits.get("validation")
        options = {"train_dataset": train, "eval_dataset": validation, "callbacks": callbacks, **self.options}
        return self.trainer_class(model=self.model, args=training, **options)

    def _fine_tune_factor_fine_tune(self, config: RankDynaConfig) -> Trainer:
        first, second = copy.copy(self.training), copy.copy(self.training)
        second.num_train_epochs, second.max_steps = self.script.second_round_epochs, -1
        has_first_round = first.num_train_epochs > 0 or first.max_steps > 0
        if has_first_round:
            first.output_dir, first.push_to_hub = str(Path(self.training.output_dir) / "fine_tuned"), False

        trainer, model = self.make_trainer(first, []), self.model
        # What cannot be factored is refused before the first round.
        if is_compacted(model):
            raise ValueError(
                f"{self.script.model_name_or_path} is compressed already, and --method {self.script.method} factors a "
                "dense model: give the model that it was made of, or use --method none to fine-tune this one."
            )
        find_targets(model, config)
        if has_first_round:
            self._train(trainer, "fine_tuned")
            trainer.save_model()
        if first.do_eval:
            self.note("fine_tuned", self.evaluate(trainer))
        rows, collate, accelerator = trainer.train_dataset, trainer.data_collator, trainer.accelerator
        # Without the wrapper for mixed precision: what the baselines ask of the data is estimated in float32.
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        del trainer  # and with it the optimizer's state
        accelerator.free_memory()

        taught = TaughtRound(model, config)
        start = time.perf_counter()
        set_seed(self.training.seed)
        batches: DataLoader[Any] = DataLoader(rows, batch_size=first.train_batch_size, collate_fn=collate)
        with self._peak_noted("factored"):
            self._factor(config, rows, batches)
        self.seconds["factored"] = time.perf_counter() - start

        trainer = self.make_trainer(second, [taught])
        if second.do_eval:
            self.note("factored", self.evaluate(trainer))
        if second.num_train_epochs > 0:
            set_seed(self.training.seed)
            self._train(trainer, "final")
        trainer.save_model()
        return trainer

    def _factor(self, config: RankDynaConfig, rows: Any, batches: DataLoader[Any]) -> None:
        if self.script.method == "svd":
            baselines.svd(self.model, config)
        elif self.script.method == "whitened":
            baselines.whitened_svd(self.model, config, TrainingRows(batches), config.rank_scope)
        else:
            factor = getattr(baselines, self.script.method)
            factor(self.model, config, self._fisher(self.model, config, rows, batches))

    def _fisher(self, model: Any, config: RankDynaConfig, rows: Any, batches: DataLoader[Any]) -> Any:
        """The batches, or the Fisher information of a file."""
        if self.script.fisher_file is None:
            return batches
        layers = find_targets(model, config)
        estimate = partial(fisher_information, model, layers, batches)
        return fisher_from_file(Path(self.script.fisher_file), layers, rows, estimate)

    @contextmanager
    def _peak_noted(self, stage: str) -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        yield
        if torch.cuda.is_available():
            self.peak_bytes[stage] = torch.cuda.max_memory_allocated()

    def _train(self, trainer: Trainer, stage: str) -> None:
        with self._peak_noted(stage):
            metrics = trainer.train(resume_from_checkpoint=self.training.resume_from_checkpoint).metrics
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        self.seconds[stage], self.steps[stage] = metrics["train_runtime"], trainer.state.global_step

    def _write(self, name: str, text: str) -> None:
        """At once: who finds the file finds all of it."""
        path = Path(str(self.training.output_dir)) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
