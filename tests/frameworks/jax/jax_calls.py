"""What the tests of gatewise.jax share: its functions, the same function as a scan in jax.numpy, and gradients of both.

Importing this needs JAX.
"""

import re
from functools import partial

import gatewise.jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_data

# JAX before 0.8 warns of this with NumPy 2.
ignore_copy_warning = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
# For tests that do not depend on the equations.
two_cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


@pytest.fixture(autouse=True)
def float64_enabled():
    """Enable float64 and, since XLA's compiler takes most of the time of these tests, disable its optimizations."""
    enable = getattr(jax, "enable_x64", None)
    if enable is None:
        from jax.experimental import enable_x64 as enable
    jax.config.update("jax_disable_most_optimizations", True)
    with enable(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def jax_function(cell):
    """The function of gatewise.jax for a cell."""
    if cell.startswith("rnn_"):
        return partial(gatewise.jax.rnn, nonlinearity=cell.removeprefix("rnn_"))
    return getattr(gatewise.jax, cell)


def parameters_of(layer):
    return {name: jnp.asarray(value) for name, value in layer.state_dict().items()}


def members(state):
    return state if isinstance(state, tuple) else (state,)


def zero_state(layer, batch):
    return jax.tree.map(np.zeros_like, make_data(layer, 1, batch).state)


# ---- the same function in jax.numpy, as anyone would write it


def step(cell, p, suffix, state, x):
    def linear(kind, value):
        return value @ p[f"weight_{kind}{suffix}"].T + p.get(f"bias_{kind}{suffix}", 0)

    a, b = linear("ih", x), linear("hh", state[0])
    if cell == "lstm":
        i, f, g, o = jnp.split(a + b, 4, -1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h @ p[f"weight_hr{suffix}"].T if f"weight_hr{suffix}" in p else h), c
    if cell == "gru":
        (ar, az, an), (br, bz, bn) = jnp.split(a, 3, -1), jnp.split(b, 3, -1)
        z = jax.nn.sigmoid(az + bz)
        return ((1 - z) * jnp.tanh(an + jax.nn.sigmoid(ar + br) * bn) + z * state[0],)
    return ((jnp.tanh if cell == "rnn_tanh" else jax.nn.relu)(a + b),)


def scanned(cell, p, x, state):
    """x [T, B, I], state [L*D, B, .] -> y, state after."""
    layers = sum(bool(re.fullmatch(r"weight_ih_l\d+", name)) for name in p)
    directions = ("", "_reverse")[: 1 + ("weight_ih_l0_reverse" in p)]
    states_after = []
    for layer in range(layers):
        outputs = []
        for direction in directions:
            state_before = tuple(part[len(states_after)] for part in members(state))

            def scan_step(state, x, suffix=f"_l{layer}{direction}"):
                after = step(cell, p, suffix, state, x)
                return after, after[0]

            state_after, y = jax.lax.scan(scan_step, state_before, x, reverse=bool(direction))
            states_after.append(state_after)
            outputs.append(y)
        x = jnp.concatenate(outputs, -1)
    parts = tuple(jnp.stack(part) for part in zip(*states_after, strict=True))
    return x, parts if isinstance(state, tuple) else parts[0]


# ---- gradients


def weighted_sum(results, weights):
    return sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))


def loss_of(call, data):
    """A function that gives the outputs of a call, and a loss in which each number of them has its own weight."""
    weights = [data.grad_output, *members(data.grad_state)]

    def loss(p, x, state):
        y, after = call(p, x, state)
        results = [y, *members(after)]
        return weighted_sum(results, weights), results

    return loss


def gradients(call, layer, data):
    """Outputs and all gradients of a call, as one list."""
    loss = jax.value_and_grad(loss_of(call, data), argnums=(0, 1, 2), has_aux=True)
    (_, results), (grad_p, grad_x, grad_state) = loss(parameters_of(layer), data.x, data.state)
    return [*results, grad_x, *members(grad_state), *(grad_p[name] for name in layer.parameters)]


def core_gradients(layer, data, **options):
    """Outputs and all gradients of the layer's own call, as one list."""
    tape = layer.record(data.x, data.state, **options)
    grads = tape.backward(data.grad_output, data.grad_state)
    return [tape.output, *members(tape.state), grads.input, *members(grads.state), *grads.parameters.values()]


def assert_same_bits(actual, expected):
    """Compare two lists of arrays."""
    assert len(actual) == len(expected)
    for actual_array, expected_array in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(actual_array), np.asarray(expected_array))
