"""What a size should keep of the dense model's score, and what to suspect of a run that kept far less."""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from ..config import RankDynaConfig

# The part of the score that is kept, by the part of the target layers' parameters: for texts RankDyna's average over
# GLUE in table 1 of the paper, for tags WNUT-17 with the defaults. What else was measured is better.
OF_TEXTS = ((0.074, 0.892), (0.16, 0.936), (0.31, 0.976), (1.0, 1.0))
OF_TAGS = ((0.15, 0.866), (1.0, 1.0))
# Of the classes of transformers, those of the same kinds of tasks.
KINDS = {"ForSequenceClassification": OF_TEXTS, "ForMultipleChoice": OF_TEXTS, "ForTokenClassification": OF_TAGS}
# Scores that grow to 1, or to 100: of a loss no part is kept.
SHARES = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr", "combined_score")
# A run is far below what is expected when it lost so many times as much, and more than seeds make of a difference.
FAR = 2.0
OF_SEEDS = 0.05


class Shortfall(NamedTuple):
    """
    A score that is far below what its size should keep.

    Attributes:
        metric: its name.
        kept: the part of the dense model's score.
        expected: the part that the size should keep.
    """

    metric: str
    kept: float
    expected: float


def expected_share(architecture: str, target_ratio: float) -> float | None:
    """
    The part of the dense model's score that a size should keep.

    Args:
        architecture: the name of the model's class, which tells the kind of the task.
        target_ratio: the part of the target layers' parameters that is kept.

    Returns:
        `None` if nothing was measured of such a task, or of so small a size.
    """
    points = next((points for ending, points in KINDS.items() if architecture.endswith(ending)), ())
    for (smaller, less), (larger, more) in pairwise(points):
        if smaller <= target_ratio <= larger:
            return less + (more - less) * (target_ratio - smaller) / (larger - smaller)
    return None


def find_shortfall(
    architecture: str, target_ratio: float, before: Mapping[str, float], after: Mapping[str, float]
) -> Shortfall | None:
    """
    The score that fell furthest below what is expected, if one did.

    Args:
        architecture: the name of the model's class.
        target_ratio: the part of the target layers' parameters that is kept.
        before: scores of the dense model, by name.
        after: of the compressed one, likewise.
    """
    expected = expected_share(architecture, target_ratio)
    if expected is None:
        return None
    kept = {
        metric: after[metric] / score
        for metric, score in before.items()
        if metric in after and metric.endswith(SHARES) and score > 0
    }
    worst = min(kept, key=kept.__getitem__, default=None)
    if worst is None or 1 - kept[worst] <= max(FAR * (1 - expected), OF_SEEDS):
        return None
    return Shortfall(worst, kept[worst], expected)


def shortfall_in_words(
    architecture: str,
    target_ratio: float,
    scores: tuple[Mapping[str, float], Mapping[str, float]],
    config: RankDynaConfig,
    warmup_steps: int,
    learning_rate: str = "",
) -> list[str]:
    """
    That a run kept far less than its size should, and its three likeliest causes with what to do about each.

    Args:
        architecture: the name of the model's class.
        target_ratio: the part of the target layers' parameters that is kept.
        scores: of the dense model and of the compressed one, by name.
        config: of the run.
        warmup_steps: optimizer steps before the first removal.
        learning_rate: of the run, in words; empty if it is not known.

    Returns:
        The sentence, then the causes; nothing if the run kept what can be expected, or if that is not known.
    """
    found = find_shortfall(architecture, target_ratio, *scores)
    if found is None:
        return []
    sentence = (
        f"{found.metric} is {found.kept:.0%} of the dense model's, and {target_ratio:.2f} of the target layers' "
        f"parameters should keep about {found.expected:.0%}. The likeliest causes:"
    )
    unlearnt = (
        f"the task was not learnt when removal began, at step {warmup_steps:,}: start from a model that was "
        "fine-tuned to the task, or train for more steps"
    )
    if config.teacher is None:
        unlearnt += ", and give a fine-tuned model as teacher"
    rate = f"the learning rate ({learning_rate})" if learning_rate else "the learning rate"
    of_paper = [
        f"{name}={value!r}"
        for name, value, default in (
            ("group_basis", config.group_basis or "activations", "activations"),
            ("block_floor", config.block_floor, 0.25),
        )
        if value != default
    ]
    last = (
        f"{' and '.join(of_paper)}: the defaults lose less"
        if of_paper
        else "the size, which may be too small for this task: try a larger ratio"
    )
    return [sentence, unlearnt, f"{rate}: 1e-4 to 4e-4 were good for encoders", last]
