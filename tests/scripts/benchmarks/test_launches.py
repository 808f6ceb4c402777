"""Counts of a trace, by hand: of a GPU, which the machines of these tests do not have."""

from typing import Any

import pytest
import torch
from benchmarks import launches


def event(category: str, name: str, start: float, length: float = 1, correlation: int | None = None) -> dict[str, Any]:
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"cat": category, "name": name, "ts": start, "dur": length, "args": arguments}


def test_kernels_and_waits_belong_to_what_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "DEVICE", torch.device("cuda"))
    trace = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", launches.STEP, 0, 100),
        event("user_annotation", launches.SCORING, 40, 20),
        event("gpu_user_annotation", launches.SCORING, 40, 500),
        event("cpu_op", "aten::mm", 10),
        event("cuda_runtime", "cudaLaunchKernel", 11, correlation=1),
        event("cpu_op", "aten::mul", 45),
        event("cuda_driver", "cuLaunchKernelEx", 46, correlation=2),
        event("cuda_runtime", "cudaStreamSynchronize", 50, correlation=3),
        event("cpu_op", "aten::add", 150),
        event("cuda_runtime", "cudaLaunchKernel", 151, correlation=4),
        event("kernel", "gemm", 200, 3000, correlation=1),
        event("kernel", "elementwise", 3200, 500, correlation=2),
        event("kernel", "elementwise", 3700, 500, correlation=4),
    ]
    row, detail = launches.counted(trace)
    assert {key: row[key] for key in ("operators", "kernels", "waits", "kernels, ms")} == {
        "operators": 2,
        "kernels": 2,
        "waits": 1,
        "kernels, ms": 3.5,
    }
    assert (row["scoring: kernels"], row["scoring: kernels, ms"], row["scoring: waits"]) == (1, 0.5, 1)
    assert row["scoring: host, ms"] == 0.02 and row["budget: kernels"] == 0
    assert detail["kernels"] == [("gemm", 1, 3), ("elementwise", 1, 0.5)]
