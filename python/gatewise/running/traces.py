"""Traces: the gates and states of every layer and direction, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np

from gatewise.arguments.arrays import Array
from gatewise.running.layout import State
from gatewise.running.tapes import Tape


class _CellTrace:
    """The traces of all cells show the shapes of their arrays."""

    def __repr__(self) -> str:
        shown = [f"{name}={array.shape}" for name, array in vars(self).items()]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, eq=False, repr=False)
class LSTMTrace(_CellTrace):
    """What one direction of an LSTM layer did: (T, B, H) each, hidden (T, B, H or P).

    Attributes
    ----------
    input_gate, forget_gate, output_gate : ndarray
        i, f and o, from 0 to 1.
    candidate : ndarray
        g, from -1 to 1: what the input gate lets into the cell.
    cell : ndarray
        c after each step.
    hidden : ndarray
        h after each step: the layer's output in this direction.
    """

    input_gate: Array
    forget_gate: Array
    candidate: Array
    output_gate: Array
    cell: Array
    hidden: Array


@dataclass(frozen=True, eq=False, repr=False)
class GRUTrace(_CellTrace):
    """What one direction of a GRU layer did: (T, B, H) each.

    Attributes
    ----------
    reset_gate, update_gate : ndarray
        r and z, from 0 to 1.
    candidate : ndarray
        n, from -1 to 1: what the state becomes where the update gate is 0.
    hidden : ndarray
        h after each step: the layer's output in this direction.
    """

    reset_gate: Array
    update_gate: Array
    candidate: Array
    hidden: Array


@dataclass(frozen=True, eq=False, repr=False)
class RNNTrace(_CellTrace):
    """What one direction of an RNN layer did.

    Attributes
    ----------
    hidden : ndarray
        (T, B, H), h after each step: the layer's output in this direction.
    """

    hidden: Array


LayerTrace = LSTMTrace | GRUTrace | RNNTrace


class Trace(Mapping[str, LayerTrace]):
    """The inside of a call: a mapping of "l0", "l0_reverse", "l1", ... to that direction's gates and states.

    Arrays have the order of x's axes: (T, B, H), with batch_first (B, T, H), unbatched (T, H). They are zero after the
    end of a row.

    Attributes
    ----------
    output, state
        The results of the call, the same bits.
    lengths : ndarray or None
        The lengths of the rows, if the call had any.
    batch_first, unbatched : bool
        The order of the axes.
    """

    def __init__(
        self,
        output: Array,
        state: State,
        layers: dict[str, LayerTrace],
        lengths: Array | None,
        batch_first: bool,
        unbatched: bool,
    ) -> None:
        self.output = output
        self.state = state
        self.lengths = lengths
        self.batch_first = batch_first
        self.unbatched = unbatched
        self._layers = layers

    def __getitem__(self, name: str) -> LayerTrace:
        if name not in self._layers:
            raise KeyError(f"{name!r}: expected one of {', '.join(self._layers)}")
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    __eq__ = object.__eq__  # comparing arrays has no single answer
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        shown = [f"{name}: {' '.join(field.name for field in fields(layer))}" for name, layer in self._layers.items()]
        return f"Trace({', '.join(shown)})"


# What a tape keeps of each unit, in the core's order; None: a trace does not show it.
KEPT: dict[str, tuple[str | None, ...]] = {
    "lstm": ("input_gate", "forget_gate", "candidate", "output_gate"),
    "gru": ("candidate", "reset_gate", "update_gate", None),
    "rnn_tanh": (None,),
    "rnn_relu": (None,),
}
KINDS: dict[str, type[LayerTrace]] = {"lstm": LSTMTrace, "gru": GRUTrace, "rnn_tanh": RNNTrace, "rnn_relu": RNNTrace}


def trace(tape: Tape, lengths: Array | None) -> Trace:
    """The trace of a recorded forward without dropout and checkpoints."""
    layout = tape._layout
    architecture = layout.architecture
    layers = {}
    for layer in range(architecture.num_layers):
        for direction in range(architecture.directions):
            shown = _values(tape, layer, direction)
            arrays = {name: layout.from_time_major(array) for name, array in shown.items()}
            layers[f"l{layer}" + ("_reverse" if direction else "")] = KINDS[architecture.cell](**arrays)
    return Trace(tape.output, tape.state, layers, lengths, layout.batch_first, layout.unbatched)


def _values(tape: Tape, layer: int, direction: int) -> dict[str, Array]:
    layout, steps = tape._layout, tape._steps
    architecture = layout.architecture

    def new(units: int) -> Array:
        array = np.empty((layout.steps, layout.batch, units), architecture.dtype)
        array[steps:] = 0
        return array

    values = [new(architecture.hidden_size) for _ in KEPT[architecture.cell]]
    cell = new(architecture.hidden_size) if architecture.has_cell_state else None
    hidden = new(architecture.recurrent_size)
    tape._usable().trace(
        layer, direction, [array[:steps] for array in values], None if cell is None else cell[:steps], hidden[:steps]
    )
    named = {name: array for name, array in zip(KEPT[architecture.cell], values, strict=True) if name is not None}
    return named | ({} if cell is None else {"cell": cell}) | {"hidden": hidden}
