"""The models in ONNX that ONNX Runtime and OpenVINO run."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from typing import Any

import numpy as np

from ..cases import WITH_STATES, Array, Case
from ..workloads import Workload, gate_count
from . import pytorch, refusals

# The gates of PyTorch in ONNX's order: i o f c; z r h.
GATE_ORDERS = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}


def refusal(workload: Workload) -> str | None:
    """Why a runtime of ONNX models takes no part in a workload."""
    return (
        refusals.other_framework(workload)
        or refusals.training(workload)
        or refusals.uneven_rows(workload)
        or refusals.float64(workload)
    )


def make_model(case: Case) -> bytes:
    """The layers as LSTM or GRU operators.

    The inputs are x and, for a step or a block, the states; the outputs are y and the states after it.
    """
    return _export_network(case) if case.workload.blocks else _build_layers(case)


def _export_network(case: Case) -> bytes:
    """PyTorch's export. The inputs are x and the states, the outputs y and the states after the step."""
    import torch

    torch.set_num_threads(1)  # so that only the runtime that is measured has more
    states = {name: torch.from_numpy(value) for name, value in case.zero_states().items()}
    file = BytesIO()
    torch.onnx.export(
        pytorch.make_network_module(case, is_eager=False),
        (torch.from_numpy(case.x[:1]), *states.values()),
        file,
        input_names=["x", *states],
        output_names=["y", *(f"{name}_after" for name in states)],
        opset_version=17,
        dynamo=False,  # the other exporter needs more packages
    )
    return file.getvalue()


def _build_layers(case: Case) -> bytes:
    from onnx import checker, helper

    workload = case.workload
    nodes: list[Any] = []
    weights: list[Any] = []
    output = "x"
    for layer in range(workload.layers):
        output = _add_layer(case, layer, output, nodes, weights)
    nodes[-1].output[0] = "y"

    element = helper.np_dtype_to_tensor_dtype(np.dtype(workload.dtype))
    info = partial(helper.make_tensor_value_info, elem_type=element)
    states = case.zero_states()
    graph = helper.make_graph(
        nodes,
        workload.cell,
        [info("x", shape=case.x.shape), *(info(name, shape=value.shape) for name, value in states.items())],
        [
            info("y", shape=[workload.steps, workload.batch, case.output_size]),
            *(info(f"{name}_after", shape=value.shape) for name, value in states.items()),
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def _add_layer(case: Case, layer: int, source: str, nodes: list[Any], weights: list[Any]) -> str:
    """Add the nodes and weights of a layer; return the name of its output (T, B, D * H)."""
    from onnx import helper, numpy_helper

    workload = case.workload
    states = ["h", "c"] if workload.cell == "LSTM" else ["h"]
    has_states = workload.mode in WITH_STATES

    def constant(name: str, value: Array) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(value), f"{name}{layer}"))
        return f"{name}{layer}"

    biases = [_stacked_gates(case, kind, layer) for kind in ("bias_ih", "bias_hh")]
    inputs = [
        source,
        constant("W", _stacked_gates(case, "weight_ih", layer)),
        constant("R", _stacked_gates(case, "weight_hh", layer)),
        constant("B", np.concatenate(biases, axis=1)),
        *(["", *states] if has_states else []),
    ]
    outputs = [f"Y{layer}", *(f"{state}_after" if has_states else "" for state in states)]
    options: dict[str, Any] = {"linear_before_reset": 1} if workload.cell == "GRU" else {}
    options["direction"] = "bidirectional" if workload.directions == 2 else "forward"
    nodes.append(helper.make_node(workload.cell, inputs, outputs, hidden_size=workload.hidden, **options))
    # The operator's output is [T, D, B, H].
    if workload.directions == 1:
        axis = constant("axis", np.array([1]))
        nodes.append(helper.make_node("Squeeze", [f"Y{layer}", axis], [f"y{layer}"]))
    else:
        shape = constant("shape", np.array([workload.steps, workload.batch, case.output_size]))
        nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"t{layer}", shape], [f"y{layer}"]))
    return f"y{layer}"


def _stacked_gates(case: Case, kind: str, layer: int) -> Array:
    """The weights or biases of a layer [D, G * H, ...], gates in ONNX's order."""
    cell = case.workload.cell
    directions = []
    for suffix in case.suffixes[layer]:
        gates = np.split(case.parameters[f"{kind}_{suffix}"], gate_count(cell))
        directions.append(np.concatenate([gates[gate] for gate in GATE_ORDERS[cell]]))
    return np.stack(directions)
