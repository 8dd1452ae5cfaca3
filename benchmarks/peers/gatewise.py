"""gatewise, as it is measured against its peers, and against itself without what a workload adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..cases import Array, Case, Party, numpy_copy, recurrent_only
from ..workloads import DENSE, FORWARD, HOMES, NETWORK, POOL, RUN, STEP, Workload
from . import jax, pytorch, refusals


def make(case: Case) -> Party:
    """The layer called with `out`; record and backward after a change of the weights; stream.step(x, out) and
    stream.run(block, out); for many streams pool.step(x, slots, out); for a network the stream of a Sequential.

    In PyTorch: the module that the peer has, on gatewise by gatewise.torch.accelerate; frozen where the workload is. In
    JAX: gatewise.jax instead of the scan.
    """
    import gatewise as gw

    gw.set_num_threads(case.threads)
    home = HOMES.get(case.workload.mode)
    if home == "PyTorch":
        return pytorch.make_module_party(case, partial(_accelerated, case))
    if home == "JAX":
        return _make_jax_program(case)
    if case.workload.mode == NETWORK:
        return _make_network(case)
    return _make_layer_party(case, case.schedule, case.workload.checkpoint_every or None)


def make_plain(case: Case) -> Party:
    """The same as if all rows had all steps, without resets and checkpoints: what these cost, or save.

    Instead of a pool, one stream after the other. Instead of a block, one step after the other. Only the recurrent
    layers of a network.
    """
    import gatewise as gw

    gw.set_num_threads(case.threads)
    if case.workload.mode == NETWORK:
        return _make_network(recurrent_only(case))
    if case.workload.mode == POOL:
        return _make_separate_streams(case)
    if case.workload.mode == RUN:
        return _make_separate_steps(case)
    return _make_layer_party(case, {}, None)


def never_refuses(workload: Workload) -> None:
    """gatewise takes part in all workloads."""


def plain_refusal(workload: Workload) -> str | None:
    is_even = workload.lengths is None and workload.resets is None
    if is_even and not workload.checkpoint_every and workload.mode not in (*HOMES, NETWORK, POOL, RUN):
        return "the same as gatewise"
    return refusals.other_framework(workload)


# ---- layers and streams


def _make_layer(case: Case) -> Any:
    import gatewise as gw

    workload = case.workload
    layer = getattr(gw, workload.cell)(
        workload.input,
        workload.hidden,
        workload.layers,
        bidirectional=workload.directions == 2,
        dtype=workload.dtype,
        seed=1,
    )
    layer.load_state_dict(case.parameters)
    return layer


def _make_layer_party(case: Case, schedule: Mapping[str, Array], checkpoint_every: int | None) -> Party:
    workload = case.workload
    if workload.mode in (STEP, RUN):
        return _make_stream(case)
    if workload.mode == POOL:
        return _make_pool(case)
    layer = _make_layer(case)
    if workload.mode == FORWARD:
        out = np.empty((workload.steps, workload.batch, case.output_size), workload.dtype)
        return Party(partial(layer, case.x, out=out, **schedule), lambda result: {"output": numpy_copy(result[0])})
    bias = case.parameters["bias_ih_l0"]

    def train() -> tuple[Array, Any]:
        layer.parameters["bias_ih_l0"] = bias  # weights are packed again, as after a step of an optimizer
        tape = layer.record(case.x, **schedule, checkpoint_every=checkpoint_every)
        return tape.output, tape.backward(case.grad_output)

    return Party(train, lambda result: {"output": result[0], "input": result[1].input, **result[1].parameters})


def _make_stream(case: Case) -> Party:
    workload = case.workload
    stream, x, out = _open_stream(case), _stream_input(case), _stream_output(case)
    run = partial(stream.run, x, out) if workload.mode == RUN else partial(stream.step, x[0], out[0])
    return Party(run, lambda _: {"output": out.reshape(workload.steps, workload.batch, -1).copy()})


def _make_pool(case: Case) -> Party:
    workload = case.workload
    pool = _make_layer(case).pool(workload.batch)
    slots = np.array([pool.open() for _ in range(workload.batch)])
    out = np.empty((workload.batch, workload.hidden), workload.dtype)
    return Party(partial(pool.step, case.x[0], slots, out), lambda _: {"output": out[None].copy()})


def _make_separate_streams(case: Case) -> Party:
    layer, workload = _make_layer(case), case.workload
    streams = [layer.stream().step for _ in range(workload.batch)]
    rows, out = list(case.x[0]), list(np.empty((workload.batch, workload.hidden), workload.dtype))

    def run() -> None:
        for step, x, y in zip(streams, rows, out, strict=True):
            step(x, y)

    return Party(run, lambda _: {"output": np.stack(out)[None]})


def _make_separate_steps(case: Case) -> Party:
    step = _open_stream(case).step
    out = _stream_output(case)
    pairs = list(zip(_stream_input(case), out, strict=True))

    def run() -> None:
        for x, y in pairs:
            step(x, y)

    return Party(run, lambda _: {"output": out.reshape(case.workload.steps, case.workload.batch, -1).copy()})


def _open_stream(case: Case) -> Any:
    return _make_layer(case).stream(None if case.workload.batch == 1 else case.workload.batch)


def _stream_input(case: Case) -> Array:
    """x in the shape of a stream: (T, I) for one row, (T, B, I) for several."""
    return case.x[:, 0].copy() if case.workload.batch == 1 else case.x


def _stream_output(case: Case) -> Array:
    """An empty array for the outputs of a stream: (T, O) for one row, (T, B, O) for several."""
    workload = case.workload
    rows = () if workload.batch == 1 else (workload.batch,)
    return np.empty((workload.steps, *rows, case.output_size), workload.dtype)


# ---- networks


def _make_network(case: Case) -> Party:
    import gatewise as gw

    layers: list[Any] = []
    for kind, inputs, outputs, activation in case.workload.blocks:
        options = {"activation": activation} if kind == DENSE else {}
        layers.append(getattr(gw, kind)(inputs, outputs, dtype=case.workload.dtype, seed=1, **options))
    model = gw.Sequential(layers)
    model.load_state_dict(case.parameters)
    step, tokens = model.stream().step, case.tokens()
    out = np.empty(case.output_size, case.workload.dtype)

    def step_on_token(tokens: Iterator[int], out: Array) -> None:
        step(next(tokens), out)

    run = partial(step, case.x[0, 0], out) if tokens is None else partial(step_on_token, tokens, out)
    return Party(run, lambda _: {"output": out[None, None].copy()})


# ---- in frameworks


def _accelerated(case: Case, module: Any) -> Any:
    import gatewise.torch

    module = gatewise.torch.accelerate(module)
    return gatewise.torch.freeze(module) if case.workload.frozen else module


def _make_jax_program(case: Case) -> Party:
    jax.prepare(case)
    import gatewise.jax

    layer = getattr(gatewise.jax, case.workload.cell.lower())
    return jax.make_trained_party(case, lambda parameters, x: layer(parameters, x, **case.schedule)[0])
