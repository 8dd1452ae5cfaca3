"""What the modules of torch.nn are to gatewise: their architecture and their weights.

torch.nn reads a module's attributes at each call, and so does gatewise. A call reads each only once, because another
thread may set it: sizes that were checked must be the sizes that are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gatewise.torch.tensors import DTYPES
from gatewise.weights.architecture import Architecture

T = TypeVar("T")

LAYER_CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}  # by torch.nn's `mode`
MATRIX_NAMES = ("weight_ih", "weight_hh")
WEIGHT_NAMES = (*MATRIX_NAMES, "bias_ih", "bias_hh")


@lru_cache(maxsize=1024)
def make_architecture(
    cell: str,
    input_size: int,
    hidden_size: int,
    num_layers: int,
    bias: bool,
    bidirectional: bool,
    proj_size: int,
    dtype: torch.dtype,
) -> Architecture:
    return Architecture(cell, input_size, hidden_size, num_layers, bias, bidirectional, proj_size, DTYPES[dtype])


class LayerAttributes(NamedTuple):
    """The attributes of a layer that its calls depend on, under torch.nn's names."""

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    proj_size: int

    @classmethod
    def of(cls, layer: Any) -> LayerAttributes:
        return cls(
            layer.mode,
            layer.input_size,
            layer.hidden_size,
            layer.num_layers,
            layer.bias,
            layer.batch_first,
            layer.bidirectional,
            layer.proj_size,
        )


def layer_architecture(layer: LayerAttributes, dtype: torch.dtype) -> Architecture:
    return make_architecture(
        LAYER_CELLS[layer.mode],
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        layer.bias,
        layer.bidirectional,
        layer.proj_size,
        dtype,
    )


def cell_architecture(cell: Any, dtype: torch.dtype) -> Architecture | None:
    """The architecture of one layer with the cell's weights; None if the cell's nonlinearity is not known."""
    if isinstance(cell, torch.nn.RNNCell):
        kind = f"rnn_{cell.nonlinearity}"
        if kind not in ("rnn_tanh", "rnn_relu"):
            return None
    else:
        kind = "lstm" if isinstance(cell, torch.nn.LSTMCell) else "gru"
    return make_architecture(kind, cell.input_size, cell.hidden_size, 1, cell.bias, False, 0, dtype)


def cell_weight_names(cell: Any) -> tuple[str, ...]:
    return WEIGHT_NAMES if cell.bias else MATRIX_NAMES


def weights_of(module: Any, names: Sequence[str]) -> tuple[Any, ...]:
    """The weights of a layer or cell. Plain parameters are found without torch.nn's slow search for attributes."""
    parameters = module._parameters
    return tuple([parameters[name] if name in parameters else getattr(module, name) for name in names])


@lru_cache(maxsize=1024)
def weight_shapes(architecture: Architecture) -> list[tuple[int, ...]]:
    return list(architecture.shapes().values())


def have_shapes_of(architecture: Architecture, weights: Sequence[Tensor]) -> bool:
    return [tuple(weight.shape) for weight in weights] == weight_shapes(architecture)


def sequence_count(architecture: Architecture) -> int:
    """How many states a batch has: one for each layer and direction."""
    return architecture.num_layers * architecture.directions


def weights_by_sequence(architecture: Architecture, weights: Sequence[T]) -> list[list[T | None]]:
    """PyTorch's flat list of weights as one list for each layer and direction, with None for what is missing.

    Each list is weight_ih, weight_hh, bias_ih, bias_hh, weight_hr.
    """
    count = len(weights) // sequence_count(architecture)
    groups: list[list[T | None]] = []
    for first in range(0, len(weights), count):
        group = weights[first : first + count]
        biases = group[2:4] if architecture.bias else (None, None)
        groups.append([group[0], group[1], *biases, group[-1] if architecture.proj_size else None])
    return groups


def dropout_of(layer: Any) -> float:
    """The probability with which a call now drops outputs between layers."""
    dropout: float = layer.dropout if layer.training and layer.num_layers > 1 else 0.0
    return dropout
