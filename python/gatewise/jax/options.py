"""What a call is beside its arrays, and which of these is which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import jax
import numpy as np

import gatewise._core as _core
from gatewise.weights.architecture import Architecture

Operands = Sequence[Any]


@dataclass(frozen=True)
class Options:
    """JAX compiles once for each."""

    architecture: Architecture
    batch_first: bool
    lengths: bool
    resets: bool
    checkpoint_every: int
    backend: str

    @property
    def state_sizes(self) -> list[int]:
        """Of h, and of c where there is one."""
        of = self.architecture
        return [of.recurrent_size, of.hidden_size] if of.has_cell_state else [of.recurrent_size]

    @property
    def states(self) -> int:
        return len(self.state_sizes)

    @property
    def sequences(self) -> int:
        return self.architecture.num_layers * self.architecture.directions

    def extent(self, x: Any) -> tuple[int, int]:
        """Steps and rows of x."""
        return (x.shape[1], x.shape[0]) if self.batch_first else (x.shape[0], x.shape[1])

    def split(self, operands: Operands) -> tuple[Any, list[Any], list[Any], list[Any]]:
        """x, states, lengths and resets as far as there are any, weights."""
        x, *others = operands
        extras = self.states + self.lengths + self.resets
        return x, others[: self.states], others[self.states : extras], others[extras:]

    @property
    def axes(self) -> list[int]:
        """The axis of rows of each operand before the weights."""
        rows = 0 if self.batch_first else 1
        return [rows] + [1] * self.states + [0] * self.lengths + [rows] * self.resets

    def weights_of(self, weights: Sequence[Any]) -> list[list[Any]]:
        """Those of each layer and direction."""
        count = len(weights) // self.sequences
        return [list(weights[first : first + count]) for first in range(0, len(weights), count)]

    def results(self, x: Any) -> list[jax.ShapeDtypeStruct]:
        """y, h and c after."""
        of, (steps, batch) = self.architecture, self.extent(x)
        rows = (batch, steps) if self.batch_first else (steps, batch)
        shapes = [(*rows, of.output_size), *((self.sequences, batch, size) for size in self.state_sizes)]
        return [jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes]

    def sizes(self, steps: int, batch: int) -> tuple[int, int]:
        """Bytes of the packed weights and of a tape."""
        of = self.architecture
        if not isinstance(steps * batch, int):
            raise NotImplementedError(
                f"x: expected sizes that are numbers where a derivative is to follow, got ({steps}, {batch})"
            )
        return _core.xla_sizes(
            self.backend, of.cell, of.dtype.itemsize, of.input_size, of.hidden_size, of.proj_size, of.num_layers,
            of.directions, steps, batch, min(self.checkpoint_every, steps),
        )  # fmt: skip

    def attributes(self, *, weights_only: bool = False, record: bool = False) -> dict[str, Any]:
        """As the handlers ask for them; see Numbers in cpp/bindings/xla.cpp."""
        of = self.architecture
        numbers = [of.input_size, of.hidden_size, of.proj_size, of.num_layers, of.directions, of.bias]
        others = [self.batch_first, self.lengths, self.resets, self.checkpoint_every, record]
        numbers += [0] * len(others) if weights_only else others
        return {"numbers": np.array(numbers, np.int64), "backend": self.backend, "cell": of.cell}


def split_backward(operands: Operands, given: tuple[bool, ...]) -> tuple[Operands, Any, Any, Operands]:
    end = len(operands) - sum(given)
    *forward, y, tape = operands[:end]
    return forward, y, tape, operands[end:]


def results_of_backward(of: Options, x: Any, states: Any, weights: Any, wanted: tuple[bool, ...]) -> list[Any]:
    like = [x] * wanted[0] + list(states)
    for own in compress(of.weights_of(weights), wanted[1:]):
        like += own
    return [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in like]


def split_tangent(operands: Operands, linear: tuple[bool, ...]) -> tuple[Operands, Operands]:
    end = len(operands) - sum(linear)
    return operands[: end - 2], operands[end:]
