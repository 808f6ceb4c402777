"""What is run: the models, rows, epochs, ratios and seeds of each scale."""

from dataclasses import dataclass, field
from typing import Any

import torch
from tasks.presets import PRESETS
from transformers import TrainingArguments

Options = dict[str, Any]

# The same in transformers 4 and 5.
BY_LENGTH: Options = (
    {"group_by_length": True}
    if hasattr(TrainingArguments, "group_by_length")
    else {"train_sampling_strategy": "group_by_length"}
)


# Where there is no GPU a Trainer has to be told so, or it refuses half precision.
ON_CPU: Options = {} if torch.cuda.is_available() else {"use_cpu": True}


@dataclass(frozen=True)
class Task:
    """
    A task and the options of its script.

    Attributes:
        script: which runs it.
        role: which of a scale's models it takes.
        metrics: of the script, whose mean is the paper's score (appendix A.1).
        options: of the script, for every method.
        first_round: further options for the only round, or the first one of a baseline.
        second_round_epochs: of a baseline, after factoring.
    """

    script: str
    role: str
    metrics: tuple[str, ...]
    options: Options = field(default_factory=dict)
    first_round: Options = field(default_factory=dict)
    second_round_epochs: float = 3.0


@dataclass(frozen=True)
class Scale:
    """
    Attributes:
        models: by role, names on the Hub; `None` where a model has to be made and given.
        tasks: by name.
        common: options of every run.
        ratios: the rank ratios of table 1.
        seeds: of table 1 and of its figures; the other tables have the first one.
        table1: its tasks.
        table1_once: tasks that table 1 has with one ratio and one seed.
        ratio: the rank ratio of those, and of tables 2 and 3.
        table2: its tasks.
        table3: its tasks.
        table4: its tasks.
        heatmaps: by figure, the task whose ranks it shows.
        heatmap_ratios: the two rank ratios of each.
        ablation: the task of figures 1 and 2.
        selection: the task of figure 4.
        study_steps: how many optimizer steps figure 1 has.
        removal_step: at which of them groups are removed.
        table4_steps: how many steps table 4 averages over.
        parts: the tasks of the ablation of the parts of the method.
        parts_options: what its runs have beside the options of the tasks, by task.
        frontier: the tasks of the table of all methods by size.
        frontier_options: likewise.
        frontier_ratios: its sizes, as parts of the target layers' parameters.
        stations: the tasks of the table of several sizes from one run, with the options of `parts_options`.
        stations_ratios: its sizes, likewise.
        frontier_seeds: of how many seeds it has the sizes other than the middle one.
        geometry: the tasks of the table of candidates beside the defaults, with the options of `frontier_options`.
        decoder: the tasks of the table of a pre-trained language model by size.
        decoder_options: likewise.
        decoder_ratios: its sizes, likewise.
    """

    models: dict[str, str | None]
    tasks: dict[str, Task]
    common: Options
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    table1: tuple[str, ...]
    table2: tuple[str, ...]
    table3: tuple[str, ...]
    table4: tuple[str, ...]
    heatmaps: dict[str, str]
    heatmap_ratios: tuple[float, float]
    ablation: str
    selection: str
    table1_once: tuple[str, ...] = ()
    ratio: float = 0.2
    study_steps: int = 1200
    removal_step: int = 200
    table4_steps: int = 100
    parts: tuple[str, ...] = ()
    parts_options: dict[str, Options] = field(default_factory=dict)
    frontier: tuple[str, ...] = ()
    frontier_options: dict[str, Options] = field(default_factory=dict)
    frontier_ratios: tuple[float, ...] = (0.30, 0.15, 0.08)
    frontier_seeds: int = 1 if ON_CPU else 3
    stations: tuple[str, ...] = ()
    stations_ratios: tuple[float, ...] = (0.5, 0.3, 0.15, 0.08)
    geometry: tuple[str, ...] = ()
    decoder: tuple[str, ...] = ()
    decoder_options: dict[str, Options] = field(default_factory=dict)
    decoder_ratios: tuple[float, ...] = (0.8, 0.6, 0.4)

    @property
    def stations_options(self) -> dict[str, Options]:
        """Those of the parts."""
        return self.parts_options

    @property
    def geometry_options(self) -> dict[str, Options]:
        """Those of the frontier."""
        return self.frontier_options


GLUE_METRICS = {
    "cola": ("matthews_correlation",),
    "mnli": ("accuracy", "mm_accuracy"),
    "mrpc": ("f1",),
    "qnli": ("accuracy",),
    "qqp": ("f1",),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearmanr"),
}
METRICS = {"run_ner": ("f1",), "run_summarization": ("rouge1", "rouge2", "rougel"), "run_clm": ("perplexity",)}
SCRIPTS = {
    "conll2003": ("run_ner", "encoder"),
    "wnut17": ("run_ner", "tagger"),
    "samsum": ("run_summarization", "encoder_decoder"),
    "wikitext2": ("run_clm", "decoder"),
    "ptb": ("run_clm", "decoder"),
}


def _task(name: str, options: Options, first_round: Options, second: float) -> Task:
    script, role = SCRIPTS.get(name, ("run_glue", "encoder"))
    metrics = GLUE_METRICS[name] if script == "run_glue" else METRICS[script]
    return Task(script, role, metrics, {"task_name": name} | options, first_round, second)


def _paper() -> Scale:
    """The paper's own set-up: section 4, appendices A and B."""
    tasks = {name: _task(name, {"preset": name}, {}, 3.0) for name in PRESETS}
    glue = ("cola", "mnli", "mrpc", "qnli", "qqp", "sst2", "stsb")
    return Scale(
        models={
            "encoder": "google-bert/bert-base-uncased",
            "encoder_decoder": "facebook/bart-base",
            "decoder": "openai-community/gpt2",
        },
        tasks=tasks,
        # Checkpoints, so that a run of hours which is stopped goes on where it was.
        common={"save_strategy": "epoch", "save_total_limit": 1, "logging_steps": 50},
        # Table 1 has numbers of parameters. Its text says that 13.9M and 6.4M are the rank ratios 0.1 and 0.05; the
        # other two follow from them: 26.6M and 43.1M are left at 0.2 and 0.33.
        ratios=(0.33, 0.2, 0.1, 0.05),
        seeds=(42,),
        table1=("conll2003", *glue),
        table2=("samsum",),
        table3=("wikitext2", "ptb"),
        table4=("conll2003", "cola", "mrpc", "qnli", "sst2", "stsb"),
        heatmaps={"figure3": "mnli", "figure6": "qnli", "figure7": "qqp", "figure8": "stsb"},
        heatmap_ratios=(0.1, 0.05),
        ablation="stsb",
        selection="qnli",
    )


def _small() -> Scale:
    """A few hours of two CPU cores, or some minutes of a GPU, with small pre-trained encoders."""
    rounds = {"num_train_epochs": 3}
    training = {"learning_rate": 2e-4, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64}
    text = training | BY_LENGTH | {"max_seq_length": 64}
    # Rows in their shuffled order: batches of like lengths, one after the other, hold a model of STS-B back.
    shuffled: Options = dict.fromkeys(BY_LENGTH) | {"bf16": True}
    whole: dict[str, Options] = {
        "stsb": shuffled | {"max_train_samples": None, "max_seq_length": 48},
        "sst2": shuffled | {"max_train_samples": 8000, "max_seq_length": 32},
    }
    return Scale(
        models={
            "encoder": "sentence-transformers/paraphrase-MiniLM-L3-v2",
            "tagger": "sentence-transformers/all-MiniLM-L6-v2",
            "encoder_decoder": None,
            "decoder": None,
        },
        tasks={
            "sst2": _task("sst2", text | {"max_train_samples": 4000}, rounds, 1.0),
            "rte": _task("rte", text, rounds, 1.0),
            "stsb": _task("stsb", text | {"max_train_samples": 3000}, rounds, 1.0),
            "wnut17": _task("wnut17", text | {"per_device_train_batch_size": 16}, rounds, 1.0),
            "samsum": _task(
                "samsum",
                training
                | {"max_train_samples": 1600, "max_eval_samples": 100, "per_device_train_batch_size": 8}
                | {"max_source_length": 96, "max_target_length": 32, "learning_rate": 1e-3},
                {"num_train_epochs": 1},
                0.375,
            ),
            "wikitext2": _task(
                "wikitext2",
                training
                | {"max_train_samples": 2500, "max_eval_samples": 500, "per_device_train_batch_size": 8}
                | {"block_size": 128, "learning_rate": 5e-4},
                {"num_train_epochs": 1},
                0.375,
            ),
        },
        common={"save_strategy": "no", "logging_steps": 10} | ON_CPU,
        ratios=(0.2, 0.1, 0.05),
        seeds=(0, 1, 2),
        table1=("sst2", "stsb", "rte"),
        table1_once=("wnut17",),
        table2=("samsum",),
        table3=("wikitext2",),
        table4=("sst2", "rte", "stsb"),
        heatmaps={"figure3": "sst2", "figure6": "rte", "figure7": "wnut17", "figure8": "stsb"},
        heatmap_ratios=(0.2, 0.05),
        ablation="sst2",
        selection="sst2",
        study_steps=200,
        removal_step=60,
        table4_steps=50,
        parts=("stsb", "sst2"),
        stations=("stsb", "sst2"),
        parts_options=whole | {"sst2": whole["sst2"] | {"learning_rate": 1e-4}},
        frontier=("sst2", "stsb", "wnut17", "rte"),
        frontier_options=whole | {"wnut17": {"bf16": True}, "rte": {"bf16": True}},
        geometry=("stsb", "wnut17"),
        decoder=("wikitext2",),
        # Of SmolLM2-135M 304 steps of 2,048 tokens, and 20,480 tokens to read.
        decoder_options={
            "wikitext2": {"max_train_samples": 9000, "max_eval_samples": 250, "block_size": 256, "bf16": True}
            | {"per_device_eval_batch_size": 8, "learning_rate": 2e-4}
        },
    )


def _tiny() -> Scale:
    """A minute, to see that all of it runs."""
    training = {"learning_rate": 1e-2, "per_device_train_batch_size": 8}
    few = training | {"max_train_samples": 32, "max_eval_samples": 16}
    names = ("sst2", "wnut17", "samsum", "wikitext2")
    sizes = {"samsum": {"max_target_length": 8}, "wikitext2": {"block_size": 16}}
    return Scale(
        models={
            "encoder": "hf-internal-testing/tiny-random-BertModel",
            "tagger": "hf-internal-testing/tiny-random-BertModel",
            "encoder_decoder": "hf-internal-testing/tiny-random-BartForConditionalGeneration",
            "decoder": "hf-internal-testing/tiny-random-GPT2LMHeadModel",
        },
        tasks={name: _task(name, few | sizes.get(name, {}), {"num_train_epochs": 2}, 1.0) for name in names},
        common={"save_strategy": "no", "logging_steps": 1, "use_cpu": True},
        ratios=(0.5, 0.25),
        seeds=(0, 1),
        table1=("sst2",),
        table1_once=("wnut17",),
        table2=("samsum",),
        table3=("wikitext2",),
        table4=("sst2",),
        heatmaps={"figure3": "sst2", "figure6": "sst2", "figure7": "wnut17", "figure8": "sst2"},
        heatmap_ratios=(0.5, 0.25),
        ablation="sst2",
        selection="sst2",
        study_steps=6,
        removal_step=2,
        table4_steps=2,
        parts=("sst2",),
        frontier=("sst2",),
        frontier_ratios=(0.7, 0.5),
        stations=("sst2",),
        stations_ratios=(0.7, 0.5),
        geometry=("sst2",),
        decoder=("wikitext2",),
        decoder_ratios=(0.7, 0.5),
    )


SCALES = {"tiny": _tiny(), "small": _small(), "paper": _paper()}
