"""
Programs that begin where neither transformers nor this library has been imported.

To start Python for each of them takes seconds, most of them for torch: they are forked from one process that has it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

SERVER = """
import contextlib, gc, importlib, json, os, sys

gc.disable()
for name in ("torch", "torch._dynamo", "torch.distributed.tensor", "torchao.quantization", "scipy.optimize"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.freeze()
gc.enable()
assert not {"transformers", "rankdyna_trainer"} & sys.modules.keys()
for line in sys.stdin:
    program, arguments, environment, outputs = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for stream, output in enumerate([os.devnull, *outputs]):
    os.dup2(os.open(output, os.O_RDWR | os.O_CREAT), stream)
os.environ.clear()
os.environ.update(environment)
sys.argv = ["-c", *arguments]
exec(program, {"__name__": "__main__"})
"""


class FreshProcesses:
    """Forks a process for each program; what they print is kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "FreshProcesses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()

    def run(self, program: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of `python -c program arguments...`."""
        self._count += 1
        outputs = [self._folder / f"{self._count}.{name}" for name in ("stdout", "stderr")]
        command = [str(argument) for argument in arguments]
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([program, command, dict(os.environ), list(map(str, outputs))]) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        out, err = (output.read_text(encoding="utf-8") for output in outputs)
        assert not check or code == 0, err
        return subprocess.CompletedProcess(command, code, out, err)
