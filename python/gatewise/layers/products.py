"""Layers with matrices or tables: Dense, Conv1D, Embedding. They are for inference only.

Names, options, weights and equations are torch.nn's.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import MAX_SIZE, Array, flag, real_dtype, whole_number
from gatewise.layers.activation import Activation, activation_of
from gatewise.layers.block import Block
from gatewise.running.network import History, LayerState, Node, Stage
from gatewise.weights.functions import Function


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
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: str | Activation = "linear",
        dtype: object = "float32",
        seed: int | None = None,
    ) -> None:
        self.in_features: Final = whole_number("in_features", in_features, 1, MAX_SIZE)
        self.out_features: Final = whole_number("out_features", out_features, 1, MAX_SIZE)
        self.bias: Final = flag("bias", bias)
        self.activation: Final = activation_of(activation)
        shape = self.out_features, self.in_features
        stage = _Product(shape, self.bias, self.activation.function, real_dtype(dtype))
        self._start(stage, lambda: _uniform(seed, stage.shapes(), self.in_features))

    def _options(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "activation": self.activation,
            "dtype": self._dtype_name,
        }


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
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        dilation: int = 1,
        padding: str = "causal",
        bias: bool = True,
        activation: str | Activation = "linear",
        dtype: object = "float32",
        seed: int | None = None,
    ) -> None:
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
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "padding": self.padding,
            "bias": self.bias,
            "activation": self.activation,
            "dtype": self._dtype_name,
        }


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
            "dense",
            self.type,
            self.taps * self.shape[1],
            self.shape[0],
            self.function,
            0.0,
            [weight, arrays.get("bias")],
        )

    def nodes(self, packed: Any, units: int, dtype: np.dtype[Any]) -> list[Node]:
        if len(self.shape) == 2:
            return [("rows", packed)]
        return [("convolution", packed, self.taps, self.dilation, self.before)]

    @property
    def state(self) -> LayerState | None:
        if not self.needs_time or self.streaming_obstacle:
            return None
        return History(self.before, self.shape[1], self.type)


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
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mask_zero: bool = False,
        dtype: object = "float32",
        seed: int | None = None,
    ) -> None:
        self.num_embeddings: Final = whole_number("num_embeddings", num_embeddings, 1, MAX_SIZE)
        self.embedding_dim: Final = whole_number("embedding_dim", embedding_dim, 1, MAX_SIZE)
        self.mask_zero: Final = flag("mask_zero", mask_zero)
        stage = _Lookup(self.num_embeddings, self.embedding_dim, real_dtype(dtype), 0.0 if self.mask_zero else None)
        self._start(stage, lambda: _normal(seed, stage.shapes()))

    def _options(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "mask_zero": self.mask_zero,
            "dtype": self._dtype_name,
        }


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
