"""What the user chooses, checked when it is chosen."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from .config_file import SavedConfig
from .options import (
    AUTO,
    NumberOrWord,
    check_choice,
    check_count,
    check_phases,
    check_switch,
    falling_parts,
    module_patterns,
    number,
    shown,
    start_part,
    steps,
)

ImportanceScore = Literal["first_order", "second_order", "fisher"]
RankScope = Literal["global", "local"]
GroupBasis = Literal["weights", "activations"]
if TYPE_CHECKING:
    Ratios = float | list[float]
else:
    Ratios = list[float]  # HfArgumentParser knows one type for each option


@dataclass
class RankDynaConfig(SavedConfig):
    """
    The choices of a RankDyna run (Hua et al., Findings of EMNLP 2023).

    Every field is also an option of a command line through `HfArgumentParser((TrainingArguments, RankDynaConfig))`.

    Args:
        > Parameters that control how small the model becomes: exactly one of the two

        rank_ratio (`float` or `list[float]`, *optional*):
            `c` of eq. 4, in (0, 1]: the part of all singular groups that remains at the end, `ceil(c * R(0))`. A
            falling list has the run stop at each: the model of that size is saved in a folder of the `output_dir`,
            such as `rank_ratio-0.5`, and the last one in the `output_dir` itself.
        param_ratio (`float` or `list[float]`, *optional*):
            In (0, 1]: the part of the target layers' weights (in numbers, not in groups) that remains at the end, at
            most. Groups are then ranked by importance per number that they hold, `out_features + in_features`. Or a
            falling list, likewise.
        keep_score (`float`, *optional*):
            In (0, 1]: the part of the dense model's score to keep. The run goes down the list until an evaluation at
            one of its sizes falls below, and ends with the smallest model that held. The score is
            `metric_for_best_model`; that of the dense model the one given to the callback, or the teacher's, or
            measured when the warm-up ends.

        rank_multiple_of (`int`, *optional*, defaults to 1):
            Each layer keeps a multiple of so many groups, within the budget, from the first removal on: tensor cores
            want 8 or 16.
        start_ratio (`float`, *optional*):
            In (0, 1]: each layer begins with the best of its groups, as many as hold at most this part of its
            parameters: in the metric of `group_basis`, at once in closed form. With 1.0 the run takes no more memory
            than dense training; all groups, the default, hold up to twice as many numbers. The other ratios stay parts
            of the dense model.

        > Parameters that control which layers are compressed, as in peft

        target_modules (`str` or `list[str]`, *optional*):
            A list of name endings, or one regular expression for the whole name, or `"all-linear"` (all linear layers
            but the output layer). Default: the linear layers of the repeated transformer blocks.
        exclude_modules (`str` or `list[str]`, *optional*):
            A list of name endings, or one regular expression: layers to leave alone in any case.

        > Parameters that control when groups are removed

        rank_warmup_steps (`float` or `str`, *optional*, defaults to `"auto"`):
            `t0` of eq. 12, the optimizer steps before the first removal: a whole number, or a part of all steps when
            in (0, 1). `"auto"`: until the training loss has fallen and flattened, at most half of all steps; that of a
            model which came with all of its weights, head included, need only be flat.
        rank_cooldown_steps (`float`, *optional*, defaults to 0.6):
            `t1` of eq. 12, the last optimizer steps, which run at the final budget: likewise. With
            `rank_warmup_steps="auto"` a part is one of the steps after the warm-up.
        rank_update_interval (`int`, *optional*):
            Enforce the budget every so many optimizer steps, and when the final one is due. By default 10, in a short
            run fewer; the paper has 1.

        > Parameters that control which groups are removed

        importance_score (`str`, *optional*, defaults to `"first_order"`):
            The score of one number: `"first_order"` or `"second_order"` (eq. 10), or `"fisher"` (eq. 13). See
            [`~rankdyna_trainer.method.importance.step_scores`].
        importance_beta (`float`, *optional*, defaults to 0.85):
            `beta` of eq. 11, in [0, 1): the weight of the past in the smoothed score.
        rank_scope (`str`, *optional*, defaults to `"global"`):
            `"global"`: all groups of the model compete; `"local"`: the same ratio in each matrix (section 4.5.1).
        block_floor (`float`, *optional*, defaults to 0.25):
            In [0, 1]: the part of its equal share that each transformer block keeps at least, where all groups of the
            model compete, so that none of them is emptied; 0 in the paper.

        > Parameters that control a teacher

        teacher (`str`, *optional*):
            A model of the same architecture and sizes, fine-tuned on the same task: a folder, or a name on the Hub.
            The loss is then `(1 - teacher_weight)` of the model's own, and what follows. A model can be given to the
            [`RankDynaCallback`] instead.
        teacher_weight (`float`, *optional*, defaults to 0.5):
            In [0, 1]: the weight of the teacher's logits.
        teacher_temperature (`float`, *optional*, defaults to 2.0):
            By which the logits of both are divided.
        hidden_weight (`float`, *optional*, defaults to 1.0):
            The weight of the hidden states after each block: of their squared error, relative to the mean square of
            the teacher's.

        > Parameters that control what others may hold of the model

        fixed_shapes (`bool`, *optional*, defaults to `False`):
            Whether tensors keep their names and shapes from the `Trainer`'s constructor until the model is compacted,
            for averages (EMA, SWA) and lists of parameters that are kept: removed groups stay in them, as zeros. The
            groups are then those of the weights, or of a model that was injected before.

        > Parameters that control what is saved

        self_contained (`bool`, *optional*, defaults to `True`):
            Whether checkpoints bring code that loads them with `trust_remote_code=True`, as [`make_self_contained`]
            lets them. A model of a class that is not in `transformers` is saved without.

        > Parameters that control the one-time factorization

        group_basis (`str`, *optional*):
            `"weights"`: the groups are those of the SVD of each weight, as in the paper, from the first step on.
            `"activations"`: those of the weight in the metric of the layer's inputs on 512 rows of the training set,
            which are better where the data leaves most directions empty. Where one process trains the model, its
            layers stay dense until near the end of the warm-up, and are factored then. Default: `"activations"` where
            there are such rows, which a `Trainer` has, and a loop of one's own gives; else `"weights"`.
        factorization_cache (`str`, *optional*):
            A folder that keeps the singular value decompositions of base models, shared by all tasks, also by those
            that run at once. It holds 20 GB, or what the environment variable `RANKDYNA_CACHE_SIZE_GB` says; files
            that were not used for longest make room.

    Raises:
        ValueError: a value is out of range, or not exactly one of `rank_ratio` and `param_ratio` is given.
        TypeError: a value is of the wrong type.
    """

    rank_ratio: Ratios | None = field(
        default=None,
        metadata={"help": "The part of all singular groups to keep, in (0, 1], or several, of which each is saved."},
    )
    param_ratio: Ratios | None = field(
        default=None,
        metadata={"help": "Instead: the part of the target layers' parameters to keep, or several, falling."},
    )
    keep_score: float | None = field(
        default=None,
        metadata={"help": "End with the smallest of several sizes that keeps this part of the dense model's score."},
    )
    rank_multiple_of: int = field(
        default=1, metadata={"help": "Each layer keeps a multiple of so many groups, such as 8 for tensor cores."}
    )
    start_ratio: float | None = field(
        default=None, metadata={"help": "Begin with the groups that hold at most this part of each layer's parameters."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name endings, one regular expression, or 'all-linear'. Default: the blocks.", "nargs": "+"},
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name endings, or one regular expression, of layers to leave alone.", "nargs": "+"},
    )
    rank_warmup_steps: float | str = field(
        default=AUTO,
        metadata={
            "help": "Steps, or the part of all steps, before the first removal, or 'auto': until the loss is flat.",
            "action": NumberOrWord,
        },
    )
    rank_cooldown_steps: float = field(
        default=0.6, metadata={"help": "How many last steps, or which part of all steps, run at the final budget."}
    )
    importance_beta: float = field(default=0.85, metadata={"help": "The weight of the past in the smoothed score."})
    importance_score: ImportanceScore = field(default="first_order", metadata={"help": "The score of one number."})
    rank_scope: RankScope = field(
        default="global", metadata={"help": "Whether groups compete in the whole model or in each matrix."}
    )
    block_floor: float = field(
        default=0.25, metadata={"help": "The part of its equal share that each block keeps at least, in [0, 1]."}
    )
    rank_update_interval: int | None = field(
        default=None, metadata={"help": "Enforce the budget every so many optimizer steps, by default at most 10."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "A fine-tuned model of the same sizes whose outputs are learnt as well."}
    )
    teacher_weight: float = field(default=0.5, metadata={"help": "The weight of the teacher's logits in the loss."})
    teacher_temperature: float = field(default=2.0, metadata={"help": "By which the logits are divided."})
    hidden_weight: float = field(default=1.0, metadata={"help": "The weight of the teacher's hidden states."})
    group_basis: GroupBasis | None = field(
        default=None, metadata={"help": "Groups of each weight, or (the default) of what it does to its inputs."}
    )
    fixed_shapes: bool = field(
        default=False, metadata={"help": "Whether tensors keep their shapes until the end, for averages of the model."}
    )
    self_contained: bool = field(default=True, metadata={"help": "Whether checkpoints bring code that loads them."})
    factorization_cache: str | None = field(
        default=None, metadata={"help": "A folder for the factorization of base models, shared by all tasks."}
    )

    def __post_init__(self) -> None:
        if (self.rank_ratio is None) == (self.param_ratio is None):
            raise ValueError(
                f"Give exactly one of rank_ratio and param_ratio: got rank_ratio={shown(self.rank_ratio)} and "
                f"param_ratio={shown(self.param_ratio)}. rank_ratio=0.2 keeps a fifth of the singular groups, "
                "param_ratio=0.2 a fifth of the target layers' parameters."
            )
        setattr(self, self.ratio_name, falling_parts(self.ratio_name, getattr(self, self.ratio_name)))
        if self.start_ratio is not None:
            self.start_ratio = start_part(self.start_ratio, self.ratio_name, self.ratios[0])
        self._check_keep_score()
        self._check_schedule()
        self.block_floor = number("block_floor", self.block_floor)
        if not 0 <= self.block_floor <= 1:
            raise ValueError(f"block_floor, a part of an equal share, must be in [0, 1]: got {self.block_floor}.")
        self.importance_beta = number("importance_beta", self.importance_beta)
        if not 0 <= self.importance_beta < 1:
            raise ValueError(f"importance_beta must be in [0, 1): got {self.importance_beta}.")
        for name, choices in (
            ("importance_score", get_args(ImportanceScore)),
            ("rank_scope", get_args(RankScope)),
            ("group_basis", (*get_args(GroupBasis), None)),
        ):
            check_choice(name, getattr(self, name), choices)
        interval = {} if self.rank_update_interval is None else {"rank_update_interval": self.rank_update_interval}
        for name, count in (interval | {"rank_multiple_of": self.rank_multiple_of}).items():
            check_count(name, count)
        self._check_teacher()
        for name in ("fixed_shapes", "self_contained"):
            check_switch(name, getattr(self, name))
        cache = self.factorization_cache
        if cache is not None and not isinstance(cache, str):
            raise TypeError(f"factorization_cache must be a folder's path as str: got {shown(cache)}.")
        self.target_modules = module_patterns("target_modules", self.target_modules)
        self.exclude_modules = module_patterns("exclude_modules", self.exclude_modules)

    def _check_schedule(self) -> None:
        if isinstance(self.rank_warmup_steps, str) and self.rank_warmup_steps != AUTO:
            raise ValueError(
                f'rank_warmup_steps must be a number of steps, a part of all steps in (0, 1), or "{AUTO}": got '
                f"{shown(self.rank_warmup_steps)}."
            )
        if not isinstance(self.rank_warmup_steps, str):
            self.rank_warmup_steps = steps("rank_warmup_steps", self.rank_warmup_steps)
        self.rank_cooldown_steps = steps("rank_cooldown_steps", self.rank_cooldown_steps)
        check_phases(self.rank_warmup_steps, self.rank_cooldown_steps)

    def _check_keep_score(self) -> None:
        if self.keep_score is None:
            return
        self.keep_score = number("keep_score", self.keep_score)
        if not 0 < self.keep_score <= 1:
            raise ValueError(f"keep_score is a part of the dense score and must be in (0, 1]: got {self.keep_score}.")
        if len(self.ratios) == 1:
            raise ValueError(
                f"keep_score={self.keep_score} chooses among several sizes: give {self.ratio_name} as a falling list, "
                f"such as [0.5, 0.3, 0.2, 0.1] (got {self.ratios[0]})."
            )

    def _check_teacher(self) -> None:
        if self.teacher is not None and (not isinstance(self.teacher, str) or not self.teacher):
            raise TypeError(
                f"teacher must be a folder or the name of a Hub repository as str: got {shown(self.teacher)}. Give a "
                "model itself to the callback: RankDynaCallback(config, teacher=model)."
            )
        for name in ("teacher_weight", "teacher_temperature", "hidden_weight"):
            setattr(self, name, number(name, getattr(self, name)))
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight is a part of the loss and must be in [0, 1]: got {self.teacher_weight}.")
        if self.teacher_temperature <= 0:
            raise ValueError(f"teacher_temperature must be above 0: got {self.teacher_temperature}.")
        if self.hidden_weight < 0:
            raise ValueError(f"hidden_weight must be at least 0: got {self.hidden_weight}.")

    @property
    def ratio_name(self) -> str:
        """Which of the two ratios is chosen, by name."""
        return "rank_ratio" if self.param_ratio is None else "param_ratio"

    @property
    def ratios(self) -> tuple[float, ...]:
        """The parts to keep, the largest first: one, or those of a falling list."""
        chosen = getattr(self, self.ratio_name)
        return tuple(chosen) if isinstance(chosen, list) else (chosen,)

    def at_ratio(self, ratio: float) -> "RankDynaConfig":
        """The same choices for one size alone."""
        chosen: dict[str, Any] = {self.ratio_name: ratio, "keep_score": None}
        return replace(self, **chosen)
