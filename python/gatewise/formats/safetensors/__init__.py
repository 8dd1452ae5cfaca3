"""Models in safetensors files: configuration and format version in the metadata, weights under their canonical names.

A file is eight bytes with the length of the header, little-endian; the header, JSON of each tensor's dtype, shape and
place; and the numbers (https://huggingface.co/docs/safetensors). Any reader of such files can read the weights. What is
read here may come from anywhere: nothing in it is taken for granted, and memory is bounded by the size of the file,
whatever sizes it speaks of.
"""

from __future__ import annotations

import errno
import inspect
import json
import math
import os
import secrets
import stat
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BufferedReader, BufferedWriter
from typing import Any, NamedTuple

import numpy as np

from gatewise.arguments.arrays import Array, describe, flag, whole_number
from gatewise.formats import json_text
from gatewise.formats.errors import at, reading
from gatewise.formats.weights import widened
from gatewise.layers import blocks
from gatewise.layers.activation import Activation
from gatewise.layers.recurrent import GRU, LSTM, RNN, Layer
from gatewise.layers.sequential import Sequential
from gatewise.weights.module import Module
from gatewise.weights.parameters import Packable

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

VERSION = "1"
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
# What others write besides, as so many bytes each.
OTHERS = {
    name: np.dtype(f"V{size}")
    for size, names in {1: "BOOL U8 I8 F8_E4M3 F8_E5M2", 2: "I16 U16 F16 BF16", 4: "I32 U32", 8: "I64 U64 C64"}.items()
    for name in names.split()
}
HALVES = {"F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}  # which become float32
MOST_HEADER = 10_000_000  # bytes: a few hundred a layer
MOST_NESTED = 8  # layers in each other: an Activation in a Dense in a TimeDistributed is the third
KINDS: dict[str, type[Module]] = {
    kind.__name__: kind
    for kind in (
        LSTM, GRU, RNN, Activation, blocks.BatchNorm, blocks.Bidirectional, blocks.Conv1D, blocks.Dense,
        blocks.Dropout, blocks.Embedding, blocks.Last, blocks.LayerNorm, blocks.Masking, blocks.Normalization,
        blocks.Reverse, blocks.TimeDistributed,
    )
}  # fmt: skip
# Options that the first files do not have, and what they are there.
GATED_LATER: dict[str, Any] = {"activation": "tanh", "recurrent_activation": "sigmoid", "clip": None}
LATER: dict[str, dict[str, Any]] = {
    "LSTM": GATED_LATER | {"output_activation": None, "peepholes": False},
    "GRU": GATED_LATER | {"reset_after": True},
    "RNN": {"clip": None},
    "Activation": {"beta": None},
    "Embedding": {"mask_zero": False},
}
# What a description says of a layer. Only of recurrent layers is the seed more than that of weights which are here.
OPTIONS = {
    name: {*inspect.signature(kind).parameters} - {"seed"}
    | ({"seed", "call_count"} if issubclass(kind, Layer) else set())
    for name, kind in KINDS.items()
}


class Tensor(NamedTuple):
    """What a header says of one; its numbers lie so many bytes behind the header's end."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


# ---- the model in words


def _described(model: object) -> dict[str, Any]:
    if type(model) is not Sequential:
        return _described_layer(model)
    layers = []
    for i, layer in enumerate(model):
        with at(f"layers[{i}]"):
            layers.append(_described_layer(layer))
    return {"kind": "Sequential", "batch_first": model.batch_first, "layers": layers}


def _described_layer(layer: object, depth: int = 1) -> dict[str, Any]:
    kind = type(layer).__name__
    if not isinstance(layer, Module) or type(layer) is not KINDS.get(kind):
        raise TypeError(f"expected a Sequential or a layer, of gatewise's own, got {type(layer).__qualname__}")
    _check_depth(depth)
    description: dict[str, Any] = {"kind": kind}
    later = LATER.get(kind, {})
    for name, value in layer._options().items():
        if name in later and value == later[name]:
            continue
        with at(name):
            description[name] = _described_layer(value, depth + 1) if isinstance(value, Module) else value
    return description | ({"call_count": layer.call_count} if isinstance(layer, Layer) else {})


def _made(description: Any, source: Source) -> Module | Sequential:
    """What is described, if it needs just the weights that there are."""
    is_model = _kind(description, ("Sequential", *KINDS)) == "Sequential"
    made = _made_model(description, source) if is_model else _made_layer(description, source)
    source.check_empty()
    return made


def _made_model(description: Mapping[str, Any], source: Source) -> Sequential:
    _check_names(description, {"kind", "batch_first", "layers"})
    batch_first = flag("batch_first", description["batch_first"])  # None, which a model would take, is no answer here
    if not isinstance(description["layers"], list):
        raise TypeError(f"layers: expected a list, got {type(description['layers']).__name__}")
    layers = []
    parts = source.split(len(description["layers"]))
    for i, layer in enumerate(description["layers"]):
        own = replace(source, tensors=parts.get(str(i), {}))
        with at(f"layers[{i}]"):
            layers.append(_made_layer(layer, own))
            own.check_empty()
    return Sequential(layers, batch_first=batch_first)


def _made_layer(description: Any, source: Source, depth: int = 1) -> Module:
    kind = _kind(description, (*KINDS,))
    _check_names(description, {"kind", *OPTIONS[kind]} - (LATER.get(kind, {}).keys() - description.keys()))
    _check_depth(depth)
    options: dict[str, Any] = {}
    for name, value in description.items():
        with at(name):
            options[name] = _made_layer(value, source, depth + 1) if isinstance(value, dict) else value
    if options.get("dtype", "float32") not in (*NAMES,):
        raise ValueError(f"dtype: expected float32 or float64, got {options['dtype']!r}")
    if issubclass(KINDS[kind], Layer):
        whole_number("seed", options["seed"], 0, 2**64 - 1)  # None, which a layer would take, is no seed here
        whole_number("num_layers", options["num_layers"], 1, len(source.tensors))  # their names, too, take memory
    del options["kind"]
    call_count = options.pop("call_count", None)
    layer = KINDS[kind]._from(source, options)
    if isinstance(layer, Layer):
        layer.call_count = call_count
    return layer


def _kind(description: Any, known: tuple[str, ...]) -> str:
    if not isinstance(description, dict) or description.get("kind") not in known:
        raise ValueError(f"expected a kind of {', '.join(known)}")
    return str(description["kind"])


def _check_names(description: Mapping[str, Any], expected: set[str]) -> None:
    if description.keys() != expected:
        raise ValueError(f"expected {', '.join(sorted(expected))}, got {', '.join(sorted(description))}")


def _check_depth(depth: int) -> None:
    if depth > MOST_NESTED:
        raise ValueError(f"expected at most {MOST_NESTED} layers in each other, got more")


@dataclass(frozen=True)
class Source:
    """Where a layer gets its weights: each tensor of a file once, and only if dtype and shape are what it needs."""

    file: BufferedReader
    begin: int  # of the numbers
    tensors: dict[str, Tensor]

    def split(self, count: int) -> dict[str, dict[str, Tensor]]:
        """The tensors of each of so many layers, whose numbers their names begin with; the others stay."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name in list(self.tensors):
            index, _, own = name.partition(".")
            if index.isdecimal() and len(index) < 10 and index == str(int(index)) and int(index) < count:
                parts.setdefault(index, {})[own] = self.tensors.pop(name)
        return parts

    def __call__(self, of: Packable[Any]) -> dict[str, Array]:
        shapes = of.shapes()
        if missing := shapes.keys() - self.tensors.keys():
            raise ValueError(f"tensors: missing {', '.join(sorted(missing))}")
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if tensor.dtype.newbyteorder("=") != of.dtype:
                raise ValueError(f"{name}: expected {of.dtype}, got {tensor.dtype.name}")
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


# ---- the header


def _tensors(header: Mapping[str, Any], size: int, dtypes: Mapping[str, np.dtype[Any]] = DTYPES) -> dict[str, Tensor]:
    """Every tensor of a header, checked: together they are the `size` bytes behind it, each byte of one."""
    found = {name: _tensor(name, entry, dtypes) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise ValueError(f"{name}: expected numbers from byte {end} on, got {tensor.begin}")
        end = tensor.end
    if end != size:
        raise ValueError(f"expected {end} bytes of numbers, got {size}")
    return found


def _tensor(name: str, entry: Any, dtypes: Mapping[str, np.dtype[Any]]) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in dtypes:
        raise ValueError(f"{name}: expected a dtype of {', '.join(dtypes)}, got {entry['dtype']!r}")
    dtype = dtypes[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name}: {what}: expected a few whole numbers, got {str(numbers)[:100]}")
    bytes_of_shape = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != bytes_of_shape:
        raise ValueError(f"{name}: data_offsets: expected {bytes_of_shape} bytes, got {str(offsets)[:100]}")
    return Tensor(dtype, tuple(shape), offsets[0], offsets[1])


def _read_header(file: BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    """The header, and its end in the file."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, MOST_HEADER):
        raise ValueError(f"expected a safetensors file, got one of {size} bytes that says its header has {length}")
    header = json_text.parse(file.read(length), is_strict=True)
    if not isinstance(header, dict):
        raise ValueError("expected names and tensors in the header")
    return header, 8 + length


def _description(header: Mapping[str, Any]) -> Any:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__: expected names and texts")
    if "gatewise" not in metadata:
        raise ValueError("expected 'gatewise' in the metadata, got a file of someone else")
    if metadata["gatewise"] != VERSION:
        raise ValueError(f"expected format version {VERSION}, got {metadata['gatewise']!r}")
    if "model" not in metadata:
        raise ValueError("expected 'model' in the metadata")
    return json_text.parse(metadata["model"].encode(), is_strict=True)


def is_foreign(path: str) -> bool:
    """Whether it is a good file, but does not say that it is gatewise's."""
    try:
        if not path.lower().endswith(".safetensors") or not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            header, _ = _read_header(file, os.fstat(file.fileno()).st_size)
    except (ValueError, OSError, RecursionError):
        return False  # `load` says what is wrong with it
    metadata = header.get("__metadata__", {})
    return isinstance(metadata, dict) and "gatewise" not in metadata


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """The tensors of floating numbers in a file, whoever wrote it; those of 16 bits as float32."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, begin = _read_header(file, size)
        source = Source(file, begin, _tensors(header, size - begin, DTYPES | OTHERS | HALVES))
        kinds = {dtype: dtype.name for dtype in DTYPES.values()}
        kinds |= {HALVES["F16"]: "float16", HALVES["BF16"]: "bfloat16"}
        known = {name: tensor for name, tensor in source.tensors.items() if tensor.dtype in kinds}
        return {name: widened(source.numbers(tensor), kinds[tensor.dtype]) for name, tensor in known.items()}


# ---- saving and loading


def save(model: Module | Sequential, path: str | os.PathLike[str]) -> None:
    """Write a model or a layer to one safetensors file: what it is, and its weights under the names of its state_dict.

    The file appears as a whole or not at all: whoever reads it meanwhile gets the one that was there before.

    Parameters
    ----------
    model : Sequential, or any layer
    path : str or path-like

    Raises
    ------
    TypeError
        If `model` is something else, or has something else in it; classes derived from gatewise's are.
    OSError
        If the file cannot be written, or something is there that is no file; what was there is untouched.
    ValueError
        If `model` has so many layers, some ten thousand, that `load` would not take it.
    """
    with at("model"):
        metadata = {"gatewise": VERSION, "model": json.dumps(_described(model))}
    arrays = model.state_dict()
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers lie as processors like them
    if len(text) > MOST_HEADER:
        raise ValueError(f"model: expected a header of at most {MOST_HEADER} bytes, got {len(text)}")
    little = (array.astype(array.dtype.newbyteorder("<"), copy=False) for array in arrays.values())
    write_pieces(os.fsdecode(path), [len(text).to_bytes(8, "little"), text, *(array.data for array in little)])


def write_pieces(path: str, pieces: Iterable[bytes | memoryview]) -> None:
    """A file of these pieces in place of the one that is there, if there is one, in one go."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        there = None
    if there is not None and not stat.S_ISREG(there.st_mode):
        raise OSError(errno.EINVAL, "expected a file, or nothing yet", path)
    target = os.path.realpath(path)
    try:
        file, temporary = _new_temporary(target)
    except OSError as error:  # which nobody gave the name of
        raise type(error)(error.errno, error.strerror, path) from None
    with file:
        try:
            if there is not None:
                os.chmod(temporary, stat.S_IMODE(there.st_mode))  # before anything is in it
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    _remove_left(target)


def _new_temporary(target: str) -> tuple[BufferedWriter, str]:
    """A new file beside the target, locked for as long as it is open, and its name."""
    while True:
        temporary = f"{_temporary_prefix(target)}{secrets.token_hex(8)}"
        file = open(temporary, "xb")  # noqa: SIM115  # the caller closes it
        if fcntl is None:
            return file, temporary
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(temporary):
            return file, temporary
        file.close()  # before it was locked, another process took it for one that was left


def _remove_left(target: str) -> None:
    """Remove what processes that were killed while they saved this target have left: files that nobody locks."""
    if fcntl is None:
        return
    folder, prefix = os.path.split(_temporary_prefix(target))
    with suppress(OSError), os.scandir(folder) as entries:
        left = [entry.path for entry in entries if entry.name.startswith(prefix)]
        for name in left:
            with suppress(OSError), open(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name)


def _temporary_prefix(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".gatewise.{zlib.crc32(os.fsencode(name)):08x}.")


def load(path: str | os.PathLike[str]) -> Any:
    """Read a model or a layer that `save` wrote.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    Sequential, or a layer
        With the weights and options of the one that was saved; recurrent layers with its seed and call_count, too.

    Raises
    ------
    FormatError
        A ValueError: the file is damaged, of another version, not one of ours, or no file (a directory, a pipe).
    OSError
        If it cannot be read.
    """
    name = os.fsdecode(path)
    with reading(name):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
            raise ValueError("expected a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, begin = _read_header(file, size)
            source = Source(file, begin, _tensors(header, size - begin))
            description = _description(header)
            with at("model"):
                return _made(description, source)
