"""The options of a call, and the order of the operands and results of the primitives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, TypeAlias

import jax
import numpy as np

import gatewise._core as _core
from gatewise.weights.architecture import Architecture

Operands: TypeAlias = Sequence[Any]
Flags: TypeAlias = tuple[bool, ...]


@dataclass(frozen=True)
class Options:
    """All that a call depends on besides its arrays; JAX compiles once for each value."""

    architecture: Architecture
    batch_first: bool
    has_lengths: bool
    has_resets: bool
    checkpoint_every: int
    backend: str

    @property
    def state_sizes(self) -> list[int]:
        """The size of h, and of c if there is one."""
        architecture = self.architecture
        sizes = [architecture.recurrent_size, architecture.hidden_size]
        return sizes if architecture.has_cell_state else sizes[:1]

    @property
    def num_states(self) -> int:
        return len(self.state_sizes)

    @property
    def num_sequences(self) -> int:
        """The number of layers times directions, L*D."""
        return self.architecture.num_layers * self.architecture.directions

    def steps_and_batch(self, x: Any) -> tuple[int, int]:
        return (x.shape[1], x.shape[0]) if self.batch_first else (x.shape[0], x.shape[1])

    def split(self, operands: Operands) -> tuple[Any, list[Any], list[Any], list[Any]]:
        """Split the operands of a forward call into x, states, extras (lengths and resets, if any) and weights."""
        x, *others = operands
        first_weight = self.num_states + self.has_lengths + self.has_resets
        return x, others[: self.num_states], others[self.num_states : first_weight], others[first_weight:]

    @property
    def batch_axes(self) -> list[int]:
        """The batch axis of each operand before the weights."""
        axis = 0 if self.batch_first else 1
        return [axis] + [1] * self.num_states + [0] * self.has_lengths + [axis] * self.has_resets

    def by_sequence(self, weights: Sequence[Any]) -> list[list[Any]]:
        """Group what belongs to the weights by layer and direction."""
        count = len(weights) // self.num_sequences
        return [list(weights[first : first + count]) for first in range(0, len(weights), count)]

    def result_shapes(self, x: Any) -> list[jax.ShapeDtypeStruct]:
        """The shapes of y, and of h and c after the last step."""
        steps, batch = self.steps_and_batch(x)
        leading = (batch, steps) if self.batch_first else (steps, batch)
        state_shapes = [(self.num_sequences, batch, size) for size in self.state_sizes]
        shapes = [(*leading, self.architecture.output_size), *state_shapes]
        return [jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes]

    def gradient_shapes(self, forward_operands: Operands, needed_grads: Flags) -> list[jax.ShapeDtypeStruct]:
        """The shapes of the gradients that `backward` returns: of x if needed, of the states, of some weights."""
        x, states, _, weights = self.split(forward_operands)
        differentiated = [x] * needed_grads[0] + states
        for sequence_weights in compress(self.by_sequence(weights), needed_grads[1:]):
            differentiated += sequence_weights
        return [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in differentiated]

    def packed_and_tape_bytes(self, steps: int, batch: int) -> tuple[int, int]:
        """The sizes of the packed weights and of a tape."""
        architecture = self.architecture
        if not isinstance(steps * batch, int):
            raise NotImplementedError(
                f"x: expected sizes that are numbers where a derivative is to follow, got ({steps}, {batch})"
            )
        return _core.xla_sizes(
            self.backend,
            architecture.cell,
            architecture.dtype.itemsize,
            architecture.input_size,
            architecture.hidden_size,
            architecture.proj_size,
            architecture.num_layers,
            architecture.directions,
            steps,
            batch,
            min(self.checkpoint_every, steps),
        )

    def attributes(self, *, weights_only: bool = False, record: bool = False) -> dict[str, Any]:
        """The attributes that every handler of the core reads; see Numbers in cpp/bindings."""
        architecture = self.architecture
        stack = [
            architecture.input_size,
            architecture.hidden_size,
            architecture.proj_size,
            architecture.num_layers,
            architecture.directions,
            architecture.bias,
        ]
        call = [self.batch_first, self.has_lengths, self.has_resets, self.checkpoint_every, record]
        numbers = stack + ([0] * len(call) if weights_only else call)
        return {"numbers": np.array(numbers, np.int64), "backend": self.backend, "cell": architecture.cell}


def split_tangent(operands: Operands, nonzero_tangents: Flags) -> tuple[Operands, Operands]:
    """Split the operands of `tangent` into those of forward and the tangents; y and the tape between are left out."""
    first_tangent = len(operands) - sum(nonzero_tangents)
    return operands[: first_tangent - 2], operands[first_tangent:]


def split_backward(operands: Operands, nonzero_grads: Flags) -> tuple[Operands, Any, Any, Operands]:
    """Split the operands of `backward` into those of forward, y, the tape, and the gradients of y, h and c."""
    first_grad = len(operands) - sum(nonzero_grads)
    *forward, y, tape = operands[:first_grad]
    return forward, y, tape, operands[first_grad:]
