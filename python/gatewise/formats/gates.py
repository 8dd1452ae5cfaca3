"""The order of a cell's gates in other formats. gatewise has PyTorch's: i f g o of an LSTM, r z n of a GRU."""

from __future__ import annotations

import numpy as np

from gatewise.arguments.arrays import Array

# Where Keras and RTNeural have each of PyTorch's gates: i f c o of an LSTM, z r h of a GRU. Each of these orders is its
# own inverse, so that it converts both ways.
KERAS_ORDER = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "RNN": (0,)}


def split_gates(array: Array, cell: str, axis: int) -> list[Array]:
    """The parts of an axis [gates * units] that belong to the gates, in PyTorch's order if they were in Keras's."""
    order = KERAS_ORDER[cell]
    gates = np.split(array, len(order), axis)
    return [gates[i] for i in order]


def reorder_gates(array: Array, cell: str, axis: int) -> Array:
    """The same array with the gates of one axis in PyTorch's order if they were in Keras's, and the other way round."""
    return np.concatenate(split_gates(array, cell, axis), axis)
