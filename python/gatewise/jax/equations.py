"""The same in jax.numpy: what derivatives of derivatives, forward mode and other devices use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gatewise.jax.options import Options, split_backward, split_tangent
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
    "lstm": _lstm, "gru": _gru, "rnn_tanh": partial(_rnn, jnp.tanh), "rnn_relu": partial(_rnn, jax.nn.relu),
}  # fmt: skip


def _sequence(
    of: Architecture, weights: Sequence[Any], x: Any, state: tuple[Any, ...], active: Any, restart: Any, reverse: bool
) -> tuple[Any, tuple[Any, ...]]:
    """One layer in one direction: x [T, B, I], h [B, R], c [B, H], flags [T, B, 1] -> y [T, B, R], state after."""
    weight_ih, weight_hh = weights[:2]
    bias_ih, bias_hh = (weights[2][None, None], weights[3][None]) if of.bias else (0, 0)
    weight_hr = weights[-1] if of.proj_size else None

    def step(before: tuple[Any, ...], at: tuple[Any, Any, Any]) -> tuple[tuple[Any, ...], Any]:
        input_sums, active, restart = at
        state = tuple(jnp.where(restart, 0, part) for part in before)
        h, *others = _CELLS[of.cell](input_sums, state[0] @ weight_hh.T + bias_hh, state)
        h = h if weight_hr is None else h @ weight_hr.T
        after = tuple(jnp.where(active, new, old) for new, old in zip((h, *others), state, strict=True))
        return after, jnp.where(active, h, 0)

    after, y = jax.lax.scan(step, state, (x @ weight_ih.T + bias_ih, active, restart), reverse=reverse)
    return y, after


def walk(*operands: Any, of: Options) -> list[Any]:
    """y, h and c after."""
    x, states, extras, weights = of.split(operands)
    steps, batch = of.extent(x)
    x = x.swapaxes(0, 1) if of.batch_first else x
    active = jnp.ones((steps, batch, 1), bool)
    restart = jnp.zeros((steps, batch, 1), bool)
    if of.lengths:
        active = jnp.arange(steps)[:, None, None] < extras[0][None, :, None]
    if of.resets:
        restart = (extras[-1].T if of.batch_first else extras[-1])[..., None] & active
    # What separates two steps separates them in the reverse direction, too.
    restarts = restart, jnp.concatenate([restart[1:], jnp.zeros_like(restart[:1])])
    after: list[tuple[Any, ...]] = []
    x = jnp.where(active, x, 0)
    for _ in range(of.architecture.num_layers):
        outputs = []
        for direction in range(of.architecture.directions):
            place = len(after)
            y, end = _sequence(
                of.architecture, of.weights_of(weights)[place], x, tuple(part[place] for part in states), active,
                restarts[direction], direction == 1,
            )  # fmt: skip
            outputs.append(y)
            after.append(end)
        x = jnp.concatenate(outputs, -1)
    return [x.swapaxes(0, 1) if of.batch_first else x, *(jnp.stack(parts) for parts in zip(*after, strict=True))]


def walk_recorded(*operands: Any, of: Options, tape_bytes: int, **_: Any) -> list[Any]:
    return [*walk(*operands, of=of), jnp.zeros(tape_bytes, np.uint8)]


def walk_tangent(*operands: Any, of: Options, linear: tuple[bool, ...]) -> list[Any]:
    """Operands: those of forward, y, tape, and tangents of those of x, states and weights that `linear` flags."""
    forward, tangents = split_tangent(operands, linear)
    x, states, extras, weights = of.split(forward)
    given = iter(tangents)
    variables = [x, *states, *weights]
    dots = [next(given) if flag else jnp.zeros_like(one) for flag, one in zip(linear, variables, strict=True)]

    def rerun(x: Any, *others: Any) -> list[Any]:
        return walk(x, *others[: of.states], *extras, *others[of.states :], of=of)

    found: list[Any] = jax.jvp(rerun, variables, dots)[1]
    return found


def walk_backward(*operands: Any, of: Options, given: tuple[bool, ...], wanted: tuple[bool, ...]) -> list[Any]:
    forward, _, _, grads = split_backward(operands, given)
    x, states, extras, weights = of.split(forward)

    def rerun(x: Any, states: Any, weights: Any) -> list[Any]:
        return walk(x, *states, *extras, *weights, of=of)

    outputs, undo = jax.vjp(rerun, x, states, weights)
    found = iter(grads)
    grad_x, grad_states, grad_weights = undo(
        [next(found) if flag else jnp.zeros_like(one) for flag, one in zip(given, outputs, strict=True)]
    )
    results = [grad_x] * wanted[0] + list(grad_states)
    for own in compress(of.weights_of(grad_weights), wanted[1:]):
        results += own
    return results
