"""The custom operator gatewise::recurrent: one node with a shape for torch.compile and torch.export to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, library

import gatewise._core as _core
from gatewise.arguments.sequences import schedule_of
from gatewise.running.layout import Layout
from gatewise.torch.architectures import (
    LAYER_CELLS,
    LayerAttributes,
    dropout_of,
    make_architecture,
    sequence_count,
    weight_shapes,
)
from gatewise.torch.calls import (
    Call,
    Recording,
    output_for_backward,
    result_of,
    run_backward,
    run_forward,
    with_batch,
)
from gatewise.torch.eligibility import refuse_own_options, traced_obstacle
from gatewise.torch.packing import pack
from gatewise.torch.tensors import DTYPES, dense, with_dense_rows
from gatewise.weights.architecture import Architecture

# sizes: input_size, hidden_size, num_layers, proj_size, checkpoint_every; flags: bias, bidirectional, batch_first.
# The tape is bytes, empty if nothing is recorded. c and its gradients are empty for cells without a cell state.
_OPTIONS = "str cell, int[] sizes, bool[] flags, Tensor? lengths, Tensor? resets, float dropout, Tensor? seed"
_library = library.Library("gatewise", "DEF")
_library.define(
    f"recurrent(Tensor x, Tensor? h, Tensor? c, Tensor[] weights, {_OPTIONS}, bool record)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "recurrent_backward(Tensor x, Tensor? h, Tensor[] weights, Tensor y, Tensor tape, Tensor? grad_y, Tensor? grad_h, "
    f"Tensor? grad_c, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor[])"
)


class Options(NamedTuple):
    """The operator's arguments that are not tensors to compute with."""

    cell: str
    sizes: Sequence[int]
    flags: Sequence[bool]
    lengths: Tensor | None
    resets: Tensor | None
    dropout: float
    seed: Tensor | None

    @property
    def batch_first(self) -> bool:
        return self.flags[2]

    @property
    def checkpoint_every(self) -> int:
        return self.sizes[4]

    def architecture(self, dtype: torch.dtype) -> Architecture:
        input_size, hidden_size, num_layers, proj_size, _ = self.sizes
        bias, bidirectional, _ = self.flags
        return make_architecture(self.cell, input_size, hidden_size, num_layers, bias, bidirectional, proj_size, dtype)

    def extent(self, x: Tensor) -> tuple[Any, Any]:
        """T and B of x, which may be symbols."""
        return (x.shape[1], x.shape[0]) if self.batch_first else (x.shape[0], x.shape[1])

    def output_shapes(self, x: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """The shapes of y, h and c, whose sizes may be symbols."""
        architecture, (_, batch) = self.architecture(x.dtype), self.extent(x)
        sequences = sequence_count(architecture)
        return (
            (*x.shape[:2], architecture.output_size),
            (sequences, batch, architecture.recurrent_size),
            (sequences, batch, architecture.hidden_size),
        )

    def call(self, x: Tensor) -> Call:
        architecture, (steps, batch) = self.architecture(x.dtype), self.extent(x)
        schedule, longest = None, steps
        if self.lengths is not None or self.resets is not None:
            layout = Layout(architecture, self.batch_first, False, steps, batch)
            schedule, longest = schedule_of(layout, self.lengths, self.resets)
        return Call(
            architecture,
            self.batch_first,
            steps,
            longest,
            batch,
            schedule,
            checkpoint_every=min(self.checkpoint_every, longest),
            dropout=self.dropout,
            seed=int(self.seed) if self.seed is not None else 0,
        )


_CELLS = _core.cells()


def tape_bytes(options: Options, x: Tensor) -> Any:
    """The size of a tape on which all rows have all steps, from sizes that may be symbols."""
    architecture, (steps, batch) = options.architecture(x.dtype), options.extent(x)
    lanes, item = _core.lanes()[architecture.dtype == np.float64], architecture.dtype.itemsize
    cell = _CELLS[options.cell]
    every = options.checkpoint_every
    states = -(-steps // every) * batch if every else steps * batch
    units = -(-architecture.hidden_size // lanes) * lanes

    def cache_lines(count: Any) -> Any:
        return -(-count * item // 64) * 64

    per_sequence = cache_lines(states * units) * cell["carried"]
    per_sequence += 0 if every else cache_lines(states * units * cell["kept"])
    between_layers = cache_lines(steps * batch * architecture.output_size) * (architecture.num_layers - 1)
    return per_sequence * sequence_count(architecture) + between_layers


# ---- what the operator does


# A tape ends with the name of the backend that wrote it.
_BACKEND_BYTES = 64


def _backend_name() -> Tensor:
    name = _core.backend().encode()[:_BACKEND_BYTES].ljust(_BACKEND_BYTES)
    return torch.frombuffer(bytearray(name), dtype=torch.uint8)


def _recurrent(
    x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options, record = Options(*arguments[:-1]), arguments[-1]
    _check(options, x, h, c, weights)
    call, x = options.call(x), with_dense_rows(x)
    h, c = (None if part is None else dense(part) for part in (h, c))
    # Zeros, because the gaps between its parts are never written, and PyTorch's opcheck compares an operator's outputs.
    tape = torch.zeros(tape_bytes(options, x) + _BACKEND_BYTES if record else 0, dtype=torch.uint8, device="cpu")
    if record:
        tape[-_BACKEND_BYTES:] = _backend_name()
    packed = pack(options.architecture(x.dtype), weights)
    y, h_after, c_after = run_forward(call, call.on(packed), x, h, c, tape if record else None)
    return y, h_after, x.new_empty(0) if c_after is None else c_after, tape


def _recurrent_backward(
    x: Tensor,
    h: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    tape: Tensor,
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    options = Options(*arguments)
    _check(options, x, h, None, weights)
    _check_recorded(options, x, y, tape, (grad_y, grad_h, grad_c))
    call, x = options.call(x), with_dense_rows(x)
    core_call = call.on(pack(options.architecture(x.dtype), weights))
    recording = Recording(x, None if h is None else dense(h), y.contiguous(), tape, weights)
    grads = [None if grad is None else grad.resolve_neg() for grad in (grad_y, grad_h, grad_c)]
    needs = [True] * (1 + len(weights))
    grad_x, grad_h_before, grad_c_before, weight_grads = run_backward(call, core_call, recording, grads, needs)
    assert grad_x is not None
    return grad_x, grad_h_before, x.new_empty(0) if grad_c_before is None else grad_c_before, weight_grads


def _check(options: Options, x: Tensor, h: Any, c: Any, weights: Sequence[Tensor]) -> None:
    """Check what the core takes for granted, because anyone can call the operator. Sizes may be symbols."""
    input_size = options.sizes[0]
    if x.dtype not in DTYPES or x.dim() != 3 or x.shape[2] != input_size:
        raise ValueError(
            f"gatewise::recurrent: x: expected float32 or float64 (., ., {input_size}), got {x.dtype}, {x.shape}"
        )
    architecture = options.architecture(x.dtype)
    shapes = weight_shapes(architecture)
    if len(shapes) != len(weights) or (c is not None and not architecture.has_cell_state):
        raise ValueError(
            f"gatewise::recurrent: expected {len(shapes)} weights, and c for LSTM only, got {len(weights)}"
        )
    _, h_shape, c_shape = options.output_shapes(x)
    expected: list[tuple[str, Any, tuple[Any, ...]]] = [("h", h, h_shape), ("c", c, c_shape)]
    expected += [
        (f"weights[{i}]", weight, shape) for i, (weight, shape) in enumerate(zip(weights, shapes, strict=True))
    ]
    for name, tensor, shape in expected:
        if tensor is not None and not _has(tensor, x.dtype, shape):
            raise ValueError(
                f"gatewise::recurrent: {name}: expected {x.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )


def _has(tensor: Any, dtype: torch.dtype, shape: Sequence[Any]) -> bool:
    return (
        tensor.dtype == dtype
        and tensor.dim() == len(shape)
        and all(size == expected for size, expected in zip(tensor.shape, shape, strict=True))
    )


def _check_recorded(options: Options, x: Tensor, y: Tensor, tape: Tensor, grads: Sequence[Tensor | None]) -> None:
    if tape.dtype != torch.uint8 or tape.numel() < _BACKEND_BYTES:
        raise RuntimeError("gatewise::recurrent: backward without a tape: forward ran, or was exported, under no_grad")
    is_from_backend = torch.equal(tape[-_BACKEND_BYTES:], _backend_name())
    if not is_from_backend or tape.numel() != tape_bytes(options, x) + _BACKEND_BYTES:
        raise RuntimeError("gatewise::recurrent: backward on another backend or of other sizes than forward")
    shapes = options.output_shapes(x)
    for tensor, shape in zip((y, *grads), (shapes[0], *shapes), strict=True):
        if tensor is not None and not _has(tensor, x.dtype, shape):
            raise ValueError(
                f"gatewise::recurrent: expected a gradient {x.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )


# ---- its shapes, for tensors without numbers


def _recurrent_fake(
    x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if torch.onnx.is_in_onnx_export():  # of an ExportedProgram: a module is exported as torch.nn's
        raise RuntimeError(
            "gatewise::recurrent has no function in ONNX: expected the module itself in torch.onnx.export, or "
            "gatewise.torch.restore(model) before torch.export.export"
        )
    options, record = Options(*arguments[:-1]), arguments[-1]
    _check(options, x, h, c, weights)
    size = tape_bytes(options, x) + _BACKEND_BYTES if record else 0
    y_shape, h_shape, c_shape = options.output_shapes(x)
    return (
        x.new_empty(y_shape),
        x.new_empty(h_shape),
        x.new_empty(c_shape if options.cell == "lstm" else 0),
        x.new_empty(size, dtype=torch.uint8),
    )


def _recurrent_backward_fake(
    x: Tensor,
    h: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    tape: Tensor,
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    options = Options(*arguments)
    _, h_shape, c_shape = options.output_shapes(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(h_shape),
        x.new_empty(c_shape if options.cell == "lstm" else 0),
        [weight.new_empty(weight.shape) for weight in weights],
    )


# ---- its derivatives


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h, c, weights, *arguments = inputs
    cell, (y, _, _, tape) = arguments[0], output
    ctx.save_for_backward(x, h, output_for_backward(cell, y), tape, *weights)
    ctx.arguments, ctx.has_state = arguments[:-1], (h is not None, c is not None)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, h, y, tape, *weights = ctx.saved_tensors
    has_cell_state = ctx.arguments[0] == "lstm"
    grad_x, grad_h_before, grad_c_before, weight_grads = torch.ops.gatewise.recurrent_backward(
        x, h, weights, y, tape, grad_y, grad_h, grad_c if has_cell_state else None, *ctx.arguments
    )
    has_h, has_c = ctx.has_state
    none = [None] * (len(ctx.arguments) + 1)
    return grad_x, grad_h_before if has_h else None, grad_c_before if has_c else None, weight_grads, *none


def _second_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("gatewise::recurrent: a compiled or exported layer has no second derivative")


_library.impl("recurrent", _recurrent, "CPU")
_library.impl("recurrent_backward", _recurrent_backward, "CPU")
library.register_fake("gatewise::recurrent", _recurrent_fake, lib=_library)
library.register_fake("gatewise::recurrent_backward", _recurrent_backward_fake, lib=_library)
library.register_autograd("gatewise::recurrent", _backward, setup_context=_save_for_backward, lib=_library)
library.register_autograd("gatewise::recurrent_backward", _second_backward, lib=_library)


# ---- a layer's call


def traced_call(
    layer: Any, input: Any, hx: Any, lengths: Any, resets: Any, checkpoint_every: int | None
) -> tuple[Any, Any] | None:
    """Output and state after, for a compiler; None if it must trace PyTorch's own code."""
    weights = [getattr(layer, name) for name in layer._flat_weights_names]
    attributes = LayerAttributes.of(layer)
    obstacle = traced_obstacle(attributes, input, hx, weights[0].dtype)
    if obstacle is not None:
        refuse_own_options(obstacle, lengths, resets, checkpoint_every)
        return None
    x, is_batched = input, input.dim() == 3
    state = None if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    lengths = None if lengths is None else torch.as_tensor(lengths)
    resets = None if resets is None else torch.as_tensor(resets)
    if not is_batched:
        x, state = with_batch(x, state)
        lengths = None if lengths is None else lengths.reshape(1)
        resets = None if resets is None else resets.unsqueeze(1)
    h, c = (*(state or ()), None, None)[:2]
    dropout = dropout_of(layer)
    record = dropout > 0 or (
        torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, h, c, *weights))
    )
    y, h_after, c_after, _ = torch.ops.gatewise.recurrent(
        x,
        h,
        c,
        weights,
        LAYER_CELLS[attributes.mode],
        [
            attributes.input_size,
            attributes.hidden_size,
            attributes.num_layers,
            attributes.proj_size,
            checkpoint_every or 0,
        ],
        [attributes.bias, attributes.bidirectional, attributes.batch_first and is_batched],
        lengths,
        resets,
        dropout,
        torch.randint(0, 2**62, ()) if dropout else None,
        record,
    )
    return result_of(y, (h_after, c_after) if attributes.mode == "LSTM" else (h_after,), is_batched=is_batched)
