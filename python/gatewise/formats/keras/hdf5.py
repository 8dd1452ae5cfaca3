"""Reading of HDF5 files that nobody vouches for: numbers and texts, in time and memory bounded by the file's size.

Keras uses a small part of HDF5 (https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html): groups,
attributes of texts, and arrays in one piece. Only that part is read, and everything else is refused. The library of
HDF5 is not used: it follows the addresses in a file wherever they lead, also in circles. Here every byte is read
through `_File`, which ends a reading that takes more than a few times the bytes that the file has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from gatewise.arguments.arrays import Array, describe

SIGNATURE = b"\x89HDF\r\n\x1a\n"
UNDEFINED = 2**64 - 1  # the address of what is not there
MOST_READINGS = 3  # of the whole file, in sum; a text is read twice, and everything else once
MOST_DEPTH = 32  # of groups in groups
MOST_NAME = 1000  # characters: names are repeated in paths
MOST_PIECES = 300  # of a list of texts: HDF5 holds 64 KB in each, and Keras parts no more than it must

# The kinds of messages in the header of an object.
SPACE, LINK_INFO, TYPE, LINK, EXTERNAL, LAYOUT, FILTERS, ATTRIBUTE, CONTINUATION, SYMBOL_TABLE, ATTRIBUTE_INFO = (
    0x01, 0x02, 0x03, 0x06, 0x07, 0x08, 0x0B, 0x0C, 0x10, 0x11, 0x15,
)  # fmt: skip
USED = {SPACE, LINK_INFO, TYPE, LINK, LAYOUT, ATTRIBUTE, SYMBOL_TABLE, ATTRIBUTE_INFO}

SOFT = "a soft one"  # a link that is not followed

# Classes of types.
WHOLE, REAL, TEXT, VARIABLE = 0, 1, 3, 9
CLASSES = (
    "whole numbers", "real numbers", "times", "texts", "bits", "bytes", "records", "references", "names", "texts",
    "arrays",
)  # fmt: skip
# IEEE's floats, of little and big endian: the type's class and bits, size and properties.
DTYPES = {
    bytes.fromhex(f"{bits} {sign} 00 {properties}"): np.dtype(f"{order}f{size}")
    for size, sign, properties in (
        (4, "1f", "04000000 0000 2000 17 08 00 17 7f000000"),
        (8, "3f", "08000000 0000 4000 34 0b 00 34 ff030000"),
    )
    for bits, order in (("20", "<"), ("21", ">"))
}

Value = TypeVar("Value")


class _Cursor:
    """Bytes that are read one after another."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self.at

    def bytes(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise ValueError(f"expected a sound HDF5 file, got a structure of {len(self._data)} bytes that needs more")
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")


class _File:
    """The bytes of a file, which a reading may take a few times at most."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._left = MOST_READINGS * len(data)

    def spend(self, size: int) -> None:
        """Count bytes that are read, or made of what was read."""
        self._left -= size
        if self._left < 0:
            raise ValueError(
                "expected a sound HDF5 file, got one whose addresses lead to the same bytes again and again"
            )

    def read(self, address: int, size: int) -> _Cursor:
        if not address + size <= len(self.data):
            raise ValueError(f"expected a sound HDF5 file, got one of {len(self.data)} bytes that needs more")
        self.spend(size)
        return _Cursor(self.data[address : address + size])

    def signed(self, address: int, size: int, signature: bytes) -> _Cursor:
        """The bytes of a structure after its signature, which says what it is."""
        cursor = self.read(address, size)
        if cursor.bytes(len(signature)) != signature:
            raise ValueError(f"expected a sound HDF5 file, got none of {signature[:4]!r} at {address}")
        return cursor


class _Type(NamedTuple):
    """The type of a dataset or attribute."""

    kind: int  # its class
    bits: int
    size: int  # bytes
    dtype: np.dtype[np.floating] | None  # of the floats that are read

    @classmethod
    def of(cls, data: bytes) -> _Type:
        cursor = _Cursor(data)
        kind, bits, size = cursor.number(1) & 15, cursor.number(3), cursor.number(4)
        return cls(kind, bits, size, DTYPES.get(data[1:20]) if kind == REAL else None)

    @property
    def is_text(self) -> bool:
        return self.kind == TEXT or (self.kind == VARIABLE and self.bits & 15 == 1)

    def __str__(self) -> str:
        if self.kind == WHOLE:
            return f"{'' if self.bits & 8 else 'u'}int{8 * self.size}"
        if self.kind == REAL:
            return f"float{8 * self.size}"
        return CLASSES[self.kind] if self.kind < len(CLASSES) else "something else"


class _Attribute(NamedTuple):
    type: _Type
    shape: tuple[int, ...] | None  # None: no value
    values: bytes


@dataclass(slots=True)
class _Object:
    """What the header of a group or dataset says."""

    is_group: bool = False
    links: dict[str, int | str] = field(default_factory=dict)  # an address, or the kind of a link that is not followed
    attributes: dict[str, _Attribute] = field(default_factory=dict)
    type: _Type | None = None
    shape: tuple[int, ...] | None = None
    layout: bytes | None = None
    is_elsewhere: bool = False  # filtered, or in other files


class Store:
    """The groups, datasets and attributes of one file, by their paths."""

    def __init__(self, data: bytes) -> None:
        self._file = _File(data)
        self._objects: dict[int, _Object] = {}
        self._heaps: dict[int, dict[int, int]] = {}
        self._left = len(data)  # bytes of arrays: many names may lead to the same ones
        self._root = self._object(_root_address(self._file))

    def has(self, path: str) -> bool:
        return self._find(path) is not None

    def datasets(self, path: str) -> list[str]:
        """The paths of all datasets under a group."""
        names: list[str] = []
        waiting = [(path, self._group(path), 0)]
        seen: set[int] = set()
        while waiting:
            above, group, depth = waiting.pop()
            if id(group) in seen or depth > MOST_DEPTH:
                raise ValueError(f"{path}: expected each group once and {MOST_DEPTH} levels at most")
            seen.add(id(group))
            for name in group.links:
                inside = f"{above}/{name}"
                self._file.spend(len(inside))
                child = self._child(group, name, inside)
                if child.is_group:
                    waiting.append((inside, child, depth + 1))
                else:
                    names.append(inside)
        return names

    def array(self, path: str, shape: tuple[int | None, ...]) -> Array:
        """The numbers of a dataset of this shape, where None is any size but zero."""
        dataset = self._find(path)
        if dataset is None or dataset.is_group:
            raise ValueError(f"{path}: expected numbers of shape {_described(shape)}, got none")
        if dataset.type is None or dataset.type.dtype is None:
            raise ValueError(f"{path}: expected float32 or float64, got {dataset.type}")
        actual = dataset.shape
        if (
            actual is None
            or len(actual) != len(shape)
            or any(b != a if a is not None else b == 0 for a, b in zip(shape, actual, strict=True))
        ):
            raise ValueError(f"{path}: expected shape {_described(shape)}, got {actual}")
        dtype = dataset.type.dtype
        size = math.prod(actual) * dtype.itemsize
        numbers = self._numbers(path, dataset, size)
        self._left -= size
        if self._left < 0:
            whole = len(self._file.data)
            raise ValueError(f"{path}: expected datasets of {whole} bytes together, as the file has, got more")
        return np.frombuffer(numbers, dtype).reshape(actual).astype(dtype.newbyteorder("="))

    def _numbers(self, path: str, dataset: _Object, size: int) -> memoryview:
        """The bytes of a dataset, which are all there."""
        layout = _Cursor(dataset.layout or b"")
        version, kind = layout.number(1), layout.number(1)
        # Keras writes neither chunks nor filters; with them a few bytes could stand for any number of them.
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
        """An attribute that is one text."""
        attribute = self._group(path).attributes.get(name)
        if attribute is None:
            return None
        if attribute.shape != () or not attribute.type.is_text:
            raise ValueError(f"{path}: {name}: expected a text, got {attribute.type} of shape {attribute.shape}")
        return next(self._texts(attribute))

    def texts(self, path: str, name: str) -> list[str] | None:
        """An attribute that is a list of texts: whole, or because of HDF5's limits in pieces name0, name1, ..."""
        attributes = self._group(path).attributes
        if name in attributes:
            return self._list(path, name, attributes[name])
        texts: list[str] = []
        for piece in range(MOST_PIECES):
            if f"{name}{piece}" not in attributes:
                return texts if piece else None
            texts += self._list(path, f"{name}{piece}", attributes[f"{name}{piece}"])
        raise ValueError(f"{path}: {name}: expected {MOST_PIECES} pieces at most")

    def _list(self, path: str, name: str, attribute: _Attribute) -> list[str]:
        shape = attribute.shape
        if shape == (0,):  # which NumPy, and so Keras, makes a list of numbers
            return []
        if shape is None or len(shape) != 1 or not attribute.type.is_text:
            raise ValueError(f"{path}: {name}: expected a list of texts, got {attribute.type} of shape {shape}")
        texts = []
        for text in self._texts(attribute):
            if len(text) > MOST_NAME:
                raise ValueError(f"{path}: {name}: expected texts of at most {MOST_NAME} characters, got {len(text)}")
            texts.append(text)
        return texts

    def _texts(self, attribute: _Attribute) -> Iterator[str]:
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
        cursor = _Cursor(reference)
        length, address, index = cursor.number(4), cursor.number(8), cursor.number(4)
        if length == 0:
            return b""
        if address not in self._heaps:
            self._heaps[address] = _global_heap(self._file, address)
        begin = self._heaps[address].get(index)
        stored = 0 if begin is None else int.from_bytes(self._file.data[begin - 8 : begin], "little")
        if begin is None or length > stored:
            raise ValueError(f"expected a sound HDF5 file, got a text of {length} bytes where there are {stored}")
        self._file.spend(length)
        return self._file.data[begin : begin + length]

    # -- objects by their names and addresses

    def _group(self, path: str) -> _Object:
        group = self._find(path)
        if group is None or not group.is_group:
            raise ValueError(f"{path}: expected a group, got {'nothing' if group is None else 'a dataset'}")
        return group

    def _find(self, path: str) -> _Object | None:
        """The object at a path, through hard links: others may lead out of the file."""
        place = self._root
        for name in path.split("/") if path else ():
            if not place.is_group or name not in place.links:
                return None
            place = self._child(place, name, path)
        return place

    def _child(self, group: _Object, name: str, path: str) -> _Object:
        link = group.links[name]
        if isinstance(link, str):
            raise ValueError(f"{path}: expected no links but hard ones, got {link} at {name!r}")
        child = self._object(link)
        if not child.is_group and child.layout is None:
            raise ValueError(f"{path}: expected groups and datasets, got something else at {name!r}")
        return child

    def _object(self, address: int) -> _Object:
        if address not in self._objects:
            self._objects[address] = _read_object(self._file, address)
        return self._objects[address]


def _unpadded(text: bytes, padding: int) -> bytes:
    """A text of fixed length: ended by a zero, or filled up with zeros or spaces."""
    return text.partition(b"\0")[0] if padding == 0 else text.rstrip(b" " if padding == 2 else b"\0")


def _described(shape: tuple[int | None, ...]) -> str:
    return describe(["any" if size is None else size for size in shape])


# ---- the structures of the format


def _root_address(file: _File) -> int:
    """Where the header of the first group is, which the superblock says."""
    cursor = file.read(0, min(96, len(file.data)))
    signature, version = cursor.bytes(8), cursor.number(1)
    if signature != SIGNATURE or version > 3:
        raise ValueError("expected an HDF5 file, got another one")
    if version < 2:
        cursor.bytes(4)
    sizes = cursor.bytes(2)
    cursor.bytes({0: 9, 1: 13}.get(version, 1))
    base, _, end = cursor.number(8), cursor.number(8), cursor.number(8)
    if sizes != b"\x08\x08" or base:
        raise ValueError("expected an HDF5 file with addresses of 8 bytes from its beginning")
    if end > len(file.data):
        raise ValueError(f"expected a sound HDF5 file of {end} bytes, got {len(file.data)}")
    if version < 2:
        cursor.bytes(16)  # the address of a driver's information, and the root's name
    return cursor.number(8)


def _read_object(file: _File, address: int) -> _Object:
    header = _Object()
    for kind, flags, body in _messages(file, address):
        if kind in USED and flags & 2:
            raise ValueError("expected an HDF5 file whose objects share no types, which Keras never writes")
        if kind == ATTRIBUTE:
            name, attribute = _read_attribute(body)
            _add(header.attributes, name, attribute)
        elif kind == TYPE:
            header.type = _Type.of(body)
        elif kind == SPACE:
            header.shape = _read_shape(body)
        elif kind == LAYOUT:
            header.layout = body
        elif kind in (EXTERNAL, FILTERS):
            header.is_elsewhere = True
        elif kind == LINK:
            header.is_group = True
            _add(header.links, *_read_link(body))
        elif kind == SYMBOL_TABLE:
            header.is_group = True
            for name, link in _symbols(file, body):
                _add(header.links, name, link)
        elif kind in (LINK_INFO, ATTRIBUTE_INFO):
            header.is_group |= kind == LINK_INFO
            _check_info(kind, body)
    return header


def _add(entries: dict[str, Value], name: str, value: Value) -> None:
    if name in entries or len(name) > MOST_NAME:
        raise ValueError(f"expected names of at most {MOST_NAME} characters, each once, got {name[:100]!r}")
    entries[name] = value


def _messages(file: _File, address: int) -> Iterator[tuple[int, int, bytes]]:
    """The messages of an object's header, also in the blocks that continue it: their kinds, flags and bodies."""
    first = file.read(address, 16)
    is_new = first.bytes(4) == b"OHDR"
    first.at = 0
    size_of_head = 8
    if is_new:
        version, flags = first.bytes(6)[4:]
        size_of_head = 6 if flags & 4 else 4
        begin = address + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        width = 1 << (flags & 3)
        blocks = [(begin + width, file.read(begin, width).number(width))]
    else:
        version = first.number(1)
        first.at = 8
        blocks = [(address + 16, first.number(4))]
    if version != 1 + is_new:
        raise ValueError(f"expected a sound HDF5 file, got no header of an object at {address}")
    for i, (begin, size) in enumerate(blocks):  # which grow
        block = file.read(begin, size)
        if is_new and i:
            if block.bytes(4) != b"OCHK":
                raise ValueError(f"expected a sound HDF5 file, got no continued header at {begin}")
            block = _Cursor(block.bytes(block.left - 4))  # without a checksum
        while block.left >= size_of_head:
            kind, length = block.number(1 if is_new else 2), block.number(2)
            flags = block.bytes(size_of_head - (3 if is_new else 4))[0]
            body = block.bytes(length)
            if kind == CONTINUATION:
                place = _Cursor(body)
                blocks.append((place.number(8), place.number(8)))
            else:
                yield kind, flags, body


def _read_attribute(body: bytes) -> tuple[str, _Attribute]:
    cursor = _Cursor(body)
    version, flags = cursor.number(1), cursor.number(1)
    sizes = [cursor.number(2) for _ in range(3)]
    if version not in (1, 2, 3) or (version > 1 and flags & 3):
        raise ValueError("expected a sound HDF5 file, got an attribute of an unknown version or a shared type")
    cursor.bytes(version == 3)  # the encoding of the name
    name, kind, space = (cursor.bytes(-(-size // 8) * 8 if version == 1 else size) for size in sizes)
    return name.partition(b"\0")[0].decode(), _Attribute(_Type.of(kind), _read_shape(space), cursor.bytes(cursor.left))


def _read_shape(space: bytes) -> tuple[int, ...] | None:
    cursor = _Cursor(space)
    version, rank, _, kind = cursor.bytes(4)
    if version not in (1, 2):
        raise ValueError(f"expected a sound HDF5 file, got a shape of version {version}")
    if version == 2 and kind == 2:
        return None
    cursor.bytes(4 if version == 1 else 0)
    return tuple(cursor.number(8) for _ in range(rank))


def _read_link(body: bytes) -> tuple[str, int | str]:
    """A name in a group, and where it leads."""
    cursor = _Cursor(body)
    version, flags = cursor.number(1), cursor.number(1)
    if version != 1:
        raise ValueError(f"expected a sound HDF5 file, got a link of version {version}")
    kind = cursor.number(1) if flags & 8 else 0
    cursor.bytes(8 * bool(flags & 4) + bool(flags & 16))  # the order in which links were made, and the encoding
    name = cursor.bytes(cursor.number(1 << (flags & 3))).decode()
    return name, cursor.number(8) if kind == 0 else {1: SOFT, 64: "an external one"}.get(kind, "one of a user")


def _check_info(kind: int, body: bytes) -> None:
    """Whether the links or attributes of an object are all in its header."""
    cursor = _Cursor(body)
    has_order = cursor.bytes(2)[1] & 1
    cursor.bytes((8 if kind == LINK_INFO else 2) * has_order)
    if cursor.number(8) != UNDEFINED:
        what = "links" if kind == LINK_INFO else "attributes"
        raise ValueError(f"expected the {what} of a group one after another, as Keras writes them, got a heap of them")


def _symbols(file: _File, body: bytes) -> Iterator[tuple[str, int | str]]:
    """The links of a group in the older form: a tree of nodes, and a local heap of names."""
    cursor = _Cursor(body)
    tree, heap = cursor.number(8), cursor.number(8)
    head = file.signed(heap, 32, b"HEAP\0")
    head.bytes(3)
    size, _, begin = head.number(8), head.number(8), head.number(8)
    names = file.read(begin, size).bytes(size)
    for node in _nodes(file, tree):
        head = file.signed(node, 8, b"SNOD\1")
        head.bytes(1)
        count = head.number(2)
        entries = file.read(node + 8, 40 * count)
        for _ in range(count):
            place, address, kind = entries.number(8), entries.number(8), entries.number(4)
            entries.bytes(20)
            end = names.find(b"\0", place)
            if end < 0:
                raise ValueError("expected a sound HDF5 file, got a name without an end")
            file.spend(end - place)
            yield names[place:end].decode(), SOFT if kind == 2 else address


def _nodes(file: _File, address: int) -> Iterator[int]:
    """The addresses of the symbols' nodes under a tree."""
    waiting: list[tuple[int, int | None]] = [(address, None)]
    while waiting:
        address, expected = waiting.pop()
        head = file.signed(address, 24, b"TREE\0")
        level, count = head.number(1), head.number(2)
        if expected not in (None, level):
            raise ValueError(f"expected a sound HDF5 file, got a node of level {level} instead of {expected}")
        entries = file.read(address + 24, 8 + 16 * count)
        for _ in range(count):
            entries.bytes(8)  # a key
            child = entries.number(8)
            if level:
                waiting.append((child, level - 1))
            else:
                yield child


def _global_heap(file: _File, address: int) -> dict[int, int]:
    """Where the objects of a heap begin, by their numbers. The eight bytes before an object are its size."""
    head = file.signed(address, 16, b"GCOL\1")
    head.bytes(3)
    size = head.number(8)
    cursor = file.read(address, size)
    cursor.bytes(16)
    places: dict[int, int] = {}
    while cursor.left >= 16:
        index = cursor.number(2)
        cursor.bytes(6)
        length = cursor.number(8)
        if index == 0:  # the rest is free
            break
        places[index] = address + cursor.at
        cursor.bytes(-(-length // 8) * 8)
    return places
