"""The order of the axes of a sequence: batched or unbatched, batch or time first."""

from __future__ import annotations

from typing import NamedTuple

from gatewise.arguments.arrays import Array, describe


class SequenceAxes:
    """What the sizes of a sequence and the order of its axes determine."""

    __slots__ = ()
    batch_first: bool
    unbatched: bool
    steps: int
    batch: int

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes of a step besides that of its units."""
        return () if self.unbatched else (self.batch,)

    @property
    def leading(self) -> tuple[int, ...]:
        """The shape of a sequence without units, of one value for each step and row."""
        if self.unbatched:
            return (self.steps,)
        return (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)

    def shape(self, units: int) -> tuple[int, ...]:
        """The shape of a sequence with `units` values for each step and row."""
        return (*self.leading, units)

    def to_time_major(self, sequence: Array) -> Array:
        """The view (T, B, ...) of a sequence."""
        if self.unbatched:
            return sequence[:, None]
        return sequence.swapaxes(0, 1) if self.batch_first else sequence

    def from_time_major(self, sequence: Array) -> Array:
        """The inverse of `to_time_major`."""
        if self.unbatched:
            return sequence[:, 0]
        return sequence.swapaxes(0, 1) if self.batch_first else sequence


class _Sizes(NamedTuple):
    batch_first: bool
    unbatched: bool
    steps: int
    batch: int


class Axes(_Sizes, SequenceAxes):
    """The sizes T and B of a sequence, and the order of its axes."""

    __slots__ = ()

    @classmethod
    def of(cls, units: tuple[int, ...], batch_first: bool, name: str, x: Array) -> Axes:
        """The axes of an input of shape (T, B, *units), (B, T, *units) or (T, *units)."""
        unit_axes = len(units)
        if x.ndim not in (1 + unit_axes, 2 + unit_axes) or x.shape[x.ndim - unit_axes :] != units:
            batched: list[int | str] = ["B", "T", *units] if batch_first else ["T", "B", *units]
            unbatched = [axis for axis in batched if axis != "B"]
            raise ValueError(
                f"{name}: expected shape {describe(batched)} or {describe(unbatched)}, got {describe(x.shape)}"
            )
        if x.ndim == 1 + unit_axes:
            return cls(batch_first, True, x.shape[0], 1)
        steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
        return cls(batch_first, False, steps, batch)
