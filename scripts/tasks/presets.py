"""The paper's hyper-parameters, as data: section 4.2, appendix B and table 5."""

from typing import Any, NamedTuple

EPOCHS = 8.0
LEARNING_RATE = 1e-4
IMPORTANCE_BETA = 0.85


# What the library does otherwise by default: groups of the weights from the first step on, chosen by score alone, at
# each step.
PAPER: dict[str, Any] = {"group_basis": "weights", "block_floor": 0.0, "rank_warmup_steps": 0.05}
PAPER |= {"rank_update_interval": 1}


class Preset(NamedTuple):
    """
    A row of table 5; none where the paper says nothing, and what is the default then holds.

    Attributes:
        batch_size: on one device.
        initial: the optimizer step at which the budget begins to fall.
        final: the optimizer step at which the final budget is reached.
    """

    batch_size: int | None = None
    initial: int | None = None
    final: int | None = None


PRESETS = {
    "conll2003": Preset(16, 500, 2500),
    "cola": Preset(32, 500, 1500),
    "mnli": Preset(32, 5400, 27000),
    "mrpc": Preset(8, 500, 1500),
    "qnli": Preset(32, 2000, 12000),
    "qqp": Preset(32, 5400, 27000),
    "sst2": Preset(16, 500, 1500),
    "stsb": Preset(16, 500, 2500),
    # Tables 2 and 3 have these, table 5 has not.
    "samsum": Preset(),
    "wikitext2": Preset(),
    "ptb": Preset(),
}


def training_options(name: str) -> dict[str, Any]:
    """The `TrainingArguments` of a preset: those of every method, in its first or only round of training."""
    options = {"num_train_epochs": EPOCHS, "learning_rate": LEARNING_RATE}
    batch_size = PRESETS[name].batch_size
    return options if batch_size is None else options | {"per_device_train_batch_size": batch_size}


def rankdyna_options(name: str) -> dict[str, Any]:
    """The fields of `RankDynaConfig` of a preset, but for the cool-down, which depends on the number of steps."""
    initial = PRESETS[name].initial
    warmup = {} if initial is None else {"rank_warmup_steps": float(initial)}
    return PAPER | {"importance_beta": IMPORTANCE_BETA} | warmup
