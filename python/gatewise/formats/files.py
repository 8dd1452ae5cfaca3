"""Files that models are read from and written to: only regular files are read, and none is ever half written."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, BufferedWriter

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether the path leads to a file, and not to a directory, a device or a pipe, which would wait for a writer."""
    return stat.S_ISREG(os.stat(path).st_mode)


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file for reading; ValueError for anything that is not a regular file."""
    if not is_regular(path):
        raise ValueError("expected a file")
    return open(path, "rb")


def read_bounded(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a whole file; ValueError if it is longer than `max_bytes`, before anything is read."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"expected a file of at most {max_bytes} bytes, got {size}")
        return file.read(size)


@contextmanager
def replacing(path: str) -> Iterator[BufferedWriter]:
    """Open a new file that takes the place of `path` when the block ends.

    Whoever reads `path` meanwhile gets the old file. If the block raises, the new file is removed and the old one is
    untouched. The new file may also be written by its name, `file.name`.

    Raises
    ------
    OSError
        If `path` leads to something that is not a regular file, or the file cannot be written. It names `path`, since
        nobody knows the new file by its own name.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "expected a file, or nothing yet", path)
    target = os.path.realpath(path)
    try:
        file, temporary = _new_temporary(target)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, path) from None
    with file:
        try:
            if mode is not None:
                os.chmod(temporary, stat.S_IMODE(mode))  # while the file is still empty
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException as error:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            if isinstance(error, OSError) and error.filename == temporary:
                error.filename = path
            raise
    _remove_abandoned(target)


def write_pieces(path: str, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file of these pieces, one after another, in place of the old one: all of it or nothing."""
    with replacing(path) as file:
        for piece in pieces:
            file.write(piece)


def _new_temporary(target: str) -> tuple[BufferedWriter, str]:
    """Make a new file in the target's folder, locked for as long as it is open; also give its name."""
    while True:
        temporary = f"{_temporary_prefix(target)}{secrets.token_hex(8)}"
        file = open(temporary, "xb")  # noqa: SIM115  # the caller closes it
        if fcntl is None:
            return file, temporary
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(temporary):
            return file, temporary
        file.close()  # another process removed it as abandoned, before it was locked


def _remove_abandoned(target: str) -> None:
    """Remove the files of processes that were killed while they wrote this target: those that nobody locks."""
    if fcntl is None:
        return
    folder, prefix = os.path.split(_temporary_prefix(target))
    with suppress(OSError), os.scandir(folder) as entries:
        paths = [entry.path for entry in entries if entry.name.startswith(prefix)]
        for path in paths:
            with suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)


def _temporary_prefix(target: str) -> str:
    """How the paths of a target's temporary files begin. The checksum stands for a name of any length."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f".gatewise.{zlib.crc32(os.fsencode(name)):08x}.")
