"""Models from files and from objects of other frameworks, and back to files. One module a format.

Each imports its framework only when it is used, and executes nothing that comes from a file.
"""

from __future__ import annotations

import os
import stat
from importlib import import_module
from typing import Any

from gatewise.formats import safetensors
from gatewise.formats.errors import FormatError
from gatewise.formats.verification import Verification, verify
from gatewise.modules import Module
from gatewise.sequential import Sequential

__all__ = ["FormatError", "Verification", "load", "save", "verify"]

ENDINGS = {
    ".keras": "keras", ".h5": "keras", ".hdf5": "keras", ".onnx": "onnx", ".json": "rtneural", ".pt": "pytorch",
    ".pth": "pytorch", ".bin": "pytorch",
}  # fmt: skip
WRITTEN = ("safetensors", "onnx", "rtneural")


def load(source: Any, **options: Any) -> Any:
    """Read a trained model: from a file, or from a module of PyTorch.

    Parameters
    ----------
    source : str, path-like or torch.nn.Module
        A file: what it is, its name's ending says.

        - `.safetensors`: what `save` wrote; or weights under PyTorch's names, as for `.pt`
        - `.pt`, `.pth`, `.bin`: a state_dict that torch.save wrote, read with weights_only
        - `.keras`, `.h5`, `.hdf5`: Keras; `.weights.h5` with `config`
        - `.onnx`: ONNX
        - `.json`: RTNeural

        A module: torch.nn.LSTM, GRU, RNN, their cells, or what has such layers and others one after the other. It is
        run beside what comes out, and must agree.
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
        A ValueError: the file is damaged, of another version, or has what gatewise cannot do, named; or it is no file
        (a directory, a pipe).
    OSError
        If it cannot be read.
    """
    if not isinstance(source, (str, bytes, os.PathLike)):
        if not any(base.__module__.startswith("torch.nn") for base in type(source).__mro__):
            raise TypeError(f"source: expected a path or a torch.nn.Module, got {type(source).__name__}")
        return import_module("gatewise.formats.pytorch").load_module(source, **options)
    path = os.fsdecode(source)
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
        raise FormatError(f"{path}: expected a file")
    format = _format(path)
    if format == "safetensors" and (options or safetensors.is_foreign(path)):
        format = "pytorch"
    return import_module(f"gatewise.formats.{format}").load(path, **options)


def _format(path: str) -> str:
    return ENDINGS.get(os.path.splitext(path)[1].lower(), "safetensors")


def save(model: Module | Sequential, path: str | os.PathLike[str]) -> None:
    """Write a model or a layer to one file, which appears as a whole or not at all.

    Parameters
    ----------
    model : Sequential, or any layer
    path : str or path-like
        `.onnx`: ONNX, with states as inputs and outputs; `.json`: RTNeural. Else a safetensors file with what the model
        is and its weights under the names of its state_dict.

    Raises
    ------
    TypeError
        If `model` is something else, or has something else in it; classes derived from gatewise's are.
    ValueError
        If the format cannot hold it.
    OSError
        If the file cannot be written, or something is there that is no file; what was there is untouched.
    """
    format = _format(os.fsdecode(path))
    if format not in WRITTEN:
        raise ValueError(f"path: expected one that ends in .safetensors, .onnx or .json, got {os.fsdecode(path)!r}")
    import_module(f"gatewise.formats.{format}").save(model, path)
