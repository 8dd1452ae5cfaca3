"""What all layers and models share: weights by name, which change as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np

from gatewise.arguments.arrays import MAX_BYTES, Array
from gatewise.weights.parameters import Packable, Parameters, Weights, WeightsSlot


class Module:
    """A layer or a model. Its weights are a snapshot that never changes; a change replaces it by another snapshot."""

    _slot: WeightsSlot[Any]
    _source: Callable[[Packable[Any]], Mapping[str, Array]] | None = None  # of the first weights; None: drawn

    @classmethod
    def _from(cls, source: Callable[[Packable[Any]], Mapping[str, Array]], options: Mapping[str, Any]) -> Module:
        """A layer whose weights come from `source`, which learns their dtype and shapes, and may refuse."""
        layer = cls.__new__(cls)
        layer._source = source
        layer.__init__(**options)  # type: ignore[misc]
        del layer._source
        return layer

    def _start_weights(self, packable: Packable[Any], draw: Callable[[], Mapping[str, Array]]) -> None:
        """Take the first weights from the source, or else from `draw`."""
        if self._source is not None:
            arrays = self._source(packable)
        else:
            size = sum(map(math.prod, packable.shapes().values())) * np.dtype(packable.dtype).itemsize
            if size > MAX_BYTES:
                raise ValueError(
                    f"{type(self).__name__}: expected weights of at most {MAX_BYTES} bytes in all, got {size}"
                )
            arrays = draw()
        converted = {name: np.asarray(array, packable.dtype) for name, array in arrays.items()}
        self._slot = WeightsSlot(Weights(packable, converted))

    def _options(self) -> dict[str, Any]:
        """The arguments of `__init__` by name, without a seed that only the first weights depend on."""
        return {}

    def _arrays(self) -> Mapping[str, Array]:
        """The present weights by name."""
        return self._slot.weights.arrays

    def _swap(self, changes: Mapping[str, object]) -> None:
        """Check and copy `changes`, and put them in the place of the weights of these names, all at once."""
        self._slot.swap(changes)

    @property
    def parameters(self) -> Parameters:
        """The weights by PyTorch's names, in a model "0.weight_ih_l0" and so on. Assign to change them."""
        return Parameters(self._arrays, self._swap)

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights consist of."""
        return sum(array.size for array in self._arrays().values())

    @contextmanager
    def edit(self) -> Iterator[dict[str, Array]]:
        """Writable copies of all weights, which replace them together at the end; on an exception nothing changes.

        If two threads edit at the same time, the one that ends last prevails.
        """
        copies = self.state_dict()
        yield copies
        self.load_state_dict(copies)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all weights by name, in PyTorch's order."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def load_state_dict(self, mapping: Mapping[str, object]) -> None:
        """Take all weights from a mapping of name to array (or tensor). On an error no weight changes."""
        self._swap(checked_names(mapping, self._arrays()))

    def __copy__(self) -> Module:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, _slot=copy(self._slot))  # the weights of the two change separately now
        return other


def checked_names(mapping: Mapping[str, object], arrays: Mapping[str, Array]) -> Mapping[str, object]:
    """Return `mapping`; raise unless it has exactly the names of `arrays`."""
    if not isinstance(mapping, Mapping):
        raise TypeError(f"mapping: expected a mapping of names to arrays, got {type(mapping).__name__}")
    expected = set(arrays)
    missing, unexpected = expected - set(mapping), set(mapping) - expected
    if missing or unexpected:
        wrong = [f"missing {', '.join(sorted(missing))}"] if missing else []
        wrong += [f"unexpected {', '.join(sorted(map(str, unexpected)))}"] if unexpected else []
        raise ValueError(f"mapping: expected exactly this layer's parameters, got {'; '.join(wrong)}")
    return mapping
