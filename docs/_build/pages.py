"""The pages of the site that lie elsewhere in the repository, and equations without a script."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# By their place in the site. The scripts are there so that links to them work.
ELSEWHERE = {"index.md": ROOT / "README.md"}
ELSEWHERE |= {name: ROOT / name for name in ("REPRODUCTION.md", "CHANGELOG.md")}
ELSEWHERE |= {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "scripts").rglob("*.py")}


def on_config(config: MkDocsConfig) -> None:
    """Blocks of LaTeX in the language `math`, which GitHub shows too, become MathML."""
    fences = [{"name": "math", "class": "math", "format": _equation}]
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add what lies outside of the folder `docs`."""
    for place, path in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links are right in the repository; in the site `docs` is the root."""
    if page.file.src_uri in ELSEWHERE:
        return re.sub(r"\]\((docs/|README\.md)", lambda m: "](index.md" if "README" in m[1] else "](", markdown)
    leaving = "../" * (page.file.src_uri.count("/") + 1)
    inside = leaving.removeprefix("../")
    return markdown.replace(f"]({leaving}README.md", f"]({inside}index.md").replace(f"]({leaving}", f"]({inside}")


def _equation(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="equation">{convert(source, display="block")}</div>'
