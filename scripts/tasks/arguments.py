"""The options that the scripts of the tasks share: of data, method and preset."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from transformers import TrainingArguments
from transformers.hf_argparser import HfArgumentParser

from rankdyna_trainer import RankDynaConfig

from .presets import PRESETS, rankdyna_options, training_options
from .settings import effective, with_file

BASELINES = ("svd", "fwsvd", "tfwsvd", "whitened")
FIRST_ROUND_EPOCHS = 8.0  # of a baseline
# The choices that a model which is factored all at once has no use for.
ONLY_RANKDYNA = {field.name for field in fields(RankDynaConfig) if field.name.startswith(("rank_", "importance_"))}
ONLY_RANKDYNA |= {"block_floor", "keep_score", "group_basis", "fixed_shapes", "self_contained", "start_ratio"}
ONLY_RANKDYNA -= {"rank_ratio", "rank_multiple_of"}
# But one of them has, if its layers are to share a budget.
SHARED_BUDGET = {"rank_scope", "block_floor"}


@dataclass
class TaskArguments:
    """The options that all tasks have."""

    # For messages: what gives data, and what gives those of one split.
    sources: ClassVar[str] = (
        "--task_name for a task of the Hub, --dataset_name for another set of the Hub, or --train_file, "
        "--validation_file"
    )
    split_source: ClassVar[str] = "--{split}_file"

    model_name_or_path: str = field(metadata={"help": "A model of the Hub, or a local folder."})
    method: Literal["none", "svd", "fwsvd", "tfwsvd", "whitened", "rankdyna"] = field(
        default="rankdyna",
        metadata={"help": "none only fine-tunes; svd, fwsvd, tfwsvd, whitened fine-tune, factor, fine-tune again."},
    )
    preset: str | None = field(
        default=None,
        metadata={"choices": list(PRESETS), "help": "Hyper-parameters of the paper; options that are given win."},
    )
    second_round_epochs: float = field(
        default=3.0, metadata={"help": "Epochs after factoring; those before are --num_train_epochs, by default 8."}
    )
    fisher_file: str | None = field(
        default=None,
        metadata={"help": "Keep the Fisher information for fwsvd and tfwsvd in this file, or take it from there."},
    )
    dense_score: list[str] | None = field(
        default=None, metadata={"help": "For the card: scores of a dense model, such as accuracy=0.86."}
    )
    task_name: str | None = field(default=None, metadata={"help": "A task by its name."})
    dataset_name: str | None = field(default=None, metadata={"help": "Another set of the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which configuration of it."})
    train_file: str | None = field(default=None, metadata={"help": "A .jsonl, .json or .csv file."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise."})
    test_file: str | None = field(default=None, metadata={"help": "Likewise, for --do_predict."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first N rows."})
    tiny: bool = field(
        default=False,
        metadata={"help": "Show it all with a tiny model and task that are made for it: no others needed."},
    )

    def __post_init__(self) -> None:
        self.files = self.local_files()
        if self.task_name is None and self.dataset_name is None and not self.files:
            raise ValueError(f"No data: give {self.sources}.")
        if self.dataset_name is not None and self.files:
            raise ValueError(
                f"--dataset_name {self.dataset_name} is on the Hub, and {', '.join(self.files.values())} is here: "
                "give only one of them."
            )
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError(
                f"--dataset_config_name {self.dataset_config_name} needs --dataset_name: of which set is it?"
            )
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type in (int, int | None) and not isinstance(value, bool) and value is not None and value < 1:
                raise ValueError(f"--{entry.name} must be at least 1: got {value}.")
        self.dense_scores = dict(_named_score(word) for word in self.dense_score or [])
        if not 0 <= self.second_round_epochs < math.inf:
            raise ValueError(f"--second_round_epochs must be at least 0: got {self.second_round_epochs}.")

    def local_files(self) -> dict[str, str]:
        """The files that are given, by split."""
        given = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in given.items() if path is not None}

    def source(self, split: str) -> str:
        """Where the rows of a split come from, for messages."""
        return self.files.get(split, f"{self.dataset_name or self.task_name} ({split})")


def _named_score(word: str) -> tuple[str, float]:
    name, _, score = word.partition("=")
    try:
        return name, float(score)
    except ValueError as error:
        raise ValueError(f"--dense_score takes a name and a number, such as accuracy=0.86: got {word}.") from error


Script = TypeVar("Script", bound=TaskArguments)


class Choices(NamedTuple, Generic[Script]):
    """
    All that was chosen; no `rankdyna` for `--method none`, `final_step` only if a preset has one. `settings` are those
    options that have not their defaults, by name.
    """

    script: Script
    training: Any
    rankdyna: RankDynaConfig | None
    final_step: int | None
    settings: dict[str, Any]


def parse_args(
    args: list[str] | None,
    script_class: type[Script],
    training_class: type[TrainingArguments] = TrainingArguments,
    **defaults: Any,
) -> Choices[Script]:
    """
    The choices on the command line, over those of the file that `--config` names, over those of the preset, over the
    defaults: those of the script come first.
    """
    types: Any = (script_class, training_class, RankDynaConfig)
    usage = "%(prog)s --model_name_or_path MODEL --output_dir DIR [options]"
    parser = HfArgumentParser(types, usage=usage, allow_abbrev=False)
    parser.add_argument("--config", help="A YAML or JSON file of options; those on the command line win.")
    args = with_file(args, parser)
    chosen = parser.parse_args(args)
    method, preset = chosen.method, chosen.preset
    # What is on by default has a second action, which turns it off: the first one has the default.
    actions = reversed(parser._actions)
    plain = {action.dest: getattr(action.default, "value", action.default) for action in actions}
    left_out = object()
    parser.set_defaults(**dict.fromkeys(vars(chosen), left_out))
    given = {name for name, value in vars(parser.parse_args(args)).items() if value is not left_out}
    if not chosen.do_train and (method != "none" or not (chosen.do_eval or chosen.do_predict)):
        parser.error("nothing to do: give --do_train, or --method none with --do_eval or --do_predict")
    useful = SHARED_BUDGET if method == "whitened" else set()
    if method in BASELINES and (useless := sorted(given & ONLY_RANKDYNA - useful)):
        parser.error(f"--method {method} factors at once: drop --{', --'.join(useless)}, or use --method rankdyna")
    if method in BASELINES and "resume_from_checkpoint" in given:
        parser.error(
            f"--method {method} cannot be resumed: fine-tune with --method none, which can, and give its output_dir "
            "as --model_name_or_path with --num_train_epochs 0"
        )
    if method not in BASELINES and "second_round_epochs" in given:
        parser.error(f"--method {method} has one round: drop --second_round_epochs, or use {', '.join(BASELINES)}")

    if method not in ("fwsvd", "tfwsvd") and "fisher_file" in given:
        parser.error(f"--method {method} needs no Fisher information: drop --fisher_file, or use fwsvd or tfwsvd")

    # A RankDynaConfig cannot be made without a ratio, and a plain run has none.
    used: Any = HfArgumentParser(types if method != "none" else types[:2], allow_abbrev=False)
    used.set_defaults(**defaults)
    if method in BASELINES:
        used.set_defaults(num_train_epochs=FIRST_ROUND_EPOCHS)
    if method == "whitened":
        used.set_defaults(rank_scope="local")
    if preset is not None:
        used.set_defaults(**training_options(preset), **(rankdyna_options(preset) if method == "rankdyna" else {}))
    script, training, *rankdyna, unused = used.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if unused:
        parser.error(f"--method none does not compress: drop {' '.join(unused)}, or use --method rankdyna")
    settings = effective(used, args, plain)
    own_cooldown = method != "rankdyna" or preset is None or "rank_cooldown_steps" in given
    final_step = None if own_cooldown else PRESETS[preset].final
    return Choices(script, training, rankdyna[0] if rankdyna else None, final_step, settings)
