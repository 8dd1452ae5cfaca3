"""The activations of Keras, as layers and as options of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from gatewise.formats.keras.config import LayerConfig
from gatewise.layers.activation import Activation
from gatewise.weights.functions import Function

FUNCTIONS = (
    "linear",
    "relu",
    "tanh",
    "sigmoid",
    "softmax",
    "hard_sigmoid",
    "elu",
    "selu",
    "leaky_relu",
    "gelu",
    "silu",
    "swish",
    "softplus",
    "softsign",
)


def activation(layer: LayerConfig, option: str = "activation") -> Activation:
    """The activation that an option names, or that is a layer in it."""
    value = layer.config.get(option)
    if isinstance(value, Mapping):
        inner = layer.inner(option)
        if inner.kind not in ACTIVATION_LAYERS:
            raise layer.error(option, f"a function or {', '.join(sorted(ACTIVATION_LAYERS))}", inner.kind)
        return ACTIVATION_LAYERS[inner.kind](replace(inner, name=layer.name))
    if value == "leaky_relu":
        return Activation("leaky_relu", 0.2)
    # Before Keras 3 its line was 0.2 * x + 0.5; since then it is gatewise's, x / 6 + 0.5.
    if value == "hard_sigmoid" and layer.is_modern is None:
        raise layer.error(option, "a configuration that tells its version of Keras, on which the slope depends", value)
    if value == "hard_sigmoid" and not layer.is_modern:
        return Activation("hard_sigmoid", 0.2, 0.5)
    if value is not None and value not in FUNCTIONS:
        raise layer.error(option, f"one of {', '.join(FUNCTIONS)}", value)
    return Activation("silu" if value == "swish" else value or "linear")


def unit_function(layer: LayerConfig, option: str) -> Function:
    """The function of single units that an option of a recurrent layer names."""
    function = activation(layer, option).function
    if function.name == "softmax":
        raise layer.error(option, "a function of one unit", "softmax")
    return function


def _relu(layer: LayerConfig) -> Activation:
    layer.expect("max_value", None)
    slope = layer.number("negative_slope", 0.0) if layer.config.get("negative_slope") is not None else 0.0
    threshold = layer.number("threshold", 0.0)
    if threshold and slope:
        raise layer.error("threshold", "0 beside a negative_slope", threshold)
    if threshold:
        return Activation("thresholded_relu", threshold)
    return Activation("leaky_relu", slope) if slope else Activation("relu")


def _leaky_relu(layer: LayerConfig) -> Activation:
    option = "negative_slope" if "negative_slope" in layer.config else "alpha"
    return Activation("leaky_relu", layer.number(option, 0.3))


def _softmax(layer: LayerConfig) -> Activation:
    layer.check_axis(None)
    return Activation("softmax")


ACTIVATION_LAYERS: dict[str, Callable[[LayerConfig], Activation]] = {
    "Activation": activation,
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "ThresholdedReLU": lambda layer: Activation("thresholded_relu", layer.number("theta", 1.0)),
    "ELU": lambda layer: Activation("elu", layer.number("alpha", 1.0)),
    "Softmax": _softmax,
}
