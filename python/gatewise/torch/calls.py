"""One call of a layer in the core, on tensors by their addresses: forward, and backpropagation through time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gatewise._core as _core
from gatewise.torch.architectures import sequence_count, weights_by_sequence
from gatewise.torch.tensors import address, dense, empty, with_dense_rows
from gatewise.weights.architecture import Architecture


@dataclass(frozen=True)
class Call:
    """Everything about a call except its tensors."""

    architecture: Architecture
    batch_first: bool
    steps: int  # T of the tensors
    longest: int  # steps of the longest row
    batch: int
    schedule: _core.Schedule | None
    checkpoint_every: int
    dropout: float
    seed: int
    packed_rows: int | None = None  # sequences are [packed_rows, units]: the rows of each step after those of the last

    def on(self, packed: _core.Packed) -> _core.Foreign:
        """The call in the core, with these weights."""
        return _core.Foreign(
            packed,
            self.longest,
            self.batch,
            self.schedule,
            self.checkpoint_every,
            self.dropout,
            self.seed,
            torch.get_num_threads(),
        )

    def new_sequence(self, units: int, dtype: torch.dtype) -> Tensor:
        """[T, B, units] in the caller's order of axes, uninitialised but for zeros after the longest row; or packed."""
        if self.packed_rows is not None:
            return empty((self.packed_rows, units), dtype)
        shape = (self.batch, self.steps, units) if self.batch_first else (self.steps, self.batch, units)
        tensor = empty(shape, dtype)
        if self.longest < self.steps:
            tensor.narrow(1 if self.batch_first else 0, self.longest, self.steps - self.longest).zero_()
        return tensor

    def new_state(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """h [L*D, B, R] and, for LSTM, c [L*D, B, H], uninitialised."""
        sequences = sequence_count(self.architecture)
        hidden = empty((sequences, self.batch, self.architecture.recurrent_size), dtype)
        if not self.architecture.has_cell_state:
            return hidden, None
        return hidden, empty((sequences, self.batch, self.architecture.hidden_size), dtype)

    def rows(self, sequence: Tensor | None) -> tuple[int, int, int]:
        """Address, stride of a step and stride of a row of a sequence with dense rows, which may be packed."""
        if sequence is None:
            return 0, 0, 0
        if self.packed_rows is not None:
            return sequence.data_ptr(), 0, sequence.stride(0)
        first, second, _ = sequence.stride()
        return (sequence.data_ptr(), second, first) if self.batch_first else (sequence.data_ptr(), first, second)


class Outputs(NamedTuple):
    """What a forward pass gives."""

    y: Tensor
    h: Tensor
    c: Tensor | None


class Recording(NamedTuple):
    """What a backward pass needs of the forward pass."""

    x: Tensor
    h: Tensor | None
    y: Tensor
    tape: Tensor
    weights: Sequence[Tensor]


def run_forward(
    call: Call, core_call: _core.Foreign, x: Tensor, h: Tensor | None, c: Tensor | None, tape: Tensor | None
) -> Outputs:
    """x with dense rows; h and c dense, None for zeros; `tape` to record on, if any."""
    y = call.new_sequence(call.architecture.output_size, x.dtype)
    outputs = Outputs(y, *call.new_state(x.dtype))
    core_call.forward(
        call.rows(x),
        address(h),
        address(c),
        call.rows(y),
        address(outputs.h),
        address(outputs.c),
        address(tape),
    )
    return outputs


def run_backward(
    call: Call, core_call: _core.Foreign, recording: Recording, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Any]]:
    """Gradients of x, of h and c before, and of the weights.

    `grads` are those of y, h and c after. `needs` says of x and of each weight whether its gradient is needed.
    """
    architecture, dtype = call.architecture, recording.x.dtype
    grad_y = None if grads[0] is None else with_dense_rows(grads[0])
    grad_h, grad_c = (None if grad is None else dense(grad) for grad in grads[1:])
    grad_x = call.new_sequence(architecture.input_size, dtype) if needs[0] else None
    grad_h_before, grad_c_before = call.new_state(dtype)
    weight_grads = _new_weight_grads(architecture, recording.weights, needs[1:])
    core_call.backward(
        call.rows(recording.x),
        address(recording.h),
        call.rows(recording.y),
        address(recording.tape),
        call.rows(grad_y),
        address(grad_h),
        address(grad_c),
        call.rows(grad_x),
        address(grad_h_before),
        address(grad_c_before),
        [[address(grad) for grad in group] for group in weights_by_sequence(architecture, weight_grads)],
    )
    weight_grads = [grad if need else None for grad, need in zip(weight_grads, needs[1:], strict=True)]
    return grad_x, grad_h_before, grad_c_before, weight_grads


def _new_weight_grads(
    architecture: Architecture, weights: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The core computes the gradients of all weights of a layer and direction, or of none."""
    count = len(weights) // sequence_count(architecture)
    grads: list[Tensor | None] = []
    for first in range(0, len(weights), count):
        is_needed = any(needs[first : first + count])
        grads += [empty(weight.shape, weight.dtype) if is_needed else None for weight in weights[first : first + count]]
    return grads


def output_for_backward(cell: str, y: Tensor) -> Tensor:
    """What backward reads as y. The caller may change the output of a GRU or RNN in place, as with torch.nn's.

    An LSTM saves y itself: after such a change backward raises an error, as it does for torch.nn's in float32.
    """
    return y if cell == "lstm" else y.clone()


# ---- what users see


def with_batch(x: Any, state: Sequence[Any] | None) -> tuple[Any, tuple[Any, ...] | None]:
    """A single sequence [T, I] and its state [L*D, .] as a batch of one row."""
    return x.unsqueeze(1), None if state is None else tuple(part.unsqueeze(1) for part in state)


def result_of(y: Any, state: Sequence[Any], *, is_batched: bool = True) -> tuple[Any, Any]:
    """Output and state as torch.nn's layers return them, without the axis that `with_batch` has added."""
    if not is_batched:
        y, state = y.squeeze(1), [part.squeeze(1) for part in state]
    return y, tuple(state) if len(state) > 1 else state[0]
