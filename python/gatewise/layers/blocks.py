"""The layers around recurrent layers in a model: embeddings, dense layers, normalisations, convolutions.

They are for inference only. Names, options, weights and equations are torch.nn's, or Keras's where PyTorch has no such
layer.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import MAX_SIZE, Array, flag, number, real_dtype, whole_number
from gatewise.layers.activation import Activation, Block, activation_of
from gatewise.layers.recurrent import Layer
from gatewise.running.network import LINEAR, History, Identity, LayerState, Node, Recurrent, Stage
from gatewise.running.network import Last as LastStage
from gatewise.weights.functions import Function

MERGES = {"concat": "concat", "sum": "add", "mul": "multiply", "ave": "average"}


def _dtype_name(dtype: np.dtype[Any] | None) -> str:
    assert dtype is not None
    return str(dtype.name)


def _uniform(seed: int | None, shapes: Mapping[str, tuple[int, ...]], inputs: int) -> dict[str, Array]:
    """Initial weights, uniform in +-1 / sqrt(inputs): PyTorch's distribution from NumPy's generator."""
    generator = np.random.default_rng(_seed(seed))
    bound = inputs**-0.5
    return {name: generator.uniform(-bound, bound, shape) for name, shape in shapes.items()}


def _normal(seed: int | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    generator = np.random.default_rng(_seed(seed))
    return {name: generator.standard_normal(shape) for name, shape in shapes.items()}


def _seed(seed: object) -> int:
    return secrets.randbits(63) if seed is None else whole_number("seed", seed, 0, 2**64 - 1)


# ---- products


class Dense(Block):
    """A fully connected layer: activation(x weight^T + bias), as torch.nn.Linear and its activation.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    activation : str or Activation
    dtype : "float32" or "float64"
    seed : int, optional
        The seed of the initial weights, weight (out_features, in_features) and bias (out_features,); None draws one.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, activation: str | Activation = "linear",
        dtype: object = "float32", seed: int | None = None,
    ) -> None:  # fmt: skip
        self.in_features: Final = whole_number("in_features", in_features, 1, MAX_SIZE)
        self.out_features: Final = whole_number("out_features", out_features, 1, MAX_SIZE)
        self.bias: Final = flag("bias", bias)
        self.activation: Final = activation_of(activation)
        shape = self.out_features, self.in_features
        stage = _Product(shape, self.bias, self.activation.function, real_dtype(dtype))
        self._start(stage, lambda: _uniform(seed, stage.shapes(), self.in_features))

    def _options(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features, "out_features": self.out_features, "bias": self.bias,
            "activation": self.activation, "dtype": _dtype_name(self._stage.dtype),
        }  # fmt: skip


class Conv1D(Block):
    """A convolution over time: activation(sum of weight[:, :, j] x[t - ...] + bias), as torch.nn.Conv1d.

    Sequences have their usual axes, (T, B, channels) or (B, T, channels). The output has as many steps as the input.

    Parameters
    ----------
    in_channels, out_channels, kernel_size : int
    dilation : int
        The distance in time between the inputs of one output.
    padding : "causal" or "same"
        causal: an output needs the inputs at its step and before it; zeros stand before the first input, and a stream
        keeps the last (kernel_size - 1) * dilation inputs. same: an output needs as many later inputs as earlier ones,
        or one more; such a layer streams in windows only.
    bias : bool
    activation : str or Activation
    dtype : "float32" or "float64"
    seed : int, optional
        The seed of the initial weights, weight (out_channels, in_channels, kernel_size) and bias (out_channels,).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, dilation: int = 1, padding: str = "causal",
        bias: bool = True, activation: str | Activation = "linear", dtype: object = "float32", seed: int | None = None,
    ) -> None:  # fmt: skip
        self.in_channels: Final = whole_number("in_channels", in_channels, 1, MAX_SIZE)
        self.out_channels: Final = whole_number("out_channels", out_channels, 1, MAX_SIZE)
        self.kernel_size: Final = whole_number("kernel_size", kernel_size, 1, 2**20)
        self.dilation: Final = whole_number("dilation", dilation, 1, 2**20)
        if not isinstance(padding, str) or padding not in ("causal", "same"):
            raise ValueError(f"padding: expected 'causal' or 'same', got {padding!r}")
        self.padding: Final = padding
        self.bias: Final = flag("bias", bias)
        self.activation: Final = activation_of(activation)
        shape = self.out_channels, self.in_channels, self.kernel_size
        stage = _Product(shape, self.bias, self.activation.function, real_dtype(dtype), self.dilation, padding)
        self._start(stage, lambda: _uniform(seed, stage.shapes(), self.in_channels * self.kernel_size))

    def _options(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels, "out_channels": self.out_channels, "kernel_size": self.kernel_size,
            "dilation": self.dilation, "padding": self.padding, "bias": self.bias, "activation": self.activation,
            "dtype": _dtype_name(self._stage.dtype),
        }  # fmt: skip


@dataclass(frozen=True)
class _Product(Stage):
    """A dense layer; with three axes a convolution, which is a dense layer over the inputs of all taps in a row."""

    shape: tuple[int, ...]  # (out, in) or (out, in, taps)
    bias: bool
    function: Function
    type: np.dtype[Any]
    dilation: int = 1
    padding: str = "causal"

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.type

    @property
    def taps(self) -> int:
        return self.shape[2] if len(self.shape) == 3 else 1

    @property
    def before(self) -> int:
        """How many steps before its own step an output needs."""
        reach = (self.taps - 1) * self.dilation
        return reach if self.padding == "causal" else reach // 2

    @property
    def needs_time(self) -> bool:  # type: ignore[override]
        return len(self.shape) == 3

    @property
    def streaming_obstacle(self) -> str | None:  # type: ignore[override]
        if self.before == (self.taps - 1) * self.dilation:
            return None
        return "expected padding='causal'; a convolution with padding='same' needs inputs that come later"

    @property
    def input_size(self) -> int:
        return self.shape[1]

    def output_size(self, units: int) -> int:
        return self.shape[0]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": self.shape} | ({"bias": (self.shape[0],)} if self.bias else {})

    def pack(self, arrays: Mapping[str, Array]) -> _core.RowWeights:
        weight = arrays["weight"]
        if weight.ndim == 3:
            weight = np.ascontiguousarray(weight.swapaxes(1, 2))  # [out, taps, in]
        return _core.RowWeights(
            "dense", self.type, self.taps * self.shape[1], self.shape[0], self.function, 0.0,
            [weight, arrays.get("bias")],
        )  # fmt: skip

    def nodes(self, packed: Any, units: int, dtype: np.dtype[Any]) -> list[Node]:
        if len(self.shape) == 2:
            return [("rows", packed)]
        return [("convolution", packed, self.taps, self.dilation, self.before)]

    @property
    def state(self) -> LayerState | None:
        if not self.needs_time or self.streaming_obstacle:
            return None
        return History(self.before, self.shape[1], self.type)


# ---- embeddings


class Embedding(Block):
    """A row of a table for each token, as torch.nn.Embedding. The first layer of a model that takes whole numbers.

    In a stream or a pool it merges with a recurrent layer after it: that layer's input products are made once for the
    whole table, and a step looks them up. This also serves a one-hot input, whose table is `numpy.eye(n)`.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Tokens are from 0 to num_embeddings - 1.
    mask_zero : bool
        Whether steps whose token is 0 are left out, as by `Masking`.
    dtype : "float32" or "float64"
    seed : int, optional
        The seed of the initial table, weight (num_embeddings, embedding_dim); None draws one.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, mask_zero: bool = False, dtype: object = "float32",
        seed: int | None = None,
    ) -> None:  # fmt: skip
        self.num_embeddings: Final = whole_number("num_embeddings", num_embeddings, 1, MAX_SIZE)
        self.embedding_dim: Final = whole_number("embedding_dim", embedding_dim, 1, MAX_SIZE)
        self.mask_zero: Final = flag("mask_zero", mask_zero)
        stage = _Lookup(self.num_embeddings, self.embedding_dim, real_dtype(dtype), 0.0 if self.mask_zero else None)
        self._start(stage, lambda: _normal(seed, stage.shapes()))

    def _options(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "mask_zero": self.mask_zero,
            "dtype": _dtype_name(self._stage.dtype),
        }  # fmt: skip


@dataclass(frozen=True)
class _Lookup(Stage):
    rows: int
    units: int
    type: np.dtype[Any]
    masked: float | None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.type

    @property
    def input_size(self) -> int:
        return self.units  # of a row of the table

    @property
    def vocabulary(self) -> int:
        return self.rows

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.rows, self.units)}

    def pack(self, arrays: Mapping[str, Array]) -> _core.Table:
        return _core.Table(arrays["weight"])

    def nodes(self, packed: Any, units: int, dtype: np.dtype[Any]) -> list[Node]:
        return [*([] if self.masked is None else [("mask", self.rows, self.masked)]), ("lookup", packed)]


# ---- normalisations


class LayerNorm(Block):
    """Layer normalisation (Ba et al. 2016) over the units of a row, as torch.nn.LayerNorm.

    Parameters
    ----------
    normalized_shape : int
        The units of a row.
    eps : float
        A number that is added to the variance.
    elementwise_affine, bias : bool
        Whether there are a weight and, with it, a bias.
    dtype : "float32" or "float64"
    """

    def __init__(
        self, normalized_shape: int, *, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True,
        dtype: object = "float32",
    ) -> None:  # fmt: skip
        self.normalized_shape: Final = whole_number("normalized_shape", normalized_shape, 1, MAX_SIZE)
        self.eps: Final = number("eps", eps, least=0.0)
        self.elementwise_affine: Final = flag("elementwise_affine", elementwise_affine)
        self.bias: Final = flag("bias", bias)
        names = ("weight", "bias")[: 1 + self.bias] if self.elementwise_affine else ()
        stage = _Normalize("layer_norm", self.normalized_shape, names, self.eps, real_dtype(dtype))
        self._start(stage, lambda: _identity(stage))

    def _options(self) -> dict[str, Any]:
        return {
            "normalized_shape": self.normalized_shape, "eps": self.eps,
            "elementwise_affine": self.elementwise_affine, "bias": self.bias, "dtype": _dtype_name(self._stage.dtype),
        }  # fmt: skip


class BatchNorm(Block):
    """Batch normalisation (Ioffe and Szegedy 2015) with the statistics of training, as torch.nn.BatchNorm1d in eval.

        y = (x - running_mean) / sqrt(running_var + eps) * weight + bias

    Parameters
    ----------
    num_features : int
    eps : float
    affine : bool
        Whether there are weight and bias.
    dtype : "float32" or "float64"
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, affine: bool = True, dtype: object = "float32") -> None:
        self.num_features: Final = whole_number("num_features", num_features, 1, MAX_SIZE)
        self.eps: Final = number("eps", eps, least=0.0)
        self.affine: Final = flag("affine", affine)
        names = (*(("weight", "bias") if self.affine else ()), "running_mean", "running_var")
        stage = _Normalize("batch_norm", self.num_features, names, self.eps, real_dtype(dtype))
        self._start(stage, lambda: _identity(stage))

    def _options(self) -> dict[str, Any]:
        return {
            "num_features": self.num_features, "eps": self.eps, "affine": self.affine,
            "dtype": _dtype_name(self._stage.dtype),
        }  # fmt: skip


class Normalization(Block):
    """A shift and a scale that are known before training: (x - mean) / max(sqrt(variance), 1e-7), as Keras has it.

    Parameters
    ----------
    num_features : int
    dtype : "float32" or "float64"
    """

    def __init__(self, num_features: int, *, dtype: object = "float32") -> None:
        self.num_features: Final = whole_number("num_features", num_features, 1, MAX_SIZE)
        stage = _Normalize("normalization", self.num_features, ("mean", "variance"), 1e-7, real_dtype(dtype))
        self._start(stage, lambda: _identity(stage))

    def _options(self) -> dict[str, Any]:
        return {"num_features": self.num_features, "dtype": _dtype_name(self._stage.dtype)}


@dataclass(frozen=True)
class _Normalize(Stage):
    kind: str
    units: int
    names: tuple[str, ...]
    epsilon: float
    type: np.dtype[Any]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.type

    @property
    def input_size(self) -> int:
        return self.units

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.names, (self.units,))

    def nodes(self, packed: Any, units: int, dtype: np.dtype[Any]) -> list[Node]:
        # A layer without weights has not been packed.
        return [("rows", self.pack({}) if packed is None else packed)]

    def pack(self, arrays: Mapping[str, Array]) -> _core.RowWeights:
        if self.kind == "layer_norm":
            values = [arrays.get("weight"), arrays.get("bias")]
            return _core.RowWeights("layer_norm", self.type, self.units, self.units, LINEAR, self.epsilon, values)
        wide = {name: array.astype(np.float64) for name, array in arrays.items()}  # rounded once, at the end
        with np.errstate(all="ignore"):
            if self.kind == "normalization":
                mean, shift = wide["mean"], np.zeros(self.units)
                scale = 1 / np.maximum(np.sqrt(wide["variance"]), self.epsilon)
            else:
                mean, shift = wide["running_mean"], wide.get("bias", np.zeros(self.units))
                scale = wide.get("weight", np.ones(self.units)) / np.sqrt(wide["running_var"] + self.epsilon)
            weights = [value.astype(self.type) for value in (mean, scale, shift)]
        return _core.RowWeights("normalize", self.type, self.units, self.units, LINEAR, 0.0, weights)


def _identity(stage: _Normalize) -> dict[str, Array]:
    """Weights with which the layer only normalises."""
    ones = ("weight", "running_var", "variance")
    return {name: np.ones(stage.units) if name in ones else np.zeros(stage.units) for name in stage.names}


# ---- layers without weights


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
