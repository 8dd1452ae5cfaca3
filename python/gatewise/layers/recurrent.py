"""LSTM, GRU and RNN: stacks of layers with the names, options and defaults of torch.nn."""

from __future__ import annotations

import math

from gatewise.arguments.arrays import (
    flag,
    number,
)
from gatewise.layers.activation import Activation
from gatewise.layers.layer import Layer
from gatewise.weights.architecture import Formula
from gatewise.weights.functions import Function, function_in_cell


class Gated(Layer):
    """What LSTM and GRU share."""

    @property
    def activation(self) -> str | Activation:
        return shown(self._formula.candidate)

    @property
    def recurrent_activation(self) -> str | Activation:
        return shown(self._formula.gate)


def shown(function: Function) -> str | Activation:
    """The name of a function, if its numbers are the default ones."""
    if function.is_default:
        return function.name
    return Activation(function.name, *function.numbers)


def _clip(value: float | None) -> float:
    return math.inf if value is None else number("clip", value, least=0.0)


class LSTM(Gated):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000), with torch.nn.LSTM's equations.

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)
        c' = f * c + i * g
        h' = o * tanh(c')                                   with proj_size: W_hr (o * tanh(c'))  (Sak et al. 2014)

    Parameters
    ----------
    input_size, hidden_size : int
        Of each step's input, and of the state.
    num_layers : int
        Layers on top of each other.
    bias : bool
        Whether there are b_ih and b_hh.
    batch_first : bool
        Whether sequences are (B, T, ...) instead of (T, B, ...). States are not affected.
    dropout : float
        Probability with which `record` drops an element between two layers.
    bidirectional : bool
        Whether a second direction runs from the end; outputs are joined.
    proj_size : int
        If positive, the size of h, projected from hidden_size.
    dtype : "float32" or "float64"
        Of weights, states and results.
    seed : int, optional
        Of the initial weights and of dropout; None draws one.

    The rest is what Keras and ONNX have beyond PyTorch. Where it is used the layer is for inference only: `record`,
    `trace` and `input_gradient` refuse it.

    activation : str or Activation
        In place of tanh, with names as `Activation` has them.
    output_activation : str or Activation, optional
        In place of that of c'; None: as `activation`.
    recurrent_activation : str or Activation
        In place of sigmoid. Keras before TensorFlow 2 had Activation("hard_sigmoid", 0.2, 0.5).
    clip : float, optional
        The sums before i, f, g and o are cut off at +-clip, as ONNX Runtime does it.
    peepholes : bool
        Whether w_ci c is added to the sum of i, w_cf c to that of f, and w_co c' to that of o (Gers and Schmidhuber
        2000): weight_ch_l0 (3 * hidden_size,) and so on, in the order i, f, o.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        dtype: object = "float32",
        seed: int | None = None,
        activation: str | Activation = "tanh",
        output_activation: str | Activation | None = None,
        recurrent_activation: str | Activation = "sigmoid",
        clip: float | None = None,
        peepholes: bool = False,
    ) -> None:
        candidate = function_in_cell("activation", activation)
        output = candidate if output_activation is None else function_in_cell("output_activation", output_activation)
        gate = function_in_cell("recurrent_activation", recurrent_activation)
        super().__init__(
            "lstm",
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
            dtype=dtype,
            seed=seed,
            formula=Formula(gate, candidate, output, _clip(clip), flag("peepholes", peepholes)),
        )

    @property
    def proj_size(self) -> int:
        return self._architecture.proj_size

    @property
    def output_activation(self) -> str | Activation | None:
        return None if self._formula.output == self._formula.candidate else shown(self._formula.output)

    @property
    def peepholes(self) -> bool:
        return self._formula.peepholes


class GRU(Gated):
    """Gated recurrent unit (Cho et al. 2014), reset gate after the product, with torch.nn.GRU's equations.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        h' = (1 - z) * n + z * h

    The parameters are those of `LSTM`, without proj_size, and

    reset_after : bool
        False: n = tanh(W_in x + b_in + W_hn (r * h) + b_hn), as in the paper, in ONNX by default and in Keras before
        version 2. For inference only, as activation, recurrent_activation and clip are.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        reset_after: bool = True,
        dtype: object = "float32",
        seed: int | None = None,
        activation: str | Activation = "tanh",
        recurrent_activation: str | Activation = "sigmoid",
        clip: float | None = None,
    ) -> None:
        cell = "gru" if flag("reset_after", reset_after) else "gru_reset_before"
        candidate = function_in_cell("activation", activation)
        gate = function_in_cell("recurrent_activation", recurrent_activation)
        super().__init__(
            cell,
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=0,
            dtype=dtype,
            seed=seed,
            formula=Formula(gate, candidate, clip=_clip(clip)),
        )

    @property
    def reset_after(self) -> bool:
        return self._architecture.cell == "gru"


class RNN(Layer):
    """The simple recurrent network (Elman 1990), with torch.nn.RNN's equation.

        h' = tanh(W_ih x + b_ih + W_hh h + b_hh)            or relu in place of tanh

    The parameters are those of `LSTM`, without proj_size, and

    nonlinearity : str or Activation
        "tanh" or "relu"; for inference only any other that `Activation` names, too, and clip.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str | Activation = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: object = "float32",
        seed: int | None = None,
        clip: float | None = None,
    ) -> None:
        function, most = function_in_cell("nonlinearity", nonlinearity), _clip(clip)
        is_relu = function == Function("relu") and most == math.inf  # which is a cell of its own, and trains
        super().__init__(
            "rnn_relu" if is_relu else "rnn_tanh",
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=0,
            dtype=dtype,
            seed=seed,
            formula=Formula() if is_relu else Formula(candidate=function, clip=most),
        )

    @property
    def nonlinearity(self) -> str | Activation:
        return "relu" if self._architecture.cell == "rnn_relu" else shown(self._formula.candidate)
