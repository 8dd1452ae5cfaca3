"""Files that commands write."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from gatewise.arguments.arrays import Array


def check_other(output: str, *inputs: str) -> None:
    """No file is overwritten by what is made from it."""
    for path in inputs:
        with suppress(FileNotFoundError):  # said later, by who reads it
            if os.path.samefile(path, output):
                raise ValueError(f"{output}: expected another file than {path}")


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """A file to write, in the folder of `path`, that takes its place at the end; on any exception it is gone."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path}: expected a file, or nothing yet")
    target = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(target), f".gatewise.{secrets.token_hex(8)}")
    try:
        try:
            with open(temporary, "xb"):
                pass
            with suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
            yield temporary
            os.replace(temporary, target)
        except OSError as error:
            if error.filename == temporary:  # which nobody knows
                error.filename = path
            raise
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def write_npy(
    path: str, shape: tuple[int, ...], dtype: np.dtype[Any], axis: int | None, results: Iterable[Array]
) -> None:
    """Results one after the other along the axis of time; axis None: one for all."""
    target = open_memmap(path, "w+", dtype, shape)
    _reserve(path)
    first = 0
    for y in results:
        if axis is None:
            target[...] = y
        else:
            last = first + y.shape[axis]
            target[(slice(None),) * axis + (slice(first, last),)] = y
            first = last
    target.flush()


def _reserve(path: str) -> None:
    """Space for all of a file: a full disk is an error here, and would be a crash where its memory is written."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from None


def write_csv(path: str, results: Iterable[Array]) -> None:
    """A line a step, with as many digits as give the same numbers again."""
    with open(path, "w", encoding="ascii", newline="\n") as file:
        for y in results:
            file.writelines(",".join(map(str, row)) + "\n" for row in np.atleast_2d(y))
