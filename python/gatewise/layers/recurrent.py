"""LSTM, GRU and RNN: stacks of layers with the names, options and defaults of torch.nn."""

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
from gatewise.layers.activation import Activation
from gatewise.running.layout import Layout, State
from gatewise.running.network import Chain, Recurrent
from gatewise.running.pools import Streamable
from gatewise.running.tapes import NO_DROPOUT, Tape, record
from gatewise.running.traces import Trace, trace
from gatewise.weights.architecture import GATES, Architecture, Formula
from gatewise.weights.functions import Function, function_in_cell
from gatewise.weights.module import Module
from gatewise.weights.parameters import WeightsSlot, swap_lock

# The options that not every recurrent layer has, and their defaults.
SPECIAL_OPTIONS = {
    "proj_size": 0, "nonlinearity": "tanh", "reset_after": True, "activation": "tanh", "output_activation": None,
    "recurrent_activation": "sigmoid", "clip": None, "peepholes": False,
}  # fmt: skip


class Layer(Module, Streamable):
    """What the three recurrent layers share. Make an LSTM, a GRU or an RNN."""

    _slot: WeightsSlot[_core.Packed]

    def __init__(
        self, cell: str, input_size: int, hidden_size: int, num_layers: int, *, bias: bool, batch_first: bool,
        dropout: float, bidirectional: bool, proj_size: int, dtype: object, seed: int | None, formula: Formula,
    ) -> None:  # fmt: skip
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
        self, x: object, state: object = None, *, lengths: object = None, resets: object = None,
        out: Array | None = None,
    ) -> tuple[Array, State]:  # fmt: skip
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
        self, x: object, state: object = None, *, lengths: object = None, resets: object = None,
        checkpoint_every: int | None = None,
    ) -> Tape:  # fmt: skip
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
        self, x: object, step: int, state: object = None, *, unit: int | None = None, lengths: object = None,
        resets: object = None,
    ) -> Array:  # fmt: skip
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


class Gated(Layer):
    """What LSTM and GRU share."""

    @property
    def activation(self) -> str | Activation:
        return shown(self._formula.candidate)

    @property
    def recurrent_activation(self) -> str | Activation:
        return shown(self._formula.gate)


def shown(function: Function) -> str | Activation:
    """The name of a function, if its numbers are the default ones."""
    if function.is_default:
        return function.name
    return Activation(function.name, *function.numbers)


def _clip(value: float | None) -> float:
    return math.inf if value is None else number("clip", value, least=0.0)


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


class LSTM(Gated):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000), with torch.nn.LSTM's equations.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c' = f * c + i * g
        h' = o * tanh(c')                                   with proj_size: W_hr (o * tanh(c'))  (Sak et al. 2014)

    Parameters
    ----------
    input_size, hidden_size : int
        Of each step's input, and of the state.
    num_layers : int
        Layers on top of each other.
    bias : bool
        Whether there are b_ih and b_hh.
    batch_first : bool
        Whether sequences are (B, T, ...) instead of (T, B, ...). States are not affected.
    dropout : float
        Probability with which `record` drops an element between two layers.
    bidirectional : bool
        Whether a second direction runs from the end; outputs are joined.
    proj_size : int
        If positive, the size of h, projected from hidden_size.
    dtype : "float32" or "float64"
        Of weights, states and results.
    seed : int, optional
        Of the initial weights and of dropout; None draws one.

    The rest is what Keras and ONNX have beyond PyTorch. Where it is used the layer is for inference only: `record`,
    `trace` and `input_gradient` refuse it.

    activation : str or Activation
        In place of tanh, with names as `Activation` has them.
    output_activation : str or Activation, optional
        In place of that of c'; None: as `activation`.
    recurrent_activation : str or Activation
        In place of sigmoid. Keras before TensorFlow 2 had Activation("hard_sigmoid", 0.2, 0.5).
    clip : float, optional
        The sums before i, f, g and o are cut off at +-clip, as ONNX Runtime does it.
    peepholes : bool
        Whether w_ci c is added to the sum of i, w_cf c to that of f, and w_co c' to that of o (Gers and Schmidhuber
        2000): weight_ch_l0 (3 * hidden_size,) and so on, in the order i, f, o.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        dtype: object = "float32", seed: int | None = None, activation: str | Activation = "tanh",
        output_activation: str | Activation | None = None, recurrent_activation: str | Activation = "sigmoid",
        clip: float | None = None, peepholes: bool = False,
    ) -> None:  # fmt: skip
        candidate = function_in_cell("activation", activation)
        output = candidate if output_activation is None else function_in_cell("output_activation", output_activation)
        gate = function_in_cell("recurrent_activation", recurrent_activation)
        super().__init__(
            "lstm", input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first, dropout=dropout,
            bidirectional=bidirectional, proj_size=proj_size, dtype=dtype, seed=seed,
            formula=Formula(gate, candidate, output, _clip(clip), flag("peepholes", peepholes)),
        )  # fmt: skip

    @property
    def proj_size(self) -> int:
        return self._architecture.proj_size

    @property
    def output_activation(self) -> str | Activation | None:
        return None if self._formula.output == self._formula.candidate else shown(self._formula.output)

    @property
    def peepholes(self) -> bool:
        return self._formula.peepholes


class GRU(Gated):
    """Gated recurrent unit (Cho et al. 2014), reset gate after the product, with torch.nn.GRU's equations.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        h' = (1 - z) * n + z * h

    The parameters are those of `LSTM`, without proj_size, and

    reset_after : bool
        False: n = tanh(W_in x + b_in + W_hn (r * h) + b_hn), as in the paper, in ONNX by default and in Keras before
        version 2. For inference only, as activation, recurrent_activation and clip are.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, reset_after: bool = True,
        dtype: object = "float32", seed: int | None = None, activation: str | Activation = "tanh",
        recurrent_activation: str | Activation = "sigmoid", clip: float | None = None,
    ) -> None:  # fmt: skip
        cell = "gru" if flag("reset_after", reset_after) else "gru_reset_before"
        candidate = function_in_cell("activation", activation)
        gate = function_in_cell("recurrent_activation", recurrent_activation)
        super().__init__(
            cell, input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first, dropout=dropout,
            bidirectional=bidirectional, proj_size=0, dtype=dtype, seed=seed,
            formula=Formula(gate, candidate, clip=_clip(clip)),
        )  # fmt: skip

    @property
    def reset_after(self) -> bool:
        return self._architecture.cell == "gru"


class RNN(Layer):
    """The simple recurrent network (Elman 1990), with torch.nn.RNN's equation.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)            or relu in place of tanh

    The parameters are those of `LSTM`, without proj_size, and

    nonlinearity : str or Activation
        "tanh" or "relu"; for inference only any other that `Activation` names, too, and clip.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, nonlinearity: str | Activation = "tanh",
        bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        dtype: object = "float32", seed: int | None = None, clip: float | None = None,
    ) -> None:  # fmt: skip
        function, most = function_in_cell("nonlinearity", nonlinearity), _clip(clip)
        is_relu = function == Function("relu") and most == math.inf  # which is a cell of its own, and trains
        super().__init__(
            "rnn_relu" if is_relu else "rnn_tanh", input_size, hidden_size, num_layers, bias=bias,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, proj_size=0, dtype=dtype, seed=seed,
            formula=Formula() if is_relu else Formula(candidate=function, clip=most),
        )  # fmt: skip

    @property
    def nonlinearity(self) -> str | Activation:
        return "relu" if self._architecture.cell == "rnn_relu" else shown(self._formula.candidate)
