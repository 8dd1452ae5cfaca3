"""Models from files and from objects of other frameworks, and back to files.

Each format has a module or a folder, which imports its framework only when it is used. Nothing in a file is executed.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from gatewise.formats import safetensors
from gatewise.formats.errors import FormatError, reading
from gatewise.formats.files import open_regular
from gatewise.formats.signatures import SAFETENSORS, described
from gatewise.formats.verification import Verification, verify
from gatewise.layers.sequential import Sequential
from gatewise.weights.module import Module

__all__ = ["FormatError", "Verification", "load", "save", "verify"]

ENDINGS = {
    ".safetensors": "safetensors",
    ".keras": "keras",
    ".h5": "keras",
    ".hdf5": "keras",
    ".onnx": "onnx",
    ".json": "rtneural",
    ".pt": "pytorch",
    ".pth": "pytorch",
    ".ckpt": "pytorch",
    ".bin": "pytorch",
    "": "safetensors",
}
READ = ", ".join(filter(None, ENDINGS))
WRITTEN = ("safetensors", "onnx", "rtneural")


def load(source: Any, **options: Any) -> Any:
    """Read a trained model: from a file, or from a module of PyTorch.

    Parameters
    ----------
    source : str, path-like or torch.nn.Module
        A file, whose format the ending of its name tells:

        - `.safetensors`, or no ending: written by `save`; or weights under PyTorch's names, as in `.pt`
        - `.pt`, `.pth`, `.ckpt`, `.bin`: a state_dict that torch.save wrote, also inside a checkpoint; read without
          PyTorch, as data
        - `.keras`, `.h5`, `.hdf5`: Keras; `.weights.h5` with `config`
        - `.onnx`: ONNX
        - `.json`: RTNeural

        Or a module: torch.nn.LSTM, GRU, RNN, their cells, or one with such layers and others one after the other, also
        on gatewise.torch. The module and the model are run on the same input, as `verify` does it, and must agree.
    **options
        For state_dicts: `prefix` (str), how the names of the layer begin; `nonlinearity` ("tanh" or "relu") of an RNN;
        `batch_first` (bool). For Keras: `config` (dict, JSON or path), which is missing in `.weights.h5`. For ONNX:
        `node` (str), the name of the only recurrent node to read. For modules: `check` (bool), whether to run both.

    Returns
    -------
    Sequential, or a layer

    Raises
    ------
    FormatError
        A ValueError: the file is damaged, of another version or format, has something that gatewise cannot do, which is
        named, or is not a file (a directory, a pipe).
    OSError
        If it cannot be read.
    """
    if not isinstance(source, (str, bytes, os.PathLike)):
        if not any(base.__module__.startswith("torch.nn") for base in type(source).__mro__):
            raise TypeError(f"source: expected a path or a torch.nn.Module, got {type(source).__name__}")
        return _module("pytorch").load_module(source, **options)
    path = os.fsdecode(source)
    with reading(path):
        _check_file(path)
    format = _format(path)
    if format == "safetensors" and (options or safetensors.is_foreign(path)):
        format = "pytorch"
    return _module(format).load(path, **options)


def save(model: Module | Sequential, path: str | os.PathLike[str]) -> None:
    """Write a model or a layer to one file, which appears as a whole or not at all.

    Parameters
    ----------
    model : Sequential, or any layer
    path : str or path-like
        `.onnx`: ONNX, with states as inputs and outputs; `.json`: RTNeural. `.safetensors`, or no ending: a safetensors
        file of the model's description and its weights under the names of its state_dict.

    Raises
    ------
    TypeError
        If `model` is something else, or has something else in it, such as a class derived from one of gatewise's.
    ValueError
        If the name has another ending, or the format cannot hold the model.
    OSError
        If the file cannot be written, or `path` leads to something that is not a file. What was there is untouched.
    """
    format = _format(os.fsdecode(path))
    if format not in WRITTEN:
        raise ValueError(f"path: expected one that ends in .safetensors, .onnx or .json, got {os.fsdecode(path)!r}")
    _module(format).save(model, path)


def _format(path: str) -> str | None:
    """The format of files of this name, or None if there is none with this ending."""
    return ENDINGS.get(os.path.splitext(path)[1].lower())


def _check_file(path: str) -> None:
    """Refuse anything but a file of a known ending, or a safetensors file without an ending."""
    if stat.S_ISDIR(os.stat(path).st_mode) and os.path.isfile(os.path.join(path, "saved_model.pb")):
        raise ValueError("expected a file, got a SavedModel of TensorFlow; Keras can save it as .keras")
    ending = os.path.splitext(path)[1]
    with open_regular(path) as file:
        if ending.lower() in filter(None, ENDINGS):
            return
        content = described(file.read(64))
    if ending:
        raise ValueError(f"expected a name that ends in {READ}, got {ending!r}, and in the file {content}")
    if content != SAFETENSORS:
        raise ValueError(f"expected a safetensors file, or a name that ends in {READ}, got {content}")


def _module(format: str | None) -> Any:
    """The module of a format. Each import is spelled out: programs that freeze others look for these statements."""
    if format == "keras":
        from gatewise.formats import keras

        return keras
    if format == "onnx":
        from gatewise.formats import onnx

        return onnx
    if format == "pytorch":
        from gatewise.formats import pytorch

        return pytorch
    if format == "rtneural":
        from gatewise.formats import rtneural

        return rtneural
    return safetensors
