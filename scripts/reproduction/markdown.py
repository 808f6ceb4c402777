"""Tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

# Of a line, so that none is broken.
WIDTH = 100_000


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The cells as they are, in columns of equal width."""
    shown, written = Table(*header, box=box.MARKDOWN), StringIO()
    for row in rows:
        shown.add_row(*map(str, row))
    Console(file=written, width=WIDTH, markup=False, highlight=False, emoji=False).print(shown)
    return "".join(f"{line}\n" for line in written.getvalue().splitlines() if line.strip())


def table_of_records(records: Sequence[Mapping[str, object]]) -> str:
    """A column for each key, empty where a record has none."""
    header = list(dict.fromkeys(key for record in records for key in record))
    return table(header, [[record.get(key, "") for key in header] for record in records])
