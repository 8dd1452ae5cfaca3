"""Reading of HDF5 files that nobody vouches for: plain numbers and text, bounded by the size of the file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from gatewise.arrays import Array, describe

SIGNATURE = b"\x89HDF\r\n\x1a\n"
DTYPES = ("float32", "float64")
VLEN = [bytes([version << 4 | 9]) for version in range(1, 6)]  # how types of variable length begin
MOST_OBJECTS = 2**16  # groups and datasets that are looked at
MOST_DEPTH = 32  # of groups in groups

Found = TypeVar("Found")


def _asked(what: Callable[[], Found]) -> Found:
    """What the HDF5 library says, whose errors are of many kinds, OSError and RuntimeError among them."""
    try:
        return what()
    except Exception as error:
        raise ValueError(f"expected a sound HDF5 file, got {type(error).__name__}: {error}") from None


class Store:
    """The groups, datasets and attributes of one file, by their paths."""

    def __init__(self, file: Any, data: bytes) -> None:
        self._file = file
        self._data = data
        self._size = len(data)
        self._left = len(data)  # of the bytes that may be read: many names may lead to the same ones
        self._checked: set[str] = set()

    def has(self, path: str) -> bool:
        return self._find(path) is not None

    def group(self, path: str) -> Any:
        found = self._find(path)
        if not _is_group(found):
            raise ValueError(f"{path}: expected a group, got {'nothing' if found is None else 'a dataset'}")
        return found

    def _find(self, path: str) -> Any:
        """The object at a path, going through hard links alone: others may lead out of the file."""
        found = self._file
        for name in path.split("/"):
            if not _is_group(found) or not _asked(lambda name=name, of=found: of.get(name, getlink=True)):  # type: ignore[misc]
                return None
            found = _child(found, name, path)
        return found

    def datasets(self, path: str) -> list[str]:
        """The paths of all datasets under a group."""
        names: list[str] = []
        waiting = [(path, self.group(path), 0)]
        count = 0
        while waiting:
            at, group, depth = waiting.pop()
            for name in _asked(lambda group=group: list(group)):  # type: ignore[misc]
                count += 1
                if count > MOST_OBJECTS or depth > MOST_DEPTH:
                    raise ValueError(f"{path}: expected {MOST_OBJECTS} objects and {MOST_DEPTH} levels at most")
                inside = f"{at}/{name}"
                child = _child(group, name, inside)
                if _is_group(child):
                    waiting.append((inside, child, depth + 1))
                else:
                    names.append(inside)
        return names

    def array(self, path: str, shape: tuple[int | None, ...]) -> Array:
        """The numbers of a dataset of this shape, where None is any size but zero."""
        found = self._find(path)
        if found is None or _is_group(found):
            raise ValueError(f"{path}: expected numbers of shape {_shape(shape)}, got none")
        dataset = _asked(lambda: (found.shape, found.dtype, found.chunks, found.external, found.is_virtual))
        actual, dtype, chunks, external, is_virtual = dataset
        if dtype.kind != "f" or dtype.name not in DTYPES:
            raise ValueError(f"{path}: expected {' or '.join(DTYPES)}, got {dtype}")
        if (
            actual is None
            or len(actual) != len(shape)
            or any(b != a if a is not None else b == 0 for a, b in zip(shape, actual, strict=True))
        ):
            raise ValueError(f"{path}: expected shape {_shape(shape)}, got {actual}")
        # Keras writes neither chunks nor filters; with them a few bytes could stand for any number of them.
        if chunks is not None or external or is_virtual:
            raise ValueError(f"{path}: expected numbers in one piece, got chunks, or numbers of other files")
        self._check_size(path, found, actual, dtype.itemsize)
        return np.ascontiguousarray(_asked(lambda: found[()]), dtype.name)

    def _check_size(self, path: str, dataset: Any, shape: tuple[int, ...], itemsize: int) -> None:
        """Before there is room for them: whether the file holds that many bytes."""
        size = itemsize
        for length in shape:
            size *= int(length)
        stored, begin = _asked(lambda: (dataset.id.get_storage_size(), dataset.id.get_offset() or 0))
        if stored != size or begin + size > self._size:
            raise ValueError(f"{path}: expected {size} bytes within the file, got {min(stored, self._size - begin)}")
        self._left -= size
        if self._left < 0:
            raise ValueError(f"{path}: expected datasets of {self._size} bytes together, as the file has, got more")

    def text(self, path: str, name: str) -> str | None:
        """An attribute that is one text."""
        found = self._attribute(path, name)
        if found is None:
            return None
        if np.shape(found) != () or not isinstance(found, (str, bytes)):
            raise ValueError(f"{path}: {name}: expected a text, got {type(found).__name__}")
        return found if isinstance(found, str) else found.decode()

    def texts(self, path: str, name: str) -> list[str] | None:
        """An attribute that is a list of texts: whole, or because of HDF5's limits in pieces name0, name1, ..."""
        found = self._attribute(path, name)
        if found is not None:
            return _texts(path, name, found)
        texts: list[str] = []
        for piece in range(MOST_OBJECTS):
            found = self._attribute(path, f"{name}{piece}")
            if found is None:
                return texts if piece else None
            texts += _texts(path, name, found)
        raise ValueError(f"{path}: {name}: expected {MOST_OBJECTS} pieces at most")

    def _attribute(self, path: str, name: str) -> Any:
        group = self.group(path) if path else self._file
        attributes = _asked(lambda: group.attrs)
        if not _asked(lambda: name in attributes):
            return None

        def described() -> tuple[Any, Any, int]:
            of = attributes.get_id(name)
            is_empty = of.shape is not None and 0 in of.shape  # whose size HDF5 calls an error
            return of.shape, of.dtype, 0 if is_empty else of.get_storage_size()

        shape, dtype, size = _asked(described)
        if size > self._size or (shape and int(np.prod(shape, dtype=object)) > self._size):
            raise ValueError(f"{path}: {name}: expected less than the {self._size} bytes of the file, got {size}")
        if dtype.kind == "O" and (dtype.metadata or {}).get("vlen") not in (str, bytes):
            raise ValueError(f"{path}: {name}: expected texts, got {dtype}")
        if dtype.kind == "O" and name not in self._checked:
            _check_texts(self._data, name)
            self._checked.add(name)
        return _asked(lambda: attributes[name])


def _check_texts(data: bytes, name: str) -> None:
    """Whether the texts of all attributes of this name are shorter than the file together, and their heaps sound.

    HDF5 makes room for a text, of up to 4 GB, before it looks whether there is one of that length, and goes round for
    ever in a heap with an object of no size. So both are looked up here: in whatever may be a message of such an
    attribute, for which its name stands in the file.
    """
    # Sizes of addresses and lengths, and what addresses count from, in the superblock.
    sizes, base = (data[13:15], data[24:32]) if data[8] < 2 else (data[9:11], data[12:20])
    if sizes != b"\x08\x08" or any(base):
        raise ValueError("expected an HDF5 file with addresses of 8 bytes from its beginning")
    key = name.encode() + b"\0"
    found: list[tuple[int, int]] = []
    begin = data.find(key)
    while begin >= 0:
        # Of the versions of such a message the third has a byte more, for the encoding.
        found += _references(data, begin, len(key), False) + _references(data, begin, len(key), True)
        begin = data.find(key, begin + 1)
    heaps = {address for length, address in found if length}
    length = sum(length for length, _ in found)
    if not found or length > len(data) or sum(_number(data, address + 8, 8) for address in heaps) > len(data):
        raise ValueError(f"{name}: expected texts within the file's {len(data)} bytes, got {length}")
    for address in heaps:
        _check_heap(data, address)


def _number(data: bytes, begin: int, size: int) -> int:
    return int.from_bytes(data[begin : begin + size], "little")


def _references(data: bytes, begin: int, size: int, is_third: bool) -> list[tuple[int, int]]:
    """The lengths and heaps of texts of an attribute whose name begins there; none if that is no attribute of texts."""
    start = begin - 8 - is_third
    if start < 0 or (data[start] != 3 if is_third else data[start] not in (1, 2)):
        return []
    sizes = [_number(data, i, 2) for i in range(start + 2, start + 8, 2)]  # of the name, the type, the shape
    name, kind, space = (-(-one // 8) * 8 if data[start] == 1 else one for one in sizes)
    shape = data[begin + name + kind : begin + name + kind + space]
    if sizes[0] < size or data[begin + name : begin + name + 1] not in VLEN or len(shape) < 4:
        return []
    first = 8 if shape[0] == 1 else 4
    count = 1
    for axis in range(shape[1]):
        count *= _number(shape, first + 8 * axis, 8)
    texts = begin + name + kind + space
    last = min(texts + 16 * count, len(data) - 15)
    return [(_number(data, i, 4), _number(data, i + 4, 8)) for i in range(texts, last, 16)]


def _check_heap(data: bytes, address: int) -> None:
    """Whether the objects of a heap lie in it one behind the other."""
    end = address + _number(data, address + 8, 8)
    at = address + 16
    is_sound = data[address : address + 5] == b"GCOL\x01" and end <= len(data)
    while is_sound and at + 16 <= end:
        index, size = _number(data, at, 2), _number(data, at + 8, 8)
        step = 16 + -(-size // 8) * 8 if index else size  # the first index is that of what is free
        is_sound = 0 < step <= end - at
        at += step
    if not is_sound:
        raise ValueError(f"expected a sound heap of texts in the file at {address}, got none")


def _texts(path: str, name: str, found: Any) -> list[str]:
    array = np.asarray(found)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "OSU"):
        raise ValueError(f"{path}: {name}: expected a list of texts, got {array.dtype} of shape {array.shape}")
    return [one.decode() if isinstance(one, bytes) else str(one) for one in array.tolist()]


def _shape(shape: tuple[int | None, ...]) -> str:
    return describe(["any" if size is None else size for size in shape])


def _is_group(found: Any) -> bool:
    return found is not None and hasattr(found, "keys")


def _child(group: Any, name: str, path: str) -> Any:
    """What stands behind a hard link of a group."""
    import h5py

    link = _asked(lambda: group.get(name, getlink=True))
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{path}: expected no links but hard ones, got {type(link).__name__} at {name!r}")
    child = _asked(lambda: group[name])
    if not isinstance(child, (h5py.Group, h5py.Dataset)):
        raise ValueError(f"{path}: expected groups and datasets, got {type(child).__name__} at {name!r}")
    return child


@contextmanager
def opened(data: bytes) -> Iterator[Store]:
    """The store in the bytes of a file."""
    try:
        import h5py
    except ImportError:
        raise ModuleNotFoundError("models of Keras need h5py: pip install 'gatewise[keras]'", name="h5py") from None

    found = _asked(lambda: h5py.File(io.BytesIO(data), "r"))
    try:
        yield Store(found, data)
    finally:
        _asked(found.close)
