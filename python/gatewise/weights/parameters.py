"""The weights of a layer: snapshots that never change, and the place where the present one is."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import Array, floating, read_only, shaped, without_graph


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
