"""What an index of packages shows: the README, with links that do not need the files beside it."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# In Markdown, and in the HTML of a picture. What begins with a scheme, or with "#", is whole already.
LINK = re.compile(r'(\]\(|src=")(?!#|[a-z]+:)([^)"]+)')
PICTURES = (".png", ".svg")


class AbsoluteLinks(MetadataHookInterface):
    """Sets the field `readme`, which `pyproject.toml` leaves to it."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put the address of the repository, which is one of the fields, before each link that has none."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        readme = absolute_links(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}


def absolute_links(text: str, repository: str) -> str:
    """The Markdown with links into the repository: to its pages, and of pictures to the file itself."""

    def absolute(match: re.Match[str]) -> str:
        beginning, path = match.groups()
        return f"{beginning}{repository}/{'raw' if path.endswith(PICTURES) else 'blob'}/main/{path}"

    return LINK.sub(absolute, text)
