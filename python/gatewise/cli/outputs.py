"""The files that commands write."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from gatewise.arguments.arrays import Array


def check_is_other(output: str, *inputs: str) -> None:
    """Refuse to overwrite a file with what is made from it."""
    for path in inputs:
        with suppress(FileNotFoundError):  # whoever reads the file reports it
            if os.path.samefile(path, output):
                raise ValueError(f"{output}: expected another file than {path}")


def write_npy(
    path: str, shape: tuple[int, ...], dtype: np.dtype[Any], time_axis: int | None, results: Iterable[Array]
) -> None:
    """Write results one after another along the time axis, or the only result if there is no time axis."""
    target = open_memmap(path, "w+", dtype, shape)
    _allocate(path)
    start = 0
    for y in results:
        if time_axis is None:
            target[...] = y
        else:
            stop = start + y.shape[time_axis]
            target[(slice(None),) * time_axis + (slice(start, stop),)] = y
            start = stop
    target.flush()


def _allocate(path: str) -> None:
    """Allocate the whole file: a full disk is an error here, and would be a crash when the mapped memory is written."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from None


def write_csv(path: str, results: Iterable[Array]) -> None:
    """Write a line for each step, with enough digits to read the same numbers again."""
    with open(path, "w", encoding="ascii", newline="\n") as file:
        for y in results:
            file.writelines(",".join(map(str, row)) + "\n" for row in np.atleast_2d(y))
