"""The specification of gatewise in plain NumPy: what every backend must compute, forward and backward.

Sizes: T steps, B batch, I input, H hidden, P projection (P = H without one), G gates, L layers, D directions.
Parameters have PyTorch's names, shapes and gate order. Everything is computed in the dtype of x, which is any
floating type. This file is for reading and checking; the rest of the package is for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "ACTIVATIONS", "CELLS", "Functions", "backward", "convolution", "dense", "dropout_mask", "forward", "last",
    "layer_norm", "leave_out", "merge", "normalize", "put_back", "reverse", "sigmoid",
]  # fmt: skip

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Arrays: TypeAlias = tuple[Array, ...]  # a state, inside this file always a tuple: (h, c) or (h,)
Flags: TypeAlias = npt.NDArray[np.bool_]
Activation: TypeAlias = Callable[..., Array]
Weights: TypeAlias = Mapping[str, Array]  # of one layer and direction, names without their suffix


# ---- activations: y = f(x), and for those inside cells the gradient of x from y and its gradient


def sigmoid(x: Array) -> Array:
    """Logistic function 1 / (1 + exp(-x)), right at both ends: no overflow, and exp(x) far to the left.

    Takes a floating array of any shape; returns one of the same shape and dtype.
    """
    with np.errstate(under="ignore"):  # an exponential that vanishes has the right value
        y: Array = np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))
    return y


def sigmoid_backward(y: Array, grad: Array) -> Array:
    return grad * y * (1 - y)


def tanh_backward(y: Array, grad: Array) -> Array:
    return grad * (1 - y * y)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def relu_backward(y: Array, grad: Array) -> Array:
    return np.where(y <= 0, 0, grad)  # selected, not multiplied: even an infinite gradient ends here


def linear(x: Array) -> Array:
    return x


def affine(x: Array, alpha: float = 1.0, beta: float = 0.0) -> Array:
    y: Array = alpha * x + beta
    return y


def softmax(x: Array) -> Array:
    """exp(x) by its sum over the last axis, after taking off the largest x: no overflow."""
    with np.errstate(under="ignore"):
        powers = np.exp(x - x.max(axis=-1, keepdims=True))
        y: Array = powers / powers.sum(axis=-1, keepdims=True)
    return y


def hard_sigmoid(x: Array, alpha: float = 1 / 6, beta: float = 0.5) -> Array:
    """The line alpha x + beta, cut off at 0 and 1: in PyTorch and Keras 3 (x + 3) / 6, before 0.2 x + 0.5."""
    line = (x + 3) / 6 if (alpha, beta) == (1 / 6, 0.5) else alpha * x + beta
    y: Array = np.minimum(np.maximum(line, 0), 1)
    return y


def scaled_tanh(x: Array, alpha: float = 1.0, beta: float = 1.0) -> Array:
    y: Array = alpha * np.tanh(beta * x)
    return y


def softsign(x: Array) -> Array:
    """x / (1 + |x|), and its limits."""
    size = np.abs(x)
    return np.where(np.isinf(x), np.sign(x), x / (1 + np.where(np.isinf(x), 0, size)))


def silu(x: Array) -> Array:
    """x sigmoid(x), zero at minus infinity."""
    y: Array = np.maximum(x, -1000) * sigmoid(x)
    return y


def selu(x: Array) -> Array:
    """With the numbers of Klambauer et al. 2017: a slope of 1.05070099 to the right, and 1.6732632 times that."""
    return np.where(x > 0, 1.0507009873554805 * x, 1.7580993408473768 * np.expm1(np.minimum(x, 0)))


def elu(x: Array, alpha: float = 1.0) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def thresholded_relu(x: Array, alpha: float = 1.0) -> Array:
    return np.where(x <= alpha, 0, x)


def leaky_relu(x: Array, alpha: float = 0.01) -> Array:
    return np.where(x > 0, x, alpha * x)


def gelu(x: Array) -> Array:
    """x times the normal distribution below x: the exact function, not its approximation by tanh.

    Computed in float64, whatever the dtype of x; in the left tail to 1e-12 of the value.
    """
    wide = np.asarray(x, np.float64)
    with np.errstate(under="ignore"):
        below = np.vectorize(math.erfc, otypes=[np.float64])(-wide / math.sqrt(2)) / 2
        y: Array = (np.maximum(wide, -50) * below).astype(x.dtype)  # below -50, and at -inf, zero
    return y


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), right at both ends: no overflow, and exp(x) far to the left."""
    with np.errstate(under="ignore"):
        y: Array = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return y


# By name, as functions of x, or of x, alpha and beta.
ACTIVATIONS: dict[str, Activation] = {
    "linear": linear,
    "affine": affine,
    "relu": relu,
    "thresholded_relu": thresholded_relu,
    "selu": selu,
    "scaled_tanh": scaled_tanh,
    "softsign": softsign,
    "silu": silu,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "softmax": softmax,
    "hard_sigmoid": hard_sigmoid,
    "elu": elu,
    "leaky_relu": leaky_relu,
    "gelu": gelu,
    "softplus": softplus,
    "exp": np.exp,
}


class Functions(NamedTuple):
    """Of the sums before gates and candidate, which are cut off at +-clip, and of c."""

    gate: Activation = sigmoid
    candidate: Activation = np.tanh
    output: Activation = np.tanh
    clip: float = np.inf

    def of_gate(self, sums: Array) -> Array:
        return self.gate(np.clip(sums, -self.clip, self.clip))

    def of_candidate(self, sums: Array) -> Array:
        return self.candidate(np.clip(sums, -self.clip, self.clip))


# ---- cells
# forward:  functions, weights, input sums x W_ih^T + b_ih [B, G*H], hidden sums h W_hh^T + b_hh [B, G*H], state before
#           -> state after (its h [B, H] not yet projected), what backward needs
# backward: what forward kept, state before, gradient of the state after
#           -> gradients of input sums, of hidden sums, of the state before (where it enters directly)


def lstm(
    f: Functions, weights: Weights, input_sums: Array, hidden_sums: Array, before: Arrays
) -> tuple[Arrays, Arrays]:
    _, c_before = before  # [B, P], [B, H]
    sums = np.split(input_sums + hidden_sums, 4, axis=-1)  # [B, H] each
    # Peepholes (Gers and Schmidhuber 2000): i and f see c before the step, o after it.
    peepholes = np.split(weights["weight_ch"], 3) if "weight_ch" in weights else None  # [H] each, of i f o
    if peepholes:
        sums[0], sums[1] = sums[0] + peepholes[0] * c_before, sums[1] + peepholes[1] * c_before
    input_gate, forget_gate, candidate = f.of_gate(sums[0]), f.of_gate(sums[1]), f.of_candidate(sums[2])
    c = forget_gate * c_before + input_gate * candidate
    if peepholes:
        sums[3] = sums[3] + peepholes[2] * c
    output_gate = f.of_gate(sums[3])
    tanh_c = f.output(c)
    h = output_gate * tanh_c
    return (h, c), (input_gate, forget_gate, candidate, output_gate, tanh_c)


def lstm_backward(intermediates: Arrays, before: Arrays, grad_after: Arrays) -> tuple[Array, Array, Arrays]:
    input_gate, forget_gate, candidate, output_gate, tanh_c = intermediates
    h_before, c_before = before
    grad_h, grad_c = grad_after
    grad_c = grad_c + tanh_backward(tanh_c, grad_h * output_gate)
    grad_input_gate = sigmoid_backward(input_gate, grad_c * candidate)
    grad_forget_gate = sigmoid_backward(forget_gate, grad_c * c_before)
    grad_candidate = tanh_backward(candidate, grad_c * input_gate)
    grad_output_gate = sigmoid_backward(output_gate, grad_h * tanh_c)
    grad_sums = np.concatenate([grad_input_gate, grad_forget_gate, grad_candidate, grad_output_gate], axis=-1)
    return grad_sums, grad_sums, (np.zeros_like(h_before), grad_c * forget_gate)


def gru(f: Functions, weights: Weights, input_sums: Array, hidden_sums: Array, before: Arrays) -> tuple[Arrays, Arrays]:
    (h_before,) = before  # [B, H]
    reset_x, update_x, candidate_x = np.split(input_sums, 3, axis=-1)  # [B, H] each
    reset_h, update_h, candidate_h = np.split(hidden_sums, 3, axis=-1)
    reset, update = f.of_gate(reset_x + reset_h), f.of_gate(update_x + update_h)
    candidate = f.of_candidate(candidate_x + reset * candidate_h)  # reset after the product with W_hh, as PyTorch
    h = (1 - update) * candidate + update * h_before
    return (h,), (reset, update, candidate, candidate_h)


def gru_backward(intermediates: Arrays, before: Arrays, grad_after: Arrays) -> tuple[Array, Array, Arrays]:
    reset, update, candidate, candidate_h = intermediates
    (h_before,), (grad_h,) = before, grad_after
    grad_candidate = tanh_backward(candidate, grad_h * (1 - update))
    grad_reset = sigmoid_backward(reset, grad_candidate * candidate_h)
    grad_update = sigmoid_backward(update, grad_h * (h_before - candidate))
    grad_input_sums = np.concatenate([grad_reset, grad_update, grad_candidate], axis=-1)
    grad_hidden_sums = np.concatenate([grad_reset, grad_update, grad_candidate * reset], axis=-1)
    return grad_input_sums, grad_hidden_sums, (grad_h * update,)


def gru_reset_before(
    f: Functions, weights: Weights, input_sums: Array, hidden_sums: Array, before: Arrays
) -> tuple[Arrays, Arrays]:
    """Reset before the product: the last part of hidden_sums is that of reset * h (see hidden_product)."""
    (h_before,) = before  # [B, H]
    _, update_sum, candidate_sum = np.split(input_sums + hidden_sums, 3, axis=-1)  # [B, H] each
    update, candidate = f.of_gate(update_sum), f.of_candidate(candidate_sum)
    return ((1 - update) * candidate + update * h_before,), ()


def rnn(f: Functions, weights: Weights, input_sums: Array, hidden_sums: Array, before: Arrays) -> tuple[Arrays, Arrays]:
    h = f.of_candidate(input_sums + hidden_sums)  # [B, H]
    return (h,), (h,)


def rnn_backward(
    f_backward: Activation, intermediates: Arrays, before: Arrays, grad_after: Arrays
) -> tuple[Array, Array, Arrays]:
    grad_sums = f_backward(intermediates[0], grad_after[0])
    return grad_sums, grad_sums, (np.zeros_like(before[0]),)


class Cell(NamedTuple):
    gates: int  # G
    states: int  # arrays in its state
    functions: Functions
    forward: Callable[[Functions, Weights, Array, Array, Arrays], tuple[Arrays, Arrays]]
    backward: Callable[[Arrays, Arrays, Arrays], tuple[Array, Array, Arrays]] | None  # None: for inference only


CELLS = {
    "lstm": Cell(4, 2, Functions(), lstm, lstm_backward),
    "gru": Cell(3, 1, Functions(), gru, gru_backward),
    "gru_reset_before": Cell(3, 1, Functions(), gru_reset_before, None),
    "rnn_tanh": Cell(1, 1, Functions(), rnn, partial(rnn_backward, tanh_backward)),
    "rnn_relu": Cell(1, 1, Functions(candidate=relu), rnn, partial(rnn_backward, relu_backward)),
}


# ---- products: ih of the input, hh of the hidden state, hr the projection; a bias where there is one


def product(kind: str, weights: Weights, x: Array) -> Array:
    y: Array = x @ weights[f"weight_{kind}"].T  # x [B, in], weight [out, in], y [B, out]
    return y + weights[f"bias_{kind}"] if f"bias_{kind}" in weights else y


def hidden_product(cell: Cell, weights: Weights, input_sums: Array, h: Array) -> Array:
    sums = product("hh", weights, h)
    if cell.forward is not gru_reset_before:
        return sums
    units = h.shape[-1]
    reset = cell.functions.of_gate(input_sums[:, :units] + sums[:, :units])
    return np.concatenate([sums[:, : 2 * units], product("hh", weights, reset * h)[:, 2 * units :]], axis=-1)


def product_backward(kind: str, weights: Weights, x: Array, grad: Array, grad_weights: Weights) -> Array:
    """Return the gradient of x; add those of weight and bias to grad_weights, in place."""
    grad_weights[f"weight_{kind}"][...] += grad.T @ x
    if f"bias_{kind}" in weights:
        grad_weights[f"bias_{kind}"][...] += grad.sum(axis=0)
    grad_x: Array = grad @ weights[f"weight_{kind}"]
    return grad_x


# ---- one layer in one direction, through time


# Rows of different lengths: a row that has no step t leaves it as it came, and its output is zero. Everything of
# it is selected, never multiplied by zero, so that nothing after a row's end can matter.


class Step(NamedTuple):
    t: int
    active: Flags  # [B, 1], which rows have this step
    reset: Flags  # [B, 1], which begin it with a state of zero
    x: Array  # [B, I], zero where a row has no step
    before: Arrays  # h [B, P], c [B, H]
    hidden: Array  # [B, H], h before its projection
    intermediates: Arrays  # what the cell's backward needs


class Schedule(NamedTuple):
    active: Flags  # [T, B, 1]
    resets: Flags  # [T, B, 1], of rows that are active

    def reset_before(self, t: int, reverse: bool) -> Flags:
        """What separates the steps t - 1 and t separates them in the reverse direction, too."""
        boundary = t + 1 if reverse else t
        flags: Flags = self.resets[boundary] if boundary < len(self.resets) else np.zeros_like(self.resets[t])
        return flags


def select(which: Flags, ones: Arrays, others: Arrays) -> Arrays:
    return tuple(np.where(which, *pair) for pair in zip(ones, others, strict=True))


def zeros_like(arrays: Arrays) -> Arrays:
    return tuple(np.zeros_like(array) for array in arrays)


def sequence(
    cell: Cell, weights: Weights, x: Array, state: Arrays, schedule: Schedule, reverse: bool
) -> tuple[Array, Arrays, list[Step]]:
    output = np.empty((*x.shape[:2], state[0].shape[-1]), x.dtype)  # [T, B, P]
    steps = []
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        active, reset = schedule.active[t], schedule.reset_before(t, reverse)
        x_t = np.where(active, x[t], 0)
        state = select(reset, zeros_like(state), state)
        input_sums = product("ih", weights, x_t)
        hidden_sums = hidden_product(cell, weights, input_sums, state[0])
        (hidden, *others), intermediates = cell.forward(cell.functions, weights, input_sums, hidden_sums, state)
        steps.append(Step(t, active, reset, x_t, state, hidden, intermediates))
        h = product("hr", weights, hidden) if "weight_hr" in weights else hidden
        output[t] = np.where(active, h, 0)
        state = select(active, (h, *others), state)
    return output, state, steps


def sequence_backward(
    cell: Cell, weights: Weights, steps: list[Step], grad_output: Array, grad: Arrays, grad_weights: Weights
) -> tuple[Array, Arrays]:
    """From the gradient of the state after the steps to that before the steps; add to grad_weights, in place."""
    if cell.backward is None:
        raise ValueError("tape: expected a cell that trains")
    grad_x = np.empty((*grad_output.shape[:2], weights["weight_ih"].shape[1]), grad_output.dtype)  # [T, B, I]
    for t, active, reset, x, before, hidden, intermediates in reversed(steps):
        grad_h = np.where(active, grad[0] + grad_output[t], 0)  # [B, P]
        if "weight_hr" in weights:
            grad_h = product_backward("hr", weights, hidden, grad_h, grad_weights)  # [B, H]
        of_step = (grad_h, *select(active, grad[1:], zeros_like(grad[1:])))
        grad_input_sums, grad_hidden_sums, direct = cell.backward(intermediates, before, of_step)
        grad_x[t] = product_backward("ih", weights, x, grad_input_sums, grad_weights)
        through_sums = product_backward("hh", weights, before[0], grad_hidden_sums, grad_weights)  # [B, P]
        grad = select(active, (direct[0] + through_sums, *direct[1:]), grad)
        grad = select(reset, zeros_like(grad), grad)
    return grad_x, grad


# ---- dropout: the random number of an element is a function of its place, so no order or thread can matter


def mix64(z: npt.NDArray[Any]) -> npt.NDArray[Any]:  # the finaliser of splitmix64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z ^= z >> 31
    return z


def mix32(z: npt.NDArray[Any]) -> npt.NDArray[Any]:  # lowbias32
    z = (z ^ (z >> 16)) * 0x7FEB352D
    z = (z ^ (z >> 15)) * 0x846CA68B
    z ^= z >> 16
    return z


def dropout_mask(
    p: float, seed: int, call_count: int, layer: int, steps: int, batch: int, units: int
) -> npt.NDArray[np.float64]:
    """Draw the factors by which dropout multiplies the output of a layer.

    Parameters
    ----------
    p : share to drop, from 0 to 1
    seed, call_count : integers modulo 2**64; each pair gives another mask
    layer : index of the layer whose output is dropped, from 0
    steps, batch, units : T, B and the D*P features of the output

    Returns
    -------
    float64 array (T, B, D*P) of 0 and 1 / (1 - p)
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a number from 0 to 1, got {p}")
    rows, times = np.arange(batch, dtype=np.uint64)[:, None], np.arange(steps, dtype=np.uint64)[:, None, None]
    key: npt.NDArray[Any] = np.zeros((1, 1, 1), np.uint64)
    for word in (*(np.array([n % 2**64], np.uint64) for n in (seed, call_count, layer)), rows, times):
        key = mix64((key ^ word) + 0x9E3779B97F4A7C15)  # modulo 2**64; [T, B, 1] in the end
    low, high = (key & 0xFFFFFFFF).astype(np.uint32), (key >> 32).astype(np.uint32)
    draws = mix32(mix32(np.arange(units, dtype=np.uint32) ^ low) ^ high)  # [T, B, D*P], uniform below 2**32
    return np.where(draws < int(p * 2**32), 0.0, 1 / (1 - p) if p < 1 else 0.0)


def drop(x: Array, mask: Array) -> Array:  # its own backward
    return np.multiply(x, mask, out=np.zeros_like(x), where=mask != 0)  # selected: a dropped NaN is gone


# ---- the stack: layers and directions; place number layer * D + direction, as in the state


class Tape(NamedTuple):
    cell: Cell
    directions: int
    parameters: dict[str, Array]
    output: Array  # [T, B, D*P]
    steps: list[list[Step]]  # [L*D][T], in the order in which each direction runs
    masks: list[Array]  # [T, B, D*P] after each layer but the last; none without dropout


def forward(
    cell: str,
    x: npt.ArrayLike,
    state: Any,
    parameters: Mapping[str, npt.ArrayLike],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    call_count: int = 0,
    lengths: npt.ArrayLike | None = None,
    resets: npt.ArrayLike | None = None,
    functions: Functions | None = None,
) -> tuple[Array, Any, Tape]:
    """Run a stack of recurrent layers over a sequence.

    The equations are those of torch.nn.LSTM (Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000,
    projection of Sak et al. 2014), torch.nn.GRU (Cho et al. 2014) and torch.nn.RNN (Elman 1990).

    Parameters
    ----------
    cell : "lstm", "gru", "gru_reset_before" (which has no backward), "rnn_tanh" or "rnn_relu"
    x : floating array (T, B, I); its dtype is that of everything computed and returned
    state : (h, c) for "lstm", h for the others; h (L*D, B, P), c (L*D, B, H). None, whole or in part, is zero
    parameters : mapping name -> array, as PyTorch's: weight_ih_l0 (G*H, I), weight_hh_l0 (G*H, P);
        with biases bias_ih_l0 and bias_hh_l0 (G*H), with a projection weight_hr_l0 (P, H), with peepholes
        weight_ch_l0 (3*H), of i f o; for the reverse
        direction ..._l0_reverse; for the next layer ..._l1, with D*P inputs; and so on
    num_layers, bidirectional : L, and whether D is 2
    dropout : share dropped of the output of each layer but the last; 0 for inference
    seed, call_count : they determine the mask, see `dropout_mask`
    lengths : integers (B,), how many steps each row has; None: all have T. After its end a row's output is zero,
        the state after the last step is the one at its end, and the reverse direction starts there
    resets : booleans (T, B), where the state is set to zero before step t, in the reverse direction after it
    functions : they replace the cell's usual ones; only the usual ones have a backward, and peepholes have none

    Returns
    -------
    output : array (T, B, D*P)
    state : as the argument, after the last step of each direction
    tape : for `backward`; it holds copies of the arguments
    """
    x = np.array(x)
    if x.dtype.kind != "f" or x.ndim != 3:
        raise TypeError(f"x: expected a floating array (T, B, I), got {x.dtype} {x.shape}")
    directions = 2 if bidirectional else 1
    weights = {name: np.array(value, x.dtype) for name, value in parameters.items()}
    kind = CELLS[cell]
    if functions is not None or "weight_ch_l0" in weights:
        kind = kind._replace(functions=functions or kind.functions, backward=None)
    starts = places("state", state, kind, weights, num_layers * directions, x.shape[1])
    schedule = schedule_of(x.shape[0], x.shape[1], lengths, resets)
    end_states: list[Arrays] = []
    steps, masks = [], []
    for layer in range(num_layers):
        outputs = []
        for reverse in (False, True)[:directions]:
            part, start = of_place(weights, layer, reverse), starts[len(end_states)]
            output, end, direction_steps = sequence(kind, part, x, start, schedule, reverse)
            outputs.append(output)
            end_states.append(end)
            steps.append(direction_steps)
        x = np.concatenate(outputs, axis=-1)  # [T, B, D*P], the input of the next layer
        if dropout and layer < num_layers - 1:
            masks.append(dropout_mask(dropout, seed, call_count, layer, *x.shape).astype(x.dtype))
            x = drop(x, masks[layer])
    return x, joined(end_states), Tape(kind, directions, weights, x, steps, masks)


def backward(tape: Tape, grad_output: Any, grad_state: Any = None) -> tuple[Array, Any, dict[str, Array]]:
    """Backpropagate through time: from gradients of what `forward` returned to those of what it was given.

    Parameters
    ----------
    tape : from `forward`; it can be used again
    grad_output : array (T, B, D*P), or None for zero
    grad_state : in the form of a state; None, whole or in part, is zero

    Returns
    -------
    grad_input : array (T, B, I)
    grad_state : in the form of a state
    grad_parameters : dict with the names and shapes of the parameters
    """
    cell, directions, parameters, output, steps, masks = tape
    grad_parameters = {name: np.zeros_like(value) for name, value in parameters.items()}
    # The gradients of the states of all places: after the steps, replaced by those before the steps.
    grads = places("grad_state", grad_state, cell, parameters, len(steps), output.shape[1])
    grad = np.zeros_like(output) if grad_output is None else np.array(grad_output, output.dtype)
    for layer in reversed(range(len(steps) // directions)):
        grad = drop(grad, masks[layer]) if layer < len(masks) else grad
        grad_inputs = []
        for direction, grad_direction in enumerate(np.split(grad, directions, axis=-1)):
            place = layer * directions + direction
            part, grad_part = (of_place(p, layer, direction == 1) for p in (parameters, grad_parameters))
            grad_x, grads[place] = sequence_backward(cell, part, steps[place], grad_direction, grads[place], grad_part)
            grad_inputs.append(grad_x)
        grad = np.sum(grad_inputs, axis=0)  # [T, B, I of this layer]
    return grad, joined(grads), grad_parameters


def schedule_of(steps: int, batch: int, lengths: npt.ArrayLike | None, resets: npt.ArrayLike | None) -> Schedule:
    row_lengths = np.full(batch, steps) if lengths is None else np.asarray(lengths)
    flags = np.zeros((steps, batch), np.bool_) if resets is None else np.asarray(resets, np.bool_)
    if row_lengths.shape != (batch,) or flags.shape != (steps, batch):
        raise ValueError(
            f"lengths, resets: expected shapes {(batch,)}, {(steps, batch)}, got {row_lengths.shape}, {flags.shape}"
        )
    active = np.arange(steps)[:, None] < row_lengths
    return Schedule(active[:, :, None], (flags & active)[:, :, None])


def of_place(parameters: Mapping[str, Array], layer: int, reverse: bool) -> Weights:
    suffix = f"_l{layer}" + ("_reverse" if reverse else "")
    return {name.removesuffix(suffix): value for name, value in parameters.items() if name.endswith(suffix)}


def places(name: str, state: Any, cell: Cell, parameters: Weights, count: int, batch: int) -> list[Arrays]:
    """Take a caller's state (h, c) or h [L*D, B, units], None for zeros, apart into one for each place."""
    (sums, projected), dtype = parameters["weight_hh_l0"].shape, parameters["weight_hh_l0"].dtype
    shapes = [(count, batch, projected), (count, batch, sums // cell.gates)][: cell.states]
    members = [state] if len(shapes) == 1 else [None] * len(shapes) if state is None else state
    pairs = zip(members, shapes, strict=True)
    arrays = [np.zeros(shape, dtype) if array is None else np.array(array, dtype) for array, shape in pairs]
    if [array.shape for array in arrays] != shapes:
        raise ValueError(f"{name}: expected shapes {shapes}, got {[array.shape for array in arrays]}")
    return list(zip(*arrays, strict=True))


def joined(states: list[Arrays]) -> Any:
    """Put the states of all places together into the form that callers see."""
    arrays = tuple(np.stack(parts) for parts in zip(*states, strict=True))  # [L*D, B, units] each
    return arrays if len(arrays) > 1 else arrays[0]


# ---- what stands around recurrent layers: inference only, x [T, B, units]


def dense(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Each row's product with weight [O, I], as torch.nn.Linear."""
    y: Array = x @ weight.T
    return y if bias is None else y + bias


def convolution(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    dilation: int = 1,
    before: int | None = None,
    history: Array | None = None,
    lengths: npt.ArrayLike | None = None,
    resets: npt.ArrayLike | None = None,
) -> Array:
    """Convolve over time, as torch.nn.Conv1d.

    Parameters
    ----------
    x : array (T, B, I)
    weight : array (O, I, taps); the output at step t is the sum over taps of weight[:, :, tap] x[t - before +
        tap * dilation]
    bias : array (O,), or None
    before : None is all that come before the last tap, (taps - 1) * dilation: no output needs a later input
    history : array (before, B, I), the inputs before the first step; None is zero
    lengths, resets : as in `forward`. Behind a row's end its input is zero, and nothing is seen across a reset

    Returns
    -------
    array (T, B, O)
    """
    steps, batch, units = x.shape
    taps = weight.shape[2]
    before = (taps - 1) * dilation if before is None else before
    schedule = schedule_of(steps, batch, lengths, resets)
    past = np.zeros((before, batch, units), x.dtype) if history is None else history
    later = np.zeros(((taps - 1) * dilation - before, batch, units), x.dtype)
    known = np.concatenate([past, np.where(schedule.active, x, 0), later])  # known[t + before] is x[t]
    # Which episode a step belongs to; what came before the first belongs to that of a first step without a reset.
    episode = np.cumsum(schedule.resets[..., 0], axis=0)  # [T, B]
    final = episode[-1:] if steps else np.zeros((1, batch), np.int64)
    episodes = np.concatenate([np.zeros((before, batch), np.int64), episode, np.repeat(final, len(later), axis=0)])
    y = np.zeros((steps, batch, weight.shape[0]), x.dtype)
    for tap in range(taps):
        times = np.arange(steps) + tap * dilation
        seen = (episodes[times] == episode)[..., None]
        y += np.where(seen, known[times], 0) @ weight[:, :, tap].T
    return y if bias is None else y + bias


def layer_norm(x: Array, weight: Array | None, bias: Array | None, epsilon: float) -> Array:
    """Each row less its mean, by its deviation, as torch.nn.LayerNorm (Ba et al. 2016)."""
    mean = x.mean(axis=-1, keepdims=True)
    y: Array = (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + epsilon)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def normalize(x: Array, mean: Array, deviation: Array, weight: Array | None = None, bias: Array | None = None) -> Array:
    """Each row less the same mean, by the same deviation: batch normalisation in inference, torch.nn.BatchNorm1d."""
    y: Array = (x - mean) / deviation
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def merge(x: Array, mode: str) -> Array:
    """The two directions of a layer's output, its two halves, as one: "concat", "sum", "mul" or "ave"."""
    forwards, backwards = np.split(x, 2, axis=-1)
    joined: dict[str, Array] = {
        "concat": x,
        "sum": forwards + backwards,
        "mul": forwards * backwards,
        "ave": (forwards + backwards) / 2,
    }
    return joined[mode]


def last(x: Array, lengths: npt.ArrayLike | None = None, *, both_ends: bool = False) -> Array:
    """The last step of each row, (B, units); zero for a row without steps.

    both_ends : the second half of the units is a reverse direction's, whose last step is the first one
    """
    steps, batch, units = x.shape
    row_lengths = np.full(batch, steps) if lengths is None else np.asarray(lengths)
    y = np.zeros((batch, units), x.dtype)
    for row in np.flatnonzero(row_lengths):
        y[row] = x[row_lengths[row] - 1, row]
        if both_ends:
            y[row, units // 2 :] = x[0, row, units // 2 :]
    return y


def reverse(x: Array, lengths: npt.ArrayLike | None = None) -> Array:
    """The steps of each row in the opposite order, within its length; zero after it."""
    steps, batch, _ = x.shape
    y = np.zeros_like(x)
    for row, end in enumerate(np.full(batch, steps) if lengths is None else np.asarray(lengths)):
        y[:end, row] = x[:end, row][::-1]
    return y


def leave_out(x: Array, masked: Flags) -> tuple[Array, npt.NDArray[np.int64]]:
    """The sequence without the steps flagged in masked (T, B), zero after it; and how long each row is then."""
    unmasked = ~masked
    y = np.zeros_like(x)
    for row in range(x.shape[1]):
        y[: unmasked[:, row].sum(), row] = x[unmasked[:, row], row]
    return y, unmasked.sum(axis=0)


def put_back(y: Array, masked: Flags) -> Array:
    """The inverse of `leave_out`: each step is at its time again, and a step that was left out is zero."""
    x = np.zeros_like(y)
    for row in range(y.shape[1]):
        unmasked = ~masked[:, row]
        x[unmasked, row] = y[: unmasked.sum(), row]
    return x
