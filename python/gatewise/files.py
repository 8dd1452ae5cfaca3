"""Layers in safetensors files: configuration and format version in the metadata, weights under PyTorch's names.

A file is eight bytes with the length of the header, little-endian; the header, JSON of each tensor's dtype, shape and
place; and the numbers (https://huggingface.co/docs/safetensors). Any reader of such files can read the weights. What is
read here may come from anywhere: nothing in it is taken for granted, and memory is bounded by the size of the file,
whatever sizes it speaks of.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from gatewise.arrays import Array, describe, flag, whole_number
from gatewise.formats.errors import FormatError
from gatewise.layers import GRU, LSTM, RNN, Layer
from gatewise.parameters import MOST, Architecture

VERSION = "1"
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
MOST_HEADER = 10_000_000  # bytes: a thousand times what a layer needs; JSON in memory takes some 25 times as much
KINDS: dict[str, Callable[..., Layer]] = {"LSTM": LSTM, "GRU": GRU, "RNN": RNN}
OPTIONS = (
    "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "seed",
)  # fmt: skip
OWN_OPTIONS = {"LSTM": ("proj_size",), "GRU": (), "RNN": ("nonlinearity",)}


class Tensor(NamedTuple):
    """What a header says of one; its numbers lie so many bytes behind the header's end."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


# ---- the layer in words


def _described(layer: Layer) -> dict[str, Any]:
    kind = type(layer).__name__
    options = {name: getattr(layer, name) for name in (*OPTIONS, *OWN_OPTIONS[kind])}
    return {"kind": kind, **options, "dtype": layer.dtype.name, "call_count": layer.call_count}


def _made(description: Any, tensors: Mapping[str, Tensor]) -> Layer:
    """A layer as described, if these tensors are just what it needs. It has weights of its own yet."""
    if not isinstance(description, dict) or description.get("kind") not in (*KINDS,):
        raise ValueError(f"model: expected a kind of {', '.join(KINDS)}")
    kind = description["kind"]
    expected = {"kind", *OPTIONS, *OWN_OPTIONS[kind], "dtype", "call_count"}
    if set(description) != expected:
        raise ValueError(f"model: expected {', '.join(sorted(expected))}, got {', '.join(sorted(description))}")
    options = {name: value for name, value in description.items() if name not in ("kind", "call_count")}
    whole_number("seed", options["seed"], 0, 2**64 - 1)  # None, which a layer would take, is no seed here
    _check(_architecture(kind, options, len(tensors)), tensors)
    layer = KINDS[kind](**options)
    layer.call_count = description["call_count"]
    return layer


def _architecture(kind: str, options: Mapping[str, Any], most_layers: int) -> Architecture:
    """The sizes alone, without any memory; the layer checks them again, and the rest."""
    if options["dtype"] not in ("float32", "float64"):
        raise ValueError(f"dtype: expected float32 or float64, got {options['dtype']!r}")
    for name in ("bias", "bidirectional"):
        flag(name, options[name])
    return Architecture(
        "rnn_tanh" if kind == "RNN" else kind.lower(),
        whole_number("input_size", options["input_size"], 1, MOST),
        whole_number("hidden_size", options["hidden_size"], 1, MOST),
        whole_number("num_layers", options["num_layers"], 1, most_layers),
        options["bias"], options["bidirectional"],
        whole_number("proj_size", options.get("proj_size", 0), 0, MOST), np.dtype(options["dtype"]),
    )  # fmt: skip


def _check(architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    shapes = architecture.shapes()
    if tensors.keys() != shapes.keys():
        missing, surplus = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        raise ValueError(f"tensors: missing {', '.join(missing) or 'none'}, surplus {', '.join(surplus) or 'none'}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.dtype.newbyteorder("=") != architecture.dtype:
            raise ValueError(f"{name}: expected {architecture.dtype}, got {tensor.dtype.name}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {describe(shape)}, got {describe(tensor.shape)}")


# ---- the header


def _parsed(text: str) -> Any:
    """JSON without what its readers disagree about: names that occur twice, NaN, infinities."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _tensors(header: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    """Every tensor of a header, checked: together they are the `size` bytes behind it, each byte of one."""
    found = {name: _tensor(name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise ValueError(f"{name}: expected numbers from byte {end} on, got {tensor.begin}")
        end = tensor.end
    if end != size:
        raise ValueError(f"expected {end} bytes of numbers, got {size}")
    return found


def _tensor(name: str, entry: Any) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{name}: expected a dtype of {', '.join(DTYPES)}, got {entry['dtype']!r}")
    dtype = DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name}: {what}: expected a few whole numbers, got {str(numbers)[:100]}")
    bytes_of_shape = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != bytes_of_shape:
        raise ValueError(f"{name}: data_offsets: expected {bytes_of_shape} bytes, got {str(offsets)[:100]}")
    return Tensor(dtype, tuple(shape), offsets[0], offsets[1])


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, and its end in the file."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, MOST_HEADER):
        raise ValueError(f"expected a safetensors file, got one of {size} bytes that says its header has {length}")
    header = _parsed(file.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError("expected names and tensors in the header")
    return header, 8 + length


def _description(header: Mapping[str, Any]) -> Any:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__: expected names and texts")
    if "gatewise" not in metadata:
        raise ValueError(
            "expected 'gatewise' in the metadata, got a file of someone else; read its tensors with safetensors.numpy "
            "and hand them to load_state_dict"
        )
    if metadata["gatewise"] != VERSION:
        raise ValueError(f"expected format version {VERSION}, got {metadata['gatewise']!r}")
    if "model" not in metadata:
        raise ValueError("expected 'model' in the metadata")
    return _parsed(metadata["model"])


# ---- saving and loading


def save(model: Layer, path: str | os.PathLike[str]) -> None:
    """Write a layer to one safetensors file: what it is, and its weights under PyTorch's names.

    The file appears as a whole or not at all: whoever reads it meanwhile gets the one that was there before.

    Parameters
    ----------
    model : LSTM, GRU or RNN
    path : str or path-like

    Raises
    ------
    TypeError
        If `model` is something else.
    OSError
        If the file cannot be written, or something is there that is no file; what was there is untouched.
    """
    if type(model).__name__ not in KINDS or type(model) is not KINDS[type(model).__name__]:
        raise TypeError(f"model: expected gatewise's own {', '.join(KINDS)}, got {type(model).__qualname__}")
    metadata = {"gatewise": VERSION, "model": json.dumps(_described(model))}
    arrays = model.state_dict()
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers lie as processors like them
    little = (array.astype(array.dtype.newbyteorder("<"), copy=False) for array in arrays.values())
    _write(os.fsdecode(path), [len(text).to_bytes(8, "little"), text, *(array.data for array in little)])


def _write(path: str, pieces: Iterable[bytes | memoryview]) -> None:
    """A file of these pieces in place of the one that is there, if there is one, in one go."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        there = None
    if there is not None and not stat.S_ISREG(there.st_mode):
        raise OSError(errno.EINVAL, "expected a file, or nothing yet", path)
    target = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(target), f".gatewise.{secrets.token_hex(8)}")
    with open(temporary, "xb") as file:
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


def load(path: str | os.PathLike[str]) -> Layer:
    """Read a layer that `save` wrote.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    LSTM, GRU or RNN
        With the weights, options, seed and call_count of the one that was saved.

    Raises
    ------
    FormatError
        A ValueError: the file is damaged, of another version, not one of ours, or no file (a directory, a pipe).
    OSError
        If it cannot be read.
    """
    name = os.fsdecode(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
            raise ValueError("expected a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, begin = _read_header(file, size)
            tensors = _tensors(header, size - begin)
            layer = _made(_description(header), tensors)
            weights = {name: _numbers(file, tensor, begin) for name, tensor in tensors.items()}
    except (ValueError, TypeError) as error:
        # What came from the file may be long, or of characters that nobody can print.
        reason = str(error).encode("ascii", "backslashreplace").decode()
        raise FormatError(f"{name}: {reason if len(reason) < 1000 else reason[:1000] + ' ...'}") from None
    layer.load_state_dict(weights)
    return layer


def _numbers(file: BinaryIO, tensor: Tensor, begin: int) -> Array:
    file.seek(begin + tensor.begin)
    data = file.read(tensor.end - tensor.begin)
    if len(data) != tensor.end - tensor.begin:
        raise ValueError("the file was cut while it was read")
    return np.frombuffer(data, tensor.dtype).reshape(tensor.shape)
