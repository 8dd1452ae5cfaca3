"""TensorFlow: layers of Keras in a tf.function."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..cases import Array, Case, Party
from ..workloads import FORWARD, ONE_STEP, Workload, gate_count
from . import refusals

# The gates of PyTorch in Keras' order: i f c o, as in PyTorch; z r h.
GATE_ORDERS = {"LSTM": [0, 1, 2, 3], "GRU": [1, 0, 2]}


def make(case: Case) -> Party:
    """keras.layers.LSTM or GRU in a tf.function, GradientTape for training; the layer's cell for a step."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    import tensorflow as tf

    x = tf.constant(case.x.swapaxes(0, 1))  # (B, T, I)
    layers = _make_layers(case, x)
    if case.workload.mode in ONE_STEP:
        return _make_step(case, layers[0].cell, x[:, 0])
    if case.workload.mode == FORWARD:
        forward = tf.function(lambda x: _compute_output(layers, x))
        return Party(lambda: forward(x).numpy(), lambda y: {"output": y.swapaxes(0, 1)})
    return _make_gradients(case, layers, x)


def refusal(workload: Workload) -> str | None:
    return (
        refusals.other_framework(workload)
        or refusals.uneven_rows(workload)
        or refusals.networks(workload)
        or refusals.blocks_of_steps(workload)
    )


def set_threads(threads: int) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _make_layers(case: Case, x: Any) -> list[Any]:
    """Layers of Keras with the weights of a case; a call on x lets each make its variables."""
    import keras

    workload = case.workload
    layers = []
    for suffixes in case.suffixes:
        layer = getattr(keras.layers, workload.cell)(workload.hidden, return_sequences=True, dtype=workload.dtype)
        if workload.directions == 2:
            layer = keras.layers.Bidirectional(layer, dtype=workload.dtype)
        x = layer(x)
        layer.set_weights([value for suffix in suffixes for value in _keras_weights(case, suffix)])
        layers.append(layer)
    return layers


def _compute_output(layers: list[Any], x: Any) -> Any:
    for layer in layers:
        x = layer(x)
    return x


def _keras_weights(case: Case, suffix: str) -> list[Array]:
    """Kernel, recurrent kernel and bias of one layer in one direction."""
    cell = case.workload.cell
    weight_ih, weight_hh, bias_ih, bias_hh = (
        _reordered(case.parameters[f"{kind}_{suffix}"], cell, GATE_ORDERS[cell])
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    bias = bias_ih + bias_hh if cell == "LSTM" else np.stack([bias_ih, bias_hh])
    return [weight_ih.T, weight_hh.T, bias]


def _reordered(value: Array, cell: str, order: Any) -> Array:
    """A weight or bias (G * H, ...) with the rows of its gates in another order."""
    gates = np.split(value, gate_count(cell))
    return np.concatenate([gates[gate] for gate in order])


def _make_step(case: Case, cell: Any, x: Any) -> Party:
    import tensorflow as tf

    zero = tf.zeros((case.workload.batch, case.workload.hidden), case.workload.dtype)
    state = [zero, zero] if case.workload.cell == "LSTM" else [zero]
    compiled = tf.function(lambda x, state: cell(x, state))

    def step() -> Any:
        nonlocal state
        y, state = compiled(x, state)
        return y.numpy()

    return Party(step, lambda h: {"output": h[None].copy()})


def _make_gradients(case: Case, layers: list[Any], x: Any) -> Party:
    import tensorflow as tf

    grad_output = tf.constant(case.grad_output.swapaxes(0, 1))
    variables = [variable.value for layer in layers for variable in layer.trainable_variables]

    def gradients() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = _compute_output(layers, x)
        return y, tape.gradient(y, [x, *variables], grad_output)

    train = tf.function(gradients)

    def run() -> Any:
        y, grads = train()
        return y.numpy(), grads

    def collect(result: Any) -> dict[str, Array]:
        y, (grad_x, *grads) = result
        named = {"output": y.swapaxes(0, 1), "input": grad_x.numpy().swapaxes(0, 1)}
        return named | _gradients_by_name(case, grads)

    return Party(run, collect)


def _gradients_by_name(case: Case, gradients: list[Any]) -> dict[str, Array]:
    """The gradients of weights under PyTorch's names, without those of biases, of which Keras has fewer."""
    cell = case.workload.cell
    order = np.argsort(GATE_ORDERS[cell])
    named = {}
    suffixes = [suffix for layer in case.suffixes for suffix in layer]
    triples = zip(*[iter(gradients)] * 3, strict=True)
    for suffix, (kernel, recurrent, _) in zip(suffixes, triples, strict=True):
        named[f"weight_ih_{suffix}"] = _reordered(kernel.numpy().T, cell, order)
        named[f"weight_hh_{suffix}"] = _reordered(recurrent.numpy().T, cell, order)
    return named
