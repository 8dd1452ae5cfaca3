"""The data of a workload, which all peers get, and what a peer makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .workloads import DENSE, EMBEDDING, ONE_STEP, RUN, Workload, gate_count

Array = npt.NDArray[Any]
# A model of one call takes the state as an input, and gives it back as an output.
WITH_STATES = (*ONE_STEP, RUN)
# Tokens before they repeat. The row of a single token would stay in the first cache.
TOKENS = 1000


@dataclass(frozen=True)
class Case:
    """A workload with its data, in PyTorch's names and shapes.

    `x` is (T, B, I), `grad_output` (T, B, D * H). For a single step, x has one step. The parameters of a network have
    the number of their layer before their names. Tokens are (N, 1), one for each step; they start again after N steps.
    """

    workload: Workload
    threads: int
    parameters: Mapping[str, Array]
    x: Array
    grad_output: Array

    @property
    def schedule(self) -> dict[str, Array]:
        """The arguments of gatewise's calls that say when a row starts and ends."""
        arguments = {"lengths": self.workload.lengths, "resets": self.workload.resets}
        return {name: value for name, value in arguments.items() if value is not None}

    @property
    def output_size(self) -> int:
        workload = self.workload
        return workload.blocks[-1].outputs if workload.blocks else workload.directions * workload.hidden

    @property
    def suffixes(self) -> list[list[str]]:
        """What the names of parameters end in: a list for each layer, with an entry for each direction."""
        directions = ("", "_reverse")[: self.workload.directions]
        return [[f"l{layer}{direction}" for direction in directions] for layer in range(self.workload.layers)]

    def tokens(self) -> Iterator[int] | None:
        """Tokens without end, if the network takes them."""
        return cycle(self.x[:, 0].tolist()) if self.workload.takes_tokens else None

    def zero_states(self) -> dict[str, Array]:
        """The states (1, B, H) that a model of one call has as inputs: h and c, in a network h0, c0, h1, ..."""
        workload = self.workload
        if workload.blocks:
            layers = [
                (f"{i}", block.kind, block.outputs) for i, block in enumerate(workload.blocks) if block.is_recurrent
            ]
        else:
            layers = [("", workload.cell, workload.hidden)] if workload.mode in WITH_STATES else []
        return {
            f"{name}{number}": np.zeros((1, workload.batch, hidden), workload.dtype)
            for number, cell, hidden in layers
            for name in ("hc" if cell == "LSTM" else "h")
        }


class Party(NamedTuple):
    """A peer, or gatewise, ready to work on a case. Only `run` is timed; single steps keep their state across calls."""

    run: Callable[[], Any]
    # Of the result of `run`: "output" (T, B, D * H), and after training the gradients of "input" and the parameters.
    collect: Callable[[Any], dict[str, Array]]


def numpy_copy(value: Any) -> Array:
    return np.array(value, copy=True)


def recurrent_only(case: Case) -> Case:
    """The recurrent layers of a network, in their order, with the input of the first of them."""
    workload = case.workload
    numbers = [i for i, block in enumerate(workload.blocks) if block.is_recurrent]
    parameters = {}
    for key, value in case.parameters.items():
        number, name = key.split(".", 1)
        if int(number) in numbers:
            parameters[f"{numbers.index(int(number))}.{name}"] = value
    x = case.parameters["0.weight"][case.x[:1]] if workload.takes_tokens else case.x
    blocks = tuple(workload.blocks[i] for i in numbers)
    return replace(case, workload=replace(workload, blocks=blocks), parameters=parameters, x=x)


# ---- random data


def make_case(workload: Workload, threads: int) -> Case:
    """Uniform weights with PyTorch's bounds and normal inputs, the same for all peers."""
    random = np.random.default_rng(1)
    weights = _network_weights(random, workload)
    for index, (inputs, hidden) in enumerate(() if workload.blocks else workload.sequences):
        suffix = f"l{index // workload.directions}" + "_reverse" * (index % workload.directions)
        weights.update(_recurrent_weights(random, workload.cell, inputs, hidden, suffix))
    parameters = {name: value.astype(workload.dtype) for name, value in weights.items()}
    steps, batch = workload.steps, workload.batch
    x: Array = random.standard_normal((steps, batch, workload.input)).astype(workload.dtype)
    if workload.takes_tokens:
        x = random.integers(workload.blocks[0].inputs, size=(TOKENS, batch))
    grad_output = random.standard_normal((steps, batch, workload.directions * workload.hidden)).astype(workload.dtype)
    if workload.lengths is not None:  # a peer that computes the padding must get the same gradients
        grad_output[np.arange(steps)[:, None] >= workload.lengths] = 0
    return Case(workload, threads, parameters, x, grad_output)


def _network_weights(random: np.random.Generator, workload: Workload) -> dict[str, Array]:
    """The weights of a network, each name after the number of its layer."""
    parameters: dict[str, Array] = {}
    for i, (kind, inputs, outputs, _) in enumerate(workload.blocks):
        if kind == EMBEDDING:
            weights = {"weight": random.standard_normal((inputs, outputs))}
        elif kind == DENSE:
            weights = _uniform(random, inputs, {"weight": (outputs, inputs), "bias": (outputs,)})
        else:
            weights = _recurrent_weights(random, kind, inputs, outputs, "l0")
        parameters.update({f"{i}.{name}": value for name, value in weights.items()})
    return parameters


def _recurrent_weights(
    random: np.random.Generator, cell: str, inputs: int, hidden: int, suffix: str
) -> dict[str, Array]:
    rows = gate_count(cell) * hidden
    shapes = {"weight_ih": (rows, inputs), "weight_hh": (rows, hidden), "bias_ih": (rows,), "bias_hh": (rows,)}
    return _uniform(random, hidden, {f"{kind}_{suffix}": shape for kind, shape in shapes.items()})


def _uniform(random: np.random.Generator, size: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    bound = 1 / np.sqrt(size)
    return {name: random.uniform(-bound, bound, shape) for name, shape in shapes.items()}
