"""The axes of one call of a recurrent layer, and the states that go with them."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np

from gatewise.arguments.arrays import Array, floating, shaped
from gatewise.arguments.axes import Axes, SequenceAxes
from gatewise.weights.architecture import Architecture

State: TypeAlias = Array | tuple[Array, Array]


class _Fields(NamedTuple):
    architecture: Architecture
    batch_first: bool
    unbatched: bool
    steps: int
    batch: int


class Layout(_Fields, SequenceAxes):
    """The sizes T and B of a layer's call, and the order of its axes."""

    __slots__ = ()

    @classmethod
    def of(cls, architecture: Architecture, batch_first: bool, name: str, x: Array) -> Layout:
        """The layout of an input of shape (T, B, I), (B, T, I) or (T, I)."""
        return cls(architecture, *Axes.of((architecture.input_size,), batch_first, name, x))

    def state_shape(self, units: int) -> tuple[int, ...]:
        architecture = self.architecture
        sequences = architecture.num_layers * architecture.directions
        return (sequences, units) if self.unbatched else (sequences, self.batch, units)

    def new_state(self) -> tuple[Array, Array | None]:
        """Uninitialised arrays for h and, if the cell has one, c."""
        architecture, dtype = self.architecture, self.architecture.dtype
        hidden = np.empty(self.state_shape(architecture.recurrent_size), dtype)
        cell = np.empty(self.state_shape(architecture.hidden_size), dtype) if architecture.has_cell_state else None
        return hidden, cell

    def state_out(self, hidden: Array, cell: Array | None = None) -> State:
        return hidden if cell is None else (hidden, cell)

    def state_in(self, name: str, state: object, *, allow_none: bool = False) -> tuple[Array | None, Array | None]:
        """h and c of a state as contiguous arrays; None for a missing state or, if allowed, for a part of a pair."""
        architecture = self.architecture
        if state is None:
            return None, None
        if not architecture.has_cell_state:
            if isinstance(state, tuple):
                raise TypeError(f"{name}: expected an array h, got a tuple of {len(state)}")
            return self._part(name, state, architecture.recurrent_size), None
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            got = f"a sequence of {len(state)}" if isinstance(state, (tuple, list)) else type(state).__name__
            raise TypeError(f"{name}: expected a pair (h, c), got {got}")
        sizes = (architecture.recurrent_size, architecture.hidden_size)
        hidden, cell = (
            None if part is None and allow_none else self._part(f"{name}[{i}]", part, size)
            for i, (part, size) in enumerate(zip(state, sizes, strict=True))
        )
        return hidden, cell

    def _part(self, name: str, part: object, units: int) -> Array:
        array = floating(name, part, self.architecture.dtype)
        return np.require(shaped(name, array, self.state_shape(units)), requirements=["C", "A"])
