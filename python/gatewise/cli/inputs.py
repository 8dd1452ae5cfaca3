"""A sequence in a file, in pieces of some steps, so that its length costs no memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import numpy as np
from numpy.lib.format import open_memmap

from gatewise.arguments.arrays import Array, floating, tokens
from gatewise.arguments.axes import Axes
from gatewise.running.network import Chain

LINE_NUMBERS = 2**14  # of lines that are Python's objects at the same time, some ten times as large as their text
MOST_CHARACTERS = 1000  # of a number in a line


@dataclass(frozen=True)
class Input:
    """A sequence in a file: so many steps, of so many rows (None: unbatched), taken in pieces of `chunk` steps."""

    path: str
    steps: int
    batch: int | None
    pieces: Callable[[int], Iterator[Array]]


def open_input(path: str, of: Chain, batch_first: bool) -> Input:
    """The sequence in an .npy or .csv file, if it is one for this model."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: expected a file")
    return _npy_input(path, of, batch_first) if ending_of(path) == ".npy" else _csv_input(path, of)


def ending_of(path: str) -> str:
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".npy", ".csv"):
        raise ValueError(f"{path}: expected a name that ends in .npy or .csv")
    return ending


def _npy_input(path: str, of: Chain, batch_first: bool) -> Input:
    try:
        array: Array = open_memmap(path, mode="r")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a header is an expression, which may be wrong in many ways
        raise ValueError(f"{path}: expected an array as numpy.save writes it ({error})") from None
    check = partial(floating, dtype=of.dtype) if of.vocabulary is None else partial(tokens, count=of.vocabulary)
    if of.vocabulary is not None and array.dtype.kind not in "iu":
        raise TypeError(f"{path}: expected whole numbers, got {array.dtype}")
    axes = Axes.of(of.units, batch_first, path, array)
    check(path, array[:0])  # its dtype; numbers are looked at as they come
    # Rows without steps have no byte in the file, but each would take memory.
    if axes.steps == 0 and axes.batch > os.path.getsize(path):
        raise ValueError(f"{path}: expected some steps, got none, of {axes.batch} rows")
    axis = time_axis(batch_first, axes.unbatched)

    def pieces(chunk: int) -> Iterator[Array]:
        for first in range(0, axes.steps, chunk):
            yield array[(slice(None),) * axis + (slice(first, first + chunk),)]

    return Input(path, axes.steps, None if axes.unbatched else axes.batch, pieces)


def time_axis(batch_first: bool, unbatched: bool) -> int:
    return 1 if batch_first and not unbatched else 0


def _csv_input(path: str, of: Chain) -> Input:
    steps = _count_lines(path)
    at_once = max(LINE_NUMBERS // (of.units[0] if of.units else 1), 1)

    def pieces(chunk: int) -> Iterator[Array]:
        with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
            for first in range(0, steps, chunk):
                last = min(first + chunk, steps)
                starts = range(first, last, at_once)
                yield np.concatenate([_parse(path, file, start, min(start + at_once, last), of) for start in starts])

    return Input(path, steps, None, pieces)


def _count_lines(path: str) -> int:
    """The lines of a file, however long they are, in little memory."""
    count, end = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(2**16):
            count, end = count + block.count(b"\n"), block[-1:]
    return count + (end != b"\n")


def _parse(path: str, file: TextIO, first: int, last: int, of: Chain) -> Array:
    """The next lines of a file: of numbers (last - first, I), of tokens (last - first,)."""
    width = of.units[0] if of.units else 1
    longest = width * MOST_CHARACTERS
    lines, rows = [], []
    for number in range(first + 1, last + 1):
        line = file.readline(longest + 1)
        if not line:
            raise ValueError(f"{path}: the file was cut while it was read")
        row = _numbers(line, width, float if of.units else int) if len(line) <= longest else None
        if row is None:
            what = ("a number" if of.units else "a whole number") if width == 1 else f"{width} numbers with commas"
            raise ValueError(f"{path}: line {number}: expected {what}, got {line[:60].rstrip()!r}")
        lines.append(line)
        rows.append(row)
    if not of.units:
        return np.array(rows, np.int64)[:, 0]
    array = np.array(rows)
    for place in np.unique(np.nonzero(_infinite(array, of.dtype))[0]):
        for field in lines[place].split(","):
            if "inf" not in field.lower() and _infinite(np.array(float(field)), of.dtype):
                where = f"{path}: line {first + place + 1}"
                raise ValueError(f"{where}: expected numbers that fit {of.dtype}, got {field.strip()[:60]}")
    return array


def _numbers(line: str, width: int, kind: type) -> list[Any] | None:
    """The numbers of a line; None if they are not so many, or no numbers."""
    if line.count(",") != width - 1 or "_" in line:
        return None
    with suppress(ValueError):
        values = [kind(field) for field in line.split(",")]
        # Tokens that are too large for any vocabulary are refused here, where the line is known.
        if kind is float or -(2**63) <= values[0] < 2**63:
            return values
    return None


def _infinite(array: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        found: Array = np.isinf(array.astype(dtype))
    return found
