"""What LSTM, GRU and RNN share: options, calls over whole sequences, recording, traces."""

from __future__ import annotations

import math
import secrets
from typing import Any

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import (
    MAX_SIZE,
    Array,
    empty,
    exact,
    flag,
    floating,
    number,
    output,
    real_dtype,
    rows,
    whole_number,
)
from gatewise.arguments.sequences import schedule_of, whole_lengths, zero_tail
from gatewise.running.layout import Layout, State
from gatewise.running.network import Chain, Recurrent
from gatewise.running.pools import Streamable
from gatewise.running.tapes import NO_DROPOUT, Tape, record
from gatewise.running.traces import Trace, trace
from gatewise.weights.architecture import GATES, Architecture, Formula
from gatewise.weights.module import Module
from gatewise.weights.parameters import WeightsSlot, swap_lock

# The options that not every recurrent layer has, and their defaults.
SPECIAL_OPTIONS = {
    "proj_size": 0,
    "nonlinearity": "tanh",
    "reset_after": True,
    "activation": "tanh",
    "output_activation": None,
    "recurrent_activation": "sigmoid",
    "clip": None,
    "peepholes": False,
}


class Layer(Module, Streamable):
    """What the three recurrent layers share. Make an LSTM, a GRU or an RNN."""

    _slot: WeightsSlot[_core.Packed]

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        dtype: object,
        seed: int | None,
        formula: Formula,
    ) -> None:
        hidden_size = whole_number("hidden_size", hidden_size, 1, MAX_SIZE)
        architecture = Architecture(
            cell=cell,
            input_size=whole_number("input_size", input_size, 1, MAX_SIZE),
            hidden_size=hidden_size,
            num_layers=whole_number("num_layers", num_layers, 1, 2**16),
            bias=flag("bias", bias),
            bidirectional=flag("bidirectional", bidirectional),
            proj_size=_projection(proj_size, hidden_size),
            dtype=real_dtype(dtype),
            formula=None if formula == Formula() else formula,
        )
        architecture.check_size()
        self._architecture = architecture
        self._batch_first = flag("batch_first", batch_first)
        self._dropout = number("dropout", dropout, 0, 1)
        self._seed = secrets.randbits(63) if seed is None else whole_number("seed", seed, 0, 2**64 - 1)
        self._call_count = 0
        self._start_weights(architecture, lambda: architecture.draw(self._seed))

    # -- its options --------------------------------------------------------------------------------------------

    @property
    def input_size(self) -> int:
        return self._architecture.input_size

    @property
    def hidden_size(self) -> int:
        return self._architecture.hidden_size

    @property
    def num_layers(self) -> int:
        return self._architecture.num_layers

    @property
    def bias(self) -> bool:
        return self._architecture.bias

    @property
    def bidirectional(self) -> bool:
        return self._architecture.bidirectional

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._architecture.dtype

    @property
    def batch_first(self) -> bool:
        return self._batch_first

    @property
    def dropout(self) -> float:
        return self._dropout

    @property
    def seed(self) -> int:
        """The seed of the initial weights and of dropout."""
        return self._seed

    @property
    def call_count(self) -> int:
        """The number of the dropout masks that the next `record` draws. Set it to draw the same ones again."""
        return self._call_count

    @call_count.setter
    def call_count(self, value: int) -> None:
        self._call_count = whole_number("call_count", value, 0, 2**64 - 1)

    def _options(self) -> dict[str, Any]:
        special = [name for name in SPECIAL_OPTIONS if hasattr(self, name)]
        shared = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "seed")
        names = (*shared, *special)
        return {name: getattr(self, name) for name in names} | {"dtype": self.dtype.name}

    def __repr__(self) -> str:
        defaults: dict[str, Any] = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
        }
        defaults |= {"dtype": "float32"} | SPECIAL_OPTIONS
        options = self._options()
        changed = [
            f"{name}={options[name]!r}"
            for name, default in defaults.items()
            if name in options and options[name] != default
        ]
        return f"{type(self).__name__}({', '.join([str(self.input_size), str(self.hidden_size), *changed])})"

    def gate(self, name: str) -> slice:
        """The rows of one gate in weight_ih, weight_hh and their biases.

        Parameters
        ----------
        name : str
            LSTM: "input", "forget", "candidate" or "output"; GRU: "reset", "update" or "candidate"; RNN: "candidate".
        """
        gates, size = GATES[self._architecture.cell], self._architecture.hidden_size
        if not isinstance(name, str) or name not in gates:
            raise ValueError(f"name: expected {' or '.join(map(repr, gates))}, got {name!r}")
        first = gates.index(name) * size
        return slice(first, first + size)

    # -- calls --------------------------------------------------------------------------------------------------

    def _arguments(
        self, x: object, state: object, is_exact: bool = False
    ) -> tuple[Array, Layout, Array | None, Array | None]:
        """x in the layer's dtype, the order of its axes, and h and c before the first step."""
        dtype = self._architecture.dtype
        array = exact("x", x, dtype) if is_exact else floating("x", x, dtype)
        layout = Layout.of(self._architecture, self._batch_first, "x", array)
        return array, layout, *layout.state_in("state", state)

    def __call__(
        self,
        x: object,
        state: object = None,
        *,
        lengths: object = None,
        resets: object = None,
        out: Array | None = None,
    ) -> tuple[Array, State]:
        """Inference over a whole sequence. Dropout does nothing here.

        Parameters
        ----------
        x : array_like
            (T, B, input_size), with batch_first (B, T, input_size), or unbatched (T, input_size). Any real floating
            dtype, converted to the layer's.
        state : array_like or (array_like, array_like), optional
            The state before the first step: (h, c) for LSTM, h for the others, each (num_layers * D, B, hidden_size),
            unbatched (num_layers * D, hidden_size), where D is 2 if bidirectional, else 1; h of an LSTM with
            projection has proj_size in place of hidden_size. None is zero.
        lengths : array_like of integers, optional
            (B,), unbatched (): how many steps each row has, from 0 to T, in any order; None: all have T. What x holds
            after a row's end does not matter, the output there is zero, the state returned is the one at that row's
            end, and the reverse direction starts there.
        resets : array_like of bools or of numbers that are 0 or 1, optional
            (T, B) in the order of x's axes, unbatched (T,): where the state is set to zero before the step. These are
            the starts of episodes: `resets[t] = dones[t - 1]`. The reverse direction starts anew between the same two
            steps: after step t, before step t - 1.
        out : ndarray, optional
            Where to write the output: C-contiguous, writable, of the layer's dtype and memory of its own. x must then
            have exactly the layer's dtype.

        Returns
        -------
        output : ndarray
            (T, B, D * hidden_size) in the order of x's axes; `out` if it was given.
        state
            After the last step, shaped as `state`.
        """
        array, layout, hidden, cell = self._arguments(x, state, out is not None)
        shape, dtype = layout.shape(self._architecture.output_size), self._architecture.dtype
        if out is None:
            y = empty(shape, dtype)
        else:
            y = output("out", out, dtype, shape, ("x", array), ("state", hidden), ("state", cell))
        hidden_after, cell_after = layout.new_state()
        steps_in, steps_out = layout.to_time_major(array), layout.to_time_major(y)
        schedule = None
        if lengths is not None or resets is not None:
            schedule, count = schedule_of(layout, lengths, resets)
            steps_in, steps_out = steps_in[:count], zero_tail(steps_out, count)
        packed = self._slot.weights.packed()
        packed.forward(rows(steps_in), hidden, cell, steps_out, hidden_after, cell_after, schedule)
        return y, layout.state_out(hidden_after, cell_after)

    def record(
        self,
        x: object,
        state: object = None,
        *,
        lengths: object = None,
        resets: object = None,
        checkpoint_every: int | None = None,
    ) -> Tape:
        """Forward for training: apply dropout, and keep what backward needs.

        Parameters
        ----------
        x, state, lengths, resets
            As in a call.
        checkpoint_every : int, optional
            Keep the cell state only before every n-th step, besides the outputs of all layers, and let backward
            compute the gates between two of these steps again. The gradients have the same bits; `Tape.nbytes` shows
            what it saves. About the square root of T needs the least memory.
        """
        self._check_trains("record")
        array, layout, hidden, cell = self._arguments(x, state)
        schedule, steps = schedule_of(layout, lengths, resets)
        every = 0 if checkpoint_every is None else whole_number("checkpoint_every", checkpoint_every, 1, 2**62)
        packed = self._slot.weights.packed()
        with swap_lock():
            call_count = self._call_count
            self._call_count = (call_count + 1) % 2**64
        dropout = (self._dropout, self._seed, call_count)
        try:
            return record(layout, packed, array, hidden, cell, schedule, steps, every, dropout)
        except BaseException:  # after Ctrl-C, or when memory is short, nothing has changed
            with swap_lock():
                if self._call_count == (call_count + 1) % 2**64:
                    self._call_count = call_count
            raise

    def trace(self, x: object, state: object = None, *, lengths: object = None, resets: object = None) -> Trace:
        """A call that shows what goes on inside: every gate and state of every layer and direction.

        Parameters
        ----------
        x, state, lengths, resets
            As in a call; the results have the same bits.

        Returns
        -------
        Trace
            `trace.output`, `trace.state`, and `trace["l0"].forget_gate` and so on.
        """
        self._check_trains("trace")
        array, layout, hidden, cell = self._arguments(x, state)
        row_lengths = None if lengths is None else whole_lengths(lengths, layout.rows, layout.steps)
        schedule, steps = schedule_of(layout, row_lengths, resets)
        packed = self._slot.weights.packed()
        return trace(record(layout, packed, array, hidden, cell, schedule, steps, 0, NO_DROPOUT), row_lengths)

    def input_gradient(
        self,
        x: object,
        step: int,
        state: object = None,
        *,
        unit: int | None = None,
        lengths: object = None,
        resets: object = None,
    ) -> Array:
        """The gradient of the output at one step with respect to the input at every step: how far back it remembers.

        Parameters
        ----------
        x, state, lengths, resets
            As in a call.
        step : int
            The step of the output, from 0 to T - 1; negative ones count from the end.
        unit : int, optional
            The unit of the output whose gradient is taken; None: the sum of all units.

        Returns
        -------
        ndarray
            In the shape of x. Zero where the output at `step` does not depend on it.
        """
        self._check_trains("input_gradient")
        array, layout, hidden, cell = self._arguments(x, state)
        index = checked_index("step", step, layout.steps)
        units = slice(None) if unit is None else checked_index("unit", unit, self._architecture.output_size)
        schedule, steps = schedule_of(layout, lengths, resets)
        tape = record(layout, self._slot.weights.packed(), array, hidden, cell, schedule, steps, 0, NO_DROPOUT)
        grad_output = np.zeros(tape.output.shape, self._architecture.dtype)
        layout.to_time_major(grad_output)[index, :, units] = 1
        return tape.backward(grad_output).input

    def _check_trains(self, name: str) -> None:
        if not self._architecture.trains:
            defaults = [f"{option}={SPECIAL_OPTIONS[option]!r}" for option in SPECIAL_OPTIONS if self._hinders(option)]
            raise ValueError(f"{name}: expected {', '.join(defaults)}; {self!r} is for inference only")

    def _hinders(self, option: str) -> bool:
        """Whether the layer cannot be trained because of this option."""
        if option == "proj_size" or (option == "nonlinearity" and self._architecture.formula is None):
            return False
        return bool(getattr(self, option, SPECIAL_OPTIONS[option]) != SPECIAL_OPTIONS[option])

    # -- options that torch.nn does not have, for inference only ------------------------------------------------

    @property
    def _formula(self) -> Formula:
        return self._architecture.formula or Formula()

    @property
    def clip(self) -> float | None:
        return None if self._formula.clip == math.inf else self._formula.clip

    @property
    def _stage(self) -> Recurrent:
        return Recurrent(self._architecture)

    @property
    def _chain(self) -> Chain:
        return Chain([self._stage], [self._slot], is_model=False)


def checked_index(name: str, value: object, count: int) -> int:
    """`value` as an index from the front; a negative one counts from the end."""
    if count == 0:
        raise ValueError(f"{name}: expected a {name} of the sequence, which has none")
    index = whole_number(name, value, -count, count - 1)
    return index % count


def _projection(value: object, hidden_size: int) -> int:
    size = whole_number("proj_size", value, 0, MAX_SIZE)
    if size >= hidden_size:
        raise ValueError(f"proj_size: expected less than hidden_size ({hidden_size}), got {size}")
    return size
