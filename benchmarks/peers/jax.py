"""JAX: lax.scan over a fused cell, compiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..cases import Array, Case, Party, numpy_copy
from ..workloads import FORWARD, ONE_STEP, Workload
from . import refusals

Parameters = dict[str, Any]
State = tuple[Any, ...]  # LSTM: h, c; GRU: h; each (B, H)


def make(case: Case) -> Party:
    """lax.scan over one fused cell, jit, arguments on the device; value_and_grad for training; a jitted cell.

    Rows of different lengths with a mask in each step.
    """
    prepare(case)
    import jax
    import jax.numpy as jnp

    if case.workload.mode in ONE_STEP:
        return _make_step(case)
    compute_output = partial(_compute_output, case)
    if case.workload.mode == FORWARD:
        forward, parameters, x = jax.jit(compute_output), _parameters(case), jnp.asarray(case.x)
        return Party(lambda: forward(parameters, x).block_until_ready(), lambda y: {"output": numpy_copy(y)})
    return make_trained_party(case, compute_output)


def refusal(workload: Workload) -> str | None:
    if workload.lengths is not None and workload.directions == 2:
        return "measured with lengths in one direction only"
    return (
        refusals.other_framework(workload, "JAX")
        or refusals.networks(workload)
        or refusals.blocks_of_steps(workload)
        or refusals.resets(workload)
    )


def prepare(case: Case) -> None:
    """Choose the processor before JAX is imported, and the dtype."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_enable_x64", case.workload.dtype == "float64")


def make_trained_party(case: Case, compute_output: Callable[[Parameters, Any], Any]) -> Party:
    """value_and_grad of a function from parameters and x to the output."""
    import jax
    import jax.numpy as jnp

    parameters, x, grad_output = _parameters(case), jnp.asarray(case.x), jnp.asarray(case.grad_output)

    def loss(parameters: Parameters, x: Any) -> Any:
        y = compute_output(parameters, x)
        return jnp.vdot(y, grad_output), y

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def collect(result: Any) -> dict[str, Array]:
        (_, y), (grads, grad_x) = result
        named = {name: numpy_copy(grad) for name, grad in grads.items()}
        return {"output": numpy_copy(y), "input": numpy_copy(grad_x), **named}

    return Party(lambda: jax.block_until_ready(gradients(parameters, x)), collect)


def _make_step(case: Case) -> Party:
    import jax
    import jax.numpy as jnp

    cell, state = _cell(case), _zero_state(case)
    parameters, x = _parameters(case), jnp.asarray(case.x)[0]

    def run_cell(parameters: Parameters, state: State, x: Any) -> Any:
        sums = _input_sums(case, parameters, "l0", x)
        return cell(parameters["weight_hh_l0"], parameters["bias_hh_l0"], state, sums)

    compiled = jax.jit(run_cell)

    def step() -> Any:
        nonlocal state
        state, h = compiled(parameters, state, x)
        return h.block_until_ready()

    return Party(step, lambda h: {"output": numpy_copy(h)[None]})


def _parameters(case: Case) -> Parameters:
    import jax.numpy as jnp

    return {name: jnp.asarray(value) for name, value in case.parameters.items()}


def _zero_state(case: Case) -> State:
    import jax.numpy as jnp

    zero = jnp.zeros((case.workload.batch, case.workload.hidden), case.workload.dtype)
    return (zero, zero) if case.workload.cell == "LSTM" else (zero,)


# ---- the equations


def _compute_output(case: Case, parameters: Parameters, x: Any) -> Any:
    """All layers and directions of x (T, B, I), to (T, B, D * H)."""
    import jax.numpy as jnp

    for suffixes in case.suffixes:
        x = jnp.concatenate([_scan(case, parameters, suffix, x) for suffix in suffixes], axis=-1)
    return x


def _scan(case: Case, parameters: Parameters, suffix: str, x: Any) -> Any:
    """The output (T, B, H) of one layer in one direction."""
    import jax
    import jax.numpy as jnp

    step = partial(_cell(case), parameters[f"weight_hh_{suffix}"], parameters[f"bias_hh_{suffix}"])
    sums, lengths = _input_sums(case, parameters, suffix, x), case.workload.lengths
    if lengths is None:
        return jax.lax.scan(step, _zero_state(case), sums, reverse=suffix.endswith("_reverse"))[1]
    active = jnp.asarray(np.arange(case.workload.steps)[:, None, None] < lengths[:, None])
    return jax.lax.scan(partial(_masked, step), _zero_state(case), (sums, active))[1]


def _masked(step: Callable[[State, Any], Any], state: State, sums_and_active: Any) -> Any:
    import jax.numpy as jnp

    sums, active = sums_and_active
    state_after, h = step(state, sums)
    selected = tuple(jnp.where(active, new, old) for new, old in zip(state_after, state, strict=True))
    return selected, jnp.where(active, h, 0)


def _input_sums(case: Case, parameters: Parameters, suffix: str, x: Any) -> Any:
    sums = x @ parameters[f"weight_ih_{suffix}"].T + parameters[f"bias_ih_{suffix}"]
    return sums + parameters[f"bias_hh_{suffix}"] if case.workload.cell == "LSTM" else sums


def _cell(case: Case) -> Callable[..., Any]:
    return _lstm_cell if case.workload.cell == "LSTM" else _gru_cell


def _lstm_cell(weight: Any, bias: Any, state: State, sums: Any) -> Any:
    """A step from sums with both biases; `bias` is unused, so that both cells have the same arguments."""
    import jax
    import jax.numpy as jnp

    h, c = state
    i, f, g, o = jnp.split(sums + h @ weight.T, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def _gru_cell(weight: Any, bias: Any, state: State, sums: Any) -> Any:
    import jax
    import jax.numpy as jnp

    (h,) = state
    sum_r, sum_z, sum_n = jnp.split(sums, 3, axis=-1)
    hidden_r, hidden_z, hidden_n = jnp.split(h @ weight.T + bias, 3, axis=-1)
    r, z = jax.nn.sigmoid(sum_r + hidden_r), jax.nn.sigmoid(sum_z + hidden_z)
    h = (1 - z) * jnp.tanh(sum_n + r * hidden_n) + z * h
    return (h,), h
