"""Docstrings in the style of transformers, as griffe reads them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Extension, Function, Module, Object

API_PAGES = Path(__file__).parents[1] / "api"
REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")
PART_OF_ARGUMENTS = re.compile(r"^(?:Args:\n+)?[ ]+> (.+)\n+", re.MULTILINE)
RETURNS = re.compile(r"^(Returns:\n    )", re.MULTILINE)
TYPE_OF_ARGUMENT = re.compile(r"^(    \w+) \(`.*\):$", re.MULTILINE)


class Docstrings(Extension):
    """
    Makes links of "[`name`]" and sections of "> Parameters that ...", and leaves types to the annotations.

    A name that no page of the reference shows stays code.
    """

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Rewrite all docstrings of a package, when all names in it are known."""
        shown = re.findall(r"^::: \w+\.(\S+)", "\n".join(p.read_text() for p in API_PAGES.glob("*.md")), re.MULTILINE)
        roots = [pkg[name].canonical_path for name in shown]
        objects = list(_objects(pkg))
        paths = {}
        for found in objects:
            if any(f"{found.path}.".startswith(f"{root}.") for root in roots):
                paths[found.path] = found.path
                paths.setdefault(found.name, found.path)
        for found in objects:
            if found.docstring:
                text = PART_OF_ARGUMENTS.sub(r"Args: \1\n", found.docstring.value)
                text = TYPE_OF_ARGUMENT.sub(r"\1:", text)
                if isinstance(found, Function) and found.returns:
                    text = RETURNS.sub(rf"\1{found.returns}: ", text)
                found.docstring.value = REFERENCE.sub(lambda match: _link(match[1], paths), text)


def _objects(parent: Object) -> Iterator[Object]:
    yield parent
    for member in parent.members.values():
        if isinstance(member, Object):
            yield from _objects(member)


def _link(name: str, paths: dict[str, str]) -> str:
    shown = name.rpartition(".")[2]
    return f"[`{shown}`][{paths[name]}]" if name in paths else f"`{shown}`"
