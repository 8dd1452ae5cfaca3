"""Chains of layers: what models, streams and pools run in the core, and what their state is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import is_not
from typing import Any, Protocol

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import MAX_BYTES, Array, describe, floating, shaped
from gatewise.running.layout import Layout, State
from gatewise.weights.architecture import Architecture
from gatewise.weights.functions import Function
from gatewise.weights.parameters import Holder, Weights, one_at_a_time

Node = tuple[Any, ...]  # as _core.Network takes it

LINEAR = Function("linear")

# Up to here an embedding and the recurrent layer behind it become one table for streams and pools: of 64 MB, made in
# a tenth of a second or so. A larger one would cost a service more memory than the products cost time.
MOST_SUMS = 64 * 2**20


class LayerState(Protocol):
    """The state of one layer: in parts, [count, (B,) units] each, for the core, and as its users see it."""

    def parts(self) -> list[tuple[int, int]]: ...
    def taken(self, name: str, state: object, rows: tuple[int, ...]) -> list[Array]: ...
    def given(self, arrays: Sequence[Array]) -> State: ...


class Stage:
    """What a layer does in a chain, apart from the values of its weights. Most leave the units of a row as they are."""

    looks_ahead: str | None = None  # why a step's output needs inputs that come later
    needs_time = False  # it is nothing without a sequence
    masked: float | None = None  # it leaves out the steps of the model's input that are this value, or this token
    reverses = False  # what it gives out has another order of time

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """None: any."""
        return None

    @property
    def input_size(self) -> int | None:
        """Units that it takes; None: any number."""
        return None

    @property
    def vocabulary(self) -> int | None:
        """Of what takes tokens."""
        return None

    def output_size(self, units: int) -> int:
        return units

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def pack(self, arrays: Mapping[str, Array]) -> Any:
        raise NotImplementedError

    def nodes(self, packed: Any, units: int, dtype: np.dtype[Any]) -> list[Node]:
        return []

    @property
    def state(self) -> LayerState | None:
        return None


class RecurrentState:
    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def parts(self) -> list[tuple[int, int]]:
        of = self.architecture
        sequences = of.num_layers * of.directions
        return [(sequences, of.recurrent_size)] + ([(sequences, of.hidden_size)] if of.has_cell_state else [])

    def taken(self, name: str, state: object, rows: tuple[int, ...]) -> list[Array]:
        layout = Layout(self.architecture, False, not rows, 0, rows[0] if rows else 1)
        return [part for part in layout.state_in(name, state) if part is not None]

    def given(self, arrays: Sequence[Array]) -> State:
        return (arrays[0], arrays[1]) if self.architecture.has_cell_state else arrays[0]


class History:
    """The last inputs of a convolution, the oldest first."""

    def __init__(self, steps: int, units: int, dtype: np.dtype[Any]) -> None:
        self.steps, self.units, self.dtype = steps, units, dtype

    def parts(self) -> list[tuple[int, int]]:
        return [(self.steps, self.units)]

    def taken(self, name: str, state: object, rows: tuple[int, ...]) -> list[Array]:
        array = shaped(name, floating(name, state, self.dtype), (self.steps, *rows, self.units))
        return [np.require(array, requirements=["C", "A"])]

    def given(self, arrays: Sequence[Array]) -> State:
        return arrays[0]


class Recurrent(Stage):
    """A recurrent layer; the outputs of its two directions may be merged: concat, add, multiply or average."""

    needs_time = True

    def __init__(self, architecture: Architecture, merge: str = "concat") -> None:
        self.architecture, self.merge = architecture, merge

    @property
    def looks_ahead(self) -> str | None:  # type: ignore[override]
        if not self.architecture.bidirectional:
            return None
        return "expected one direction; a bidirectional layer needs the end of the sequence first"

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.architecture.dtype

    @property
    def input_size(self) -> int:
        return self.architecture.input_size

    def output_size(self, units: int) -> int:
        of = self.architecture
        return of.output_size if self.merge == "concat" else of.recurrent_size

    def nodes(self, packed: Any, units: int, dtype: np.dtype[Any]) -> list[Node]:
        recurrent: list[Node] = [("recurrent", packed)]
        if self.merge == "concat":
            return recurrent
        of = self.architecture
        return [*recurrent, rows(self.merge, dtype, of.output_size, of.recurrent_size)]

    @property
    def state(self) -> LayerState:
        return RecurrentState(self.architecture)


class Identity(Stage):
    """What does nothing in inference."""


class Last(Stage):
    """Of a sequence the last step: of each direction, right behind a layer of two."""

    needs_time = True


def rows(
    operation: str, dtype: np.dtype[Any], inputs: int, outputs: int, function: Function = LINEAR
) -> Node:  # fmt: skip
    """The node of a function of rows without weights."""
    return ("rows", _core.RowWeights(operation, dtype, inputs, outputs, function, 0.0, []))


class Chain:
    """The layers of a model, or a layer by itself, in their order.

    Parameters
    ----------
    stages, holders : what each does, and where its weights are
    alone : whether it is a layer by itself, whose state is not in a tuple
    """

    def __init__(self, stages: Sequence[Stage], holders: Sequence[Holder[Any]], alone: bool) -> None:
        self.stages = tuple(stages)
        self.holders = tuple(holders)
        self.alone = alone
        self.dtype = self._dtype()
        self.sizes = self._sizes()
        # The axes of one step of one row: none of a token, of which there are so many.
        self.vocabulary = next((one.vocabulary for one in self.stages if one.vocabulary is not None), None)
        self.units = () if self.vocabulary is not None else (self.sizes[0],)
        self.output_size = self.sizes[-1]
        self.ends_at_last = any(isinstance(stage, Last) for stage in self.stages)  # then the output has no time
        self.looks_ahead = self._why_it_looks_ahead()
        self.refuses_resets = self._why_it_refuses_resets()
        self.masked = next((stage.masked for stage in self.stages if stage.masked is not None), None)
        self.states = [stage.state for stage in self.stages if stage.state is not None]
        self.parts = [part for state in self.states for part in state.parts()]
        self.state_bytes = sum(count * units for count, units in self.parts) * self.dtype.itemsize
        if self.state_bytes > MAX_BYTES:
            raise ValueError(f"layers: expected a state of at most {MAX_BYTES} bytes a row, got {self.state_bytes}")
        self._networks: dict[str, tuple[tuple[Weights[Any], ...], list[_core.Network]]] = {}

    def _why_it_looks_ahead(self) -> str | None:
        for i, stage in enumerate(self.stages):
            if stage.looks_ahead:
                where = "" if self.alone else f"layers[{i}]: "
                return f"{where}{stage.looks_ahead}; stream(window=k) gives what a call on the last k inputs gives"
        return None

    def _why_it_refuses_resets(self) -> str | None:
        """They are of times, which some layers change."""
        for i, stage in enumerate(self.stages):
            if stage.masked is not None or stage.reverses:
                what = "leaves steps out" if stage.masked is not None else "changes their order"
                return f"resets: expected none, since layers[{i}] {what}"
        return None

    def _dtype(self) -> np.dtype[Any]:
        found: tuple[int, np.dtype[Any]] | None = None
        for i, stage in enumerate(self.stages):
            if stage.dtype is not None and found is not None and stage.dtype != found[1]:
                raise ValueError(f"layers[{i}]: expected {found[1]}, as layers[{found[0]}] has, got {stage.dtype}")
            if stage.dtype is not None and found is None:
                found = i, stage.dtype
        return np.dtype(np.float32) if found is None else found[1]

    def _sizes(self) -> list[int]:
        """The units before each stage and behind the last; of an embedding, those of its rows."""
        first = next((stage.input_size for stage in self.stages if stage.input_size is not None), None)
        if first is None:
            raise ValueError("layers: expected one at least that tells the size of its input")
        sizes, ended = [first], False
        for i, stage in enumerate(self.stages):
            units = sizes[-1]
            if stage.input_size not in (None, units):
                raise ValueError(f"layers[{i}]: expected {units} units, as they come in, got one of {stage.input_size}")
            if stage.vocabulary is not None and not all(isinstance(one, Identity) for one in self.stages[:i]):
                raise ValueError(f"layers[{i}]: expected an embedding only as the first")
            if stage.masked is not None and not all(isinstance(one, Identity) for one in self.stages[:i]):
                raise ValueError(f"layers[{i}]: expected what leaves steps out only as the first")
            if stage.needs_time and ended:
                raise ValueError(f"layers[{i}]: expected no layer that needs time behind Last()")
            ended = ended or isinstance(stage, Last)
            sizes.append(stage.output_size(units))
        return sizes

    def masked_steps(self, x: Array) -> Array:
        """Which steps of an input, in its dtype, are left out."""
        if self.masked is None:
            return np.zeros(x.shape[: x.ndim - len(self.units)], np.bool_)
        same = np.asarray(x == np.asarray(self.masked, x.dtype))
        return np.asarray(same.all(axis=-1)) if self.units else same

    def describe(self) -> str:
        """In a few words: lstm (64, 128), layers=2, float32."""
        if not self.alone:
            size = f"{self.vocabulary} tokens" if self.vocabulary is not None else str(self.sizes[0])
            return f"model of {len(self.stages)} layers, {size} to {self.output_size}, {self.dtype}"
        (stage,) = self.stages
        assert isinstance(stage, Recurrent)
        of = stage.architecture
        cell = of.cell if of.formula is None else of.cell.partition("_")[0]  # which names functions
        return f"{cell} {describe((of.input_size, of.hidden_size))}, layers={of.num_layers}, {of.dtype}"

    # -- the state ----------------------------------------------------------------------------------------------

    def new_parts(self, leading: tuple[int, ...]) -> list[Array]:
        """Uninitialised arrays of the state of some rows."""
        return [np.empty((count, *leading, units), self.dtype) for count, units in self.parts]

    def state_out(self, parts: Sequence[Array]) -> Any:
        given, first = [], 0
        for state in self.states:
            count = len(state.parts())
            given.append(state.given(parts[first : first + count]))
            first += count
        return given[0] if self.alone else tuple(given)

    def state_in(self, name: str, state: object, leading: tuple[int, ...]) -> list[Array]:
        """The parts of a state as contiguous arrays."""
        if self.alone:
            return self.states[0].taken(name, state, leading)
        if not isinstance(state, (tuple, list)) or len(state) != len(self.states):
            got = f"a sequence of {len(state)}" if isinstance(state, (tuple, list)) else type(state).__name__
            raise TypeError(
                f"{name}: expected a tuple of {len(self.states)}, one entry a layer that has a state, got {got}"
            )
        parts: list[Array] = []
        for i, (of, entry) in enumerate(zip(self.states, state, strict=True)):
            if entry is None:
                raise TypeError(f"{name}[{i}]: expected a state, got None; only the whole of it may be None")
            parts += of.taken(f"{name}[{i}]", entry, leading)
        return parts

    def part_names(self, name: str) -> list[str]:
        """How a user calls the entry that each part is of."""
        return [f"{name}[{i}]" for i, state in enumerate(self.states) for _ in state.parts()]

    # -- the core -----------------------------------------------------------------------------------------------

    def weights(self) -> tuple[Weights[Any], ...]:
        """The present snapshots."""
        with one_at_a_time():  # a model's are swapped together
            return tuple(holder.weights for holder in self.holders)

    def network(self, weights: tuple[Weights[Any], ...], form: str) -> _core.Network:
        """Of these snapshots for the backend in use.

        form "call": as it is; "steps": every step has an output, and what an embedding looks up are, where that pays,
        the products of the layer behind it.
        """
        return self._kept(form, weights, self._whole)[0]

    def window(self, weights: tuple[Weights[Any], ...]) -> tuple[_core.Network, _core.Network | None]:
        """What the last inputs are run through at each step, and what each of them runs through once before."""
        rest, *head = self._kept("window", weights, self._parted)
        return rest, head[0] if head else None

    def _kept(
        self, form: str, weights: tuple[Weights[Any], ...],
        make: Callable[[str, tuple[Weights[Any], ...]], list[_core.Network]],
    ) -> list[_core.Network]:  # fmt: skip
        """Made once for these snapshots; a second thread that asks meanwhile makes them for itself."""
        kept = self._networks.get(form)
        if kept is None or kept[1][0].backend != _core.backend() or any(map(is_not, kept[0], weights)):
            self._networks[form] = kept = weights, make(form, weights)
        return kept[1]

    def _whole(self, form: str, weights: tuple[Weights[Any], ...]) -> list[_core.Network]:
        nodes = self._nodes(weights, form)
        return [_core.Network(self.dtype, nodes, self._sums(nodes) if form == "steps" else None)]

    def _parted(self, form: str, weights: tuple[Weights[Any], ...]) -> list[_core.Network]:
        nodes = self._nodes(weights, form)
        first = next(i for i, node in enumerate(nodes) if node[0] not in ("lookup", "rows"))
        return [_core.Network(self.dtype, part) for part in (nodes[first:], nodes[:first]) if part]

    def _nodes(self, weights: tuple[Weights[Any], ...], form: str) -> list[Node]:
        while True:  # another thread may change the backend meanwhile
            nodes = self._made(weights, form)
            if len({node[1].backend for node in nodes if hasattr(node[1], "backend")}) <= 1:
                return nodes

    def _made(self, weights: tuple[Weights[Any], ...], form: str) -> list[Node]:
        nodes: list[Node] = []
        behind, two = 0, None  # the place behind the last recurrent layer, and what it is if it has two directions
        with_time = max((i for i, stage in enumerate(self.stages) if stage.needs_time), default=-1)
        for i, (stage, held, units) in enumerate(zip(self.stages, weights, self.sizes, strict=False)):
            if isinstance(stage, Last) and form != "steps":
                at_end: Node = ("last", units, False, False) if two is None else ("last", two.output_size, True, False)
                nodes.insert(len(nodes) if two is None else behind, at_end)
            elif own := stage.nodes(held.packed() if held.arrays else None, units, self.dtype):
                behind = len(nodes) + 1
                two = stage.architecture if isinstance(stage, Recurrent) and stage.architecture.bidirectional else None
                nodes += own
            if form == "window" and i == with_time and not self.ends_at_last:
                nodes.append(("last", self.sizes[i + 1], False, True))  # what comes behind needs no other step
        if form == "window" and with_time < 0:
            nodes.append(("last", self.output_size, False, True))
        return nodes

    def _sums(self, nodes: list[Node]) -> _core.Sums | None:
        table, layer = next(((a, b) for a, b in pairwise(nodes) if a[0] == "lookup"), ((), ()))
        if not layer or layer[0] != "recurrent":
            return None
        of = next(stage for stage in self.stages if isinstance(stage, Recurrent)).architecture
        assert self.vocabulary is not None
        size = self.vocabulary * of.directions * 4 * of.hidden_size * of.dtype.itemsize
        return _core.Sums(layer[1], table[1]) if size <= MOST_SUMS else None

    def __getstate__(self) -> tuple[Any, ...]:
        return self.stages, self.holders, self.alone

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]
