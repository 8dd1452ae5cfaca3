"""Tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress


def print_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table on stdout, the first column to the left and the others to the right."""
    cells = [tuple(header), *map(tuple, lines)]
    if sys.stdout.isatty():
        with suppress(ModuleNotFoundError):
            return _print_rich_table(cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        shown = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        print("  ".join(shown).rstrip())


def _print_rich_table(cells: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if i else "left")
    for line in cells[1:]:
        table.add_row(*map(Text, line))  # brackets are no markup
    Console().print(table)
