"""Sequences as they come: of different lengths in one batch, and with restarts in the middle."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import Array, as_array, describe, flag, shaped
from gatewise.arguments.axes import SequenceAxes


def pad(sequences: Iterable[object], *, batch_first: bool = False) -> tuple[Array, Array]:
    """Put sequences of different lengths into one batch, with zeros behind their ends.

    Parameters
    ----------
    sequences : iterable of array_like
        Each (T_i, ...), with the same dtype and the same axes behind the first; a T_i may be 0.
    batch_first : bool
        Whether the batch is (B, T, ...) instead of (T, B, ...).

    Returns
    -------
    x : ndarray
        (T, B, ...) where T is the greatest T_i, in the order of the sequences.
    lengths : ndarray of int64
        (B,), each T_i: what a layer takes as `lengths`.
    """
    batch_first = flag("batch_first", batch_first)
    if isinstance(sequences, (str, bytes)):
        raise TypeError(f"sequences: expected several arrays, got {type(sequences).__name__}")
    try:
        given = list(sequences)
    except TypeError as error:
        raise TypeError(f"sequences: expected several arrays, got {type(sequences).__name__} ({error})") from None
    arrays = [as_array(f"sequences[{i}]", one) for i, one in enumerate(given)]
    if not arrays:
        raise ValueError("sequences: expected one array at least, got none")
    first = arrays[0]
    for i, one in enumerate(arrays):
        if one.ndim == 0 or one.shape[1:] != first.shape[1:]:
            expected = describe(("T", *first.shape[1:]))
            raise ValueError(f"sequences[{i}]: expected shape {expected}, got {describe(one.shape)}")
        if one.dtype != first.dtype:
            raise TypeError(f"sequences[{i}]: expected {first.dtype} as sequences[0], got {one.dtype}")
    lengths = np.array([len(one) for one in arrays], np.int64)
    steps, batch = int(lengths.max()), len(arrays)
    x = np.zeros((batch, steps, *first.shape[1:]) if batch_first else (steps, batch, *first.shape[1:]), first.dtype)
    rows = x if batch_first else x.swapaxes(0, 1)
    for row, one in zip(rows, arrays, strict=True):
        row[: len(one)] = one
    return x, lengths


def unpad(x: object, lengths: object, *, batch_first: bool = False) -> list[Array]:
    """Take a batch apart again: the first steps of each row, as many as its length says. The inverse of `pad`.

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
    whole = whole_lengths(lengths, (rows.shape[0],), rows.shape[1])
    return [row[:length].copy() for row, length in zip(rows, whole, strict=True)]


def whole_lengths(lengths: object, shape: tuple[int, ...], steps: int, name: str = "lengths") -> Array:
    """`lengths` as int64 of the given shape, each from 0 to `steps`."""
    array = np.array(as_array(name, lengths))  # what is checked must be what is used
    if array.dtype.kind not in "iu" and not _is_empty_list(array):
        raise TypeError(f"{name}: expected whole numbers, got {array.dtype}")
    array = shaped(name, array, shape)
    for wrong in array[(array < 0) | (array > steps)].flat:
        raise ValueError(f"{name}: expected numbers from 0 to {steps} (T), got {wrong}")
    return array.astype(np.int64)


def _is_empty_list(array: Array) -> bool:
    """Whether it may have been [], which NumPy takes for floating numbers."""
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


def plan(axes: SequenceAxes, lengths: object, resets: object) -> tuple[_core.Schedule | None, int]:
    """What the core has to know of lengths and resets, if it is anything at all; and the steps of the longest row."""
    batch = axes.rows
    steps, ends, flags = axes.steps, None, None
    if lengths is not None:
        whole = whole_lengths(lengths, batch, steps).reshape(axes.batch)
        if (whole < steps).any():
            ends, steps = whole, int(whole.max())
    if resets is not None:
        shape = (*batch, axes.steps) if axes.batch_first else (axes.steps, *batch)
        given = restarts(resets, shape).reshape(shape if batch else (*shape, 1))
        given = (given.T if axes.batch_first and batch else given)[:steps]
        if given.any():
            flags = np.ascontiguousarray(given)
    if ends is None and flags is None:
        return None, steps
    return _core.Schedule(steps, axes.batch, ends, flags), steps


def cut(sequence: Array, steps: int) -> Array:
    """The first steps of a sequence (T, B, ...) that the core writes; the others become zero."""
    sequence[steps:] = 0
    return sequence[:steps]


def flags_of_rows(name: str, rows: object, batch: int) -> Array:
    """Rows of a batch, given as bools (B,), as one index or as several, as bools (B,)."""
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
