"""Normalisations: LayerNorm, BatchNorm, Normalization. They are for inference only.

Names, options, weights and equations are torch.nn's; those of Normalization are Keras's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import MAX_SIZE, Array, flag, number, real_dtype, whole_number
from gatewise.layers.block import Block
from gatewise.running.network import LINEAR, Node, Stage


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
        self,
        normalized_shape: int,
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dtype: object = "float32",
    ) -> None:
        self.normalized_shape: Final = whole_number("normalized_shape", normalized_shape, 1, MAX_SIZE)
        self.eps: Final = number("eps", eps, least=0.0)
        self.elementwise_affine: Final = flag("elementwise_affine", elementwise_affine)
        self.bias: Final = flag("bias", bias)
        names = ("weight", "bias")[: 1 + self.bias] if self.elementwise_affine else ()
        stage = _Normalize("layer_norm", self.normalized_shape, names, self.eps, real_dtype(dtype))
        self._start(stage, lambda: _identity(stage))

    def _options(self) -> dict[str, Any]:
        return {
            "normalized_shape": self.normalized_shape,
            "eps": self.eps,
            "elementwise_affine": self.elementwise_affine,
            "bias": self.bias,
            "dtype": self._dtype_name,
        }


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
            "num_features": self.num_features,
            "eps": self.eps,
            "affine": self.affine,
            "dtype": self._dtype_name,
        }


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
        return {"num_features": self.num_features, "dtype": self._dtype_name}


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
