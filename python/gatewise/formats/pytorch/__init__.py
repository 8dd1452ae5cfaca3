"""From PyTorch: modules, and files of their weights."""

from __future__ import annotations

import os

from gatewise.arguments.arrays import flag
from gatewise.formats.errors import reading
from gatewise.formats.files import open_regular
from gatewise.formats.pytorch.checkpoints import Checkpoint
from gatewise.formats.pytorch.modules import load_module
from gatewise.formats.pytorch.state_dicts import build_layer, pick_layer, read_weights
from gatewise.formats.safetensors import read_arrays
from gatewise.layers.layer import Layer

__all__ = ["load", "load_module"]


def load(
    path: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    nonlinearity: str | None = None,
    batch_first: bool = False,
) -> Layer:
    """Read a recurrent layer from a file of weights under PyTorch's names.

    Parameters
    ----------
    path : str or path-like
        A state_dict, or a dict with one in it, that torch.save wrote, which is read without PyTorch; or a safetensors
        file.
    prefix : str, optional
        How the layer's names begin, such as "encoder.lstm."; not needed if it is the only layer in the file.
    nonlinearity : "tanh" or "relu", optional
        Of an RNN, whose weights do not tell.
    batch_first : bool
        Of the layer, whose weights do not tell.
    """
    flag("batch_first", batch_first)
    for name, value in (("prefix", prefix), ("nonlinearity", nonlinearity)):
        if not isinstance(value, str | None):
            raise TypeError(f"{name}: expected a text, got {value!r}")
    if nonlinearity not in (None, "tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    with reading(path):
        if os.fsdecode(path).lower().endswith(".safetensors"):
            arrays = read_arrays(path)
            weights = {layer_name: arrays[name] for layer_name, name in pick_layer(arrays, prefix).items()}
        else:
            with open_regular(path) as file:
                weights = read_weights(Checkpoint(file), prefix)
        return build_layer(weights, nonlinearity, batch_first)
