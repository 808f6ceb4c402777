"""Short runs of a `Trainer` that stop in the middle of a compression."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from rankdyna_trainer import RankDynaCallback, RankDynaConfig

STEPS, STOP = 10, 4
CONFIG = RankDynaConfig(rank_ratio=0.2, rank_warmup_steps=1, rank_cooldown_steps=3)


class SequentialTrainer(Trainer):
    """Takes the rows in their order, which no training argument asks for in transformers 4."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(train_dataset or self.train_dataset)


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == STOP


class Interrupt(TrainerCallback):
    """Presses Ctrl-C at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Folders(NamedTuple):
    """The forms of one classifier on disk, each with its tokenizer."""

    dense: Path
    compacted: Path
    training: Path
    run: Path


def rows_for(model: PreTrainedModel, count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Random tokens, with what the model learns of them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, model.config.get_text_config().vocab_size, (count, 8), generator=generator)
    classes = type(model).__name__.endswith("ForSequenceClassification")
    labels = tokens[:, 0] % 2 if classes else tokens
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def stopped_run(
    model: PreTrainedModel, folder: Path, config: RankDynaConfig = CONFIG, tokenizer: Any = None
) -> tuple[Path, Path]:
    """
    A run that is stopped in the middle of the compression.

    Returns:
        The checkpoint of this step, and the output folder, into which the run has compacted its model at this step.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        optim="adamw_torch",
    )
    callbacks = [RankDynaCallback(config), _Stop()]
    Trainer(model, arguments, train_dataset=rows_for(model), callbacks=callbacks, processing_class=tokenizer).train()
    return folder / f"checkpoint-{STOP}", folder
