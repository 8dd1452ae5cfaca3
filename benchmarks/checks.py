"""The check before anything is timed: gatewise and its peer compute what the reference computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cases import Array, Case, Party, recurrent_only
from .workloads import CONTINUES, DENSE, EMBEDDING, TRAINING

# Relative to the largest element: an approximate tanh with an error of a few 1e-7 passes, another equation does not.
# The gradients of weights are sums of thousands of terms.
TOLERANCES = {"float32": (1e-5, 2e-4), "float64": (1e-10, 1e-9)}
CALLS = 3  # of a party whose calls continue from the state that the last one left


def reference_results(case: Case, *, padded: bool = False) -> dict[str, Array]:
    """The reference's results in float64; where calls continue from each other, the outputs of several calls.

    With `padded` all rows have all steps and no resets, and a network has only its recurrent layers.
    """
    from gatewise import reference

    workload = case.workload
    calls = CALLS if workload.mode in CONTINUES else 1
    if workload.blocks:
        return {"output": _network_output(recurrent_only(case) if padded else case, calls)}
    schedule: dict[str, Any] = {} if padded else case.schedule
    output, _, tape = reference.forward(
        workload.cell.lower(),
        np.tile(case.x, (calls, 1, 1)).astype(float),
        None,
        case.parameters,
        num_layers=workload.layers,
        bidirectional=workload.directions == 2,
        **schedule,
    )
    expected = {"output": output}
    if workload.mode in TRAINING:
        expected["input"], _, gradients = reference.backward(tape, case.grad_output.astype(float))
        expected.update(gradients)
    return expected


def _network_output(case: Case, steps: int) -> Array:
    """Layer after layer, each over all steps."""
    from gatewise import reference

    workload = case.workload
    x: Array = case.x[:steps] if workload.takes_tokens else np.repeat(case.x, steps, axis=0).astype(float)
    for i, block in enumerate(workload.blocks):
        prefix = f"{i}."
        parameters = {
            name.removeprefix(prefix): value.astype(float)
            for name, value in case.parameters.items()
            if name.startswith(prefix)
        }
        if block.kind == EMBEDDING:
            x = parameters["weight"][x]
        elif block.kind == DENSE:
            x = reference.ACTIVATIONS[block.activation](x @ parameters["weight"].T + parameters["bias"])
        else:
            x, _, _ = reference.forward(block.kind.lower(), x, None, parameters)
    return x


def check(case: Case, party: Party, expected: dict[str, Array]) -> None:
    """Raise ValueError if the party's results differ from the expected ones, or lack some.

    Gradients of biases may be missing: Keras has one bias where PyTorch has two.
    """
    output_tolerance, gradient_tolerance = TOLERANCES[case.workload.dtype]
    if case.workload.mode in CONTINUES:
        outputs = [party.collect(party.run())["output"] for _ in range(CALLS)]
        results = {"output": np.concatenate(outputs)}
    else:
        results = party.collect(party.run())
    missing = [name for name in expected if name not in results and not name.startswith("bias_")]
    if missing:
        raise ValueError(f"no {', '.join(missing)} among the results")
    for name, value in results.items():
        if value.shape != expected[name].shape:
            raise ValueError(f"wrong {name}: shape {value.shape}, expected {expected[name].shape}")
        tolerance = output_tolerance if name == "output" else gradient_tolerance
        error = np.abs(value - expected[name]).max() / np.abs(expected[name]).max()
        if not error <= tolerance:
            raise ValueError(
                f"wrong {name}: error {error:.1e} of the largest element, expected {tolerance:.0e} at most"
            )
