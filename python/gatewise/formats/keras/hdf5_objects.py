"""The structures of an HDF5 file: the headers of groups and datasets, their attributes and links, and heaps.

Every byte is read through `BoundedFile`, which ends a reading that takes more than a few times the bytes of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

SIGNATURE = b"\x89HDF\r\n\x1a\n"
UNDEFINED = 2**64 - 1  # the address of something that is absent
MAX_READINGS = 3  # of the whole file, in sum; a text is read twice, and everything else once
MAX_NAME = 1000  # characters: names are repeated in paths

# The kinds of messages in the header of an object.
SPACE = 0x01
LINK_INFO = 0x02
TYPE = 0x03
LINK = 0x06
EXTERNAL = 0x07
LAYOUT = 0x08
FILTERS = 0x0B
ATTRIBUTE = 0x0C
CONTINUATION = 0x10
SYMBOL_TABLE = 0x11
ATTRIBUTE_INFO = 0x15
USED = {SPACE, LINK_INFO, TYPE, LINK, LAYOUT, ATTRIBUTE, SYMBOL_TABLE, ATTRIBUTE_INFO}

SOFT = "a soft link"  # which is not followed
OTHER_LINKS = {1: SOFT, 64: "an external link"}

# Classes of types.
WHOLE, REAL, TEXT, VARIABLE = 0, 1, 3, 9
CLASSES = (
    "whole numbers",
    "real numbers",
    "times",
    "texts",
    "bits",
    "bytes",
    "records",
    "references",
    "names",
    "texts",
    "arrays",
)
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


class Cursor:
    """Bytes that are read one after another."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self.position

    def bytes(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise ValueError(f"expected a sound HDF5 file, got a structure of {len(self._data)} bytes that needs more")
        self.position += size
        return self._data[self.position - size : self.position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")


class BoundedFile:
    """The bytes of a file, of which a few times the size of the file may be read in all."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._left = MAX_READINGS * len(data)

    def spend(self, size: int) -> None:
        """Count bytes that are read, or made of what was read."""
        self._left -= size
        if self._left < 0:
            raise ValueError(
                "expected a sound HDF5 file, got one whose addresses lead to the same bytes again and again"
            )

    def read(self, address: int, size: int) -> Cursor:
        if not address + size <= len(self.data):
            raise ValueError(f"expected a sound HDF5 file, got one of {len(self.data)} bytes that needs more")
        self.spend(size)
        return Cursor(self.data[address : address + size])

    def read_signed(self, address: int, size: int, signature: bytes) -> Cursor:
        """The bytes of a structure, after the signature that says which structure it is."""
        cursor = self.read(address, size)
        if cursor.bytes(len(signature)) != signature:
            raise ValueError(f"expected a sound HDF5 file with {signature[:4]!r} at {address}, got something else")
        return cursor


class Type(NamedTuple):
    """The type of a dataset or attribute."""

    kind: int  # its class
    bits: int
    size: int  # bytes
    dtype: np.dtype[np.floating] | None  # of floats that can be read

    @classmethod
    def of(cls, data: bytes) -> Type:
        cursor = Cursor(data)
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
        return CLASSES[self.kind] if self.kind < len(CLASSES) else "an unknown type"


class Attribute(NamedTuple):
    type: Type
    shape: tuple[int, ...] | None  # None: no value
    values: bytes


@dataclass(slots=True)
class Object:
    """The contents of the header of a group or dataset."""

    is_group: bool = False
    links: dict[str, int | str] = field(default_factory=dict)  # an address, or the kind of a link that is not followed
    attributes: dict[str, Attribute] = field(default_factory=dict)
    type: Type | None = None
    shape: tuple[int, ...] | None = None
    layout: bytes | None = None
    is_elsewhere: bool = False  # filtered, or in other files


def root_address(file: BoundedFile) -> int:
    """The address of the first group's header, from the superblock."""
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


# ---- headers


def read_object(file: BoundedFile, address: int) -> Object:
    header = Object()
    for kind, flags, body in _messages(file, address):
        if kind in USED and flags & 2:
            raise ValueError("expected an HDF5 file whose objects share no types, which Keras never writes")
        if kind == ATTRIBUTE:
            name, attribute = _read_attribute(body)
            _add(header.attributes, name, attribute)
        elif kind == TYPE:
            header.type = Type.of(body)
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
    if name in entries or len(name) > MAX_NAME:
        raise ValueError(f"expected names of at most {MAX_NAME} characters, each once, got {name[:100]!r}")
    entries[name] = value


def _messages(file: BoundedFile, address: int) -> Iterator[tuple[int, int, bytes]]:
    """The messages of an object's header, also in the blocks that continue it: their kinds, flags and bodies."""
    start = file.read(address, 16)
    is_new = start.bytes(4) == b"OHDR"
    start.position = 0
    size_of_head = 8
    if is_new:
        version, flags = start.bytes(6)[4:]
        size_of_head = 6 if flags & 4 else 4
        begin = address + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        width = 1 << (flags & 3)
        blocks = [(begin + width, file.read(begin, width).number(width))]
    else:
        version = start.number(1)
        start.position = 8
        blocks = [(address + 16, start.number(4))]
    if version != 1 + is_new:
        raise ValueError(f"expected a sound HDF5 file with the header of an object at {address}, got something else")
    for i, (begin, size) in enumerate(blocks):  # continuations are appended meanwhile
        block = file.read(begin, size)
        if is_new and i:
            if block.bytes(4) != b"OCHK":
                raise ValueError(f"expected a sound HDF5 file with a continued header at {begin}, got something else")
            block = Cursor(block.bytes(block.left - 4))  # without a checksum
        while block.left >= size_of_head:
            kind, length = block.number(1 if is_new else 2), block.number(2)
            flags = block.bytes(size_of_head - (3 if is_new else 4))[0]
            body = block.bytes(length)
            if kind == CONTINUATION:
                cursor = Cursor(body)
                blocks.append((cursor.number(8), cursor.number(8)))
            else:
                yield kind, flags, body


def _read_attribute(body: bytes) -> tuple[str, Attribute]:
    cursor = Cursor(body)
    version, flags = cursor.number(1), cursor.number(1)
    sizes = [cursor.number(2) for _ in range(3)]
    if version not in (1, 2, 3) or (version > 1 and flags & 3):
        raise ValueError("expected a sound HDF5 file, got an attribute of an unknown version or a shared type")
    cursor.bytes(version == 3)  # the encoding of the name
    name, kind, space = (cursor.bytes(-(-size // 8) * 8 if version == 1 else size) for size in sizes)
    return name.partition(b"\0")[0].decode(), Attribute(Type.of(kind), _read_shape(space), cursor.bytes(cursor.left))


def _read_shape(space: bytes) -> tuple[int, ...] | None:
    cursor = Cursor(space)
    version, rank, _, kind = cursor.bytes(4)
    if version not in (1, 2):
        raise ValueError(f"expected a sound HDF5 file, got a shape of version {version}")
    if version == 2 and kind == 2:
        return None
    cursor.bytes(4 if version == 1 else 0)
    return tuple(cursor.number(8) for _ in range(rank))


def _read_link(body: bytes) -> tuple[str, int | str]:
    """A name in a group, and the address that it leads to, or the kind of a link that is not followed."""
    cursor = Cursor(body)
    version, flags = cursor.number(1), cursor.number(1)
    if version != 1:
        raise ValueError(f"expected a sound HDF5 file, got a link of version {version}")
    kind = cursor.number(1) if flags & 8 else 0
    cursor.bytes(8 * bool(flags & 4) + bool(flags & 16))  # the order in which links were made, and the encoding
    name = cursor.bytes(cursor.number(1 << (flags & 3))).decode()
    return name, cursor.number(8) if kind == 0 else OTHER_LINKS.get(kind, "a link of another kind")


def _check_info(kind: int, body: bytes) -> None:
    """Refuse an object whose links or attributes are not all in its header."""
    cursor = Cursor(body)
    has_order = cursor.bytes(2)[1] & 1
    cursor.bytes((8 if kind == LINK_INFO else 2) * has_order)
    if cursor.number(8) != UNDEFINED:
        members = "links" if kind == LINK_INFO else "attributes"
        raise ValueError(f"expected the {members} of a group in its header, as Keras writes them, got a heap of them")


# ---- the older form of groups: a tree of nodes, and a local heap of names


def _symbols(file: BoundedFile, body: bytes) -> Iterator[tuple[str, int | str]]:
    """The links of a group in this form."""
    cursor = Cursor(body)
    tree, heap = cursor.number(8), cursor.number(8)
    head = file.read_signed(heap, 32, b"HEAP\0")
    head.bytes(3)
    size, _, begin = head.number(8), head.number(8), head.number(8)
    names = file.read(begin, size).bytes(size)
    for node in tree_nodes(file, tree):
        head = file.read_signed(node, 8, b"SNOD\1")
        head.bytes(1)
        count = head.number(2)
        entries = file.read(node + 8, 40 * count)
        for _ in range(count):
            start, address, kind = entries.number(8), entries.number(8), entries.number(4)
            entries.bytes(20)
            end = names.find(b"\0", start)
            if end < 0:
                raise ValueError("expected a sound HDF5 file, got a name without an end")
            file.spend(end - start)
            yield names[start:end].decode(), SOFT if kind == 2 else address


def tree_nodes(file: BoundedFile, address: int) -> Iterator[int]:
    """The addresses of the nodes with symbols under a tree."""
    waiting: list[tuple[int, int | None]] = [(address, None)]
    while waiting:
        address, expected = waiting.pop()
        head = file.read_signed(address, 24, b"TREE\0")
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


def read_global_heap(file: BoundedFile, address: int) -> dict[int, int]:
    """The addresses of the objects of a heap, by their numbers. The eight bytes before an object are its size."""
    head = file.read_signed(address, 16, b"GCOL\1")
    head.bytes(3)
    size = head.number(8)
    cursor = file.read(address, size)
    cursor.bytes(16)
    addresses: dict[int, int] = {}
    while cursor.left >= 16:
        index = cursor.number(2)
        cursor.bytes(6)
        length = cursor.number(8)
        if index == 0:  # free space, up to the end of the heap
            break
        addresses[index] = address + cursor.position
        cursor.bytes(-(-length // 8) * 8)
    return addresses
