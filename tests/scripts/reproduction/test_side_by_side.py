import os
from functools import partial
from pathlib import Path

import pytest
from reproduction.side_by_side import Cell, run_side_by_side


def tell(folder: Path, name: str, other: str) -> None:
    """Wait until the other one has begun too, which only one that runs at the same time has."""
    print(f"this is {name}")
    with open(folder / f"{name}.pipe", "w" if name < other else "r") as pipe:
        if name < other:
            pipe.write(name)
        else:
            assert pipe.read() == other
    (folder / name).write_text(str(os.getpid()))


def fail() -> None:
    raise ValueError("no rows")


@pytest.mark.long
def test_cells_run_at_once_in_processes_of_their_own(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pipe")
    (tmp_path / "b.pipe").symlink_to(tmp_path / "a.pipe")
    cells = [Cell("of/a", partial(tell, tmp_path, "a", "b")), Cell("of/b", partial(tell, tmp_path, "b", "a"))]
    run_side_by_side(cells, 2, tmp_path / "logs")
    numbers = {(tmp_path / name).read_text() for name in ("a", "b")}
    assert len(numbers) == 2 and str(os.getpid()) not in numbers
    assert "this is b" in (tmp_path / "logs/of/b.log").read_text(encoding="utf-8")


def test_cell_that_fails_is_named_when_the_others_are_finished(tmp_path: Path) -> None:
    done = tmp_path / "done"
    with pytest.raises(RuntimeError, match=r"1 of 2 cells failed:\nbad: ValueError\('no rows'\)"):
        run_side_by_side([Cell("bad", fail), Cell("good", done.touch)], 1, tmp_path / "logs")
    assert done.exists()
