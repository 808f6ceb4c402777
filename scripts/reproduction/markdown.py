"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The cells as they are, in columns of equal width."""
    return tabulate(list(rows), list(header), tablefmt="github", disable_numparse=True) + "\n"


def table_of_records(records: Sequence[dict[str, str]]) -> str:
    """A column for each key, empty where a record has none."""
    header = list(dict.fromkeys(key for record in records for key in record))
    return table(header, [[record.get(key, "") for key in header] for record in records])
