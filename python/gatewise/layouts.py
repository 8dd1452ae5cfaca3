"""How the axes of one call lie: batched or not, batch or time first; and the states that go with them."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np

from gatewise.arrays import Array, describe, floating, shaped
from gatewise.parameters import Architecture

State: TypeAlias = Array | tuple[Array, Array]


class _Axes:
    """What follows from the sizes of a sequence and the order of its axes."""

    __slots__ = ()
    batch_first: bool
    unbatched: bool
    steps: int
    batch: int

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes that a step has beside its values."""
        return () if self.unbatched else (self.batch,)

    @property
    def leading(self) -> tuple[int, ...]:
        """The axes of a sequence of one value a step."""
        if self.unbatched:
            return (self.steps,)
        return (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)

    def shape(self, units: int) -> tuple[int, ...]:
        """Of a sequence with `units` values a step."""
        return (*self.leading, units)

    def to_time_major(self, sequence: Array) -> Array:
        """The view (T, B, ...) of a sequence."""
        if self.unbatched:
            return sequence[:, None]
        return sequence.swapaxes(0, 1) if self.batch_first else sequence

    def from_time_major(self, sequence: Array) -> Array:
        """The inverse."""
        if self.unbatched:
            return sequence[:, 0]
        return sequence.swapaxes(0, 1) if self.batch_first else sequence


class _Sizes(NamedTuple):
    batch_first: bool
    unbatched: bool
    steps: int
    batch: int


class Axes(_Sizes, _Axes):
    """The sizes T and B of a sequence, and the order of its axes."""

    __slots__ = ()

    @classmethod
    def of(cls, units: tuple[int, ...], batch_first: bool, name: str, x: Array) -> Axes:
        """Those of an input of shape (T, B, *units), (B, T, *units) or (T, *units)."""
        behind = len(units)
        if x.ndim not in (1 + behind, 2 + behind) or x.shape[x.ndim - behind :] != units:
            batched: list[int | str] = ["B", "T", *units] if batch_first else ["T", "B", *units]
            unbatched = [axis for axis in batched if axis != "B"]
            raise ValueError(
                f"{name}: expected shape {describe(batched)} or {describe(unbatched)}, got {describe(x.shape)}"
            )
        if x.ndim == 1 + behind:
            return cls(batch_first, True, x.shape[0], 1)
        steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
        return cls(batch_first, False, steps, batch)


class _Fields(NamedTuple):
    architecture: Architecture
    batch_first: bool
    unbatched: bool
    steps: int
    batch: int


class Layout(_Fields, _Axes):
    """The sizes T and B of a layer's call, and the order of its axes."""

    __slots__ = ()

    @classmethod
    def of(cls, architecture: Architecture, batch_first: bool, name: str, x: Array) -> Layout:
        """The layout of an input of shape (T, B, I), (B, T, I) or (T, I)."""
        return cls(architecture, *Axes.of((architecture.input_size,), batch_first, name, x))

    def state_shape(self, units: int) -> tuple[int, ...]:
        of = self.architecture
        sequences = of.num_layers * of.directions
        return (sequences, units) if self.unbatched else (sequences, self.batch, units)

    def new_state(self) -> tuple[Array, Array | None]:
        """Uninitialised h, and c where there is one."""
        of = self.architecture
        hidden = np.empty(self.state_shape(of.recurrent_size), of.dtype)
        return hidden, np.empty(self.state_shape(of.hidden_size), of.dtype) if of.has_cell_state else None

    def state_out(self, hidden: Array, cell: Array | None = None) -> State:
        return hidden if cell is None else (hidden, cell)

    def state_in(self, name: str, state: object, *, allow_none: bool = False) -> tuple[Array | None, Array | None]:
        """h and c of a state as contiguous arrays; None for a missing state or, if allowed, for a part of a pair."""
        of = self.architecture
        if state is None:
            return None, None
        if not of.has_cell_state:
            if isinstance(state, tuple):
                raise TypeError(f"{name}: expected an array h, got a tuple of {len(state)}")
            return self._part(name, state, of.recurrent_size), None
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            got = f"a sequence of {len(state)}" if isinstance(state, (tuple, list)) else type(state).__name__
            raise TypeError(f"{name}: expected a pair (h, c), got {got}")
        sizes = (of.recurrent_size, of.hidden_size)
        hidden, cell = (
            None if part is None and allow_none else self._part(f"{name}[{i}]", part, size)
            for i, (part, size) in enumerate(zip(state, sizes, strict=True))
        )
        return hidden, cell

    def _part(self, name: str, part: object, units: int) -> Array:
        array = floating(name, part, self.architecture.dtype)
        return np.require(shaped(name, array, self.state_shape(units)), requirements=["C", "A"])
