"""The bytes of a safetensors file: its header, and the numbers of each tensor on demand.

A file is eight bytes with the length of the header, little-endian; the header, JSON of each tensor's dtype, shape and
place; and the numbers (https://huggingface.co/docs/safetensors). The file may come from anywhere: nothing in it is
taken for granted, and memory is bounded by the size of the file, whatever sizes the header claims.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, NamedTuple

import numpy as np

from gatewise.arguments.arrays import Array, describe
from gatewise.formats import json_text
from gatewise.formats.files import write_pieces
from gatewise.formats.weights import widened
from gatewise.weights.parameters import Packable

DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
HALVES = {"F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}  # which become float32
# The other dtypes of the format, of which only the sizes in bytes matter here.
OTHERS = {
    name: np.dtype(f"V{size}")
    for size, names in {1: "BOOL U8 I8 F8_E4M3 F8_E5M2", 2: "I16 U16", 4: "I32 U32", 8: "I64 U64 C64"}.items()
    for name in names.split()
}
MAX_HEADER = 10_000_000  # bytes; a layer takes a few hundred
MAX_AXES = 8
METADATA = "__metadata__"


class Tensor(NamedTuple):
    """What the header says of one tensor. `begin` and `end` count bytes from the end of the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Source:
    """Where a layer gets its weights: each tensor of a file once, if its dtype and shape are what the layer needs."""

    file: BufferedReader
    begin: int  # of the numbers in the file
    tensors: dict[str, Tensor]

    def split(self, count: int) -> dict[str, dict[str, Tensor]]:
        """Take out the tensors of `count` layers, whose names begin with the layer's index; all others stay."""
        layers: dict[str, dict[str, Tensor]] = {}
        for full_name in list(self.tensors):
            index, _, name = full_name.partition(".")
            if index.isdecimal() and len(index) < 10 and index == str(int(index)) and int(index) < count:
                layers.setdefault(index, {})[name] = self.tensors.pop(full_name)
        return layers

    def __call__(self, layer: Packable[Any]) -> dict[str, Array]:
        shapes = layer.shapes()
        if missing := shapes.keys() - self.tensors.keys():
            raise ValueError(f"tensors: missing {', '.join(sorted(missing))}")
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if tensor.dtype.newbyteorder("=") != layer.dtype:
                raise ValueError(f"{name}: expected {layer.dtype}, got {tensor.dtype.name}")
            if tensor.shape != shape:
                raise ValueError(f"{name}: expected shape {describe(shape)}, got {describe(tensor.shape)}")
        return {name: self.numbers(self.tensors.pop(name)) for name in shapes}

    def check_empty(self) -> None:
        if self.tensors:
            raise ValueError(f"tensors: surplus {', '.join(sorted(self.tensors))}")

    def numbers(self, tensor: Tensor) -> Array:
        self.file.seek(self.begin + tensor.begin)
        array: Array = np.empty(tensor.shape, tensor.dtype)
        if self.file.readinto(array.data) != array.nbytes:
            raise ValueError("the file was cut while it was read")
        return array.astype(tensor.dtype.newbyteorder("="), copy=False)


def read_header(file: BufferedReader) -> dict[str, Any]:
    """The header of a file, which is then read up to the numbers."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError(f"expected a safetensors file, got one of {size} bytes that says its header has {length}")
    header = json_text.parse(file.read(length), is_strict=True)
    if not isinstance(header, dict):
        raise ValueError("expected names and tensors in the header")
    return header


def source(file: BufferedReader, header: Mapping[str, Any], dtypes: Mapping[str, np.dtype[Any]] = DTYPES) -> Source:
    """The tensors of a file whose header was just read."""
    begin = file.tell()
    return Source(file, begin, _tensors(header, os.fstat(file.fileno()).st_size - begin, dtypes))


def read_floats(file: BufferedReader) -> dict[str, Array]:
    """All tensors of floating numbers in a file, whoever wrote it; those of 16 bits as float32."""
    header = read_header(file)
    tensors = source(file, header, DTYPES | HALVES | OTHERS)
    kinds = {dtype: dtype.name for dtype in DTYPES.values()}
    kinds |= {HALVES["F16"]: "float16", HALVES["BF16"]: "bfloat16"}
    floats = {name: tensor for name, tensor in tensors.tensors.items() if tensor.dtype in kinds}
    return {name: widened(tensors.numbers(tensor), kinds[tensor.dtype]) for name, tensor in floats.items()}


def _tensors(header: Mapping[str, Any], size: int, dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, Tensor]:
    """Every tensor of a header, checked: each of the `size` bytes of numbers belongs to exactly one of them."""
    tensors = {name: _tensor(name, entry, dtypes) for name, entry in header.items() if name != METADATA}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise ValueError(f"{name}: expected numbers from byte {end} on, got {tensor.begin}")
        end = tensor.end
    if end != size:
        raise ValueError(f"expected {end} bytes of data after the header, got {size}")
    return tensors


def _tensor(name: str, entry: Any, dtypes: Mapping[str, np.dtype[Any]]) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in dtypes:
        raise ValueError(f"{name}: expected a dtype of {', '.join(dtypes)}, got {entry['dtype']!r}")
    dtype = dtypes[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    for key, sizes in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(sizes, list) or len(sizes) > MAX_AXES or not all(type(n) is int and n >= 0 for n in sizes):
            expected = f"a list of at most {MAX_AXES} whole numbers from 0 on"
            raise ValueError(f"{name}: {key}: expected {expected}, got {str(sizes)[:100]}")
    bytes_of_shape = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != bytes_of_shape:
        raise ValueError(f"{name}: data_offsets: expected {bytes_of_shape} bytes, got {str(offsets)[:100]}")
    return Tensor(dtype, tuple(shape), offsets[0], offsets[1])


def write(path: str, metadata: Mapping[str, str], arrays: Mapping[str, Array]) -> None:
    """Write a file of these arrays of float32 or float64."""
    header: dict[str, Any] = {METADATA: metadata}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the numbers
    if len(text) > MAX_HEADER:
        raise ValueError(f"model: expected a header of at most {MAX_HEADER} bytes, got {len(text)}")
    little_endian = (array.astype(array.dtype.newbyteorder("<"), copy=False) for array in arrays.values())
    write_pieces(path, [len(text).to_bytes(8, "little"), text, *(array.data for array in little_endian)])
