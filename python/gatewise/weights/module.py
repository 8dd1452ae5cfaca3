"""What all layers share: weights by name, which are changed as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np

from gatewise.arguments.arrays import MAX_BYTES, Array
from gatewise.weights.parameters import Holder, Packable, Parameters, Weights


class Module:
    """A layer of a network. Its weights are a snapshot that never changes, and that another one takes the place of."""

    _holder: Holder[Any]
    _source: Callable[[Packable[Any]], Mapping[str, Array]] | None = None  # of the first weights, if not drawn

    @classmethod
    def _from(cls, source: Callable[[Packable[Any]], Mapping[str, Array]], options: Mapping[str, Any]) -> Module:
        """A layer with weights from `source`, which is told dtype and shapes and may refuse. None are drawn."""
        layer = cls.__new__(cls)
        layer._source = source
        layer.__init__(**options)  # type: ignore[misc]
        del layer._source
        return layer

    def _hold(self, of: Packable[Any], draw: Callable[[], Mapping[str, Array]]) -> None:
        """Start with the weights that `draw` gives, or else the source."""
        if self._source is not None:
            arrays = self._source(of)
        else:
            size = sum(map(math.prod, of.shapes().values())) * np.dtype(of.dtype).itemsize
            if size > MAX_BYTES:
                raise ValueError(
                    f"{type(self).__name__}: expected weights of at most {MAX_BYTES} bytes in all, got {size}"
                )
            arrays = draw()
        self._holder = Holder(Weights(of, {name: np.asarray(array, of.dtype) for name, array in arrays.items()}))

    def _options(self) -> dict[str, Any]:
        """What `__init__` was given, by name, but for the seed of what only starts with it."""
        return {}

    @property
    def parameters(self) -> Parameters:
        """The weights by PyTorch's names; assign to change them."""
        holder = self._holder
        return Parameters(lambda: holder.weights.arrays, holder.swap)

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(array.size for array in self._holder.weights.arrays.values())

    @contextmanager
    def edit(self) -> Iterator[dict[str, Array]]:
        """Writable copies of all weights, swapped in together at the end; on an exception nothing changes.

        Of two threads that edit at the same time the one that ends last prevails.
        """
        copies = self.state_dict()
        yield copies
        self.load_state_dict(copies)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all weights by name, in PyTorch's order."""
        return {name: array.copy() for name, array in self._holder.weights.arrays.items()}

    def load_state_dict(self, mapping: Mapping[str, object]) -> None:
        """Take all weights from a mapping of name to array (or tensor): all of them, or on an error none."""
        self._holder.swap(checked_names(mapping, self._holder.weights.arrays))

    def __copy__(self) -> Module:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, _holder=copy(self._holder))  # from here on its own weights
        return other


def checked_names(mapping: Mapping[str, object], arrays: Mapping[str, Array]) -> Mapping[str, object]:
    """`mapping` itself, if it has just these names."""
    if not isinstance(mapping, Mapping):
        raise TypeError(f"mapping: expected a mapping of names to arrays, got {type(mapping).__name__}")
    expected = set(arrays)
    missing, unexpected = expected - set(mapping), set(mapping) - expected
    if missing or unexpected:
        wrong = [f"missing {', '.join(sorted(missing))}"] if missing else []
        wrong += [f"unexpected {', '.join(sorted(map(str, unexpected)))}"] if unexpected else []
        raise ValueError(f"mapping: expected exactly this layer's parameters, got {'; '.join(wrong)}")
    return mapping
