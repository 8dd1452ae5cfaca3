"""Streams: a layer's state that advances one step, or several, at a time."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import (
    MAX_BYTES,
    MAX_SIZE,
    Array,
    as_array,
    empty,
    exact,
    floating,
    output,
    rows,
    shaped,
    tokens,
    whole_number,
)
from gatewise.arguments.axes import Axes
from gatewise.arguments.sequences import flags_of_rows, restarts, whole_lengths
from gatewise.running.network import Chain
from gatewise.weights.parameters import Weights

MAX_WINDOW = 2**20  # steps


class Stream(_core.Stream):
    """A state that advances step by step, with the weights that its layer or model had when the stream was made.

    `step(x, out)` and `run(x, out)` are plain C methods: they convert nothing, allocate nothing and take no lock, and a
    step starts no thread. Their results have the same bits as those of a call over the whole sequence.

    A stream serves one thread at a time; a second thread that uses it in the meantime gets a RuntimeError. So does the
    child of a process that forked while another of its threads was using the stream, until it has reset the stream.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_two_bases(cls)

    def __init__(self, chain: Chain, batch_first: bool, batch_size: int | None, window: int | None = None) -> None:
        if window is None and chain.streaming_obstacle:
            raise ValueError(f"stream: {chain.streaming_obstacle}")
        self._start(chain, chain.weights(), batch_first, batch_size, window)

    def _start(
        self,
        chain: Chain,
        weights: tuple[Weights[Any], ...],
        batch_first: bool,
        batch_size: int | None,
        window: int | None,
    ) -> None:
        size = None if batch_size is None else whole_number("batch_size", batch_size, 1, MAX_SIZE)
        rows = 1 if size is None else size
        if window is None:
            super().__init__(chain.network(weights, "steps"), rows, size is None, batch_first=batch_first)
        else:
            window = whole_number("window", window, 1, MAX_WINDOW)
            # The numbers that the inputs of a window, or what was computed from them, consist of at most.
            numbers = rows * window * (2 * max(chain.sizes) + sum(4 * units for _, units in chain.parts))
            if 8 * numbers > MAX_BYTES:
                raise ValueError(f"window: expected one of at most {MAX_BYTES} bytes, got {8 * numbers}")
            tail, head = chain.window(weights)
            super().__init__(tail, rows, size is None, head, window, batch_first)
        self._chain = chain
        self._weights = weights
        self._batch_first = batch_first
        self._batch_size = size
        self._window = window
        self._rows = () if size is None else (size,)

    @property
    def window(self) -> int | None:
        """The number of last inputs that a step depends on; None: all."""
        return self._window

    @property
    def batch_size(self) -> int | None:
        """Rows of a step; None if steps are unbatched."""
        return self._batch_size

    def _prepare_step(self, x: object, out: object, resets: object) -> tuple[Array, Array, Array | None]:
        """Convert arguments that the C method `step` cannot use as they are, or say what is wrong with them."""
        chain, rows = self._chain, self._rows
        flags = None if resets is None else restarts(resets, rows)
        array = step_input(chain, x, rows, out is not None)
        shape = (*rows, chain.output_size)
        if out is None:
            return array, np.empty(shape, chain.dtype), flags
        return array, output("out", out, chain.dtype, shape, ("x", array)), flags

    def _prepare_run(self, x: object, out: object, resets: object) -> tuple[Array, Array, Array | None]:
        """The same for the C method `run`. Each array has the order of x's axes."""
        chain = self._chain
        array = sequence_input(chain, x, out is not None)
        axes = self._axes("x", array)
        shape = axes.shape(chain.output_size)
        y = empty(shape, chain.dtype) if out is None else output("out", out, chain.dtype, shape, ("x", array))
        if resets is not None and self._window is None and chain.refuses_resets:
            raise ValueError(chain.refuses_resets)
        flags = None if resets is None else restarts(resets, axes.leading)
        return rows(array) if chain.units else array, y, flags

    def _axes(self, name: str, array: Array) -> Axes:
        """The axes of an array of steps, which must have this stream's rows and units."""
        expected: list[int | str] = ["T", *self._chain.units]
        if self._batch_size is not None:
            expected.insert(0 if self._batch_first else 1, self._batch_size)
        steps = shaped(name, array, expected).shape[expected.index("T")]
        return Axes(self._batch_first, self._batch_size is None, steps, self._batch_size or 1)

    @property
    def state(self) -> Any:
        """A copy of the state: (h, c) for LSTM, h for the others, (L, B, H) or unbatched (L, H). Setting copies in.

        The state of a model is a tuple of these, one for each layer that has a state. The state of a window consists of
        its inputs, oldest first, and of how many each row has: (x, lengths) as a call takes them, x (T, B, I) or
        unbatched (T, I), lengths (B,) or ().
        """
        if self._window is not None:
            return self._window_state()
        parts = self._chain.new_parts(self._rows)
        self._get_state(parts)
        return self._chain.state_out(parts)

    @state.setter
    def state(self, state: object) -> None:
        if state is None:
            raise TypeError("state: expected a state, got None; reset() sets it to zero")
        if self._window is not None:
            self._set_window_state(state)
        else:
            self._set_state(self._chain.state_in("state", state, self._rows))

    def _window_state(self) -> tuple[Array, Array]:
        chain, counts = self._chain, self._window_counts()
        dtype = chain.dtype if chain.vocabulary is None else np.dtype(np.int64)
        inputs = np.zeros((max(counts), len(counts), *chain.units), dtype)
        self._get_window(inputs, counts)
        lengths = np.array(counts, np.int64)
        if self._batch_size is None:
            return inputs[:, 0], lengths[0]
        return (np.ascontiguousarray(inputs.swapaxes(0, 1)) if self._batch_first else inputs), lengths

    def _set_window_state(self, state: object) -> None:
        vocabulary = self._chain.vocabulary
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise TypeError(f"state: expected a pair (x, lengths), got {type(state).__name__}")
        array = as_array("state[0]", state[0])
        axes = self._axes("state[0]", array)
        most = min(axes.steps, self._window or 0)
        lengths = whole_lengths(state[1], self._rows, most, "state[1]").reshape(axes.batch)
        if vocabulary is None:
            inputs = axes.to_time_major(floating("state[0]", array, self._chain.dtype))
        else:
            padded = np.array(array)
            axes.to_time_major(padded)[np.arange(axes.steps)[:, None] >= lengths] = 0  # need not be a token
            inputs = axes.to_time_major(tokens("state[0]", padded, vocabulary))
        # The core takes the last input of each row last.
        aligned = np.zeros((int(lengths.max(initial=0)), *inputs.shape[1:]), inputs.dtype)
        for row, length in enumerate(lengths):
            aligned[len(aligned) - length :, row] = inputs[:length, row]
        self._set_window(aligned, lengths.tolist())

    def reset(self, rows: object = None) -> None:
        """Set the state to zero: all of it, or some rows.

        Parameters
        ----------
        rows : array_like of bools or of integers, optional
            Bools (batch_size,) flag the rows; integers, also a single integer, are indices of rows.
        """
        batch = self._batch_size
        if rows is None:
            self._reset(np.ones(() if batch is None else batch, np.bool_))
        elif batch is None:
            raise ValueError("rows: expected none, since this stream is unbatched")
        else:
            self._reset(flags_of_rows("rows", rows, batch))

    def refresh(self) -> None:
        """Take the present weights of the layer or model; the state stays."""
        weights = self._chain.weights()
        if self._window is None:
            self._use(self._chain.network(weights, "steps"))
        else:
            self._use(*self._chain.window(weights))
        self._weights = weights

    def copy(self) -> Stream:
        """Another stream with the same weights and a copy of the state."""
        return _restore(self._chain, self._weights, self._batch_first, self._batch_size, self._window, self.state)

    def __copy__(self) -> Stream:
        return self.copy()

    def __deepcopy__(self, memory: dict[int, Any]) -> Stream:
        other = self.copy()
        other._chain = deepcopy(
            self._chain, memory
        )  # of the copied layers, if they are copied together with the stream
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (
            self._chain,
            self._weights,
            self._batch_first,
            self._batch_size,
            self._window,
            self.state,
        )

    def __repr__(self) -> str:
        window = "" if self._window is None else f", window={self._window}"
        return f"Stream({self._chain.describe()}, batch_size={self._batch_size}{window})"


def refuse_two_bases(cls: type) -> None:
    """A class cannot be a stream and a pool: the C methods of one would take an instance for the other."""
    if issubclass(cls, _core.Stream) and issubclass(cls, _core.Pool):
        raise TypeError(f"{cls.__name__}: expected a class that inherits from Stream or from Pool, got one of both")


def _restore(
    chain: Chain,
    weights: tuple[Weights[Any], ...],
    batch_first: bool,
    batch_size: int | None,
    window: int | None,
    state: object,
) -> Stream:
    """Make a pickled stream. Unless its layer is in the same pickle, refresh() takes the weights of that time."""
    stream = Stream.__new__(Stream)
    stream._start(chain, weights, batch_first, batch_size, window)
    stream.state = state
    return stream


def step_input(chain: Chain, x: object, rows: tuple[int, ...], is_exact: bool) -> Array:
    """The input of one step, as the core takes it."""
    if chain.vocabulary is not None:
        return tokens("x", shaped("x", as_array("x", x), rows), chain.vocabulary)
    array = exact("x", x, chain.dtype) if is_exact else floating("x", x, chain.dtype)
    array = shaped("x", array, (*rows, *chain.units))
    if is_exact and not (array.flags.c_contiguous and array.flags.aligned):
        got = f"strides {array.strides}" if array.flags.aligned else "a misaligned array"
        raise ValueError(f"x: expected a C-contiguous, aligned array with `out`, got {got}")
    return np.require(array, requirements=["C", "A"])


def sequence_input(chain: Chain, x: object, is_exact: bool) -> Array:
    """The input of several steps, of any shape."""
    if chain.vocabulary is not None:
        return tokens("x", x, chain.vocabulary)
    return exact("x", x, chain.dtype) if is_exact else floating("x", x, chain.dtype)
