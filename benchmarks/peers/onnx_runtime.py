"""ONNX Runtime: a session on the processor, with arrays in and out or with bound memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from ..cases import Case, Party, numpy_copy
from .onnx_models import make_model


def make(case: Case) -> Party:
    """InferenceSession.run of the ONNX operator, all graph optimizations on, NumPy arrays in and out.

    For a network the graph that torch.onnx.export makes, with the states as inputs and outputs.
    """
    session = _make_session(case)
    states = case.zero_states()
    feed = {"x": case.x, **states}
    tokens = cycle(list(case.x[:, None])) if case.workload.takes_tokens else None

    def run() -> Any:
        if tokens is not None:
            feed["x"] = next(tokens)
        y, *states_after = session.run(None, feed)
        feed.update(zip(states, states_after, strict=True))
        return y

    return Party(run, lambda y: {"output": numpy_copy(y).reshape(case.workload.steps, case.workload.batch, -1)})


def make_bound(case: Case) -> Party:
    """InferenceSession.run_with_iobinding: inputs and outputs bound once, a step's state bound in place."""
    import onnxruntime

    session = _make_session(case)
    binding = session.io_binding()
    as_value = onnxruntime.OrtValue.ortvalue_from_numpy
    states = {name: as_value(value) for name, value in case.zero_states().items()}
    workload, tokens = case.workload, case.tokens()
    rows = (workload.batch,) if workload.blocks else (workload.steps, workload.batch)
    output = as_value(np.zeros((*rows, case.output_size), workload.dtype))
    x = case.x if tokens is None else case.x[:1].copy()  # the session reads this memory
    binding.bind_ortvalue_input("x", as_value(x))
    binding.bind_ortvalue_output("y", output)
    for name, value in states.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(f"{name}_after", value)

    def step_on_token(tokens: Iterator[int]) -> None:
        x[0, 0] = next(tokens)
        session.run_with_iobinding(binding)

    run = partial(session.run_with_iobinding, binding) if tokens is None else partial(step_on_token, tokens)
    return Party(run, lambda _: {"output": numpy_copy(output.numpy()).reshape(workload.steps, workload.batch, -1)})


def _make_session(case: Case) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(make_model(case), options, providers=["CPUExecutionProvider"])
