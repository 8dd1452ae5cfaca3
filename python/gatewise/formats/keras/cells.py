"""The cells of Keras's recurrent layers: what they compute, as their configuration says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from gatewise.formats.keras.activations import unit_function
from gatewise.formats.keras.config import LayerConfig
from gatewise.layers.activation import Activation
from gatewise.layers.layer import Layer
from gatewise.layers.recurrent import GRU, LSTM, RNN
from gatewise.weights.functions import Function

CUDNN = {"CuDNNLSTM": "LSTM", "CuDNNGRU": "GRU"}
STACKED = "StackedRNNCells"
CELLS = ("LSTMCell", "GRUCell", "SimpleRNNCell")
RECURRENT = ("LSTM", "GRU", "SimpleRNN", *CUDNN)


class Cell(NamedTuple):
    """What a recurrent layer computes, apart from its weights."""

    kind: str  # LSTM, GRU or RNN
    units: int
    bias: bool
    reset_after: bool = True
    activation: Function = Function("tanh")
    recurrent_activation: Function = Function("sigmoid")
    is_cudnn: bool = False

    def layer(self, inputs: int, bidirectional: bool, dtype: np.dtype[Any]) -> Layer:
        """A layer of this cell, whose weights are still to be loaded."""
        options: dict[str, Any] = {"bias": self.bias, "batch_first": True, "bidirectional": bidirectional}
        options |= {"dtype": dtype, "seed": 0}
        activation, recurrent_activation = (
            Activation(function.name, *function.numbers) for function in (self.activation, self.recurrent_activation)
        )
        if self.kind == "RNN":
            return RNN(inputs, self.units, nonlinearity=activation, **options)
        options |= {"activation": activation, "recurrent_activation": recurrent_activation}
        if self.kind == "GRU":
            return GRU(inputs, self.units, reset_after=self.reset_after, **options)
        return LSTM(inputs, self.units, **options)


def cell_of(layer: LayerConfig) -> Cell:
    """The cell of an LSTM, GRU, SimpleRNN, CuDNNLSTM, CuDNNGRU, or of one of their cells."""
    kind = CUDNN.get(layer.kind, layer.kind.removesuffix("Cell").removeprefix("Simple"))
    units = layer.size("units")
    if layer.kind in CUDNN:
        return Cell(kind, units, True, is_cudnn=True)
    bias = layer.flag("use_bias", True)
    if "activation" not in layer.config:
        layer = replace(layer, config={**layer.config, "activation": "tanh"})
    activation = unit_function(layer, "activation")
    if kind == "RNN":
        return Cell(kind, units, bias, activation=activation)
    if "recurrent_activation" not in layer.config:  # its default depends on the version
        raise layer.error("recurrent_activation", "a function", None)
    recurrent_activation = unit_function(layer, "recurrent_activation")
    # Keras before 2.1.4 had no reset_after, and computed what False says.
    reset_after = kind != "GRU" or layer.flag("reset_after", False)
    return Cell(kind, units, bias, reset_after, activation, recurrent_activation)


def cells_of(layer: LayerConfig) -> list[LayerConfig]:
    """The cells of an RNN layer, lowest first."""
    cell = layer.inner("cell")
    if cell.kind != STACKED:
        cells = [cell]
    else:
        values = cell.config.get("cells")
        values = values if isinstance(values, list) else []
        cells = [replace(cell, config={"cell": value}).inner("cell") for value in values]
    for config in cells:
        if config.kind not in CELLS:
            raise layer.refusal(f"cell: expected one of {', '.join(CELLS)}, got {config.kind!r}")
    if not cells:
        raise layer.error("cell", "at least one cell", cell.config)
    return cells


def forward_layer(layer: LayerConfig) -> LayerConfig:
    """The layer that a Bidirectional runs from the first step to the last."""
    inner = layer.inner("layer")
    if inner.kind not in RECURRENT:
        expected = f"{', '.join(RECURRENT[:-1])} or {RECURRENT[-1]}"
        raise layer.refusal(f"layer: expected {expected}, got {inner.kind!r}")
    return inner


def check_outputs(layer: LayerConfig) -> None:
    """Refuse a layer that also returns its state, or that has time as the first axis."""
    layer.expect_off("return_state", "time_major")
