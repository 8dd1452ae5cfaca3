"""The functions `lstm`, `gru` and `rnn`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import as_array, describe, flag, shaped, whole_number
from gatewise.arguments.sequences import restarts, whole_lengths
from gatewise.jax.options import Options
from gatewise.jax.primitives import recurrent
from gatewise.jax.sharding import alike
from gatewise.running.layout import Layout
from gatewise.weights.architecture import GATES, Architecture


def lstm(
    parameters: Mapping[str, Any], x: Any, state: Any = None, *, batch_first: bool = False, lengths: Any = None,
    resets: Any = None, checkpoint_every: int | None = None,
) -> tuple[Any, tuple[Any, Any]]:  # fmt: skip
    """Run a stack of LSTM layers, as `torch.nn.LSTM` defines it.

    Parameters
    ----------
    parameters : mapping of names to arrays
        PyTorch's names, shapes and gate order (i f g o): `weight_ih_l0` (4*H, I), `weight_hh_l0` (4*H, R), with biases
        `bias_ih_l0` and `bias_hh_l0` (4*H,), with a projection `weight_hr_l0` (P, H); for the reverse direction
        `..._l0_reverse`; for the next layer `..._l1`. The names and shapes say what the stack is. A layer's
        `state_dict()` is such a mapping, and a pytree.
    x : array
        float32 or, where JAX has it enabled, float64, as the parameters: (T, B, I), with batch_first (B, T, I), or
        unbatched (T, I).
    state : pair of arrays, optional
        h (L*D, B, R) and c (L*D, B, H) before the first step, unbatched without B; by default zero.
    lengths : array of integers, optional
        (B,): the steps of each row. Output behind a row's end is zero, its state after is the one at its end.
    resets : array of bools, optional
        In the order of x's axes, (T, B): where the state is set to zero before the step.
    checkpoint_every : int, optional
        For gradients, keep only the state of every so many steps and make the gates between them again.

    Returns
    -------
    y : array
        (T, B, D*R), the axes in the order of x's.
    (h, c) : arrays
        The state after the last step.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. Lengths that are known only when a compiled program runs
        are checked there; JAX raises its own error then.
    """
    y, h, c = _run("lstm", parameters, x, state, batch_first, lengths, resets, checkpoint_every)
    return y, (h, c)


def gru(
    parameters: Mapping[str, Any], x: Any, state: Any = None, *, batch_first: bool = False, lengths: Any = None,
    resets: Any = None, checkpoint_every: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Run a stack of GRU layers, as `torch.nn.GRU` defines it: gates r z n, and the state is one array h.

    Else as `lstm`, without a projection. Returns y and h.
    """
    y, h = _run("gru", parameters, x, state, batch_first, lengths, resets, checkpoint_every)
    return y, h


def rnn(
    parameters: Mapping[str, Any], x: Any, state: Any = None, *, nonlinearity: str = "tanh", batch_first: bool = False,
    lengths: Any = None, resets: Any = None, checkpoint_every: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Run a stack of simple recurrent layers, as `torch.nn.RNN` defines it, with nonlinearity "tanh" or "relu".

    Else as `gru`.
    """
    if not isinstance(nonlinearity, str) or nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    y, h = _run(f"rnn_{nonlinearity}", parameters, x, state, batch_first, lengths, resets, checkpoint_every)
    return y, h


def _run(
    cell: str, parameters: Any, x: Any, state: Any, batch_first: bool, lengths: Any, resets: Any,
    checkpoint_every: int | None,
) -> Any:  # fmt: skip
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters: expected a mapping of names to arrays, got {type(parameters).__name__}")
    for name in parameters:
        if not isinstance(name, str):
            raise TypeError(f"parameters: expected names, got {name!r}")
    batch_first = flag("batch_first", batch_first)
    every = 0 if checkpoint_every is None else whole_number("checkpoint_every", checkpoint_every, 1, 2**31 - 1)
    x = _floating("x", x)
    weights = {name: _floating(name, value, x.dtype) for name, value in parameters.items()}
    architecture = _architecture(cell, x.dtype, tuple((name, one.shape) for name, one in weights.items()))
    layout = Layout.of(architecture, batch_first, "x", x)
    states = _states(layout, state)
    if lengths is not None:
        lengths = _lengths(layout, lengths)
    if resets is not None:
        resets = _resets(layout, resets)
    of = Options(
        architecture, batch_first or layout.unbatched, lengths is not None, resets is not None, every, _core.backend()
    )
    ordered = [weights[name] for name in architecture.shapes()]
    return _call(of, layout.unbatched, x, states, lengths, resets, ordered)


@partial(jax.jit, static_argnums=(0, 1))
def _call(of: Options, unbatched: bool, x: Any, states: Any, lengths: Any, resets: Any, weights: Any) -> Any:
    extras = [one for one in (lengths, resets) if one is not None]
    if states is None:
        batch = () if unbatched else of.extent(x)[1:]
        states = [jnp.zeros((of.sequences, *batch, size), x.dtype) for size in of.state_sizes]
    if not unbatched:
        return recurrent.bind(*alike([x, *states, *extras, *weights]), of=of)
    one_row = [x[None], *(part[:, None] for part in states), *(one[None] for one in extras)]
    y, *after = recurrent.bind(*alike([*one_row, *weights]), of=of)
    return [y[0], *(part[:, 0] for part in after)]


def _floating(name: str, value: Any, dtype: Any = None) -> Any:
    array = value if isinstance(value, jax.Array) else as_array(name, value)
    if array.dtype.newbyteorder("=") not in (np.float32, np.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {array.dtype}")
    if not isinstance(array, jax.Array):
        array = jnp.asarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} as x, got {array.dtype}")
    return array


@lru_cache(maxsize=1024)
def _architecture(cell: str, dtype: Any, given: tuple[tuple[str, tuple[int, ...]], ...]) -> Architecture:
    """What the names and shapes of weights say."""
    shapes = dict(given)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        if name not in shapes:
            raise ValueError(f"parameters: expected {name} among them, got {', '.join(shapes) or 'none'}")
        if len(shapes[name]) != 2:
            raise ValueError(f"{name}: expected two axes, got shape {describe(shapes[name])}")
    rows, input_size = shapes["weight_ih_l0"]
    gates = len(GATES[cell])
    hidden_size = rows // gates
    projection = shapes["weight_hr_l0"][0] if shapes.get("weight_hr_l0") else 0
    if rows == 0 or rows % gates or input_size == 0:
        raise ValueError(
            f"weight_ih_l0: expected shape ({gates}*H, I) of {cell}, got {describe(shapes['weight_ih_l0'])}"
        )
    if projection and cell != "lstm":
        raise ValueError(f"weight_hr_l0: expected no projection of {cell}, got one")
    layers = 1
    while f"weight_ih_l{layers}" in shapes:
        layers += 1
    found = Architecture(
        cell, input_size, hidden_size, layers, "bias_ih_l0" in shapes, "weight_ih_l0_reverse" in shapes, projection,
        np.dtype(dtype),
    )  # fmt: skip
    expected = found.shapes()
    if shapes.keys() != expected.keys():
        raise ValueError(f"parameters: expected {', '.join(expected)}, got {', '.join(shapes)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{name}: expected shape {describe(shape)}, got {describe(shapes[name])}")
    found.check_size()
    return found


def _states(layout: Layout, state: Any) -> list[Any] | None:
    """h, and c where there is one; None: zeros."""
    if state is None:
        return None
    of = layout.architecture
    several = isinstance(state, (tuple, list))
    got = f"a {type(state).__name__} of {len(state)}" if several else type(state).__name__
    if of.has_cell_state and (not several or len(state) != 2):
        raise TypeError(f"state: expected a pair (h, c), got {got}")
    if not of.has_cell_state and several:
        raise TypeError(f"state: expected an array h, got {got}")
    parts = {"state": (state, of.recurrent_size)}
    if of.has_cell_state:
        parts = {"state[0]": (state[0], of.recurrent_size), "state[1]": (state[1], of.hidden_size)}
    return [
        shaped(name, _floating(name, part, of.dtype), layout.state_shape(size)) for name, (part, size) in parts.items()
    ]


def _lengths(layout: Layout, lengths: Any) -> Any:
    if not isinstance(lengths, jax.core.Tracer):
        return whole_lengths(lengths, layout.rows, layout.steps).astype(np.int32)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths: expected whole numbers, got {lengths.dtype}")
    # Into the range of int32, where no wrong one becomes a right one.
    least = 0 if jnp.issubdtype(lengths.dtype, jnp.unsignedinteger) else -1
    most = min(np.iinfo(np.int32).max, jnp.iinfo(lengths.dtype).max)
    return jnp.clip(shaped("lengths", lengths, layout.rows), least, most).astype(np.int32)


def _resets(layout: Layout, resets: Any) -> Any:
    shape = layout.shape(1)[:-1]
    if not isinstance(resets, jax.core.Tracer):
        return restarts(resets, shape)
    if resets.dtype != bool:
        raise TypeError(f"resets: expected bools, got {resets.dtype}")
    return shaped("resets", resets, shape)
