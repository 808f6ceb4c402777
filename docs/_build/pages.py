"""
The pages of the site that lie elsewhere in the repository, notebooks as pages, equations without a script, and code
beside its equations.
"""

import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# By their place in the site. Code is there so that links to it work.
ELSEWHERE = {"index.md": ROOT / "README.md"}
ELSEWHERE |= {name: ROOT / name for name in ("REPRODUCTION.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
ELSEWHERE |= {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "scripts").rglob("*.py")}
ELSEWHERE |= {f"tests/{name}": ROOT / "tests" / name for name in ("reference.py", "support/reference_parameters.py")}

# In a page "<!-- show FILE: PART -->" under a heading "## ..." puts this part of a file beside what stands between. A
# part is headed by "# --- PART ---", or by "# --- PART: more ---"; without a name it is what stands before the first.
SHOW = re.compile(r"^(## .+?\n)((?:(?!^## ).)*?)^<!-- show (\S+?)(?:: (.+?))? -->$", re.MULTILINE | re.DOTALL)
PART = re.compile(r"^# --- ([^:\n]+).*? ---$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """Blocks of LaTeX in the language `math`, which GitHub shows too, become MathML."""
    fences = [{"name": "math", "class": "math", "format": _equation}]
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add what lies outside of the folder `docs`, and a page for each notebook in it."""
    for place, path in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    docs = Path(config.docs_dir)
    for path in sorted(docs.rglob("*.ipynb")):
        place = path.relative_to(docs).with_suffix(".md").as_posix()
        files.append(File.generated(config, place, content=_page_of(json.loads(path.read_text(encoding="utf-8")))))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links are right in the repository; in the site `docs` is the root."""
    if page.file.src_uri in ELSEWHERE:
        markdown = re.sub(r"(\]\([^)]+)\.ipynb\)", r"\1.md)", markdown)
        return re.sub(r"\]\((docs/|README\.md)", lambda m: "](index.md" if "README" in m[1] else "](", markdown)
    leaving = "../" * (page.file.src_uri.count("/") + 1)
    inside = leaving.removeprefix("../")
    markdown = markdown.replace(f"]({leaving}README.md", f"]({inside}index.md").replace(f"]({leaving}", f"]({inside}")
    if "<!-- show " in markdown:
        markdown = _with_code_beside(markdown)
    return markdown


def _page_of(notebook: dict[str, Any]) -> str:
    """Its cells, each with what it printed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join("".join(output["text"]) for output in cell.get("outputs", []))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _with_code_beside(markdown: str) -> str:
    """Fill in the parts of files. Each file that a page shows is shown whole, in its order."""
    left: dict[str, list[tuple[str, str]]] = {}

    def beside(match: re.Match[str]) -> str:
        heading, text, file, name = match.groups()
        parts = left.setdefault(file, _parts(file))
        if not parts or parts[0][0] != (name or ""):
            raise PluginError(f"The next part of {file} is {parts[:1]}, and the page asks for {name!r}.")
        code = parts.pop(0)[1].strip("\n")
        columns = f"<div markdown>\n{text}\n</div>\n\n```python\n{code}\n```"
        return f'{heading}\n<div class="beside" markdown>\n{columns}\n\n</div>\n'

    filled = SHOW.sub(beside, markdown)
    if "<!-- show " in filled or any(left.values()):
        raise PluginError(f"The page does not show {left}, or a part stands under no heading.")
    return filled


def _parts(file: str) -> list[tuple[str, str]]:
    text = (ROOT / file).read_text(encoding="utf-8")
    first, *others = PART.split(text)
    return [("", first), *zip(others[::2], others[1::2], strict=True)]


def _equation(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="equation">{convert(source, display="block")}</div>'
