"""ONNX Runtime with the same model, for `gatewise bench` to compare with."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import gatewise as gw
from gatewise.arguments.arrays import Array
from gatewise.arguments.axes import Axes
from gatewise.running.network import Chain


@dataclass(frozen=True)
class OnnxRuntime:
    """A session whose first input is x and first output is y; all other inputs and outputs are states."""

    session: Any
    dtype: np.dtype[Any]

    @property
    def states(self) -> list[Any]:
        return list(self.session.get_inputs()[1:])

    @property
    def outputs(self) -> list[str]:
        return [output.name for output in self.session.get_outputs()]

    @property
    def can_step(self) -> bool:
        """Whether the graph gives back each state that it takes."""
        return len(self.states) + 1 == len(self.outputs)

    def zero_states(self, batch: int) -> dict[str, Array]:
        """Zeros for each state; the only size that a graph leaves open is that of the batch."""
        shapes = {
            state.name: [size if isinstance(size, int) else batch for size in state.shape] for state in self.states
        }
        return {name: np.zeros(shape, self.dtype) for name, shape in shapes.items()}

    def run_sequence(self, batch: int, x: Array) -> Array:
        input_name = self.session.get_inputs()[0].name
        y: Array = self.session.run(self.outputs[:1], {input_name: x, **self.zero_states(batch)})[0]
        return y

    def make_stepper(self) -> Callable[[Array], None]:
        """A function that advances one row, each time from the states that its last call left."""
        input_name, outputs, feed = self.session.get_inputs()[0].name, self.outputs, self.zero_states(1)
        states = [state.name for state in self.states]

        def step(x: Array) -> None:
            feed[input_name] = x
            _, *states_after = self.session.run(outputs, feed)
            feed.update(zip(states, states_after, strict=True))

        return step


def random_input(chain: Chain, leading: tuple[int, ...]) -> Array:
    """Random tokens or numbers for a model, with the given axes before those of a step."""
    generator = np.random.default_rng(1)
    if chain.vocabulary is not None:
        return generator.integers(0, chain.vocabulary, leading)
    return generator.standard_normal((*leading, *chain.units)).astype(chain.dtype)


def open_onnx_runtime(model: gw.Sequential) -> tuple[OnnxRuntime | None, str | None]:
    """ONNX Runtime with the same model, or None and the reason."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None, "not installed; try: pip install onnxruntime onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = gw.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        try:
            gw.save(model, path)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            runtime = OnnxRuntime(session, model.dtype)
            x = random_input(model._chain, Axes(model.batch_first, False, 3, 2).leading)
            y, expected = runtime.run_sequence(2, x), model(x)
            if runtime.can_step:
                runtime.make_stepper()(random_input(model._chain, (1, 1)))
        except Exception as error:  # ONNX Runtime's errors have no common base class
            return None, f"left out: {' '.join(str(error).split())[:200]}"
    if y.shape != expected.shape or not np.allclose(y, expected, rtol=1e-3, atol=1e-3):
        return None, "left out: its output differs"
    return runtime, None
