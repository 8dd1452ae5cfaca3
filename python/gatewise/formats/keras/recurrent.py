"""The recurrent layers of Keras: LSTM, GRU, SimpleRNN, CuDNNLSTM, CuDNNGRU, RNN with cells, and Bidirectional."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gatewise.arguments.arrays import Array
from gatewise.formats.gates import KERAS_ORDER, reorder_gates, split_gates
from gatewise.formats.keras.builder import Builder, Mask
from gatewise.formats.keras.cells import Cell, cell_of, cells_of, check_outputs, forward_layer
from gatewise.formats.keras.config import LayerConfig
from gatewise.layers.structure import MERGES, Bidirectional, Last, Reverse


def add_recurrent(builder: Builder, layer: LayerConfig) -> None:
    """Add an LSTM, GRU, SimpleRNN, CuDNNLSTM or CuDNNGRU."""
    _start(builder, layer)
    _add_cell(builder, layer, cell_of(layer))
    _finish(builder, layer)


def add_rnn(builder: Builder, layer: LayerConfig) -> None:
    """Add an RNN: a layer for each of its cells."""
    _start(builder, layer)
    for i, cell in enumerate(cells_of(layer)):
        _add_cell(builder, replace(cell, key_prefix=f"cells/{i}/"), cell_of(cell))
    _finish(builder, layer)


def add_bidirectional(builder: Builder, layer: LayerConfig) -> None:
    builder.expect_sequences(layer)
    builder.use_mask(layer)
    mode = layer.expect("merge_mode", *MERGES, default="concat")
    forward = forward_layer(layer)
    check_outputs(forward)
    forward.expect("go_backwards", False, default=False)
    cell = cell_of(forward)
    _check_backward_layer(layer, forward)
    weights = _read_cell(builder, replace(forward, key_prefix="forward_layer/"), cell, builder.units)
    inputs, dtype = weights["weight_ih"].shape[1], weights["weight_ih"].dtype
    reverse = _read_cell(builder, replace(forward, key_prefix="backward_layer/"), cell, inputs)
    module = cell.layer(inputs, True, dtype)
    arrays = {f"{kind}_l0": array for kind, array in weights.items()}
    arrays |= {f"{kind}_l0_reverse": array for kind, array in reverse.items()}
    module.load_state_dict(arrays)
    if mode == "concat":
        builder.add(module, None, 2 * cell.units)
    else:
        builder.add(Bidirectional(module, mode), None, cell.units)
    _finish(builder, forward)


def _check_backward_layer(layer: LayerConfig, forward: LayerConfig) -> None:
    """Refuse a Bidirectional whose two directions compute different things."""
    if layer.config.get("backward_layer") is None:
        return
    backward = layer.inner("backward_layer")
    check_outputs(backward)
    backward.expect("go_backwards", True)
    is_alike = backward.kind == forward.kind and cell_of(backward) == cell_of(forward)
    options = "return_sequences", "dtype"
    if not is_alike or any(backward.config.get(option) != forward.config.get(option) for option in options):
        raise layer.refusal("backward_layer: expected the options of the layer, got others")


def _start(builder: Builder, layer: LayerConfig) -> None:
    """Use the mask, and reverse the sequence for a layer that reads it from its end.

    Its outputs stay reversed, as in Keras.
    """
    check_outputs(layer)
    builder.expect_sequences(layer)
    builder.use_mask(layer)
    if builder.mask is Mask.USED and not layer.flag("return_sequences", False):
        layer.expect_off("zero_output_for_mask")
    if layer.flag("go_backwards", False):
        if builder.mask is Mask.USED and layer.flag("return_sequences", False):
            raise layer.error("go_backwards", "False where steps are masked and sequences returned", True)
        builder.add(Reverse())


def _add_cell(builder: Builder, layer: LayerConfig, cell: Cell) -> None:
    weights = _read_cell(builder, layer, cell, builder.units)
    module = cell.layer(weights["weight_ih"].shape[1], False, weights["weight_ih"].dtype)
    builder.add(module, {f"{kind}_l0": array for kind, array in weights.items()}, cell.units)


def _finish(builder: Builder, layer: LayerConfig) -> None:
    """Take only the last step of a layer that does not return sequences."""
    if not layer.flag("return_sequences", False):
        builder.add(Last())
        builder.rank, builder.mask = 2, Mask.NONE


def _read_cell(builder: Builder, layer: LayerConfig, cell: Cell, inputs: int | None) -> dict[str, Array]:
    """The weights of one direction: weight_ih [gates * units, inputs], weight_hh [gates * units, units], two biases."""
    rows = cell.units * len(KERAS_ORDER[cell.kind])
    kernel = builder.read(layer, "kernel", inputs, rows)
    recurrent = builder.read(layer, "recurrent_kernel", cell.units, rows)
    if cell.is_cudnn:
        # CuDNN's matrices are [units, inputs] for each gate already; Keras only changed their shape.
        arrays = [
            np.concatenate([gate.reshape(cell.units, -1) for gate in split_gates(matrix, cell.kind, -1)])
            for matrix in (kernel, recurrent)
        ]
    else:
        arrays = [reorder_gates(matrix, cell.kind, -1).T for matrix in (kernel, recurrent)]
    weights = dict(zip(("weight_ih", "weight_hh"), arrays, strict=True))
    return weights | (_read_biases(builder, layer, cell, rows) if cell.bias else {})


def _read_biases(builder: Builder, layer: LayerConfig, cell: Cell, rows: int) -> dict[str, Array]:
    if cell.is_cudnn:
        biases = builder.read(layer, "bias", 2 * rows).reshape(2, rows)
    elif cell.kind == "GRU" and cell.reset_after:
        biases = builder.read(layer, "bias", 2, rows)
    else:
        bias = builder.read(layer, "bias", rows)
        biases = np.stack([bias, np.zeros_like(bias)])
    names = "bias_ih", "bias_hh"
    return {name: reorder_gates(bias, cell.kind, 0) for name, bias in zip(names, biases, strict=True)}
