"""RankDyna for the Hugging Face Trainer: compress a transformer while it is fine-tuned."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .checkpoint.registration import register_format
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .checkpoint.self_contained import make_self_contained
    from .config import RankDynaConfig
    from .layers.compaction import compact, merge
    from .layers.injection import inject_singular_groups
    from .layers.low_rank import LowRankLinear
    from .layers.singular_group import SingularGroupLinear
    from .method.algorithm import RankDyna
    from .report.tables import rank_report
    from .trainer.callback import RankDynaCallback

# Where each name comes from when it is first asked for: who only loads a compacted model needs none of them.
_PLACES = {
    "LowRankLinear": "layers.low_rank",
    "RankDyna": "method.algorithm",
    "RankDynaCallback": "trainer.callback",
    "RankDynaConfig": "config",
    "SingularGroupLinear": "layers.singular_group",
    "compact": "layers.compaction",
    "inject_singular_groups": "layers.injection",
    "make_self_contained": "checkpoint.self_contained",
    "merge": "layers.compaction",
    "rank_report": "report.tables",
}

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


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_format()
