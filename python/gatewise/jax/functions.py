"""The functions `lstm`, `gru` and `rnn`: they check their arguments and call the primitive."""

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
from gatewise.jax.sharding import make_varying_alike
from gatewise.running.layout import Layout
from gatewise.weights.architecture import GATES, Architecture


def lstm(
    parameters: Mapping[str, Any],
    x: Any,
    state: Any = None,
    *,
    batch_first: bool = False,
    lengths: Any = None,
    resets: Any = None,
    checkpoint_every: int | None = None,
) -> tuple[Any, tuple[Any, Any]]:
    """Run a stack of LSTM layers, as `torch.nn.LSTM` defines it.

    Parameters
    ----------
    parameters : mapping of names to arrays
        PyTorch's names, shapes and gate order (i f g o): `weight_ih_l0` (4*H, I) and `weight_hh_l0` (4*H, R); with
        biases `bias_ih_l0` and `bias_hh_l0` (4*H,); with a projection `weight_hr_l0` (P, H). Those of the reverse
        direction end in `_l0_reverse`, those of the next layer in `_l1`. Layers, directions, biases and projection
        follow from the names and shapes. A layer's `state_dict()` is such a mapping, and a pytree.
    x : array
        (T, B, I), with batch_first (B, T, I), or unbatched (T, I). float32 or, if JAX has it enabled, float64; the
        parameters have the same dtype.
    state : pair of arrays, optional
        h (L*D, B, R) and c (L*D, B, H) before the first step, without B if x is unbatched; zeros by default.
    lengths : array of integers, optional
        (B,): the number of steps in each row. Output after the end of a row is zero, and its state is the one at the
        end.
    resets : array of bools, optional
        (T, B), with its axes in the order of x's: True sets the state to zero before that step.
    checkpoint_every : int, optional
        For gradients, keep only the state of every n-th step and compute the gates between them again.

    Returns
    -------
    y : array
        (T, B, D*R), with its axes in the order of x's.
    (h, c) : pair of arrays
        The state after the last step.

    Raises
    ------
    ValueError, TypeError
        The message names the argument, what was expected and what came. Lengths whose values are not known before a
        compiled program runs are checked while it runs, and JAX raises an error of its own.
    """
    y, h, c = _run("lstm", parameters, x, state, batch_first, lengths, resets, checkpoint_every)
    return y, (h, c)


def gru(
    parameters: Mapping[str, Any],
    x: Any,
    state: Any = None,
    *,
    batch_first: bool = False,
    lengths: Any = None,
    resets: Any = None,
    checkpoint_every: int | None = None,
) -> tuple[Any, Any]:
    """Run a stack of GRU layers, as `torch.nn.GRU` defines it. Returns y and h.

    The gates are r z n, the state is one array h, and there is no projection. All else is as in `lstm`.
    """
    y, h = _run("gru", parameters, x, state, batch_first, lengths, resets, checkpoint_every)
    return y, h


def rnn(
    parameters: Mapping[str, Any],
    x: Any,
    state: Any = None,
    *,
    nonlinearity: str = "tanh",
    batch_first: bool = False,
    lengths: Any = None,
    resets: Any = None,
    checkpoint_every: int | None = None,
) -> tuple[Any, Any]:
    """Run a stack of simple recurrent layers, as `torch.nn.RNN` defines it. Returns y and h.

    The nonlinearity is "tanh" or "relu". All else is as in `gru`.
    """
    if not isinstance(nonlinearity, str) or nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    y, h = _run(f"rnn_{nonlinearity}", parameters, x, state, batch_first, lengths, resets, checkpoint_every)
    return y, h


def _run(
    cell: str,
    parameters: Any,
    x: Any,
    state: Any,
    batch_first: bool,
    lengths: Any,
    resets: Any,
    checkpoint_every: int | None,
) -> Any:
    """Check the arguments of a call and make it: y, h and, for an LSTM, c."""
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters: expected a mapping of names to arrays, got {type(parameters).__name__}")
    for name in parameters:
        if not isinstance(name, str):
            raise TypeError(f"parameters: expected names, got {name!r}")
    batch_first = flag("batch_first", batch_first)
    every = 0 if checkpoint_every is None else whole_number("checkpoint_every", checkpoint_every, 1, 2**31 - 1)
    x = _as_floating("x", x)
    weights = {name: _as_floating(name, value, x.dtype) for name, value in parameters.items()}
    architecture = architecture_of(cell, x.dtype, tuple((name, array.shape) for name, array in weights.items()))
    layout = Layout.of(architecture, batch_first, "x", x)
    states = _checked_states(layout, state)
    if lengths is not None:
        lengths = _checked_lengths(layout, lengths)
    if resets is not None:
        resets = _checked_resets(layout, resets)
    options = Options(
        architecture,
        batch_first or layout.unbatched,
        has_lengths=lengths is not None,
        has_resets=resets is not None,
        checkpoint_every=every,
        backend=_core.backend(),
    )
    ordered_weights = [weights[name] for name in architecture.shapes()]
    return _bind(options, layout.unbatched, x, states, lengths, resets, ordered_weights)


@partial(jax.jit, static_argnums=(0, 1))
def _bind(options: Options, unbatched: bool, x: Any, states: Any, lengths: Any, resets: Any, weights: Any) -> Any:
    """Call the primitive on checked arrays, an unbatched sequence as a batch of one row."""
    extras = [array for array in (lengths, resets) if array is not None]
    if states is None:
        batch = () if unbatched else options.steps_and_batch(x)[1:]
        states = [jnp.zeros((options.num_sequences, *batch, size), x.dtype) for size in options.state_sizes]
    if not unbatched:
        return recurrent.bind(*make_varying_alike([x, *states, *extras, *weights]), options=options)
    batch_of_one = [x[None], *(part[:, None] for part in states), *(array[None] for array in extras)]
    y, *states_after = recurrent.bind(*make_varying_alike([*batch_of_one, *weights]), options=options)
    return [y[0], *(part[:, 0] for part in states_after)]


def _as_floating(name: str, value: Any, dtype: Any = None) -> Any:
    array = value if isinstance(value, jax.Array) else as_array(name, value)
    if array.dtype.newbyteorder("=") not in (np.float32, np.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {array.dtype}")
    if not isinstance(array, jax.Array):
        array = jnp.asarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} as x, got {array.dtype}")
    return array


@lru_cache(maxsize=1024)
def architecture_of(cell: str, dtype: Any, names_and_shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Architecture:
    """The architecture that follows from the names and shapes of the weights."""
    shapes = dict(names_and_shapes)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        if name not in shapes:
            raise ValueError(f"parameters: expected {name} among them, got {', '.join(shapes) or 'none'}")
        if len(shapes[name]) != 2:
            raise ValueError(f"{name}: expected two axes, got shape {describe(shapes[name])}")
    rows, input_size = shapes["weight_ih_l0"]
    gates = len(GATES[cell])
    proj_size = shapes["weight_hr_l0"][0] if shapes.get("weight_hr_l0") else 0
    if rows == 0 or rows % gates or input_size == 0:
        raise ValueError(
            f"weight_ih_l0: expected shape ({gates}*H, I) of {cell}, got {describe(shapes['weight_ih_l0'])}"
        )
    if proj_size and cell != "lstm":
        raise ValueError(f"weight_hr_l0: expected no projection of {cell}, got one")
    num_layers = 1
    while f"weight_ih_l{num_layers}" in shapes:
        num_layers += 1
    architecture = Architecture(
        cell,
        input_size,
        hidden_size=rows // gates,
        num_layers=num_layers,
        bias="bias_ih_l0" in shapes,
        bidirectional="weight_ih_l0_reverse" in shapes,
        proj_size=proj_size,
        dtype=np.dtype(dtype),
    )
    expected = architecture.shapes()
    if shapes.keys() != expected.keys():
        raise ValueError(f"parameters: expected {', '.join(expected)}, got {', '.join(shapes)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{name}: expected shape {describe(shape)}, got {describe(shapes[name])}")
    architecture.check_size()
    return architecture


def _checked_states(layout: Layout, state: Any) -> list[Any] | None:
    """The arrays h and, for an LSTM, c; None stands for zeros."""
    if state is None:
        return None
    architecture = layout.architecture
    is_sequence = isinstance(state, (tuple, list))
    got = f"a {type(state).__name__} of {len(state)}" if is_sequence else type(state).__name__
    if architecture.has_cell_state and (not is_sequence or len(state) != 2):
        raise TypeError(f"state: expected a pair (h, c), got {got}")
    if not architecture.has_cell_state and is_sequence:
        raise TypeError(f"state: expected an array h, got {got}")
    parts = {"state": (state, architecture.recurrent_size)}
    if architecture.has_cell_state:
        parts = {
            "state[0]": (state[0], architecture.recurrent_size),
            "state[1]": (state[1], architecture.hidden_size),
        }
    return [
        shaped(name, _as_floating(name, part, architecture.dtype), layout.state_shape(size))
        for name, (part, size) in parts.items()
    ]


def _checked_lengths(layout: Layout, lengths: Any) -> Any:
    if not isinstance(lengths, jax.core.Tracer):
        return whole_lengths(lengths, layout.rows, layout.steps).astype(np.int32)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths: expected whole numbers, got {lengths.dtype}")
    # Clip to the range of int32 before the cast, which would turn some lengths out of range into valid ones.
    lowest = 0 if jnp.issubdtype(lengths.dtype, jnp.unsignedinteger) else -1
    highest = min(np.iinfo(np.int32).max, jnp.iinfo(lengths.dtype).max)
    return jnp.clip(shaped("lengths", lengths, layout.rows), lowest, highest).astype(np.int32)


def _checked_resets(layout: Layout, resets: Any) -> Any:
    shape = layout.shape(1)[:-1]
    if not isinstance(resets, jax.core.Tracer):
        return restarts(resets, shape)
    if resets.dtype != bool:
        raise TypeError(f"resets: expected bools, got {resets.dtype}")
    return shaped("resets", resets, shape)
