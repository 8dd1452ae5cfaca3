"""The core's forward and backward passes as one node of PyTorch's graph; second derivatives by PyTorch's operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gatewise._core as _core
from gatewise.torch.architectures import sequence_count, weights_by_sequence
from gatewise.torch.calls import Call, Recording, output_for_backward, run_backward, run_forward
from gatewise.torch.tensors import empty, is_plain


class RecurrentFunction(torch.autograd.Function):  # type: ignore[misc]
    """y, h and c after from x, h and c before, and the weights."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, packed: _core.Packed, x: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor | None, ...]:
        core_call = call.on(packed)
        tape = empty((core_call.tape_bytes,), torch.uint8)
        outputs = run_forward(call, core_call, x, h, c, tape)
        y = output_for_backward(call.architecture.cell, outputs.y)
        ctx.save_for_backward(x, h, c, y, tape, *weights)
        ctx.call, ctx.core_call = call, core_call
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, h, c, y, tape, *weights = ctx.saved_tensors
        needs_x, needs_h, needs_c, *needs_weights = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or not all(grad is None or is_plain(grad) for grad in grads):
            return None, None, *backward_by_torch(ctx.call, (x, h, c, *weights), ctx.needs_input_grad[2:], grads)
        grad_x, grad_h, grad_c, weight_grads = run_backward(
            ctx.call, ctx.core_call, Recording(x, h, y, tape, weights), grads, [needs_x, *needs_weights]
        )
        return None, None, grad_x, grad_h if needs_h else None, grad_c if needs_c else None, *weight_grads


def backward_by_torch(
    call: Call, inputs: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Any]
) -> list[Any]:
    """Gradients of the inputs by PyTorch's operations, which have derivatives and take gradients of any kind."""
    if call.dropout or call.schedule is not None:
        raise RuntimeError(
            "backward with create_graph, or of gradients that are not plain tensors: expected a call without dropout, "
            "lengths, resets or uneven packed rows"
        )
    create_graph = torch.is_grad_enabled()
    views = [None if tensor is None else _view(tensor, create_graph) for tensor in inputs]
    with torch.enable_grad():
        outputs = _steps_by_torch(call, *views)
    results: list[Any] = [None] * len(inputs)
    indices = [i for i, view in enumerate(views) if needs[i] and view is not None]
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=False) if grad is not None]
    if pairs:
        input_grads = torch.autograd.grad(
            [output for output, _ in pairs],
            [views[i] for i in indices],
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
        for i, grad in zip(indices, input_grads, strict=True):
            results[i] = grad
    return results


def _view(tensor: Tensor, create_graph: bool) -> Tensor:
    """An input by itself. Without views, autograd would follow an input that was computed from another one twice."""
    view: Tensor = tensor.view_as(tensor) if create_graph else tensor.detach().requires_grad_()
    return view


def _steps_by_torch(call: Call, x: Tensor, h: Any, c: Any, *weights: Tensor) -> tuple[Any, ...]:
    """Output and state after, step by step. oneDNN's LSTM, which PyTorch would use, has no second derivative."""
    architecture = call.architecture
    x = x.transpose(0, 1) if call.batch_first else x
    sequences, batch = sequence_count(architecture), x.size(1)
    h = [x.new_zeros((batch, architecture.recurrent_size))] * sequences if h is None else h.unbind(0)
    c = [x.new_zeros((batch, architecture.hidden_size))] * sequences if c is None else c.unbind(0)
    groups = weights_by_sequence(architecture, weights)
    states: list[tuple[Any, Any]] = []
    for _ in range(architecture.num_layers):
        outputs = []
        for direction in range(architecture.directions):
            i = len(states)
            y, state = _direction_by_torch(architecture.cell, x, (h[i], c[i]), groups[i], is_reverse=direction == 1)
            outputs.append(y)
            states.append(state)
        x = torch.cat(outputs, -1)
    y, h = x.transpose(0, 1) if call.batch_first else x, torch.stack([h for h, _ in states])
    return y, h, torch.stack([c for _, c in states]) if architecture.has_cell_state else None


def _direction_by_torch(
    cell: str, x: Tensor, state: tuple[Tensor, Tensor], weights: Sequence[Any], *, is_reverse: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Output [T, B, R] and state after of one layer and direction; x [T, B, .], the state h [B, R] and c [B, H]."""
    h, c = state
    *gates, projection = weights
    outputs: list[Any] = [None] * x.size(0)
    for t in range(x.size(0))[:: -1 if is_reverse else 1]:
        if cell == "lstm":
            h, c = _lstm_step(x[t], h, c, *gates)
            h = h if projection is None else h @ projection.T
        else:
            h = getattr(torch, f"{cell}_cell")(x[t], h, *gates)
        outputs[t] = h
    return torch.stack(outputs), (h, c)


def _lstm_step(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any) -> Any:
    sums = torch.nn.functional.linear(x, w_ih, b_ih) + torch.nn.functional.linear(h, w_hh, b_hh)
    i, f, g, o = sums.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c
