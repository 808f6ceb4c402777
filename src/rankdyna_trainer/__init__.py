"""RankDyna for the Hugging Face Trainer: compress a transformer while it is fine-tuned."""

from .checkpoint import loader as loader  # registers the format with transformers
from .checkpoint import saved_config as saved_config  # lets save_pretrained write the ranks that the layers have
from .checkpoint.self_contained import make_self_contained
from .config import RankDynaConfig
from .layers.compaction import compact, merge
from .layers.injection import inject_singular_groups
from .layers.low_rank import LowRankLinear
from .layers.singular_group import SingularGroupLinear
from .method.algorithm import RankDyna
from .report.tables import rank_report
from .trainer.callback import RankDynaCallback
from .version import __version__ as __version__

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
