"""Models in safetensors files: what the model is in the metadata, its weights under the names of its state_dict.

Any reader of such files can read the weights.
"""

from __future__ import annotations

import os
from typing import Any

from gatewise.arguments.arrays import Array
from gatewise.formats.errors import at, reading
from gatewise.formats.files import is_regular, open_regular
from gatewise.formats.safetensors import description, tensors
from gatewise.layers.sequential import Sequential
from gatewise.weights.module import Module


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
        If `model` is something else, or has something else in it, such as a class derived from one of gatewise's.
    OSError
        If the file cannot be written, or `path` leads to something that is not a file. What was there is untouched.
    ValueError
        If `model` has some ten thousand layers or more, which `load` would not take.
    """
    with at("model"):
        metadata = description.metadata_of(model)
    tensors.write(os.fsdecode(path), metadata, model.state_dict())


def load(path: str | os.PathLike[str]) -> Any:
    """Read a model or a layer that `save` wrote.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    Sequential, or a layer
        With the weights and options of the one that was saved. Recurrent layers also have its seed and call_count.

    Raises
    ------
    FormatError
        A ValueError: the file is damaged, of another version, of another program, or not a file (a directory, a pipe).
    OSError
        If it cannot be read.
    """
    with reading(path), open_regular(path) as file:
        header = tensors.read_header(file)
        source = tensors.source(file, header)
        described = description.description_in(header)
        with at("model"):
            return description.build(described, source)


def is_foreign(path: str) -> bool:
    """Whether it is a sound file that another program wrote. Of any other file, `load` says what is wrong with it."""
    try:
        if not path.lower().endswith(".safetensors") or not is_regular(path):
            return False
        with open(path, "rb") as file:
            return description.is_described(tensors.read_header(file)) is False
    except (ValueError, OSError, RecursionError):
        return False


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """All tensors of floating numbers in a file, whoever wrote it; those of 16 bits as float32."""
    with open_regular(path) as file:
        return tensors.read_floats(file)
