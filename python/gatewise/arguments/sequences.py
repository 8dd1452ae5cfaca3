"""Sequences of different lengths in one batch, and sequences with resets in the middle."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import Array, as_array, describe, flag, shaped
from gatewise.arguments.axes import SequenceAxes


def pad(sequences: Iterable[object], *, batch_first: bool = False) -> tuple[Array, Array]:
    """Put sequences of different lengths into one batch, with zeros after their ends.

    Parameters
    ----------
    sequences : iterable of array_like
        Each (T_i, ...), with the same dtype and the same axes after the first; a T_i may be 0.
    batch_first : bool
        Whether the batch is (B, T, ...) instead of (T, B, ...).

    Returns
    -------
    x : ndarray
        (T, B, ...) where T is the greatest T_i; rows are in the order of the sequences.
    lengths : ndarray of int64
        (B,), the T_i, as a layer takes them.
    """
    batch_first = flag("batch_first", batch_first)
    if isinstance(sequences, (str, bytes)):
        raise TypeError(f"sequences: expected several arrays, got {type(sequences).__name__}")
    try:
        unchecked = list(sequences)
    except TypeError as error:
        raise TypeError(f"sequences: expected several arrays, got {type(sequences).__name__} ({error})") from None
    arrays = [as_array(f"sequences[{i}]", sequence) for i, sequence in enumerate(unchecked)]
    if not arrays:
        raise ValueError("sequences: expected at least one array, got an empty sequence")
    first = arrays[0]
    for i, array in enumerate(arrays):
        if array.ndim == 0 or array.shape[1:] != first.shape[1:]:
            expected = describe(("T", *first.shape[1:]))
            raise ValueError(f"sequences[{i}]: expected shape {expected}, got {describe(array.shape)}")
        if array.dtype != first.dtype:
            raise TypeError(f"sequences[{i}]: expected {first.dtype} as sequences[0], got {array.dtype}")
    lengths = np.array([len(array) for array in arrays], np.int64)
    steps, batch = int(lengths.max()), len(arrays)
    x = np.zeros((batch, steps, *first.shape[1:]) if batch_first else (steps, batch, *first.shape[1:]), first.dtype)
    rows = x if batch_first else x.swapaxes(0, 1)
    for row, array in zip(rows, arrays, strict=True):
        row[: len(array)] = array
    return x, lengths


def unpad(x: object, lengths: object, *, batch_first: bool = False) -> list[Array]:
    """Take a batch apart: as many first steps of each row as its length says. The inverse of `pad`.

    Parameters
    ----------
    x : array_like
        (T, B, ...), or (B, T, ...) with batch_first.
    lengths : array_like of integers
        (B,), each from 0 to T.
    batch_first : bool

    Returns
    -------
    list of ndarray
        B copies, each (lengths[i], ...).
    """
    batch_first = flag("batch_first", batch_first)
    array = as_array("x", x)
    if array.ndim < 2:
        expected = ("B", "T", "...") if batch_first else ("T", "B", "...")
        raise ValueError(f"x: expected shape {describe(expected)}, got {describe(array.shape)}")
    rows = array if batch_first else array.swapaxes(0, 1)
    checked = whole_lengths(lengths, (rows.shape[0],), rows.shape[1])
    return [row[:length].copy() for row, length in zip(rows, checked, strict=True)]


def whole_lengths(lengths: object, shape: tuple[int, ...], steps: int, name: str = "lengths") -> Array:
    """`lengths` as int64 of the given shape, each from 0 to `steps`."""
    array = np.array(as_array(name, lengths))  # a copy, so that nobody changes it after the check
    if array.dtype.kind not in "iu" and not _is_empty_list(array):
        raise TypeError(f"{name}: expected whole numbers, got {array.dtype}")
    array = shaped(name, array, shape)
    for wrong in array[(array < 0) | (array > steps)].flat:
        raise ValueError(f"{name}: expected numbers from 0 to {steps} (T), got {wrong}")
    return array.astype(np.int64)


def _is_empty_list(array: Array) -> bool:
    """Whether `array` may have been made from [], which NumPy turns into float64."""
    return array.size == 0 and array.dtype == np.float64


def restarts(resets: object, shape: tuple[int, ...]) -> Array:
    """`resets` as bools of the given shape: bools, or numbers that are exactly 0 or 1."""
    array = np.array(as_array("resets", resets))
    if array.dtype.kind not in "biuf":
        raise TypeError(f"resets: expected bools, or numbers that are 0 or 1, got {array.dtype}")
    array = shaped("resets", array, shape)
    if array.dtype.kind != "b":
        for wrong in array[(array != 0) & (array != 1)].flat:
            raise ValueError(f"resets: expected bools, or numbers that are 0 or 1, got {wrong}")
    return np.asarray(array, np.bool_, order="C")


def schedule_of(axes: SequenceAxes, lengths: object, resets: object) -> tuple[_core.Schedule | None, int]:
    """Which rows take which steps, for the core, and the steps of the longest row.

    None: every row takes every step, and nothing is reset.
    """
    steps, short_lengths, flags = axes.steps, None, None
    if lengths is not None:
        row_lengths = whole_lengths(lengths, axes.rows, steps).reshape(axes.batch)
        if (row_lengths < steps).any():
            short_lengths, steps = row_lengths, int(row_lengths.max())
    if resets is not None:
        all_flags = restarts(resets, axes.leading)
        time_major = axes.to_time_major(all_flags)[:steps]
        if time_major.any():
            flags = np.ascontiguousarray(time_major)
    if short_lengths is None and flags is None:
        return None, steps
    return _core.Schedule(steps, axes.batch, short_lengths, flags), steps


def zero_tail(sequence: Array, steps: int) -> Array:
    """The first steps of a sequence (T, B, ...), which the core writes; the steps after them become zero."""
    sequence[steps:] = 0
    return sequence[:steps]


def flags_of_rows(name: str, rows: object, batch: int) -> Array:
    """`rows` as bools (B,): it may be bools (B,), an index, or several indices."""
    array = as_array(name, rows)
    if array.dtype.kind == "b":
        return np.ascontiguousarray(shaped(name, array, (batch,)))
    if array.dtype.kind not in "iu" and not _is_empty_list(array):
        raise TypeError(f"{name}: expected bools or indices of rows, got {array.dtype}")
    if array.ndim > 1:
        raise ValueError(f"{name}: expected an index or a list of them, got shape {describe(array.shape)}")
    flags = np.zeros(batch, np.bool_)
    for index in array.reshape(-1):
        if not -batch <= index < batch:
            raise ValueError(f"{name}: expected indices from 0 to {batch - 1}, got {index}")
        if flags[int(index)]:
            raise ValueError(f"{name}: expected each row once, got {index} again; flags must be bools")
        flags[int(index)] = True
    return flags
