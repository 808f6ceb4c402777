"""
Compress random models with random settings, and check each from the injection to the merged checkpoint: it computes
the same at each seam, the budget is met exactly, by groups that are chosen a second time in plain numbers, and all
that is left of removed groups is zero. What cannot be must be refused by an error of ours.

    python scripts/checks/fuzz.py --cases 2000

2,000 cases take about 20 minutes on one core with OMP_NUM_THREADS=1. Prints a table of the cases by their kind, and
of each failure what was tried, and the command that tries it again; exits with 1 if there was any.
"""

import argparse
import logging
import random
import re
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import transformers
from tqdm import tqdm

import rankdyna_trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from checks.fuzzing.families import random_family
from checks.fuzzing.life import live
from checks.fuzzing.networks import random_network
from checks.fuzzing.settings import Settings, random_settings
from checks.fuzzing.subjects import DTYPES, Subject, cast, compacted_before, spoil

OURS = Path(rankdyna_trainer.__file__).parent


class Outcome(NamedTuple):
    """
    What became of a case.

    Attributes:
        kinds: that it counts for, such as `"optimizer: SGD"`.
        result: `"passed"`, `"refused"` or `"failed"`.
        why: it was refused or failed.
        removals: how often groups were removed.
    """

    kinds: list[str]
    result: str
    why: str
    removals: int


def main() -> None:
    """Try all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    options = parser.parse_args()
    quiet()
    outcomes = []
    for number in tqdm(range(options.first, options.first + options.cases), unit="case", mininterval=10):
        outcomes.append(outcome := try_case(options.seed, number))
        if outcome.result == "failed":
            tqdm.write(f"{outcome.why}\n    {command(options.seed, number)}", file=sys.stdout)
    print(table(outcomes).to_string())
    refusals = Counter(outcome.why for outcome in outcomes if outcome.result == "refused")
    print("\nrefused:", *(f"  {count:4} {why}" for why, count in refusals.most_common()), sep="\n")
    failures = sum(outcome.result == "failed" for outcome in outcomes)
    removals = sum(outcome.removals for outcome in outcomes)
    print(f"\ncases: {len(outcomes)}\nremovals checked: {removals}\nfailures: {failures}")
    if failures:
        sys.exit(1)


def command(seed: int, number: int) -> str:
    """That tries one case again."""
    return f"python scripts/checks/fuzz.py --seed {seed} --first {number} --cases 1"


def try_case(seed: int, number: int) -> Outcome:
    """Make the model and the settings of a case, and lead it through its life."""
    draw = random.Random(f"{seed} {number}")
    torch.manual_seed(draw.getrandbits(32))
    dtype = draw.choice(["float32", "float32", *DTYPES])
    subject, settings = random_subject(draw, dtype), random_settings(draw, dtype)
    kinds = kinds_of(subject, settings, dtype)
    try:
        return Outcome(kinds, "passed", "", live(subject, settings))
    except Exception as error:
        message = str(error).split("\n")[0]
        if is_refusal(error):
            return Outcome(kinds, "refused", shortened(message), 0)
        described = (
            f"{type(error).__name__}: {message}\n    {subject.kind}: {', '.join(subject.notes)}\n    {settings}"
        )
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(kinds, "failed", f"{described}\n    {frame.filename}:{frame.lineno}", 0)


def random_subject(draw: random.Random, dtype: str) -> Subject:
    """A plain network or a family of transformers, spoilt, in this dtype, perhaps compacted before."""
    subject = random_network(draw) if draw.random() < 0.6 else random_family(draw)
    spoil(draw, subject)
    subject = cast(subject, dtype)
    if draw.random() < 0.15:
        try:
            compacted_before(draw, subject)
        except ValueError as error:
            if not is_refusal(error):
                raise
    return subject


def kinds_of(subject: Subject, settings: Settings, dtype: str) -> list[str]:
    """What a case counts for."""
    config = settings.config
    kinds = {
        "model": subject.kind,
        "dtype": dtype,
        "optimizer": settings.optimizer,
        "ratio": "rank_ratio" if "rank_ratio" in config else "param_ratio",
        "multiple of": config["rank_multiple_of"],
        "scope": config["rank_scope"],
        "score": config["importance_score"],
        "floor": config["block_floor"],
        "groups": settings.route,
    }
    found = [f"{kind}: {value}" for kind, value in kinds.items()]
    happened = {
        "compacted before": "compacted before" in subject.notes,
        "a gradient of inf": settings.overflows,
        "factors without a gradient": settings.without_gradients,
        "stopped early": settings.stops_at < settings.steps,
        "a mistake": settings.mistake,
    }
    return [*found, *(f"with: {what}" for what, is_so in happened.items() if is_so)]


def shortened(message: str) -> str:
    """What all refusals of a kind say."""
    words = re.sub(r"(rank_ratio|param_ratio|rank_multiple_of|rank_scope)=\S+", r"\1", message)
    return re.sub(r"\d+|The weight of \S+|\(.*", "...", words)[:60]


def is_refusal(error: Exception) -> bool:
    """Whether an error was raised by the library, in words."""
    raised_at = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = raised_at.is_relative_to(OURS) and isinstance(error, (ValueError, TypeError))
    return ours and len(str(error)) > 20


def table(outcomes: list[Outcome]) -> pd.DataFrame:
    """How many cases of each kind passed, were refused, and failed."""
    rows = pd.DataFrame([(kind, outcome.result) for outcome in outcomes for kind in outcome.kinds])
    counts = pd.crosstab(rows[0].rename("kind"), rows[1].rename("result"))
    return counts.reindex(columns=["passed", "refused", "failed"], fill_value=0)


def quiet() -> None:
    """Leave the screen to the progress bar."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
