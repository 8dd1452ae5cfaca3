"""OpenVINO: a model in ONNX, compiled for the processor."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cases import Case, Party, numpy_copy
from ..workloads import Workload
from . import onnx_models, refusals


def make(case: Case) -> Party:
    """A model compiled with the latency hint and in float32, tensors shared with NumPy, InferRequest.infer."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(onnx_models.make_model(case), b"")
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    x = np.ascontiguousarray(case.x)
    request.set_tensor("x", ov.Tensor(x, shared_memory=True))
    # Two buffers for each state, exchanged after each step, since input and output must be different memory.
    states = {name: [value, value.copy()] for name, value in case.zero_states().items()}
    tensors = {name: [ov.Tensor(buffer, shared_memory=True) for buffer in pair] for name, pair in states.items()}
    input_buffer = 0

    def run() -> Any:
        nonlocal input_buffer
        for name, pair in tensors.items():
            request.set_tensor(name, pair[input_buffer])
            request.set_tensor(f"{name}_after", pair[1 - input_buffer])
        input_buffer = 1 - input_buffer
        request.infer()
        return request

    # x must live as long as the tensor that shares its memory.
    return Party(run, lambda result: {"output": numpy_copy(result.get_tensor("y").data).reshape(*x.shape[:2], -1)})


def refusal(workload: Workload) -> str | None:
    return onnx_models.refusal(workload) or refusals.networks(workload)
