"""What is wrong with a file, in one kind of error."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class FormatError(ValueError):
    """A file that cannot be taken, with the file's name and the reason."""


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a reader finds wrong with the file into a FormatError that names it.

    So does an error that no reader foresaw, whose kind and traceback are kept: a damaged file may lead to any of them,
    and a program that catches FormatError goes on.
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
    """One line that any terminal can print, of what may come from a file: its start if it is long."""
    line = " ".join(text[: most + 1].split()).encode("ascii", "backslashreplace").decode()
    line = re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", line)
    return line if len(text) <= most and len(line) <= most else line[:most] + " ..."


@contextmanager
def at(place: str) -> Iterator[None]:
    """What is wrong in here is wrong there."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{place}: {error}") from None
