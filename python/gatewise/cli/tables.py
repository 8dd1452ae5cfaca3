"""Tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress


def print_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print a table with the first column aligned to the left and the others to the right.

    On a terminal Rich prints it if it is installed.
    """
    cells = [tuple(header), *map(tuple, lines)]
    if sys.stdout.isatty():
        with suppress(ModuleNotFoundError):
            return _print_rich_table(cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *values in cells:
        aligned = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *aligned]).rstrip())


def _print_rich_table(cells: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, title in enumerate(cells[0]):
        table.add_column(title, justify="right" if i else "left")
    for line in cells[1:]:
        table.add_row(*map(Text, line))  # Text, so that brackets are not taken for markup
    Console().print(table)
