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
    """What has weights: it knows their dtype, names and shapes, and packs them for the core."""

    @property
    def dtype(self) -> np.dtype[Any]: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def pack(self, arrays: Mapping[str, Array]) -> P: ...


class Weights(Generic[P]):
    """A snapshot of all weights of a layer, which never changes, and its packed form for the backend in use."""

    def __init__(self, architecture: Packable[P], arrays: Mapping[str, Array]) -> None:
        self.architecture = architecture
        self.arrays = {name: read_only(arrays[name]) for name in architecture.shapes()}
        self._packed: P | None = None

    def packed(self) -> P:
        """The packed form, made once for each backend; a second thread that asks meanwhile makes another one."""
        packed = self._packed
        if packed is None or packed.backend != _core.backend():
            self._packed = packed = self.architecture.pack(self.arrays)
        return packed

    def checked(self, changes: Mapping[str, object]) -> dict[str, Array]:
        """Copy the arrays that are to replace some of these; raise unless all of them fit."""
        shapes, copies = self.architecture.shapes(), {}
        for name, value in changes.items():
            if name not in shapes:
                raise ValueError(f"{name}: expected one of {', '.join(shapes)}")
            array = shaped(name, floating(name, without_graph(value), self.architecture.dtype), shapes[name])
            copies[name] = np.array(array, order="C")
        return copies

    def replaced(self, copies: Mapping[str, Array]) -> Weights[P]:
        """A snapshot in which `copies` have replaced the arrays of these names."""
        return Weights(self.architecture, {**self.arrays, **copies})

    def __getstate__(self) -> tuple[Packable[P], dict[str, Array]]:
        return self.architecture, self.arrays

    def __setstate__(self, state: tuple[Packable[P], dict[str, Array]]) -> None:
        # The arrays of a pickle may be misaligned, or views of memory that others write to later.
        architecture, arrays = state
        copies = {name: np.array(array, architecture.dtype, order="C") for name, array in arrays.items()}
        self.__init__(architecture, copies)  # type: ignore[misc]

    def __deepcopy__(self, memory: object) -> Weights[P]:
        return self


class Parameters(Mapping[str, Array]):
    """The weights of a layer by PyTorch's names, as read-only arrays. Assigning to a name changes that weight.

    An assignment is checked, copied and then swapped in as a whole: a call that another thread has begun, a stream and
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
        """Change several weights at once. On an error no weight changes."""
        if not isinstance(changes, Mapping):
            raise TypeError(f"changes: expected a mapping of names to arrays, got {type(changes).__name__}")
        self._swap(changes)

    def __repr__(self) -> str:
        return f"Parameters({', '.join(f'{name} {array.shape}' for name, array in self.items())})"


class WeightsSlot(Generic[P]):
    """The place of a layer's present snapshot, in which threads put another one, one thread at a time."""

    def __init__(self, weights: Weights[P]) -> None:
        self.weights = weights

    def swap(self, changes: Mapping[str, object]) -> None:
        self.put(self.weights.checked(changes))  # the check may run the user's code, and so comes before the lock

    def put(self, copies: Mapping[str, Array]) -> None:
        """Replace arrays by copies that were checked."""
        with swap_lock():
            self.weights = self.weights.replaced(copies)

    def __copy__(self) -> WeightsSlot[P]:
        return WeightsSlot(self.weights)


# There is one lock for all layers, so that a fork can renew it: the thread that held it may not exist in the child.
# It is reentrant, since a finaliser or a signal's handler may change a layer while its thread is changing another.
_lock = threading.RLock()


def swap_lock() -> AbstractContextManager[object]:
    """The lock that a thread holds while it changes a layer."""
    return _lock


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
