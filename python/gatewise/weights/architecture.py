"""What a stack of recurrent layers is, apart from the values of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import MAX_BYTES, Array
from gatewise.weights.functions import Function

# The gates of each cell, in the order of PyTorch's weights.
GATES = {
    "lstm": ("input", "forget", "candidate", "output"),
    "gru": ("reset", "update", "candidate"),
    "gru_reset_before": ("reset", "update", "candidate"),
    "rnn_tanh": ("candidate",),
    "rnn_relu": ("candidate",),
}
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_ch")


class Formula(NamedTuple):
    """The functions inside a cell, and what else Keras and ONNX vary, as the core takes them."""

    gate: Function = Function("sigmoid")
    candidate: Function = Function("tanh")
    output: Function = Function("tanh")  # LSTM: applied to c before it enters h
    clip: float = math.inf  # bound of the sums before gates and candidate
    peepholes: bool = False  # LSTM: the gates see c


@dataclass(frozen=True)
class Architecture:
    """What a stack of recurrent layers is, apart from its weights."""

    cell: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    bidirectional: bool
    proj_size: int
    dtype: np.dtype[Any]
    formula: Formula | None = None  # None: the cell's usual functions

    @property
    def trains(self) -> bool:
        return self.cell != "gru_reset_before" and self.formula is None

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def recurrent_size(self) -> int:
        """The units of h: the projection's, if there is one."""
        return self.proj_size or self.hidden_size

    @property
    def output_size(self) -> int:
        return self.directions * self.recurrent_size

    @property
    def has_cell_state(self) -> bool:
        return self.cell == "lstm"

    def sequences(self) -> list[tuple[str, int]]:
        """The suffix of the names and the input size of each layer and direction, in PyTorch's order."""
        suffixes = ("", "_reverse")[: self.directions]
        return [
            (f"_l{layer}{suffix}", self.output_size if layer else self.input_size)
            for layer in range(self.num_layers)
            for suffix in suffixes
        ]

    def shapes_of(self, suffix: str, input_size: int) -> dict[str, tuple[int, ...]]:
        rows = len(GATES[self.cell]) * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows, self.recurrent_size),
        }
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, self.hidden_size)
        if self.formula and self.formula.peepholes:
            shapes["weight_ch"] = (3 * self.hidden_size,)
        return {kind + suffix: shape for kind, shape in shapes.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, as torch.nn has them."""
        return {name: shape for sequence in self.sequences() for name, shape in self.shapes_of(*sequence).items()}

    def check_size(self) -> None:
        numbers = sum(int(np.prod(shape, dtype=object)) for shape in self.shapes().values())
        if numbers * self.dtype.itemsize > MAX_BYTES:
            raise ValueError(
                f"hidden_size: expected weights of at most {MAX_BYTES} bytes in all, "
                f"got {numbers * self.dtype.itemsize}"
            )

    def draw(self, seed: int) -> dict[str, Array]:
        """Initial weights, uniform in +-1 / sqrt(hidden_size): PyTorch's distribution from NumPy's generator."""
        generator = np.random.default_rng(seed)
        bound = self.hidden_size**-0.5
        return {
            name: generator.uniform(-bound, bound, shape).astype(self.dtype) for name, shape in self.shapes().items()
        }

    def pack(self, arrays: Mapping[str, Array]) -> _core.Packed:
        return _core.Packed(
            self.cell,
            self.dtype,
            self.input_size,
            self.hidden_size,
            self.proj_size,
            self.num_layers,
            self.directions,
            self.grouped(arrays),
            self.formula,
        )

    def grouped(self, arrays: Mapping[str, Array]) -> list[list[Array | None]]:
        """One list of weights for each layer and direction, in the order of KINDS, as the core takes them."""
        return [[arrays.get(kind + suffix) for kind in KINDS] for suffix, _ in self.sequences()]
