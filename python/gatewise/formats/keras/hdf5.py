"""Reading of HDF5 files that may come from anywhere: numbers and texts, in time and memory bounded by the file's size.

Keras uses a small part of HDF5 (https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html): groups,
attributes of texts, and arrays in one piece. Only that part is read, and everything else is refused. The library of
HDF5 is not used: it follows the addresses in a file wherever they lead, also in circles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gatewise.arguments.arrays import Array, describe
from gatewise.formats.keras.hdf5_objects import (
    MAX_NAME,
    SIGNATURE,
    UNDEFINED,
    VARIABLE,
    Attribute,
    BoundedFile,
    Cursor,
    Object,
    read_global_heap,
    read_object,
    root_address,
)

__all__ = ["MAX_NAME", "SIGNATURE", "Store"]

MAX_DEPTH = 32  # of groups in groups
MAX_PIECES = 300  # of a list of texts: each holds up to 64 KB, and Keras makes no more pieces than it must


class Store:
    """The groups, datasets and attributes of one file, by their paths."""

    def __init__(self, data: bytes) -> None:
        self._file = BoundedFile(data)
        self._objects: dict[int, Object] = {}
        self._heaps: dict[int, dict[int, int]] = {}
        self._left = len(data)  # bytes of arrays: many names may lead to the same ones
        self._root = self._object(root_address(self._file))

    def has(self, path: str) -> bool:
        return self._find(path) is not None

    def datasets(self, path: str) -> list[str]:
        """The paths of all datasets under a group."""
        paths: list[str] = []
        waiting = [(path, self._group(path), 0)]
        seen: set[int] = set()
        while waiting:
            group_path, group, depth = waiting.pop()
            if id(group) in seen or depth > MAX_DEPTH:
                raise ValueError(f"{path}: expected each group once and {MAX_DEPTH} levels at most")
            seen.add(id(group))
            for name in group.links:
                child_path = f"{group_path}/{name}"
                self._file.spend(len(child_path))
                child = self._child(group, name, child_path)
                if child.is_group:
                    waiting.append((child_path, child, depth + 1))
                else:
                    paths.append(child_path)
        return paths

    def array(self, path: str, shape: tuple[int | None, ...]) -> Array:
        """The numbers of a dataset, which must have this shape; None stands for any size but zero."""
        dataset = self._find(path)
        if dataset is None or dataset.is_group:
            present = "nothing" if dataset is None else "a group"
            raise ValueError(f"{path}: expected a dataset of shape {_shown(shape)}, got {present}")
        if dataset.type is None or dataset.type.dtype is None:
            raise ValueError(f"{path}: expected float32 or float64, got {dataset.type}")
        actual = dataset.shape
        if actual is None or not _fits(actual, shape):
            raise ValueError(f"{path}: expected shape {_shown(shape)}, got {actual}")
        dtype = dataset.type.dtype
        size = math.prod(actual) * dtype.itemsize
        numbers = self._numbers(path, dataset, size)
        self._left -= size
        if self._left < 0:
            size = len(self._file.data)
            raise ValueError(f"{path}: expected datasets of {size} bytes together, as the file has, got more")
        return np.frombuffer(numbers, dtype).reshape(actual).astype(dtype.newbyteorder("="))

    def _numbers(self, path: str, dataset: Object, size: int) -> memoryview:
        """The bytes of a dataset, all of which must be within the file."""
        layout = Cursor(dataset.layout or b"")
        version, kind = layout.number(1), layout.number(1)
        # Keras writes neither chunks nor filters. With them a few bytes of the file could become any number of bytes.
        if dataset.is_elsewhere or version not in (3, 4) or kind > 1:
            raise ValueError(f"{path}: expected numbers in one piece, got chunks, or numbers of other files")
        if kind == 0:  # in the header itself
            stored = layout.number(2)
            begin, data = 0, layout.bytes(stored)
        else:
            begin, stored, data = layout.number(8), layout.number(8), self._file.data
        if begin == UNDEFINED or stored != size or begin + size > len(data):
            present = 0 if begin == UNDEFINED else min(stored, max(0, len(data) - begin))
            raise ValueError(f"{path}: expected {size} bytes within the file, got {present}")
        return memoryview(data)[begin : begin + size]

    def text(self, path: str, name: str) -> str | None:
        """An attribute that must be a single text; None if it is absent."""
        attribute = self._group(path).attributes.get(name)
        if attribute is None:
            return None
        if attribute.shape != () or not attribute.type.is_text:
            raise ValueError(f"{path}: {name}: expected a text, got {attribute.type} of shape {attribute.shape}")
        return next(self._texts(attribute))

    def texts(self, path: str, name: str) -> list[str] | None:
        """An attribute that must be a list of texts; None if it is absent.

        Because of HDF5's limits a long list is in pieces: name0, name1, ...
        """
        attributes = self._group(path).attributes
        if name in attributes:
            return self._list(path, name, attributes[name])
        texts: list[str] = []
        for piece in range(MAX_PIECES):
            if f"{name}{piece}" not in attributes:
                return texts if piece else None
            texts += self._list(path, f"{name}{piece}", attributes[f"{name}{piece}"])
        raise ValueError(f"{path}: {name}: expected {MAX_PIECES} pieces at most")

    def _list(self, path: str, name: str, attribute: Attribute) -> list[str]:
        shape = attribute.shape
        if shape == (0,):  # NumPy, and so Keras, makes an empty list one of numbers
            return []
        if shape is None or len(shape) != 1 or not attribute.type.is_text:
            raise ValueError(f"{path}: {name}: expected a list of texts, got {attribute.type} of shape {shape}")
        texts = []
        for text in self._texts(attribute):
            if len(text) > MAX_NAME:
                raise ValueError(f"{path}: {name}: expected texts of at most {MAX_NAME} characters, got {len(text)}")
            texts.append(text)
        return texts

    def _texts(self, attribute: Attribute) -> Iterator[str]:
        """The texts of an attribute, one by one."""
        kind, size = attribute.type.kind, attribute.type.size
        count = math.prod(attribute.shape or ())
        if size < 1 or size * count > len(attribute.values) or (kind == VARIABLE and size != 16):
            raise ValueError(f"expected a sound HDF5 file, got {count} texts in {len(attribute.values)} bytes")
        self._file.spend(size * count)
        for begin in range(0, size * count, size):
            value = attribute.values[begin : begin + size]
            text = self._text(value) if kind == VARIABLE else _unpadded(value, attribute.type.bits & 15)
            yield text.decode()

    def _text(self, reference: bytes) -> bytes:
        """The text that a reference to a global heap leads to."""
        cursor = Cursor(reference)
        length, address, index = cursor.number(4), cursor.number(8), cursor.number(4)
        if length == 0:
            return b""
        if address not in self._heaps:
            self._heaps[address] = read_global_heap(self._file, address)
        begin = self._heaps[address].get(index)
        stored = 0 if begin is None else int.from_bytes(self._file.data[begin - 8 : begin], "little")
        if begin is None or length > stored:
            raise ValueError(f"expected a sound HDF5 file, got a text of {length} bytes in an object of {stored}")
        self._file.spend(length)
        return self._file.data[begin : begin + length]

    # -- objects by their names and addresses

    def _group(self, path: str) -> Object:
        group = self._find(path)
        if group is None or not group.is_group:
            raise ValueError(f"{path}: expected a group, got {'nothing' if group is None else 'a dataset'}")
        return group

    def _find(self, path: str) -> Object | None:
        """The object at a path. Only hard links are followed, since others may lead out of the file."""
        current = self._root
        for name in path.split("/") if path else ():
            if not current.is_group or name not in current.links:
                return None
            current = self._child(current, name, path)
        return current

    def _child(self, group: Object, name: str, path: str) -> Object:
        link = group.links[name]
        if isinstance(link, str):
            raise ValueError(f"{path}: expected only hard links, got {link} at {name!r}")
        child = self._object(link)
        if not child.is_group and child.layout is None:
            raise ValueError(f"{path}: expected groups and datasets, got something else at {name!r}")
        return child

    def _object(self, address: int) -> Object:
        if address not in self._objects:
            self._objects[address] = read_object(self._file, address)
        return self._objects[address]


def _fits(actual: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    if len(actual) != len(expected):
        return False
    sizes = zip(actual, expected, strict=True)
    return all(size > 0 if expected_size is None else size == expected_size for size, expected_size in sizes)


def _unpadded(text: bytes, padding: int) -> bytes:
    """A text of fixed length without its padding: it ends at the first zero, or is filled up with zeros or spaces."""
    return text.partition(b"\0")[0] if padding == 0 else text.rstrip(b" " if padding == 2 else b"\0")


def _shown(shape: tuple[int | None, ...]) -> str:
    return describe(["any" if size is None else size for size in shape])
