"""RankDyna for the Hugging Face Trainer: compress a transformer while it is fine-tuned."""

from . import checkpoint as checkpoint  # registers the format with transformers
from .algorithm import RankDyna
from .callback import RankDynaCallback
from .compaction import compact, merge
from .config import RankDynaConfig
from .injection import inject_singular_groups
from .layers import LowRankLinear, SingularGroupLinear
from .report import rank_report
from .self_contained import make_self_contained

__version__ = "0.1.0"

__all__ = [
    "LowRankLinear",
    "RankDyna",
    "RankDynaCallback",
    "RankDynaConfig",
    "SingularGroupLinear",
    "compact",
    "inject_singular_groups",
    "make_self_contained",
    "merge",
    "rank_report",
]
