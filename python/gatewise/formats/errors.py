"""Everything that can be wrong with a file, as one kind of error."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class FormatError(ValueError):
    """A file that cannot be read as a model, with the file's name and the reason."""


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a reader finds wrong with a file into a FormatError that names the file.

    That includes errors of unforeseen kinds, whose kind and traceback are kept: a damaged file may lead to any of them,
    and a program that catches FormatError should go on.
    """
    try:
        yield
    except (FormatError, OSError, MemoryError, ImportError):
        raise
    except RecursionError:
        raise FormatError(f"{os.fsdecode(path)}: nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise FormatError(f"{os.fsdecode(path)}: {printable(str(error))}") from None
    except Exception as error:
        raise FormatError(f"{os.fsdecode(path)}: {type(error).__name__}: {printable(str(error))}") from error


def printable(text: str, most: int = 1000) -> str:
    """`text`, which may come from a file, as one line that any terminal can print, cut off if it is long."""
    line = " ".join(text[: most + 1].split()).encode("ascii", "backslashreplace").decode()
    line = re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", line)
    return line if len(text) <= most and len(line) <= most else line[:most] + " ..."


@contextmanager
def at(place: str) -> Iterator[None]:
    """Prefix the ValueErrors and TypeErrors raised inside with a place, such as `layers[3]`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{place}: {error}") from None
