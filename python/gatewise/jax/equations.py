"""The equations of the cells in jax.numpy, for other devices, forward mode, and derivatives of derivatives.

`recurrent`, `recorded`, `tangent` and `backward` take the operands and give the results of the primitives of these
names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gatewise.jax.options import Flags, Options, split_backward, split_tangent
from gatewise.weights.architecture import Architecture


def _lstm(input_sums: Any, hidden_sums: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    i, f, g, o = jnp.split(input_sums + hidden_sums, 4, axis=-1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(input_sums: Any, hidden_sums: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    x_r, x_z, x_n = jnp.split(input_sums, 3, axis=-1)
    h_r, h_z, h_n = jnp.split(hidden_sums, 3, axis=-1)
    z = jax.nn.sigmoid(x_z + h_z)
    return ((1 - z) * jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n) + z * state[0],)


def _rnn(activation: Any, input_sums: Any, hidden_sums: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    return (activation(input_sums + hidden_sums),)


_CELLS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_rnn, jnp.tanh),
    "rnn_relu": partial(_rnn, jax.nn.relu),
}


def _run_sequence(
    architecture: Architecture,
    weights: Sequence[Any],
    x: Any,
    state: tuple[Any, ...],
    active: Any,
    restart: Any,
    reverse: bool,
) -> tuple[Any, tuple[Any, ...]]:
    """Run one layer in one direction.

    x [T, B, I], h [B, R], c [B, H], active and restart [T, B, 1] -> y [T, B, R] and the state after.
    """
    weight_ih, weight_hh = weights[:2]
    bias_ih, bias_hh = (weights[2][None, None], weights[3][None]) if architecture.bias else (0, 0)
    weight_hr = weights[-1] if architecture.proj_size else None

    def step(state: tuple[Any, ...], inputs: tuple[Any, Any, Any]) -> tuple[tuple[Any, ...], Any]:
        input_sums, active, restart = inputs
        before = tuple(jnp.where(restart, 0, part) for part in state)
        h, *c = _CELLS[architecture.cell](input_sums, before[0] @ weight_hh.T + bias_hh, before)
        h = h if weight_hr is None else h @ weight_hr.T
        after = tuple(jnp.where(active, new, old) for new, old in zip((h, *c), before, strict=True))
        return after, jnp.where(active, h, 0)

    after, y = jax.lax.scan(step, state, (x @ weight_ih.T + bias_ih, active, restart), reverse=reverse)
    return y, after


def _active_and_restarts(options: Options, x: Any, extras: Sequence[Any]) -> tuple[Any, tuple[Any, Any]]:
    """Which steps are within their row's length, and where each direction begins again with zeros: [T, B, 1]."""
    steps, batch = options.steps_and_batch(x)
    active = jnp.ones((steps, batch, 1), bool)
    restart = jnp.zeros((steps, batch, 1), bool)
    if options.has_lengths:
        active = jnp.arange(steps)[:, None, None] < extras[0][None, :, None]
    if options.has_resets:
        restart = (extras[-1].T if options.batch_first else extras[-1])[..., None] & active
    # A reset between two steps separates them in the reverse direction, too, where the earlier step comes second.
    return active, (restart, jnp.concatenate([restart[1:], jnp.zeros_like(restart[:1])]))


def recurrent(*operands: Any, options: Options) -> list[Any]:
    """Compute y, and h and c after the last step."""
    x, states, extras, weights = options.split(operands)
    active, restarts = _active_and_restarts(options, x, extras)
    layer_input = jnp.where(active, x.swapaxes(0, 1) if options.batch_first else x, 0)
    sequence_weights = options.by_sequence(weights)
    states_after: list[tuple[Any, ...]] = []
    for _ in range(options.architecture.num_layers):
        outputs = []
        for direction in range(options.architecture.directions):
            sequence = len(states_after)
            y, after = _run_sequence(
                options.architecture,
                sequence_weights[sequence],
                layer_input,
                tuple(part[sequence] for part in states),
                active,
                restarts[direction],
                reverse=direction == 1,
            )
            outputs.append(y)
            states_after.append(after)
        layer_input = jnp.concatenate(outputs, -1)
    y = layer_input.swapaxes(0, 1) if options.batch_first else layer_input
    return [y, *(jnp.stack(parts) for parts in zip(*states_after, strict=True))]


def recorded(*operands: Any, options: Options, tape_bytes: int, **_: Any) -> list[Any]:
    """The same with a tape of zeros: the equations need none."""
    return [*recurrent(*operands, options=options), jnp.zeros(tape_bytes, np.uint8)]


def tangent(*operands: Any, options: Options, nonzero_tangents: Flags) -> list[Any]:
    """Compute the tangents of y, h and c after, from the nonzero tangents of x, states and weights."""
    forward, tangents = split_tangent(operands, nonzero_tangents)
    x, states, extras, weights = options.split(forward)
    variables = [x, *states, *weights]

    def function(x: Any, *states_and_weights: Any) -> list[Any]:
        states, weights = states_and_weights[: options.num_states], states_and_weights[options.num_states :]
        return recurrent(x, *states, *extras, *weights, options=options)

    results: list[Any] = jax.jvp(function, variables, _with_zeros(tangents, nonzero_tangents, variables))[1]
    return results


def backward(*operands: Any, options: Options, nonzero_grads: Flags, needed_grads: Flags) -> list[Any]:
    """Compute the gradients of x if needed, of the states, and of the weights as needed."""
    forward, _, _, grads = split_backward(operands, nonzero_grads)
    x, states, extras, weights = options.split(forward)

    def function(x: Any, states: Any, weights: Any) -> list[Any]:
        return recurrent(x, *states, *extras, *weights, options=options)

    outputs, transposed = jax.vjp(function, x, states, weights)
    grad_x, grad_states, grad_weights = transposed(_with_zeros(grads, nonzero_grads, outputs))
    results = [grad_x] * needed_grads[0] + list(grad_states)
    for sequence_grads in compress(options.by_sequence(grad_weights), needed_grads[1:]):
        results += sequence_grads
    return results


def _with_zeros(nonzero: Sequence[Any], is_nonzero: Flags, variables: Sequence[Any]) -> list[Any]:
    """A tangent or gradient for every variable: the next nonzero one, or zeros."""
    following = iter(nonzero)
    return [
        next(following) if flag else jnp.zeros_like(variable)
        for flag, variable in zip(is_nonzero, variables, strict=True)
    ]
