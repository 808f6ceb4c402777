"""What the pages name is there: files, functions, commands, and the version and paper of CITATION.cff."""

import ast
import re
from pathlib import Path

from rankdyna_trainer.report.card import CITATION
from rankdyna_trainer.version import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rankdyna_trainer"


def names_in(path: Path) -> set[str]:
    """Classes, functions, and the members of classes as `Class.member`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
            found |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
    return found


def test_each_function_of_the_papers_is_there() -> None:
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `([\w/]+\.py)` \| `([\w.]+)` \|$", page, re.MULTILINE)
    tables = [line for line in page.splitlines() if line.startswith("| ")]
    headings = [line for line in tables if line.endswith("| file | function |") or line.startswith("| ---")]
    assert len(rows) == len(tables) - len(headings) and rows, "a row that ends in no file and function"
    for file, function in rows:
        assert function in names_in(PACKAGE / file), f"{file} has no {function}"


def test_contributors_are_sent_to_files_and_commands_that_are_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:src|tests|docs|scripts)/[\w./-]*)`", page))
    targets = set(re.findall(r"`make ([\w-]+)`", page))
    makefile = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert files and targets
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    assert targets - makefile == set()


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation
    title, doi = (re.search(rf'{key} = "(.*)"', CITATION)[1] for key in ("title", "doi"))
    assert f"title: {title}\n" in citation and f"doi: {doi}\n" in citation
