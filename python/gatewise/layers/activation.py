"""Functions of every unit as layers, which recurrent layers also take as options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gatewise.layers.block import Block
from gatewise.running.network import Node, Stage, rows
from gatewise.weights.functions import Function, function_of


class Activation(Block):
    """A function of every unit; softmax: of every row.

    Parameters
    ----------
    name : str
        linear, relu, leaky_relu, elu, selu, tanh, sigmoid, softmax, softplus, softsign, silu or gelu (the exact one),
        with torch.nn.functional's equations; and with alpha = a and beta = b

            affine            a x + b                              1 and 0 by default
            scaled_tanh       a tanh(b x)                          1 and 1
            hard_sigmoid      a x + b, cut off at 0 and 1          1/6 and 0.5, as in PyTorch and Keras 3
            thresholded_relu  x above a, else zero                 1
            leaky_relu        x, below zero a x                    0.01
            elu               x, below zero a (exp(x) - 1)         1
    alpha, beta : float, optional
        The numbers a and b of the functions that have them.
    """

    def __init__(self, name: str, alpha: float | None = None, beta: float | None = None) -> None:
        self.function: Final = function_of(name, alpha, beta)
        self._start(_Activate(self.function))

    @property
    def name(self) -> str:
        return self.function.name

    @property
    def alpha(self) -> float:
        return self.function.alpha

    @property
    def beta(self) -> float:
        return self.function.beta

    def _options(self) -> dict[str, Any]:
        alpha, beta = (*self.function.numbers, None, None)[:2]
        return {"name": self.name, "alpha": alpha, "beta": beta}


def activation_of(activation: object) -> Activation:
    if isinstance(activation, Activation):
        return activation
    return Activation(*function_of(activation, argument="activation")[:1])


@dataclass(frozen=True)
class _Activate(Stage):
    function: Function

    def nodes(self, packed: Any, units: int, dtype: np.dtype[Any]) -> list[Node]:
        return [rows("activate", dtype, units, units, self.function)]
