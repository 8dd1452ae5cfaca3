"""Models in RTNeural's JSON (https://github.com/jatinchowdhury18/RTNeural), for audio plug-ins in C++.

Weights lie as Keras has them: kernels (inputs, gates * units), gates of an LSTM i f c o with one bias, those of a GRU
z r h with two biases; convolutions (taps, inputs, outputs), causal.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gatewise.arguments.arrays import MAX_SIZE, Array, number, shaped, whole_number
from gatewise.formats import json_text
from gatewise.formats.errors import reading
from gatewise.formats.safetensors import write_pieces
from gatewise.layers import blocks
from gatewise.layers.activation import Activation
from gatewise.layers.recurrent import GRU, LSTM, Layer
from gatewise.layers.sequential import Sequential
from gatewise.weights.module import Module
from gatewise.weights.parameters import Packable

ACTIVATIONS = ("tanh", "relu", "sigmoid", "softmax", "elu")
MOST_BYTES = 2**30  # of a file
# What AIDA-X reads besides: whether the input is added to the output, and gains in decibels.
PLAYER_OPTIONS: dict[str, object] = {"in_skip": 0, "in_gain": 0, "out_gain": 0}
# Options of Keras's layers that RTNeural does not look at, with the one value that it computes.
LAYER_OPTIONS: dict[str, object] = {
    "strides": 1, "groups": 1, "padding": "causal", "recurrent_activation": "sigmoid", "reset_after": True,
    "go_backwards": False, "return_state": False, "bidirectional": False,
}  # fmt: skip


def load(path: str | os.PathLike[str]) -> Sequential:
    """Read a model of RTNeural: lstm, gru, dense, time-distributed-dense, conv1d, batchnorm, activation."""
    with reading(path):
        there = os.stat(path)
        if not stat.S_ISREG(there.st_mode) or there.st_size > MOST_BYTES:
            raise ValueError(f"expected a file of at most {MOST_BYTES} bytes")
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
        model = json_text.parse(text)
        units = _size("in_shape", _entry(model, "in_shape"))
        _check_options(model, PLAYER_OPTIONS)
        made: list[Module] = []
        layers = _entry(model, "layers")
        if not isinstance(layers, list):
            raise TypeError(f"layers: expected a list, got {type(layers).__name__}")
        for i, layer in enumerate(layers):
            try:
                made += _layers(layer, units)
                units = _size("shape", _entry(layer, "shape"))
            except (ValueError, TypeError) as error:
                raise ValueError(f"layers[{i}]: {error}") from None
        return Sequential(made)


def _entry(where: Any, name: str) -> Any:
    if not isinstance(where, dict) or name not in where:
        raise ValueError(f"expected an object with {name!r}")
    return where[name]


def _check_options(where: Mapping[str, Any], options: Mapping[str, object]) -> None:
    """Refuse options that would change the numbers; what is missing, or null, is what RTNeural computes."""
    for name, expected in options.items():
        value = where.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None and value != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {str(value)[:100]}")


def _size(name: str, shape: Any) -> int:
    """The last of a shape's sizes."""
    last = shape[-1] if isinstance(shape, list) and shape else shape
    if isinstance(shape, list) and len(shape) > 3:
        raise ValueError(f"{name}: expected batch, steps and units at most, got {str(shape)[:100]}")
    return whole_number(name, last, 1, MAX_SIZE)


def _layers(layer: Any, inputs: int) -> list[Module]:
    kind, units = _entry(layer, "type"), _size("shape", _entry(layer, "shape"))
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(f"type: expected {', '.join(READERS)}, got {str(kind)[:100]!r}")
    _check_options(layer, LAYER_OPTIONS)
    return READERS[kind](layer, inputs, units)


def _weights(layer: Any, *shapes: tuple[int, ...]) -> list[Array]:
    given = _entry(layer, "weights")
    if not isinstance(given, list) or len(given) != len(shapes):
        raise ValueError(
            f"weights: expected {len(shapes)} arrays, got {len(given) if isinstance(given, list) else given}"
        )
    arrays = []
    for i, (one, shape) in enumerate(zip(given, shapes, strict=True)):
        try:
            with np.errstate(over="ignore"):
                array = np.array(one, np.float64).astype(np.float32)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"weights[{i}]: expected numbers of shape {shape}") from None
        if not np.isfinite(array).all():
            raise ValueError(f"weights[{i}]: expected finite numbers")
        arrays.append(shaped(f"weights[{i}]", array, shape))
    return arrays


def _with(kind: type[Module], arrays: Mapping[str, Array], **options: Any) -> Module:
    def source(of: Packable[Any]) -> dict[str, Array]:
        return {name: np.ascontiguousarray(shaped(name, arrays[name], shape)) for name, shape in of.shapes().items()}

    return kind._from(source, options)


def _reordered(array: Array, order: tuple[int, ...], axis: int) -> Array:
    """Its gates in another order."""
    gates = np.split(array, len(order), axis)
    return np.concatenate([gates[i] for i in order], axis)


# ---- reading


def _lstm(layer: Any, inputs: int, units: int) -> list[Module]:
    _check_activation(layer, "tanh")
    kernel, recurrent, bias = _weights(layer, (inputs, 4 * units), (units, 4 * units), (4 * units,))
    arrays = {
        "weight_ih_l0": kernel.T,
        "weight_hh_l0": recurrent.T,
        "bias_ih_l0": bias,
        "bias_hh_l0": np.zeros_like(bias),
    }
    return [_with(LSTM, arrays, input_size=inputs, hidden_size=units)]


def _gru(layer: Any, inputs: int, units: int) -> list[Module]:
    _check_activation(layer, "tanh")
    kernel, recurrent, bias = _weights(layer, (inputs, 3 * units), (units, 3 * units), (2, 3 * units))
    order = 1, 0, 2  # z r h -> r z n
    arrays = {
        "weight_ih_l0": _reordered(kernel.T, order, 0), "weight_hh_l0": _reordered(recurrent.T, order, 0),
        "bias_ih_l0": _reordered(bias[0], order, 0), "bias_hh_l0": _reordered(bias[1], order, 0),
    }  # fmt: skip
    return [_with(GRU, arrays, input_size=inputs, hidden_size=units)]


def _dense(layer: Any, inputs: int, units: int) -> list[Module]:
    weights = _entry(layer, "weights")
    bias = isinstance(weights, list) and len(weights) == 2
    arrays = _weights(layer, (inputs, units), *[(units,)] * bias)
    named = dict(zip(("weight", "bias"), (arrays[0].T, *arrays[1:]), strict=False))
    activation = _activation(layer)
    return [_with(blocks.Dense, named, in_features=inputs, out_features=units, bias=bias, activation=activation)]


def _convolution(layer: Any, inputs: int, units: int) -> list[Module]:
    taps, dilation = _size("kernel_size", _entry(layer, "kernel_size")), _size("dilation", _entry(layer, "dilation"))
    kernel, bias = _weights(layer, (taps, inputs, units), (units,))
    arrays = {"weight": kernel.transpose(2, 1, 0), "bias": bias}
    return [
        _with(
            blocks.Conv1D, arrays, in_channels=inputs, out_channels=units, kernel_size=taps, dilation=dilation,
            activation=_activation(layer),
        )
    ]  # fmt: skip


def _batch_norm(layer: Any, inputs: int, units: int) -> list[Module]:
    _check_activation(layer)
    weights = _entry(layer, "weights")
    affine = isinstance(weights, list) and len(weights) == 4
    arrays = _weights(layer, *[(units,)] * (4 if affine else 2))
    names = ("weight", "bias", "running_mean", "running_var")[0 if affine else 2 :]
    epsilon = number("epsilon", _entry(layer, "epsilon"), 0)
    named = dict(zip(names, arrays, strict=True))
    return [_with(blocks.BatchNorm, named, num_features=units, eps=epsilon, affine=affine)]


def _activate(layer: Any, inputs: int, units: int) -> list[Module]:
    return [Activation(_activation(layer))]


def _check_activation(layer: Any, *computed: str) -> None:
    """Refuse an activation that RTNeural's layer of this kind does not compute, though the file asks for it."""
    name = layer.get("activation", "")
    if name not in ("", *computed):
        raise ValueError(f"activation: expected {' or '.join((*computed, 'nothing'))}, got {str(name)[:100]!r}")


def _activation(layer: Any) -> str:
    name = layer.get("activation", "")
    if name not in ("", *ACTIVATIONS):
        raise ValueError(f"activation: expected {', '.join(ACTIVATIONS)} or nothing, got {str(name)[:100]!r}")
    return name or "linear"


READERS: dict[str, Callable[[Any, int, int], list[Module]]] = {
    "lstm": _lstm, "gru": _gru, "dense": _dense, "time-distributed-dense": _dense, "conv1d": _convolution,
    "batchnorm": _batch_norm, "activation": _activate,
}  # fmt: skip


# ---- writing


def save(model: Module | Sequential, path: str | os.PathLike[str]) -> None:
    """Write a model for RTNeural: LSTM, GRU, Dense, causal Conv1D, BatchNorm, Activation; stacks become layers."""
    layers: list[dict[str, Any]] = []
    whole: Any = model if isinstance(model, Sequential) else Sequential([model])
    first = whole._chain
    if first.vocabulary is not None:
        raise ValueError("model: layers[0]: RTNeural has no embedding")
    for i, (module, units) in enumerate(zip(whole, first.sizes, strict=False)):
        while isinstance(module, blocks.TimeDistributed):
            module = module.layer
        try:
            layers += _written(module, units)
        except ValueError as error:
            raise ValueError(f"model: layers[{i}]: {error}") from None
    text = json.dumps({"in_shape": [None, None, first.sizes[0]], "layers": layers})
    write_pieces(os.fsdecode(path), [text.encode()])


def _written(module: Any, units: int) -> list[dict[str, Any]]:
    weights = {name: array.astype(np.float64) for name, array in module.state_dict().items()}
    if isinstance(module, Layer):
        return _written_recurrent(module, weights)
    if isinstance(module, blocks.Dropout):
        return []
    if isinstance(module, blocks.Dense):
        arrays = [weights["weight"].T, weights.get("bias", np.zeros(module.out_features))]
        return [_layer("dense", module.out_features, arrays, module.activation)]
    if isinstance(module, blocks.Conv1D) and (module.padding == "causal" or module.kernel_size == 1):
        arrays = [weights["weight"].transpose(2, 1, 0), weights.get("bias", np.zeros(module.out_channels))]
        options = {"kernel_size": [module.kernel_size], "dilation": [module.dilation], "groups": 1}
        return [_layer("conv1d", module.out_channels, arrays, module.activation) | options]
    if isinstance(module, blocks.BatchNorm):
        names = ("weight", "bias", "running_mean", "running_var")[0 if module.affine else 2 :]
        layer = _layer("batchnorm", module.num_features, [weights[name] for name in names], None)
        return [layer | {"epsilon": module.eps}]
    if isinstance(module, Activation):
        return [_layer("activation", units, [], module)]
    raise ValueError(f"RTNeural has nothing for {module!r}")


def _written_recurrent(module: Layer, weights: Mapping[str, Array]) -> list[dict[str, Any]]:
    is_lstm = isinstance(module, LSTM)
    if (
        module.bidirectional
        or not (is_lstm or isinstance(module, GRU))
        or (isinstance(module, LSTM) and module.proj_size)
    ):
        raise ValueError(f"RTNeural has nothing for {module!r}")
    if not module._architecture.trains:  # what is not PyTorch's cell
        raise ValueError(f"RTNeural has nothing for {module!r}")
    order = (0, 1, 2, 3) if is_lstm else (1, 0, 2)  # r z n -> z r h
    layers = []
    for i in range(module.num_layers):
        kernel, recurrent = (_reordered(weights[f"weight_{kind}_l{i}"], order, 0).T for kind in ("ih", "hh"))
        none = np.zeros(len(order) * module.hidden_size)
        biases = [_reordered(weights.get(f"bias_{kind}_l{i}", none), order, 0) for kind in ("ih", "hh")]
        bias = biases[0] + biases[1] if is_lstm else np.stack(biases)
        layers.append(_layer("lstm" if is_lstm else "gru", module.hidden_size, [kernel, recurrent, bias], None))
    return layers


def _layer(kind: str, units: int, arrays: list[Array], activation: Activation | None) -> dict[str, Any]:
    name = "" if activation is None or activation.name == "linear" else activation.name
    if name not in ("", *ACTIVATIONS) or (name == "elu" and activation is not None and activation.alpha != 1):
        raise ValueError(f"RTNeural has nothing for {activation!r}")
    weights = [array.tolist() for array in arrays]
    return {"type": kind, "activation": name, "shape": [None, None, units], "weights": weights}
