"""Models in RTNeural's JSON (https://github.com/jatinchowdhury18/RTNeural), for audio plug-ins in C++.

Weights lie as in Keras: kernels [inputs, gates * units]; an LSTM has its gates as i f c o and one bias, a GRU as z r h
and two biases; convolutions are causal, with kernels [taps, inputs, outputs].
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gatewise.arguments.arrays import MAX_SIZE, Array, number, shaped, whole_number
from gatewise.formats import json_text
from gatewise.formats.errors import at, reading
from gatewise.formats.files import read_bounded, write_pieces
from gatewise.formats.gates import KERAS_ORDER, reorder_gates
from gatewise.formats.weights import layer_with
from gatewise.layers.activation import Activation
from gatewise.layers.layer import Layer
from gatewise.layers.normalization import BatchNorm
from gatewise.layers.products import Conv1D, Dense
from gatewise.layers.recurrent import GRU, LSTM
from gatewise.layers.sequential import Sequential
from gatewise.layers.structure import Dropout, TimeDistributed
from gatewise.weights.module import Module

ACTIVATIONS = ("tanh", "relu", "sigmoid", "softmax", "elu")
MAX_BYTES = 2**30  # of a file
# Options of the player AIDA-X: whether the input is added to the output, and gains in decibels. RTNeural has none.
PLAYER_OPTIONS: dict[str, object] = {"in_skip": 0, "in_gain": 0, "out_gain": 0}
# Options of Keras's layers that RTNeural ignores, with the only value that matches what it computes.
LAYER_OPTIONS: dict[str, object] = {
    "strides": 1,
    "groups": 1,
    "padding": "causal",
    "recurrent_activation": "sigmoid",
    "reset_after": True,
    "go_backwards": False,
    "return_state": False,
    "bidirectional": False,
}
BATCH_NORM_WEIGHTS = ("weight", "bias", "running_mean", "running_var")  # the first two only if it is affine


def load(path: str | os.PathLike[str]) -> Sequential:
    """Read a model of RTNeural: lstm, gru, dense, time-distributed-dense, conv1d, batchnorm, activation."""
    with reading(path):
        model = json_text.parse(read_bounded(path, MAX_BYTES))
        units = _size("in_shape", _member(model, "in_shape"))
        _check_options(model, PLAYER_OPTIONS)
        layers = _member(model, "layers")
        if not isinstance(layers, list):
            raise TypeError(f"layers: expected a list, got {type(layers).__name__}")
        modules: list[Module] = []
        for i, layer in enumerate(layers):
            with at(f"layers[{i}]"):
                modules += _modules(layer, units)
                units = _size("shape", _member(layer, "shape"))
        return Sequential(modules)


def save(model: Module | Sequential, path: str | os.PathLike[str]) -> None:
    """Write a model for RTNeural: LSTM, GRU, Dense, causal Conv1D, BatchNorm, Activation; a stack becomes layers."""
    layers: list[dict[str, Any]] = []
    sequential: Any = model if isinstance(model, Sequential) else Sequential([model])
    chain = sequential._chain
    if chain.vocabulary is not None:
        raise ValueError("model: layers[0]: RTNeural has no embedding")
    for i, (module, units) in enumerate(zip(sequential, chain.sizes, strict=False)):
        while isinstance(module, TimeDistributed):
            module = module.layer
        with at(f"model: layers[{i}]"):
            layers += _layers_of(module, units)
    text = json.dumps({"in_shape": [None, None, chain.sizes[0]], "layers": layers})
    write_pieces(os.fsdecode(path), [text.encode()])


# ---- reading


def _member(value: Any, name: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise ValueError(f"expected an object with {name!r}")
    return value[name]


def _check_options(values: Mapping[str, Any], options: Mapping[str, object]) -> None:
    """Refuse options that would change the numbers. What is missing or null is what RTNeural computes."""
    for name, expected in options.items():
        value = values.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None and value != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {str(value)[:100]}")


def _size(name: str, shape: Any) -> int:
    """The last size of a shape, [batch, steps, units], or the number that stands for one."""
    if isinstance(shape, list) and len(shape) > 3:
        raise ValueError(f"{name}: expected batch, steps and units at most, got {str(shape)[:100]}")
    return whole_number(name, shape[-1] if isinstance(shape, list) and shape else shape, 1, MAX_SIZE)


def _modules(layer: Any, inputs: int) -> list[Module]:
    kind, units = _member(layer, "type"), _size("shape", _member(layer, "shape"))
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(f"type: expected {', '.join(READERS)}, got {str(kind)[:100]!r}")
    _check_options(layer, LAYER_OPTIONS)
    return [READERS[kind](layer, inputs, units)]


def _weights(layer: Any, *shapes: tuple[int, ...]) -> list[Array]:
    """The weights of a layer, which must be finite and have these shapes, as float32."""
    lists = _member(layer, "weights")
    if not isinstance(lists, list) or len(lists) != len(shapes):
        count = len(lists) if isinstance(lists, list) else str(lists)[:100]
        raise ValueError(f"weights: expected {len(shapes)} arrays, got {count}")
    arrays = []
    for i, (numbers, shape) in enumerate(zip(lists, shapes, strict=True)):
        try:
            with np.errstate(over="ignore"):
                array = np.array(numbers, np.float64).astype(np.float32)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"weights[{i}]: expected numbers of shape {shape}") from None
        if not np.isfinite(array).all():
            raise ValueError(f"weights[{i}]: expected finite numbers")
        arrays.append(shaped(f"weights[{i}]", array, shape))
    return arrays


def _lstm(layer: Any, inputs: int, units: int) -> Module:
    _check_activation(layer, "tanh")
    kernel, recurrent, bias = _weights(layer, (inputs, 4 * units), (units, 4 * units), (4 * units,))
    return _recurrent(LSTM, kernel, recurrent, np.stack([bias, np.zeros_like(bias)]))


def _gru(layer: Any, inputs: int, units: int) -> Module:
    _check_activation(layer, "tanh")
    return _recurrent(GRU, *_weights(layer, (inputs, 3 * units), (units, 3 * units), (2, 3 * units)))


def _recurrent(kind: type[Layer], kernel: Array, recurrent: Array, biases: Array) -> Module:
    cell = kind.__name__
    weights = {
        "weight_ih_l0": reorder_gates(kernel.T, cell, 0),
        "weight_hh_l0": reorder_gates(recurrent.T, cell, 0),
        "bias_ih_l0": reorder_gates(biases[0], cell, 0),
        "bias_hh_l0": reorder_gates(biases[1], cell, 0),
    }
    layer: Module = layer_with(kind, weights, input_size=kernel.shape[0], hidden_size=recurrent.shape[0])
    return layer


def _dense(layer: Any, inputs: int, units: int) -> Module:
    lists = _member(layer, "weights")
    bias = isinstance(lists, list) and len(lists) == 2
    kernel, *biases = _weights(layer, (inputs, units), *[(units,)] * bias)
    weights = {"weight": kernel.T} | ({"bias": biases[0]} if bias else {})
    options = {"bias": bias, "activation": _activation(layer)}
    dense: Module = layer_with(Dense, weights, in_features=inputs, out_features=units, **options)
    return dense


def _convolution(layer: Any, inputs: int, units: int) -> Module:
    taps, dilation = _size("kernel_size", _member(layer, "kernel_size")), _size("dilation", _member(layer, "dilation"))
    kernel, bias = _weights(layer, (taps, inputs, units), (units,))
    weights = {"weight": kernel.transpose(2, 1, 0), "bias": bias}
    options = {"kernel_size": taps, "dilation": dilation, "activation": _activation(layer)}
    convolution: Module = layer_with(Conv1D, weights, in_channels=inputs, out_channels=units, **options)
    return convolution


def _batch_norm(layer: Any, inputs: int, units: int) -> Module:
    _check_activation(layer)
    lists = _member(layer, "weights")
    affine = isinstance(lists, list) and len(lists) == 4
    arrays = _weights(layer, *[(units,)] * (4 if affine else 2))
    weights = dict(zip(BATCH_NORM_WEIGHTS[0 if affine else 2 :], arrays, strict=True))
    epsilon = number("epsilon", _member(layer, "epsilon"), 0)
    norm: Module = layer_with(BatchNorm, weights, num_features=units, eps=epsilon, affine=affine)
    return norm


def _activation_layer(layer: Any, inputs: int, units: int) -> Module:
    return Activation(_activation(layer))


def _check_activation(layer: Any, *names: str) -> None:
    """Refuse an activation that a file asks for but RTNeural's layer of this kind does not compute."""
    name = layer.get("activation", "")
    if name not in ("", *names):
        raise ValueError(f"activation: expected {' or '.join((*names, 'nothing'))}, got {str(name)[:100]!r}")


def _activation(layer: Any) -> str:
    name = layer.get("activation", "")
    if name not in ("", *ACTIVATIONS):
        raise ValueError(f"activation: expected {', '.join(ACTIVATIONS)} or nothing, got {str(name)[:100]!r}")
    return name or "linear"


READERS: dict[str, Callable[[Any, int, int], Module]] = {
    "lstm": _lstm,
    "gru": _gru,
    "dense": _dense,
    "time-distributed-dense": _dense,
    "conv1d": _convolution,
    "batchnorm": _batch_norm,
    "activation": _activation_layer,
}


# ---- writing


def _layers_of(module: Any, units: int) -> list[dict[str, Any]]:
    weights = {name: array.astype(np.float64) for name, array in module.state_dict().items()}
    if isinstance(module, Layer):
        return _recurrent_layers(module, weights)
    if isinstance(module, Dropout):
        return []
    if isinstance(module, Dense):
        arrays = [weights["weight"].T, weights.get("bias", np.zeros(module.out_features))]
        return [_layer("dense", module.out_features, arrays, module.activation)]
    if isinstance(module, Conv1D) and (module.padding == "causal" or module.kernel_size == 1):
        arrays = [weights["weight"].transpose(2, 1, 0), weights.get("bias", np.zeros(module.out_channels))]
        options = {"kernel_size": [module.kernel_size], "dilation": [module.dilation], "groups": 1}
        return [_layer("conv1d", module.out_channels, arrays, module.activation) | options]
    if isinstance(module, BatchNorm):
        names = BATCH_NORM_WEIGHTS[0 if module.affine else 2 :]
        layer = _layer("batchnorm", module.num_features, [weights[name] for name in names], None)
        return [layer | {"epsilon": module.eps}]
    if isinstance(module, Activation):
        return [_layer("activation", units, [], module)]
    raise ValueError(f"RTNeural has nothing for {module!r}")


def _recurrent_layers(module: Layer, weights: Mapping[str, Array]) -> list[dict[str, Any]]:
    is_known = isinstance(module, GRU) or (isinstance(module, LSTM) and not module.proj_size)
    # What PyTorch's cells cannot compute, RTNeural's cannot either.
    if not is_known or module.bidirectional or not module._architecture.trains:
        raise ValueError(f"RTNeural has nothing for {module!r}")
    cell = "LSTM" if isinstance(module, LSTM) else "GRU"
    zeros = np.zeros(len(KERAS_ORDER[cell]) * module.hidden_size)
    layers = []
    for i in range(module.num_layers):
        kernel, recurrent = (reorder_gates(weights[f"weight_{kind}_l{i}"], cell, 0).T for kind in ("ih", "hh"))
        biases = [reorder_gates(weights.get(f"bias_{kind}_l{i}", zeros), cell, 0) for kind in ("ih", "hh")]
        bias = sum(biases) if cell == "LSTM" else np.stack(biases)
        layers.append(_layer(cell.lower(), module.hidden_size, [kernel, recurrent, bias], None))
    return layers


def _layer(kind: str, units: int, arrays: list[Any], activation: Activation | None) -> dict[str, Any]:
    name = "" if activation is None or activation.name == "linear" else activation.name
    if name not in ("", *ACTIVATIONS) or (name == "elu" and activation is not None and activation.alpha != 1):
        raise ValueError(f"RTNeural has nothing for {activation!r}")
    weights = [array.tolist() for array in arrays]
    return {"type": kind, "activation": name, "shape": [None, None, units], "weights": weights}
