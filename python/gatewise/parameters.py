"""The weights of a layer: names, shapes, initial values, and snapshots that never change."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from gatewise import _core
from gatewise.activations import Function
from gatewise.arguments.arrays import Array, floating, read_only, shaped, without_graph

GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1}
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_ch")

MOST = 2**31 - 1  # of a size; and of the bytes of all weights together:
MOST_BYTES = 2**46


class Formula(NamedTuple):
    """Other functions than a cell's own, and what else Keras and ONNX vary; as the core takes it."""

    gate: Function = Function("sigmoid")
    candidate: Function = Function("tanh")
    output: Function = Function("tanh")  # LSTM: of c, on its way into h
    clip: float = math.inf  # of the sums before gates and candidate
    peepholes: bool = False  # LSTM: the gates see c


@dataclass(frozen=True)
class Architecture:
    """What a stack of recurrent layers is, apart from its weights."""

    cell: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    bidirectional: bool
    proj_size: int
    dtype: np.dtype[Any]
    formula: Formula | None = None  # None: the cell's own

    @property
    def trains(self) -> bool:
        return self.cell != "gru_reset_before" and self.formula is None

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def recurrent_size(self) -> int:
        """Of h: the projection's size if there is one."""
        return self.proj_size or self.hidden_size

    @property
    def output_size(self) -> int:
        return self.directions * self.recurrent_size

    @property
    def has_cell_state(self) -> bool:
        return self.cell == "lstm"

    def sequences(self) -> list[tuple[str, int]]:
        """The suffix and input size of each layer and direction, in PyTorch's order."""
        suffixes = ("", "_reverse")[: self.directions]
        return [
            (f"_l{layer}{suffix}", self.output_size if layer else self.input_size)
            for layer in range(self.num_layers)
            for suffix in suffixes
        ]

    def shapes_of(self, suffix: str, input_size: int) -> dict[str, tuple[int, ...]]:
        rows = GATES[self.cell] * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows, self.recurrent_size),
        }
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, self.hidden_size)
        if self.formula and self.formula.peepholes:
            shapes["weight_ch"] = (3 * self.hidden_size,)
        return {kind + suffix: shape for kind, shape in shapes.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, as torch.nn has them."""
        return {name: shape for sequence in self.sequences() for name, shape in self.shapes_of(*sequence).items()}

    def check_size(self) -> None:
        numbers = sum(int(np.prod(shape, dtype=object)) for shape in self.shapes().values())
        if numbers * self.dtype.itemsize > MOST_BYTES:
            raise ValueError(
                f"hidden_size: expected weights of at most {MOST_BYTES} bytes in all, "
                f"got {numbers * self.dtype.itemsize}"
            )

    def draw(self, seed: int) -> dict[str, Array]:
        """Initial weights, uniform in +-1 / sqrt(hidden_size): PyTorch's distribution, NumPy's generator."""
        generator = np.random.default_rng(seed)
        bound = self.hidden_size**-0.5
        return {
            name: generator.uniform(-bound, bound, shape).astype(self.dtype) for name, shape in self.shapes().items()
        }

    def pack(self, arrays: Mapping[str, Array]) -> _core.Packed:
        return _core.Packed(
            self.cell, self.dtype, self.input_size, self.hidden_size, self.proj_size, self.num_layers, self.directions,
            self.grouped(arrays), self.formula,
        )  # fmt: skip

    def grouped(self, arrays: Mapping[str, Array]) -> list[list[Array | None]]:
        """One list of weights a layer and direction, in the order of KINDS, as the core asks."""
        return [[arrays.get(kind + suffix) for kind in KINDS] for suffix, _ in self.sequences()]


class Packed(Protocol):
    """Weights in the core, for one backend."""

    @property
    def backend(self) -> str: ...


P = TypeVar("P", bound=Packed, covariant=True)


class Packable(Protocol[P]):
    """What weights belong to: their dtype, names and shapes, and their form in the core."""

    @property
    def dtype(self) -> np.dtype[Any]: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def pack(self, arrays: Mapping[str, Array]) -> P: ...


class Weights(Generic[P]):
    """A snapshot of all weights, which never changes, and its packed form for the backend in use."""

    def __init__(self, architecture: Packable[P], arrays: Mapping[str, Array]) -> None:
        self.architecture = architecture
        self.arrays = {name: read_only(arrays[name]) for name in architecture.shapes()}
        self._packed: P | None = None

    def packed(self) -> P:
        """Packed once for each backend that asks; a second thread that asks meanwhile packs for itself."""
        packed = self._packed
        if packed is None or packed.backend != _core.backend():
            self._packed = packed = self.architecture.pack(self.arrays)
        return packed

    def checked(self, changes: Mapping[str, object]) -> dict[str, Array]:
        """Copies of some arrays to come in place of these: all of them fit, or there is an error."""
        shapes, copies = self.architecture.shapes(), {}
        for name, value in changes.items():
            if name not in shapes:
                raise ValueError(f"{name}: expected one of {', '.join(shapes)}")
            array = shaped(name, floating(name, without_graph(value), self.architecture.dtype), shapes[name])
            copies[name] = np.array(array, order="C")
        return copies

    def replaced(self, copies: Mapping[str, Array]) -> Weights[P]:
        """A snapshot with some arrays in place of these."""
        return Weights(self.architecture, {**self.arrays, **copies})

    def __getstate__(self) -> tuple[Packable[P], dict[str, Array]]:
        return self.architecture, self.arrays

    def __setstate__(self, state: tuple[Packable[P], dict[str, Array]]) -> None:
        # The arrays of a pickle may lie at any address, in memory that others write to later.
        of, arrays = state
        copies = {name: np.array(array, of.dtype, order="C") for name, array in arrays.items()}
        self.__init__(of, copies)  # type: ignore[misc]

    def __deepcopy__(self, memory: object) -> Weights[P]:
        return self


class Parameters(Mapping[str, Array]):
    """The weights of a layer by PyTorch's names, as read-only arrays. Assigning to a name changes that weight.

    An assignment is checked, copied and then swapped in as a whole: a call under way in another thread, a stream and
    a tape keep the weights that they started with.
    """

    def __init__(self, arrays: Callable[[], Mapping[str, Array]], swap: Callable[[Mapping[str, object]], None]) -> None:
        self._arrays = arrays
        self._swap = swap

    def __getitem__(self, name: str) -> Array:
        return self._arrays()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays())

    def __len__(self) -> int:
        return len(self._arrays())

    def __setitem__(self, name: str, value: object) -> None:
        self._swap({name: value})

    def update(self, changes: Mapping[str, object]) -> None:
        """Change several weights at once: all of them, or on an error none."""
        if not isinstance(changes, Mapping):
            raise TypeError(f"changes: expected a mapping of names to arrays, got {type(changes).__name__}")
        self._swap(changes)

    def __repr__(self) -> str:
        return f"Parameters({', '.join(f'{name} {array.shape}' for name, array in self.items())})"


class Holder(Generic[P]):
    """The place where a layer's present snapshot is kept. Threads swap snapshots here, one at a time."""

    def __init__(self, weights: Weights[P]) -> None:
        self.weights = weights

    def swap(self, changes: Mapping[str, object]) -> None:
        self.take(self.weights.checked(changes))  # may run the user's code, thus not under the lock

    def take(self, copies: Mapping[str, Array]) -> None:
        """Copies that were checked."""
        with one_at_a_time():
            self.weights = self.weights.replaced(copies)

    def __copy__(self) -> Holder[P]:
        return Holder(self.weights)


# One lock for all layers, so that a fork can renew it: another thread may have held it, and is not in the child.
# Reentrant, since a finaliser or a signal's handler may change a layer while its thread is changing another.
_lock = threading.RLock()


def one_at_a_time() -> AbstractContextManager[object]:
    """The lock under which layers change."""
    return _lock


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
