"""Files that torch.save wrote, read without PyTorch: the pickle as data, and the numbers only on demand.

Since PyTorch 1.6 a file is a zip archive without compression: `data.pkl`, and each storage as a member of its own.
Before that it was several pickles one after another, the last of them a list of the storages' keys, and then the
storages in the order of this list.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from gatewise.arguments.arrays import Array
from gatewise.formats import signatures
from gatewise.formats.pytorch import pickles
from gatewise.formats.pytorch.pickles import ITEM_SIZES, Class, Instance, Storage, Tensor
from gatewise.formats.weights import widened

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of an old file
PROTOCOL = 1001  # the second pickle of an old file
HEADER = 30  # bytes of the header that precedes each member, before its name
HEADER_MARK = b"PK\x03\x04"
DTYPES = {"float32": "f4", "float64": "f8", "float16": "f2", "bfloat16": "u2"}


class Place(NamedTuple):
    """Where a storage lies in the file."""

    begin: int
    size: int


class Checkpoint:
    """The contents of a file: nested dicts of tensors, and the numbers of each tensor on demand.

    Attributes
    ----------
    root : object
        What was saved, with data in place of objects; see `pickles`.
    size : int
        Bytes of the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.root: Any
        self.order = "<"
        head = file.read(64)
        if head.startswith(HEADER_MARK):
            self._open_archive()
        elif head.startswith(b"\x80"):
            self._open_pickles()
        else:
            raise ValueError(f"expected a file that torch.save wrote, got {signatures.described(head)}")

    def numbers(self, tensor: Tensor) -> Array:
        """The values of a tensor, as float32 or float64; float16 and bfloat16 become float32, which is exact."""
        storage = tensor.storage
        if storage is None or tensor.kind not in DTYPES:
            raise ValueError(f"expected numbers of {', '.join(DTYPES)}, got {tensor.kind}")
        count = span(tensor)
        if tensor.offset + count > storage.length:
            raise ValueError(f"expected a view of the {storage.length} numbers of its storage, got a larger one")
        place, dtype = self._place(storage), np.dtype(self.order + DTYPES[tensor.kind])
        first = storage.begin + tensor.offset
        if (first + count) * dtype.itemsize > place.size:
            raise ValueError(f"expected {(first + count) * dtype.itemsize} bytes of numbers, got {place.size}")
        self.file.seek(place.begin + first * dtype.itemsize)
        data = self.file.read(count * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise ValueError("the file was cut while it was read")
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        array: Array = np.ndarray(tensor.shape, dtype, data, strides=strides)
        return widened(array, tensor.kind)

    # -- archives

    def _open_archive(self) -> None:
        members = self._members()
        pickled = [name for name in members if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(pickled) != 1:
            raise ValueError("expected an archive as torch.save writes it, with one data.pkl")
        self.folder = pickled[0].removesuffix("data.pkl")
        if f"{self.folder}constants.pkl" in members:
            raise ValueError(
                "expected a state_dict, got a TorchScript archive, which is a program; "
                "torch.save(module.state_dict(), path) writes a file that can be read"
            )
        self.members = members
        byteorder = f"{self.folder}byteorder"
        if byteorder in members:
            place = self._member(byteorder)
            self.file.seek(place.begin)
            order = self.file.read(min(place.size, 8))
            if order not in (b"little", b"big"):
                raise ValueError(f"byteorder: expected little or big, got {order!r}")
            self.order = "<" if order == b"little" else ">"
        place = self._member(pickled[0])
        self.file.seek(place.begin)
        self.root = pickles.read(self.file, place.size, {})

    def _members(self) -> dict[str, ZipInfo]:
        try:
            with ZipFile(self.file) as archive:
                listed = archive.infolist()
        except (MemoryError, ValueError):
            raise
        except Exception as error:  # of many kinds: zipfile's own, struct's, of offsets before the file's start
            raise ValueError(f"expected a sound zip archive, got {type(error).__name__}: {error}") from None
        members = {member.filename: member for member in listed}
        if len(members) != len(listed):
            raise ValueError("expected an archive as torch.save writes it, got one with two members of the same name")
        end = 0
        for member in sorted(listed, key=lambda member: member.header_offset):
            if member.header_offset < end:
                raise ValueError("expected an archive as torch.save writes it, got one whose members overlap")
            end = member.header_offset + HEADER + member.compress_size
        if end > self.size:
            raise ValueError("expected a whole archive, got one that is cut short")
        return members

    def _member(self, name: str) -> Place:
        member = self.members.get(name)
        if member is None:
            raise ValueError(f"expected {name!r} in the archive, got an archive without it")
        if member.compress_type != ZIP_STORED or member.file_size != member.compress_size or member.flag_bits & 1:
            raise ValueError("expected an archive as torch.save writes it, without compression")
        self.file.seek(member.header_offset)
        header = self.file.read(HEADER)
        if len(header) != HEADER or header[: len(HEADER_MARK)] != HEADER_MARK:
            raise ValueError(f"expected {name!r} at byte {member.header_offset}, as the archive says, got other bytes")
        begin = member.header_offset + HEADER + sum(struct.unpack("<HH", header[26:]))  # the name and extra fields
        if begin + member.file_size > self.size:
            raise ValueError(f"expected {member.file_size} bytes of {name!r}, got a file that is cut short")
        return Place(begin, member.file_size)

    # -- pickles

    def _open_pickles(self) -> None:
        self.file.seek(0)
        self.members = {}
        storages: dict[str, Storage] = {}
        for expected in (MAGIC, PROTOCOL):
            value = self._pickle({})
            if type(value) is not int or value != expected:
                raise ValueError(f"expected a file that torch.save wrote, got {described(value)} in a pickle")
        system = self._pickle({})
        if isinstance(system, dict) and system.get("little_endian") is False:
            self.order = ">"
        self.root = self._pickle(storages)
        keys = self._pickle({})
        is_list = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not is_list or len(keys) != len(storages) or {*keys} != storages.keys():
            raise ValueError("expected the numbers of each storage once, got a list of other storages")
        self.places = self._storage_places(keys, storages)

    def _pickle(self, storages: dict[str, Storage]) -> Any:
        return pickles.read(self.file, self.size - self.file.tell(), storages)

    def _storage_places(self, keys: list[str], storages: Mapping[str, Storage]) -> dict[str, Place]:
        """The places of the storages, each of which is the count of its numbers, and then the numbers."""
        places, begin = {}, self.file.tell()
        for key in keys:
            storage = storages[key]
            self.file.seek(begin)
            count = self.file.read(8)
            if int.from_bytes(count, "little" if self.order == "<" else "big") != storage.total or len(count) < 8:
                raise ValueError(f"storage {key!r}: expected {storage.total} numbers, got another count")
            size = ITEM_SIZES.get(storage.kind)
            if size is None:
                raise ValueError(f"storage {key!r}: expected numbers of a known size, got {storage.kind}")
            places[key] = Place(begin + 8, storage.total * size)
            begin += 8 + storage.total * size
            if begin > self.size:
                raise ValueError(f"storage {key!r}: expected {storage.total} numbers, got a file that is cut short")
        return places

    def _place(self, storage: Storage) -> Place:
        if self.members:
            return self._member(f"{self.folder}data/{storage.key}")
        return self.places[storage.key]


def described(root: object) -> str:
    """What was saved instead of a state_dict."""
    if isinstance(root, (Class, Instance)):
        return f"a pickled object of class {root.made_by if isinstance(root, Instance) else root}"
    return type(root).__name__


def span(tensor: Tensor) -> int:
    """How many numbers of the storage there are from the first one of a tensor to its last one."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))


def size_of(tensor: Tensor) -> int:
    """The bytes of a tensor, in memory or from its first number to its last one in the file, whichever are more."""
    return max(math.prod(tensor.shape), span(tensor)) * max(4, ITEM_SIZES.get(tensor.kind, 0))
