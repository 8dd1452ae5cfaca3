"""Streams: a layer's state that advances one step, or a few, at a time."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np

from gatewise import _core
from gatewise.arrays import Array, describe, empty, exact, floating, output, rows, shaped, whole_number
from gatewise.layouts import Layout, State
from gatewise.parameters import MOST, Architecture, Holder, Weights
from gatewise.sequences import flags_of_rows, plan, restarts


class Stream(_core.Stream):
    """A state that advances step by step, with the weights that the layer had when the stream was made.

    `step(x, out)` is a plain C method: it converts nothing, allocates nothing, takes no lock and starts no thread. Its
    results have the same bits as those of the layer's call over the whole sequence.

    A stream serves one thread at a time; a second one that comes meanwhile gets a RuntimeError.
    """

    def __init__(self, holder: Holder, architecture: Architecture, batch_first: bool, batch_size: int | None) -> None:
        if architecture.bidirectional:
            raise ValueError(
                "stream: expected one direction; a bidirectional layer needs the end of the sequence first"
            )
        self._start(holder, holder.weights, batch_first, batch_size)

    def _start(self, holder: Holder, weights: Weights, batch_first: bool, batch_size: int | None) -> None:
        size = None if batch_size is None else whole_number("batch_size", batch_size, 1, MOST)
        super().__init__(weights.packed(), 1 if size is None else size, size is None)
        self._holder = holder
        self._weights = weights
        self._batch_first = batch_first
        self._batch_size = size

    @property
    def batch_size(self) -> int | None:
        """Rows of a step; None if steps are unbatched."""
        return self._batch_size

    def _layout(self, steps: int) -> Layout:
        unbatched = self._batch_size is None
        return Layout(self._weights.architecture, self._batch_first, unbatched, steps, self._batch_size or 1)

    def _prepare_step(self, x: object, out: object, resets: object) -> tuple[Array, Array, Array | None]:
        """For the C method `step`: arguments that it cannot use as they are, made fit, or why they cannot be."""
        of = self._weights.architecture
        leading = () if self._batch_size is None else (self._batch_size,)
        flags = None if resets is None else restarts(resets, leading)
        if out is None:
            array = shaped("x", floating("x", x, of.dtype), (*leading, of.input_size))
            return np.require(array, requirements=["C", "A"]), np.empty((*leading, of.output_size), of.dtype), flags
        array = shaped("x", exact("x", x, of.dtype), (*leading, of.input_size))
        if not array.flags.c_contiguous or not array.flags.aligned:
            raise ValueError(f"x: expected a C-contiguous array with `out`, got strides {array.strides}")
        return array, output("out", out, of.dtype, (*leading, of.output_size), ("x", array)), flags

    def run(self, x: object, out: Array | None = None, *, resets: object = None) -> Array:
        """Several steps in one call, the same bits as one by one.

        Parameters
        ----------
        x : array_like
            (T, input_size); with batch_size B (T, B, input_size), or (B, T, input_size) if the layer is batch_first.
        out : ndarray, optional
            Where to write the output, as in the layer's call.
        resets : array_like of bools or of numbers that are 0 or 1, optional
            (T, B) in the order of x's axes, unbatched (T,): where the state is set to zero before the step.

        Returns
        -------
        ndarray
            The outputs in the order of x's axes; `out` if it was given.
        """
        of = self._weights.architecture
        array = floating("x", x, of.dtype) if out is None else exact("x", x, of.dtype)
        axes: list[int | str] = ["T", of.input_size]
        if self._batch_size is not None:
            axes.insert(0 if self._batch_first else 1, self._batch_size)
        layout = self._layout(shaped("x", array, axes).shape[axes.index("T")])
        shape = layout.shape(of.output_size)
        y = empty(shape, of.dtype) if out is None else output("out", out, of.dtype, shape, ("x", array))
        timetable = None if resets is None else plan(layout, None, resets)[0]
        self._run(rows(layout.to_time_major(array)), layout.to_time_major(y), timetable)
        return y

    @property
    def state(self) -> State:
        """A copy of the state: (h, c) for LSTM, h for the others, (L, B, H) or unbatched (L, H). Setting copies in."""
        layout = self._layout(0)
        hidden, cell = layout.new_state()
        self._get_state(hidden, cell)
        return layout.state_out(hidden, cell)

    @state.setter
    def state(self, state: object) -> None:
        if state is None:
            raise TypeError("state: expected a state, got None; reset() sets it to zero")
        hidden, cell = self._layout(0).state_in("state", state)
        assert hidden is not None
        self._set_state(hidden, cell)

    def reset(self, rows: object = None) -> None:
        """Set the state to zero: all of it, or some rows.

        Parameters
        ----------
        rows : array_like of bools or of integers, optional
            Bools (batch_size,) flag the rows; integers, also a single one, are indices of rows and not flags.
        """
        batch = self._batch_size
        if rows is None:
            self._reset(np.ones(() if batch is None else batch, np.bool_))
        elif batch is None:
            raise ValueError("rows: expected none, since this stream is unbatched")
        else:
            self._reset(flags_of_rows("rows", rows, batch))

    def refresh(self) -> None:
        """Take the layer's present weights; the state stays."""
        weights = self._holder.weights
        self._use(weights.packed())
        self._weights = weights

    def copy(self) -> Stream:
        """Another stream with the same weights and, from here on, its own state."""
        other = Stream.__new__(Stream)
        other._start(self._holder, self._weights, self._batch_first, self._batch_size)
        other.state = self.state
        return other

    def __copy__(self) -> Stream:
        return self.copy()

    def __deepcopy__(self, memory: dict[int, Any]) -> Stream:
        other = self.copy()
        other._holder = deepcopy(self._holder, memory)  # the copied layer's, if that is copied together with this
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (
            self._holder,
            self._weights,
            self._batch_first,
            self._batch_size,
            self.state,
        )

    def __repr__(self) -> str:
        of = self._weights.architecture
        sizes = describe((of.input_size, of.hidden_size))
        return f"Stream({of.cell} {sizes}, layers={of.num_layers}, batch_size={self._batch_size}, {of.dtype})"


def _restore(holder: Holder, weights: Weights, batch_first: bool, batch_size: int | None, state: State) -> Stream:
    """A pickled stream. If its layer was not pickled with it, refresh() takes the weights that the layer had then."""
    stream = Stream.__new__(Stream)
    stream._start(holder, weights, batch_first, batch_size)
    stream.state = state
    return stream
