"""What is wrong with a file, in one kind of error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class FormatError(ValueError):
    """A file that cannot be taken, with the file's name and the reason."""


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a reader finds wrong with the file into a FormatError that names it."""
    try:
        yield
    except FormatError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        # What came from the file may be long, or of characters that nobody can print.
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        reason = reason.encode("ascii", "backslashreplace").decode()
        shown = reason if len(reason) < 1000 else reason[:1000] + " ..."
        raise FormatError(f"{os.fsdecode(path)}: {shown}") from None


@contextmanager
def at(place: str) -> Iterator[None]:
    """What is wrong in here is wrong there."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{place}: {error}") from None
