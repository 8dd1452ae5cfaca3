"""What all layers share that are not recurrent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gatewise.arguments.arrays import Array
from gatewise.running.network import Stage
from gatewise.weights.module import Module


class Block(Module):
    """A layer that is not recurrent."""

    _stage: Stage

    def _start(self, stage: Stage, draw: Callable[[], Mapping[str, Array]] = dict) -> None:
        self._stage = stage
        packable: Any = stage
        self._start_weights(packable, draw)

    @property
    def _dtype_name(self) -> str:
        assert self._stage.dtype is not None
        return str(self._stage.dtype.name)

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self._options().items() if value is not None]
        return f"{type(self).__name__}({', '.join(shown)})"
