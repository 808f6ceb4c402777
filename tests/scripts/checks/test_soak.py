"""Killed for real, a few times: `scripts/checks/soak.py --kills 50` is the long run."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "checks" / "soak.py"


@pytest.mark.slow
@pytest.mark.long
def test_killed_runs_end_with_the_same_model(tmp_path: Path) -> None:
    # In a process of its own, as a user runs it: it starts others, and this one has threads.
    command = [sys.executable, SCRIPT, "--kills", "3", "--optimizers", "adamw", "--output_dir", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = dict(line.rsplit(maxsplit=1) for line in result.stdout.splitlines())
    assert int(table["kills"]) == int(table["resumes"]) == 3
    for nothing in (
        "half written models loaded",
        "runs that differ",
        "largest weight difference",
        "largest score difference",
    ):
        assert float(table[nothing]) == 0, result.stdout
