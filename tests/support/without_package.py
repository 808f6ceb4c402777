"""Virtual environments that have all that the tests run with, but not this library."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

REFUSE_PACKAGE = """
try:
    import rankdyna_trainer
except ImportError:
    pass
else:
    raise SystemExit(f"rankdyna_trainer is installed in {rankdyna_trainer.__file__}")
"""


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees what is installed here, except what is installed as a link to its source."""
    venv.create(folder, with_pip=False, symlinks=True)
    own = next(folder.glob("lib/python*/site-packages"))
    # Files that this process's site-packages names in turn, as an editable installation does, are not read.
    (own / "outer.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return folder / "bin" / "python"


def run_in(python: Path, folder: Path, code: str) -> str:
    """What a program prints that runs in `folder`, outside of the checkout, and has its caches there."""
    cache = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command, environment = [str(python), "-I", "-c", code], os.environ | cache
    run = subprocess.run(
        command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def run_without_package(folder: Path, code: str) -> str:
    """What a program prints that runs in `folder` where this library is not installed."""
    return run_in(make_environment(folder / "environment"), folder, REFUSE_PACKAGE + code)
