"""The layers of Keras that are not recurrent, and which layers there are at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gatewise.arguments.arrays import Array
from gatewise.formats.keras.activations import ACTIVATION_LAYERS, activation
from gatewise.formats.keras.builder import MAX_REPEATED, Builder, Mask
from gatewise.formats.keras.config import LayerConfig, as_list, single
from gatewise.formats.keras.recurrent import add_bidirectional, add_recurrent, add_rnn
from gatewise.formats.keras.weights import WeightReader, slots_of
from gatewise.layers.normalization import BatchNorm, LayerNorm, Normalization
from gatewise.layers.products import Conv1D, Dense, Embedding
from gatewise.layers.sequential import Sequential
from gatewise.layers.structure import Masking


def check_kinds(layers: Sequence[LayerConfig]) -> None:
    """Refuse layers that this reader does not know, before anything else is asked of them."""
    for layer in layers:
        if layer.kind not in BUILDERS:
            raise layer.refusal(REFUSED.get(layer.kind, "expected a layer that gatewise has"))
        layer.check_options()


def build(layers: Sequence[LayerConfig], weights: WeightReader) -> Sequential:
    """Make a model of these layers, which `check_kinds` has seen."""
    builder = Builder(weights)
    for layer in layers:
        builder.start(layer)
        try:
            BUILDERS[layer.kind](builder, layer)
        except ValueError as error:
            raise error if str(error).startswith("layer ") else layer.refusal(str(error)) from None
    if builder.mask is Mask.PENDING and not builder.drop_mask():
        raise ValueError("Masking: expected a recurrent layer after it, or mask_value=0")
    if not builder.layers:
        raise ValueError("expected a model of at least one layer, got one that does nothing")
    _check_policies(builder)
    return Sequential(builder.layers, batch_first=True)


def _check_policies(builder: Builder) -> None:
    """Refuse layers, also those without weights, that compute in another dtype than that of the weights."""
    allowed = (None, builder.weights.dtype)
    has_tokens = isinstance(builder.layers[0], Embedding)
    for layer, policy in builder.policies:
        # The input may be of the other width, which the first layer converts, or of tokens before an Embedding.
        is_input = layer.kind == "InputLayer" and isinstance(policy, str)
        if is_input and (policy in ("float32", "float64") or ("int" in str(policy) and has_tokens)):
            continue
        if policy not in allowed:
            raise layer.error("dtype", f"{builder.weights.dtype!r}, as the model's weights are", policy)


# ---- layers with weights


def _embedding(builder: Builder, layer: LayerConfig) -> None:
    masks = layer.flag("mask_zero", False)
    sizes = layer.size("input_dim"), layer.size("output_dim")
    if builder.layers:
        raise layer.refusal("expected it as the first layer")
    table = builder.read(layer, "embeddings", *sizes)
    builder.add(Embedding(*sizes, mask_zero=masks, dtype=table.dtype, seed=0), {"weight": table}, sizes[1])
    builder.rank = None if builder.rank is None else builder.rank + 1
    builder.mask = Mask.PENDING if masks else Mask.NONE


def _dense(builder: Builder, layer: LayerConfig) -> None:
    units = layer.size("units")
    kernel = builder.read(layer, "kernel", builder.units, units)
    bias = {"bias": builder.read(layer, "bias", units)} if layer.flag("use_bias", True) else {}
    options: dict[str, Any] = {"bias": bool(bias), "activation": activation(layer), "dtype": kernel.dtype, "seed": 0}
    builder.add(Dense(kernel.shape[0], units, **options), {"weight": kernel.T, **bias}, units)


def _convolution(builder: Builder, layer: LayerConfig) -> None:
    builder.expect_sequences(layer)
    builder.end_mask(layer)
    units, taps = layer.size("filters"), layer.size("kernel_size")
    padding = layer.expect("padding", "causal", "same", *(("valid",) if taps == 1 else ()))
    for option in ("strides", "groups"):
        if single(layer.config.get(option, 1)) != 1:
            raise layer.error(option, "1", layer.config.get(option))
    layer.expect("data_format", "channels_last", default="channels_last")
    dilation = layer.whole_number("dilation_rate", single(layer.config.get("dilation_rate", 1)))
    kernel = builder.read(layer, "kernel", taps, builder.units, units)
    bias = {"bias": builder.read(layer, "bias", units)} if layer.flag("use_bias", True) else {}
    options: dict[str, Any] = {"bias": bool(bias), "activation": activation(layer), "dtype": kernel.dtype, "seed": 0}
    padding = "causal" if padding == "valid" else padding
    convolution = Conv1D(kernel.shape[1], units, taps, dilation=dilation, padding=padding, **options)
    builder.add(convolution, {"weight": kernel.transpose(2, 1, 0), **bias}, units)


def _layer_norm(builder: Builder, layer: LayerConfig) -> None:
    layer.check_axis(builder.rank)
    layer.expect_off("rms_scaling")
    arrays = _read_present(builder, layer, {"weight": "gamma", "bias": "beta"})
    units, dtype = _units_and_dtype(builder, layer, arrays)
    if arrays:
        arrays.setdefault("weight", np.ones(units, dtype))
    options: dict[str, Any] = {"elementwise_affine": bool(arrays), "bias": "bias" in arrays, "dtype": dtype}
    builder.add(LayerNorm(units, eps=layer.number("epsilon", 1e-3), **options), arrays, units)


def _batch_norm(builder: Builder, layer: LayerConfig) -> None:
    layer.check_axis(builder.rank)
    layer.expect_off("renorm")
    affine = _read_present(builder, layer, {"weight": "gamma", "bias": "beta"})
    arrays = affine | _read_present(builder, layer, {"running_mean": "moving_mean", "running_var": "moving_variance"})
    units, dtype = _units_and_dtype(builder, layer, arrays)
    if affine:
        arrays = {"weight": np.ones(units, dtype), "bias": np.zeros(units, dtype)} | arrays
    builder.add(BatchNorm(units, eps=layer.number("epsilon", 1e-3), affine=bool(affine), dtype=dtype), arrays, units)


def _normalization(builder: Builder, layer: LayerConfig) -> None:
    layer.check_axis(builder.rank)
    layer.expect_off("invert")
    if not layer.is_modern:
        builder.end_mask(layer)
    if slots_of(layer):
        arrays = _read_present(builder, layer, {"mean": "mean", "variance": "variance"})
    else:
        arrays = {name: _numbers_in_config(builder, layer, name) for name in ("mean", "variance")}
    units, dtype = _units_and_dtype(builder, layer, arrays)
    builder.add(Normalization(units, dtype=dtype), arrays, units)


def _read_present(builder: Builder, layer: LayerConfig, names: Mapping[str, str]) -> dict[str, Array]:
    """Those of some weights [units] that a layer has, by gatewise's names."""
    present = {slot.key for slot in slots_of(layer)}
    return {name: builder.read(layer, key, builder.units) for name, key in names.items() if key in present}


def _units_and_dtype(builder: Builder, layer: LayerConfig, arrays: Mapping[str, Array]) -> tuple[int, np.dtype[Any]]:
    """What the weights [units] of a layer and the layer before it have in common."""
    sizes = {array.shape[0] for array in arrays.values()} | ({builder.units} if builder.units else set())
    if len(sizes) != 1:
        raise layer.refusal(f"expected weights of one size, got {sorted(sizes)}")
    dtypes = [array.dtype for array in arrays.values()]
    return sizes.pop(), dtypes[0] if dtypes else np.dtype(builder.weights.dtype)


def _numbers_in_config(builder: Builder, layer: LayerConfig, option: str) -> Array:
    """The number of each unit, [units], where the configuration itself holds them, or one for all."""
    try:
        array = np.array(layer.config.get(option), builder.weights.dtype).reshape(-1)
    except (ValueError, TypeError, OverflowError):
        raise layer.error(option, "numbers", layer.config.get(option)) from None
    if array.size != 1 or not builder.units:
        return array
    builder.copies_left -= builder.units
    if builder.copies_left < 0:
        raise layer.error(option, f"one number for at most {MAX_REPEATED} units of all layers", builder.units)
    return np.repeat(array, builder.units)


def _time_distributed(builder: Builder, layer: LayerConfig) -> None:
    inner = layer.inner("layer")
    if inner.kind not in ROWWISE:
        raise layer.refusal(f"layer: expected one of {', '.join(sorted(ROWWISE))}, got {inner.kind!r}")
    builder.expect_sequences(layer)
    builder.policies.append((inner, inner.policy()))
    builder.rank = 2
    BUILDERS[inner.kind](builder, replace(inner, key_prefix="layer/"))
    builder.rank = 3


# ---- layers without weights


def _ignore(builder: Builder, layer: LayerConfig) -> None:
    """Add nothing for a layer that does nothing in inference."""


def _masking(builder: Builder, layer: LayerConfig) -> None:
    builder.expect_sequences(layer)
    if builder.layers:
        raise layer.refusal("expected it as the first layer")
    builder.add(Masking(layer.number("mask_value", 0.0)))
    builder.mask = Mask.PENDING


def _activation(builder: Builder, layer: LayerConfig) -> None:
    if layer.kind == "Softmax":
        layer.check_axis(builder.rank)
        if builder.mask is not Mask.NONE:
            raise layer.refusal("expected no masked steps before it, which a Softmax of Keras treats differently")
        layer = replace(layer, config={**layer.config, "axis": -1})
    module = ACTIVATION_LAYERS[layer.kind](layer)
    if module.name != "linear":
        builder.add(module)


def _reshape(builder: Builder, layer: LayerConfig) -> None:
    """Add nothing for a Flatten or Reshape that keeps the shape; refuse all others."""
    if layer.kind == "Flatten":
        if builder.rank != 2:
            raise layer.refusal("expected one step before it (return_sequences=False), got sequences")
        return
    target = as_list(layer.config.get("target_shape"))
    if builder.rank != 2 or target is None or list(target) not in ([builder.units], [-1]):
        raise layer.error("target_shape", f"the shape before it, [{builder.units}] of one step", target)


# ---- which layers there are

IGNORED = (
    "InputLayer",
    "Dropout",
    "SpatialDropout1D",
    "GaussianNoise",
    "GaussianDropout",
    "AlphaDropout",
    "ActivityRegularization",
)
REFUSED = {
    "Lambda": "expected a layer of Keras without code of its own; nothing in a file is executed",
}
BUILDERS: dict[str, Callable[[Builder, LayerConfig], None]] = {
    **dict.fromkeys(IGNORED, _ignore),
    **dict.fromkeys(ACTIVATION_LAYERS, _activation),
    "Masking": _masking,
    "Embedding": _embedding,
    "Dense": _dense,
    "Conv1D": _convolution,
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "Normalization": _normalization,
    "TimeDistributed": _time_distributed,
    "Flatten": _reshape,
    "Reshape": _reshape,
    "LSTM": add_recurrent,
    "GRU": add_recurrent,
    "SimpleRNN": add_recurrent,
    "CuDNNLSTM": add_recurrent,
    "CuDNNGRU": add_recurrent,
    "RNN": add_rnn,
    "Bidirectional": add_bidirectional,
}
# Layers that may be inside a TimeDistributed: those that treat each step by itself.
ROWWISE = {
    "Dense",
    "LayerNormalization",
    "BatchNormalization",
    "Normalization",
    "Dropout",
    "Flatten",
    "Reshape",
    *ACTIVATION_LAYERS,
}
