"""How many operators, kernels and waits a training step consists of, and how many of them are the method's own."""

import argparse
import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

from rankdyna_trainer import inject_singular_groups
from rankdyna_trainer.method.schedule import RankBudgetSchedule

from .device_time import wait
from .measuring import Results, Rows
from .models import DEVICE, load_model, random_batch
from .quick_groups import gram_groups, groups_from
from .sides import RankDynaSide, Run, Side

STEP, SCORING, BUDGET = "benchmark: step", "benchmark: update_importance", "benchmark: enforce_budget"
ACTIVITIES = [ProfilerActivity.CPU] + (DEVICE.type == "cuda") * [ProfilerActivity.CUDA]
Trace = list[dict[str, Any]]


def profile_steps(options: argparse.Namespace, run: Run) -> Results:
    """
    Profile one step of each kind.

    Args:
        options: with `model`, `seed`, `batch` and `length`.
        run: which is not finished.

    Returns:
        Tables of the steps, and of what is called and takes longest in them.
    """
    model = load_model(options.model, options.seed)
    in_groups = copy.deepcopy(model)
    with groups_from(gram_groups):
        inject_singular_groups(in_groups, run.config)
    schedule = RankBudgetSchedule.of(run.config, run.steps)
    middle = schedule.warmup_steps + max(1, schedule.adjusting_steps // 2)
    wanted = {
        max(1, schedule.warmup_steps): "warm-up, in groups",
        **{number: f"adjusting, step {number}" for number in range(middle, min(middle + 6, schedule.final_step), 2)},
        min(schedule.final_step + 4, run.steps): "cool-down",
    }
    last = max(wanted)
    with profile(activities=ACTIVITIES):  # the first one sets up what the others would be slowed down by
        wait()
    steps: Rows = []
    details: Rows = []
    for side, kinds in ((Side(model, run), {last: "dense"}), (RankDynaSide(in_groups, run), wanted)):
        for number in range(1, last + 1):
            batch = random_batch(side.model, options.batch, options.length)
            wait()
            if number not in kinds:
                side.step(number, batch)
                continue
            trace = traced(side, number, batch)
            counts, detail = counted(trace)
            # The profiler makes a step slower: what is shown is the time of the one before.
            steps.append({"step": kinds[number], "the one before, ms": 1000 * side.seconds[-2]} | counts)
            details.append({"step": kinds[number]} | detail)
    return {"tables": {"steps": steps}, "details": details}


def traced(side: Side, number: int, batch: dict[str, Any]) -> Trace:
    """The events of a step."""
    scoring, budget = annotated(side.before_optimizer, SCORING), annotated(side.after_optimizer, BUDGET)
    with (
        patch.object(side, "before_optimizer", scoring),
        patch.object(side, "after_optimizer", budget),
        profile(activities=ACTIVITIES) as profiler,
    ):
        with record_function(STEP):
            side.step(number, batch)
        wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: Trace = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)["traceEvents"]
    return events


def annotated(work: Callable[..., None], name: str) -> Callable[..., None]:
    """The same, found in a trace by this name."""

    def call(*arguments: Any) -> None:
        with record_function(name):
            work(*arguments)

    return call


def counted(trace: Trace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a step consists of: as a row, and the names of most of it."""
    row: dict[str, Any] = {}
    detail: dict[str, Any] = {}
    for label, names in (("", [STEP]), ("scoring: ", [SCORING]), ("budget: ", [BUDGET])):
        spans = [event for event in trace if event.get("cat") == "user_annotation" and event["name"] in names]
        inside = [event for event in trace if _is_in(event, spans)]
        operators = [event["name"] for event in inside if str(event["name"]).startswith("aten::")]
        row[f"{label}operators"] = len(operators)
        detail[f"{label}operators"] = Counter(operators).most_common(15)
        if label:
            row[f"{label}host, ms"] = sum(span["dur"] for span in spans) / 1000
        if DEVICE.type == "cuda":
            kernels, waits = _of_gpu(trace, inside)
            row |= {f"{label}kernels": len(kernels), f"{label}waits": len(waits)}
            row[f"{label}kernels, ms"] = sum(kernel["dur"] for kernel in kernels) / 1000
            detail |= {f"{label}kernels": _longest(kernels), f"{label}waits": Counter(waits).most_common()}
    return row, detail


def _is_in(event: dict[str, Any], spans: Iterable[dict[str, Any]]) -> bool:
    # The backward pass runs in a thread of its own, so only the time tells.
    of_host = event.get("cat") in ("cpu_op", "cuda_runtime", "cuda_driver")
    return of_host and any(span["ts"] <= event["ts"] <= span["ts"] + span["dur"] for span in spans)


def _of_gpu(trace: Trace, calls: Trace) -> tuple[Trace, list[str]]:
    """The kernels that these calls of the host started, and the names of those calls that wait for the device."""
    of_runtime = [event for event in calls if event["cat"] != "cpu_op"]
    started = {event.get("args", {}).get("correlation") for event in of_runtime} - {None}
    kernels = [
        event
        for event in trace
        if event.get("cat") == "kernel" and event.get("args", {}).get("correlation") in started
    ]
    return kernels, [event["name"] for event in of_runtime if "Synchronize" in event["name"]]


def _longest(kernels: Trace) -> list[tuple[str, int, float]]:
    """Names of kernels with how many there are and their milliseconds."""
    times: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for kernel in kernels:
        times[kernel["name"][:120]] += kernel["dur"] / 1000
        numbers[kernel["name"][:120]] += 1
    return [(name, numbers[name], time) for name, time in times.most_common(15)]
