"""Layers without weights of their own, which change the steps or the directions of a sequence, or nothing.

Names and options are Keras's, Dropout's torch.nn's.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gatewise.arguments.arrays import number
from gatewise.layers.block import Block
from gatewise.layers.layer import Layer
from gatewise.running.network import Identity, Node, Recurrent, Stage
from gatewise.running.network import Last as LastStage

MERGES = {"concat": "concat", "sum": "add", "mul": "multiply", "ave": "average"}


class Bidirectional(Block):
    """A bidirectional layer with a choice of how its outputs are merged, as Keras's Bidirectional.

    Parameters
    ----------
    layer : LSTM, GRU or RNN
        A layer with bidirectional=True, with which this one shares its weights.
    merge_mode : "concat", "sum", "mul" or "ave"
        How the outputs of the two directions become one. Except with "concat", it is as wide as each of them.
    """

    def __init__(self, layer: Layer, merge_mode: str = "concat") -> None:
        if not isinstance(layer, Layer):
            raise TypeError(f"layer: expected LSTM, GRU or RNN, got {type(layer).__name__}")
        if not layer.bidirectional:
            raise ValueError(f"layer: expected a layer with bidirectional=True, got {layer!r}")
        if not isinstance(merge_mode, str) or merge_mode not in MERGES:
            raise ValueError(f"merge_mode: expected {', '.join(map(repr, MERGES))}, got {merge_mode!r}")
        self.layer: Final = layer
        self.merge_mode: Final = merge_mode
        self._stage = Recurrent(layer._architecture, MERGES[merge_mode])
        self._slot = layer._slot

    def _options(self) -> dict[str, Any]:
        return {"layer": self.layer, "merge_mode": self.merge_mode}

    def __copy__(self) -> Bidirectional:
        return Bidirectional(copy(self.layer), self.merge_mode)


class TimeDistributed(Block):
    """A layer that is applied at every step, as Keras writes it. In gatewise every layer is.

    Parameters
    ----------
    layer : Dense, Activation, LayerNorm, BatchNorm, Normalization or Dropout
        The layer with which this one shares its weights.
    """

    def __init__(self, layer: Block) -> None:
        if not isinstance(layer, Block) or layer._stage.needs_time or layer._stage.vocabulary is not None:
            raise TypeError(f"layer: expected a layer of single steps, got {type(layer).__name__}")
        self.layer: Final = layer
        self._stage = layer._stage
        self._slot = layer._slot

    def _options(self) -> dict[str, Any]:
        return {"layer": self.layer}

    def __copy__(self) -> TimeDistributed:
        return TimeDistributed(copy(self.layer))


class Dropout(Block):
    """A layer that drops elements in training; in inference it does nothing.

    Parameters
    ----------
    p : float
        The probability of an element to be dropped, which has no effect here.
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p: Final = number("p", p, least=0.0, most=1.0)
        self._start(Identity())

    def _options(self) -> dict[str, Any]:
        return {"p": self.p}


class Masking(Block):
    """Leave out the steps whose input units all have one value, as Keras's Masking. The first layer of a model.

    The model runs as if the sequence did not have these steps: the state is carried over them. The output at a step
    that is left out is zero, also in a stream; in Keras it may be something else.

    Parameters
    ----------
    mask_value : float
        The value. It is compared with the input in the model's dtype, in which denormal numbers are zero.
    """

    def __init__(self, mask_value: float = 0.0) -> None:
        largest = float(np.finfo(np.float32).max)
        self.mask_value: Final = number("mask_value", mask_value, -largest, largest)
        self._start(_Mask(self.mask_value))

    def _options(self) -> dict[str, Any]:
        return {"mask_value": self.mask_value}


@dataclass(frozen=True)
class _Mask(Stage):
    masked: float
    needs_time = True

    def nodes(self, packed: Any, units: int, dtype: np.dtype[Any]) -> list[Node]:
        return [("mask", units, self.masked)]


class Reverse(Block):
    """The steps of each row in the opposite order; with `lengths` the steps up to the row's end.

    A layer between two Reverse layers reads backwards, as with Keras's go_backwards and ONNX's direction "reverse".
    """

    def __init__(self) -> None:
        self._start(_Reverse())


class _Reverse(Stage):
    needs_time = True
    reverses = True
    streaming_obstacle = "expected no Reverse, which needs the end of the sequence first"

    def nodes(self, packed: Any, units: int, dtype: np.dtype[Any]) -> list[Node]:
        return [("reverse", units)]


class Last(Block):
    """The last step of a sequence, as with Keras's return_sequences=False.

    With `lengths` it is the last step of each row, or zero for a row without steps. Directly after a bidirectional
    layer it is the last step of each direction; the reverse direction's is the first step of the sequence. In a stream
    every step is the last one so far.
    """

    def __init__(self) -> None:
        self._start(LastStage())
