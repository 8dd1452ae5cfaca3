"""Chains of layers, which models, streams and pools run in the core, and the state of a chain."""

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
from gatewise.weights.parameters import Weights, WeightsSlot, swap_lock

Node = tuple[Any, ...]  # as _core.Network takes it

LINEAR = Function("linear")

# The largest table into which streams and pools merge an embedding and the recurrent layer after it: 64 MB take about a
# tenth of a second to make. A larger table would cost a service more memory than the products cost time.
MAX_TABLE_BYTES = 64 * 2**20


class LayerState(Protocol):
    """The state of one layer: the core sees parts, [count, (B,) units] each; users see a state."""

    def parts(self) -> list[tuple[int, int]]: ...
    def to_parts(self, name: str, state: object, rows: tuple[int, ...]) -> list[Array]: ...
    def from_parts(self, arrays: Sequence[Array]) -> State: ...


class Stage:
    """A layer in a chain, apart from the values of its weights. Most stages do not change the units of a row."""

    streaming_obstacle: str | None = None  # why a step's output needs inputs that come later
    needs_time = False  # it takes sequences only
    masked: float | None = None  # it leaves out the steps of the model's input that are this value, or this token
    reverses = False  # its output has the opposite order of time

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """None: any."""
        return None

    @property
    def input_size(self) -> int | None:
        """The units that it takes; None: any number."""
        return None

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens, if it takes tokens."""
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
        architecture = self.architecture
        sequences = architecture.num_layers * architecture.directions
        hidden = [(sequences, architecture.recurrent_size)]
        return [*hidden, (sequences, architecture.hidden_size)] if architecture.has_cell_state else hidden

    def to_parts(self, name: str, state: object, rows: tuple[int, ...]) -> list[Array]:
        layout = Layout(self.architecture, False, not rows, 0, rows[0] if rows else 1)
        return [part for part in layout.state_in(name, state) if part is not None]

    def from_parts(self, arrays: Sequence[Array]) -> State:
        return (arrays[0], arrays[1]) if self.architecture.has_cell_state else arrays[0]


class History:
    """The last inputs of a convolution, the oldest first."""

    def __init__(self, steps: int, units: int, dtype: np.dtype[Any]) -> None:
        self.steps, self.units, self.dtype = steps, units, dtype

    def parts(self) -> list[tuple[int, int]]:
        return [(self.steps, self.units)]

    def to_parts(self, name: str, state: object, rows: tuple[int, ...]) -> list[Array]:
        array = shaped(name, floating(name, state, self.dtype), (self.steps, *rows, self.units))
        return [np.require(array, requirements=["C", "A"])]

    def from_parts(self, arrays: Sequence[Array]) -> State:
        return arrays[0]


class Recurrent(Stage):
    """A recurrent layer; the outputs of its two directions may be merged: concat, add, multiply or average."""

    needs_time = True

    def __init__(self, architecture: Architecture, merge: str = "concat") -> None:
        self.architecture, self.merge = architecture, merge

    @property
    def streaming_obstacle(self) -> str | None:  # type: ignore[override]
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
        architecture = self.architecture
        return architecture.output_size if self.merge == "concat" else architecture.recurrent_size

    def nodes(self, packed: Any, units: int, dtype: np.dtype[Any]) -> list[Node]:
        recurrent: list[Node] = [("recurrent", packed)]
        if self.merge == "concat":
            return recurrent
        return [*recurrent, rows(self.merge, dtype, self.architecture.output_size, self.architecture.recurrent_size)]

    @property
    def state(self) -> LayerState:
        return RecurrentState(self.architecture)


class Identity(Stage):
    """A stage that does nothing in inference."""


class Last(Stage):
    """The last step of a sequence; directly after a bidirectional layer, the last step of each direction."""

    needs_time = True


def rows(operation: str, dtype: np.dtype[Any], inputs: int, outputs: int, function: Function = LINEAR) -> Node:
    """The node of a function of rows without weights."""
    return ("rows", _core.RowWeights(operation, dtype, inputs, outputs, function, 0.0, []))


class Chain:
    """The layers of a model in their order, or a single layer.

    Parameters
    ----------
    stages, slots : of each layer, what it computes and where its weights are
    is_model : whether the state is a tuple with one entry for each layer that has a state
    """

    def __init__(self, stages: Sequence[Stage], slots: Sequence[WeightsSlot[Any]], is_model: bool) -> None:
        self.stages = tuple(stages)
        self.slots = tuple(slots)
        self.is_model = is_model
        self.dtype = self._dtype()
        self.sizes = self._sizes()
        self.vocabulary = next((stage.vocabulary for stage in self.stages if stage.vocabulary is not None), None)
        # The axes of one step of one row: a token has none.
        self.units = () if self.vocabulary is not None else (self.sizes[0],)
        self.output_size = self.sizes[-1]
        self.ends_at_last = any(isinstance(stage, Last) for stage in self.stages)  # then the output has no time
        self.streaming_obstacle = self._find_streaming_obstacle()
        self.refuses_resets = self._find_resets_obstacle()
        self.masked = next((stage.masked for stage in self.stages if stage.masked is not None), None)
        self.states = [stage.state for stage in self.stages if stage.state is not None]
        self.parts = [part for state in self.states for part in state.parts()]
        self.state_bytes = sum(count * units for count, units in self.parts) * self.dtype.itemsize
        if self.state_bytes > MAX_BYTES:
            raise ValueError(f"layers: expected a state of at most {MAX_BYTES} bytes a row, got {self.state_bytes}")
        self._networks: dict[str, tuple[tuple[Weights[Any], ...], list[_core.Network]]] = {}

    def _find_streaming_obstacle(self) -> str | None:
        for i, stage in enumerate(self.stages):
            if stage.streaming_obstacle:
                where = f"layers[{i}]: " if self.is_model else ""
                return (
                    f"{where}{stage.streaming_obstacle}; stream(window=k) gives what a call on the last k inputs gives"
                )
        return None

    def _find_resets_obstacle(self) -> str | None:
        """Resets belong to times, and some layers change the times of steps."""
        for i, stage in enumerate(self.stages):
            if stage.masked is not None or stage.reverses:
                change = "leaves steps out" if stage.masked is not None else "changes their order"
                return f"resets: expected none, since layers[{i}] {change}"
        return None

    def _dtype(self) -> np.dtype[Any]:
        dtypes = [(i, stage.dtype) for i, stage in enumerate(self.stages) if stage.dtype is not None]
        if not dtypes:
            return np.dtype(np.float32)
        first, expected = dtypes[0]
        for i, dtype in dtypes:
            if dtype != expected:
                raise ValueError(f"layers[{i}]: expected {expected}, as layers[{first}] has, got {dtype}")
        return expected

    def _sizes(self) -> list[int]:
        """The units before each stage and after the last one; before an embedding, those of its rows."""
        first = next((stage.input_size for stage in self.stages if stage.input_size is not None), None)
        if first is None:
            raise ValueError("layers: expected at least one layer that determines the size of its input")
        sizes, ended = [first], False
        for i, stage in enumerate(self.stages):
            units = sizes[-1]
            if stage.input_size not in (None, units):
                raise ValueError(f"layers[{i}]: expected a layer of {units} input units, got one of {stage.input_size}")
            if stage.vocabulary is not None and not all(isinstance(before, Identity) for before in self.stages[:i]):
                raise ValueError(f"layers[{i}]: expected an embedding only as the first layer")
            if stage.masked is not None and not all(isinstance(before, Identity) for before in self.stages[:i]):
                raise ValueError(f"layers[{i}]: expected a layer that leaves steps out only as the first layer")
            if stage.needs_time and ended:
                raise ValueError(f"layers[{i}]: expected no layer that needs time after Last()")
            ended = ended or isinstance(stage, Last)
            sizes.append(stage.output_size(units))
        return sizes

    def masked_steps(self, x: Array) -> Array:
        """Flags of the steps of an input that are left out; the comparison is made in the input's dtype."""
        if self.masked is None:
            return np.zeros(x.shape[: x.ndim - len(self.units)], np.bool_)
        is_masked = np.asarray(x == np.asarray(self.masked, x.dtype))
        return np.asarray(is_masked.all(axis=-1)) if self.units else is_masked

    def describe(self) -> str:
        """A short text: lstm (64, 128), layers=2, float32."""
        if self.is_model:
            size = f"{self.vocabulary} tokens" if self.vocabulary is not None else str(self.sizes[0])
            return f"model of {len(self.stages)} layers, {size} to {self.output_size}, {self.dtype}"
        (stage,) = self.stages
        assert isinstance(stage, Recurrent)
        architecture = stage.architecture
        # A suffix such as "_tanh" names the cell's functions. A formula replaces them, so that it is left out.
        cell = architecture.cell if architecture.formula is None else architecture.cell.partition("_")[0]
        size = describe((architecture.input_size, architecture.hidden_size))
        return f"{cell} {size}, layers={architecture.num_layers}, {architecture.dtype}"

    # -- the state ----------------------------------------------------------------------------------------------

    def new_parts(self, leading: tuple[int, ...]) -> list[Array]:
        """Uninitialised arrays of the state of some rows."""
        return [np.empty((count, *leading, units), self.dtype) for count, units in self.parts]

    def state_out(self, parts: Sequence[Array]) -> Any:
        entries, first = [], 0
        for state in self.states:
            count = len(state.parts())
            entries.append(state.from_parts(parts[first : first + count]))
            first += count
        return tuple(entries) if self.is_model else entries[0]

    def state_in(self, name: str, state: object, leading: tuple[int, ...]) -> list[Array]:
        """The parts of a state as contiguous arrays."""
        if not self.is_model:
            return self.states[0].to_parts(name, state, leading)
        if not isinstance(state, (tuple, list)) or len(state) != len(self.states):
            got = f"a sequence of {len(state)}" if isinstance(state, (tuple, list)) else type(state).__name__
            raise TypeError(
                f"{name}: expected a tuple of {len(self.states)}, one entry for each layer that has a state, got {got}"
            )
        parts: list[Array] = []
        for i, (layer_state, entry) in enumerate(zip(self.states, state, strict=True)):
            if entry is None:
                raise TypeError(f"{name}[{i}]: expected a state, got None; only the whole tuple may be None")
            parts += layer_state.to_parts(f"{name}[{i}]", entry, leading)
        return parts

    def part_names(self, name: str) -> list[str]:
        """The entry of a state that each part belongs to, as users name it."""
        return [f"{name}[{i}]" for i, state in enumerate(self.states) for _ in state.parts()]

    # -- the core -----------------------------------------------------------------------------------------------

    def weights(self) -> tuple[Weights[Any], ...]:
        """The present snapshots."""
        with swap_lock():  # a model's snapshots are swapped together
            return tuple(slot.weights for slot in self.slots)

    def network(self, weights: tuple[Weights[Any], ...], form: str) -> _core.Network:
        """The network of these snapshots for the backend in use.

        form "call" is the chain as it is. In form "steps" every step has an output, and, where that pays, an embedding
        looks up the input products of the layer after it.
        """
        return self._cached(form, weights, self._make_whole)[0]

    def window(self, weights: tuple[Weights[Any], ...]) -> tuple[_core.Network, _core.Network | None]:
        """The part of the chain that each step of a window runs on all its inputs, and the part before it, which runs
        once on each input."""
        tail, *head = self._cached("window", weights, self._make_parts)
        return tail, head[0] if head else None

    def _cached(
        self,
        form: str,
        weights: tuple[Weights[Any], ...],
        make: Callable[[str, tuple[Weights[Any], ...]], list[_core.Network]],
    ) -> list[_core.Network]:
        """Networks that are made once for these snapshots; a second thread that asks meanwhile makes its own."""
        entry = self._networks.get(form)
        if entry is None or entry[1][0].backend != _core.backend() or any(map(is_not, entry[0], weights)):
            self._networks[form] = entry = weights, make(form, weights)
        return entry[1]

    def _make_whole(self, form: str, weights: tuple[Weights[Any], ...]) -> list[_core.Network]:
        nodes = self._nodes(weights, form)
        return [_core.Network(self.dtype, nodes, self._sums(nodes) if form == "steps" else None)]

    def _make_parts(self, form: str, weights: tuple[Weights[Any], ...]) -> list[_core.Network]:
        nodes = self._nodes(weights, form)
        first = next(i for i, node in enumerate(nodes) if node[0] not in ("lookup", "rows"))
        return [_core.Network(self.dtype, part) for part in (nodes[first:], nodes[:first]) if part]

    def _nodes(self, weights: tuple[Weights[Any], ...], form: str) -> list[Node]:
        while True:  # another thread may change the backend meanwhile
            nodes = self._nodes_once(weights, form)
            if len({node[1].backend for node in nodes if hasattr(node[1], "backend")}) <= 1:
                return nodes

    def _nodes_once(self, weights: tuple[Weights[Any], ...], form: str) -> list[Node]:
        nodes: list[Node] = []
        # Where the node after the last recurrent layer belongs, and that layer's architecture if it is bidirectional.
        after_recurrent, bidirectional = 0, None
        with_time = max((i for i, stage in enumerate(self.stages) if stage.needs_time), default=-1)
        for i, (stage, snapshot, units) in enumerate(zip(self.stages, weights, self.sizes, strict=False)):
            if isinstance(stage, Last) and form != "steps":
                if bidirectional is None:
                    nodes.append(("last", units, False, False))
                else:
                    nodes.insert(after_recurrent, ("last", bidirectional.output_size, True, False))
            elif stage_nodes := stage.nodes(snapshot.packed() if snapshot.arrays else None, units, self.dtype):
                after_recurrent = len(nodes) + 1
                is_bidirectional = isinstance(stage, Recurrent) and stage.architecture.bidirectional
                bidirectional = stage.architecture if isinstance(stage, Recurrent) and is_bidirectional else None
                nodes += stage_nodes
            if form == "window" and i == with_time and not self.ends_at_last:
                nodes.append(("last", self.sizes[i + 1], False, True))  # the stages after it need no other step
        if form == "window" and with_time < 0:
            nodes.append(("last", self.output_size, False, True))
        return nodes

    def _sums(self, nodes: list[Node]) -> _core.Sums | None:
        table, layer = next(((a, b) for a, b in pairwise(nodes) if a[0] == "lookup"), ((), ()))
        if not layer or layer[0] != "recurrent":
            return None
        architecture = next(stage for stage in self.stages if isinstance(stage, Recurrent)).architecture
        assert self.vocabulary is not None
        size = self.vocabulary * architecture.directions * 4 * architecture.hidden_size * self.dtype.itemsize
        return _core.Sums(layer[1], table[1]) if size <= MAX_TABLE_BYTES else None

    def __getstate__(self) -> tuple[Any, ...]:
        return self.stages, self.slots, self.is_model

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]
