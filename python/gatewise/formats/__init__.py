"""Models from files and from objects of other frameworks, and back to files. One module a format.

Each imports its framework only when it is used, and executes nothing that comes from a file.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from gatewise.formats import safetensors
from gatewise.formats.errors import FormatError
from gatewise.formats.signatures import SAFETENSORS, described
from gatewise.formats.verification import Verification, verify
from gatewise.layers.sequential import Sequential
from gatewise.weights.module import Module

__all__ = ["FormatError", "Verification", "load", "save", "verify"]

ENDINGS = {
    ".safetensors": "safetensors", ".keras": "keras", ".h5": "keras", ".hdf5": "keras", ".onnx": "onnx",
    ".json": "rtneural", ".pt": "pytorch", ".pth": "pytorch", ".ckpt": "pytorch", ".bin": "pytorch",
    "": "safetensors",
}  # fmt: skip
READ = ", ".join(filter(None, ENDINGS))
WRITTEN = ("safetensors", "onnx", "rtneural")


def load(source: Any, **options: Any) -> Any:
    """Read a trained model: from a file, or from a module of PyTorch.

    Parameters
    ----------
    source : str, path-like or torch.nn.Module
        A file: what it is, its name's ending says.

        - `.safetensors`, or no ending: what `save` wrote; or weights under PyTorch's names, as for `.pt`
        - `.pt`, `.pth`, `.ckpt`, `.bin`: a state_dict that torch.save wrote, or what has one in it; read without
          PyTorch, as data
        - `.keras`, `.h5`, `.hdf5`: Keras; `.weights.h5` with `config`
        - `.onnx`: ONNX
        - `.json`: RTNeural

        A module: torch.nn.LSTM, GRU, RNN, their cells, or what has such layers and others one after the other, also on
        gatewise.torch. It is run beside what comes out, as `verify` does it, and must agree.
    **options
        Of state_dicts: `prefix` (str) of the layer's names, `nonlinearity` ("tanh" or "relu") of an RNN, `batch_first`
        (bool). Of Keras: `config` (dict, JSON or path), which `.weights.h5` lacks. Of ONNX: `node` (str), the name of
        one recurrent node, which alone is taken. Of modules: `check` (bool), whether to run both.

    Returns
    -------
    Sequential, or a layer

    Raises
    ------
    FormatError
        A ValueError: the file is damaged, of another version or format, or has what gatewise cannot do, named; or it is
        no file (a directory, a pipe).
    OSError
        If it cannot be read.
    """
    if not isinstance(source, (str, bytes, os.PathLike)):
        if not any(base.__module__.startswith("torch.nn") for base in type(source).__mro__):
            raise TypeError(f"source: expected a path or a torch.nn.Module, got {type(source).__name__}")
        return _module("pytorch").load_module(source, **options)
    path = os.fsdecode(source)
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
        file with what the model is and its weights under the names of its state_dict.

    Raises
    ------
    TypeError
        If `model` is something else, or has something else in it; classes derived from gatewise's are.
    ValueError
        If the name has another ending, or the format cannot hold the model.
    OSError
        If the file cannot be written, or something is there that is no file; what was there is untouched.
    """
    format = _format(os.fsdecode(path))
    if format not in WRITTEN:
        raise ValueError(f"path: expected one that ends in .safetensors, .onnx or .json, got {os.fsdecode(path)!r}")
    _module(format).save(model, path)


def _format(path: str) -> str | None:
    """The module for a file of this name; None: no format has this ending."""
    return ENDINGS.get(os.path.splitext(path)[1].lower())


def _check_file(path: str) -> None:
    """Whether it is a file, and one of a known ending; without any it must be a safetensors file."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode) and os.path.isfile(os.path.join(path, "saved_model.pb")):
        raise FormatError(f"{path}: expected a file, got a SavedModel of TensorFlow; Keras can save it as .keras")
    if not stat.S_ISREG(mode):  # a pipe would wait for a writer
        raise FormatError(f"{path}: expected a file")
    ending = os.path.splitext(path)[1]
    if ending.lower() in filter(None, ENDINGS):
        return
    with open(path, "rb") as file:
        content = described(file.read(64))
    if ending:
        raise FormatError(f"{path}: expected a name that ends in {READ}, got {ending!r}, and in the file {content}")
    if content != SAFETENSORS:
        raise FormatError(f"{path}: expected a safetensors file, or a name that ends in {READ}, got {content}")


def _module(format: str | None) -> Any:
    """The module of a format, imported in so many words: what freezes programs looks for these."""
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
