"""A sequence in a file, read a chunk of steps at a time, so that its length costs no memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
from numpy.lib.format import open_memmap

from gatewise.arguments.arrays import Array, floating, tokens
from gatewise.arguments.axes import Axes
from gatewise.running.network import Chain

MAX_PARSED_NUMBERS = 2**14  # Python objects at one time; they are some ten times as large as their text
MAX_NUMBER_LENGTH = 1000  # characters, on average over a line


@dataclass(frozen=True)
class SequenceFile:
    """A sequence in a file; `chunks(n)` gives it as arrays of n steps, the last of which may be shorter."""

    path: str
    axes: Axes
    chunks: Callable[[int], Iterator[Array]]


def open_sequence(path: str, chain: Chain, batch_first: bool) -> SequenceFile:
    """Open an .npy or .csv file, and check that its shape and dtype suit the model."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: expected a file")
    return _open_npy(path, chain, batch_first) if ending_of(path) == ".npy" else _open_csv(path, chain, batch_first)


def ending_of(path: str) -> str:
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".npy", ".csv"):
        raise ValueError(f"{path}: expected a name that ends in .npy or .csv")
    return ending


def time_axis(axes: Axes) -> int:
    return 1 if axes.batch_first and not axes.unbatched else 0


# ---- .npy


def _open_npy(path: str, chain: Chain, batch_first: bool) -> SequenceFile:
    try:
        array: Array = open_memmap(path, mode="r")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # NumPy evaluates the header, an expression, which may fail in many ways
        raise ValueError(f"{path}: expected an array as numpy.save writes it ({error})") from None
    if chain.vocabulary is not None and array.dtype.kind not in "iu":
        raise TypeError(f"{path}: expected whole numbers, got {array.dtype}")
    axes = Axes.of(chain.units, batch_first, path, array)
    _check_dtype(path, array, chain)
    # Rows without steps take no bytes of the file, but each of them would take memory.
    if axes.steps == 0 and axes.batch > os.path.getsize(path):
        raise ValueError(f"{path}: expected at least one step, got {axes.batch} rows without steps")
    axis = time_axis(axes)

    def chunks(size: int) -> Iterator[Array]:
        for start in range(0, axes.steps, size):
            yield array[(slice(None),) * axis + (slice(start, start + size),)]

    return SequenceFile(path, axes, chunks)


def _check_dtype(path: str, array: Array, chain: Chain) -> None:
    """Check the dtype by an array without steps; the values are checked chunk by chunk."""
    if chain.vocabulary is None:
        floating(path, array[:0], dtype=chain.dtype)
    else:
        tokens(path, array[:0], count=chain.vocabulary)


# ---- .csv


def _open_csv(path: str, chain: Chain, batch_first: bool) -> SequenceFile:
    steps = _count_lines(path)
    max_lines = max(MAX_PARSED_NUMBERS // (chain.units[0] if chain.units else 1), 1)

    def chunks(size: int) -> Iterator[Array]:
        with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
            for start in range(0, steps, size):
                stop = min(start + size, steps)
                bounds = [(first, min(first + max_lines, stop)) for first in range(start, stop, max_lines)]
                yield np.concatenate([_parse_lines(path, file, first, last, chain) for first, last in bounds])

    return SequenceFile(path, Axes(batch_first, unbatched=True, steps=steps, batch=1), chunks)


def _count_lines(path: str) -> int:
    """Count the lines of a file in constant memory, however long they are."""
    count, last_byte = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(2**16):
            count, last_byte = count + block.count(b"\n"), block[-1:]
    return count + (last_byte != b"\n")


def _parse_lines(path: str, file: TextIO, start: int, stop: int, chain: Chain) -> Array:
    """Read the lines from `start` to `stop` of a file: numbers (stop - start, I), or tokens (stop - start,)."""
    width = chain.units[0] if chain.units else 1
    kind = float if chain.units else int
    max_length = width * MAX_NUMBER_LENGTH
    lines, rows = [], []
    for number in range(start + 1, stop + 1):
        line = file.readline(max_length + 1)
        if not line:
            raise ValueError(f"{path}: the file was cut while it was read")
        row = _parse_line(line, width, kind) if len(line) <= max_length else None
        if row is None:
            expected = (
                ("a number" if chain.units else "a whole number") if width == 1 else f"{width} numbers with commas"
            )
            raise ValueError(f"{path}: line {number}: expected {expected}, got {line[:60].rstrip()!r}")
        lines.append(line)
        rows.append(row)
    if not chain.units:
        return np.array(rows, np.int64)[:, 0]
    array = np.array(rows)
    _check_overflow(path, start, lines, array, chain.dtype)
    return array


def _parse_line(line: str, width: int, kind: type) -> list[Any] | None:
    """The numbers of a line; None if there are more or fewer than `width`, or if one is not a number."""
    if line.count(",") != width - 1 or "_" in line:
        return None
    with suppress(ValueError):
        values = [kind(field) for field in line.split(",")]
        # A token beyond int64 is refused here, where the number of the line is known.
        if kind is float or -(2**63) <= values[0] < 2**63:
            return values
    return None


def _check_overflow(path: str, start: int, lines: list[str], array: Array, dtype: np.dtype[Any]) -> None:
    """Refuse finite numbers that are infinite in the model's dtype."""
    for index in np.unique(np.nonzero(_is_infinite(array, dtype))[0]):
        for field in lines[index].split(","):
            if "inf" not in field.lower() and _is_infinite(np.array(float(field)), dtype):
                place = f"{path}: line {start + index + 1}"
                raise ValueError(f"{place}: expected numbers that fit {dtype}, got {field.strip()[:60]}")


def _is_infinite(array: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        infinite: Array = np.isinf(array.astype(dtype))
    return infinite
