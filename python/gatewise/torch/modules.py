"""Subclasses of torch.nn's layers and cells whose forward runs on gatewise if it can.

A layer's call goes from the module to `Call` (sizes, schedule) and packed weights, and on to the core, by address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import gatewise._core as _core
from gatewise.arguments.arrays import whole_number
from gatewise.arguments.sequences import schedule_of
from gatewise.running.layout import Layout
from gatewise.torch.architectures import (
    LayerAttributes,
    cell_weight_names,
    dropout_of,
    layer_architecture,
    weights_of,
)
from gatewise.torch.autograd import RecurrentFunction
from gatewise.torch.calls import Call, result_of, run_forward, with_batch
from gatewise.torch.eligibility import (
    batch_sizes_of,
    data_of,
    in_forward_mode,
    layer_obstacle,
    refuse_own_options,
    step_architecture,
    unsupported_mode,
    weights_obstacle,
)
from gatewise.torch.operator import traced_call
from gatewise.torch.packing import caches, forget, pack, packed_weights
from gatewise.torch.tensors import dense, empty, with_dense_rows
from gatewise.weights.architecture import Architecture


class RecurrentModule:
    """What layers and cells share: changes that torch.nn's forward would notice make them forget packed weights."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        forget(self)  # torch.nn's forward reads all attributes

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        module = super()._apply(*arguments, **options)  # type: ignore[misc]
        forget(self)  # the weights may now be on another device or of another dtype
        return module


# ---- layers


class RecurrentLayer(RecurrentModule):
    """What LSTM, GRU and RNN share: forward on gatewise, or else by the torch.nn class that comes next."""

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: object = None,
        resets: object = None,
        checkpoint_every: int | None = None,
    ) -> Any:
        """Run as torch.nn's layer does, with options that it lacks.

        Parameters
        ----------
        input, hx
            As torch.nn's: a batch, a single sequence or a PackedSequence; the state before, by default zero.
        lengths : Tensor, array or list of integers, optional
            (B,): how many steps each row has; see gatewise.LSTM. Not with a PackedSequence, which has its own.
        resets : Tensor, array or list of bools, optional
            (T, B), with batch_first (B, T): where the state is set to zero before the step.
        checkpoint_every : int, optional
            In training, keep the state of every n-th step only, and compute the gates between them again.
        """
        if torch.compiler.is_compiling():
            result = traced_call(self, input, hx, lengths, resets, checkpoint_every)
            return super().forward(input, hx) if result is None else result  # type: ignore[misc]
        is_plain = lengths is None and resets is None and checkpoint_every is None
        try:
            cache = caches.get(id(self))
            if is_plain and cache and not (torch.is_grad_enabled() or dropout_of(self) or in_forward_mode()):
                result = cache.weights.walk(self._parameters, input, hx, self.batch_first)  # type: ignore[attr-defined]
                if result is not None:
                    return result
            result = _run_layer(self, input, hx, lengths, resets, checkpoint_every)
            return super().forward(input, hx) if result is None else result  # type: ignore[misc]
        except TypeError:
            if isinstance(self, RecurrentModule):
                raise
        # Another thread has restored torch.nn's class meanwhile, for which `super` is not valid.
        if not is_plain:
            raise NotImplementedError(
                "lengths, resets, checkpoint_every: another thread called gatewise.torch.restore during this call"
            )
        return self.forward(input, hx)


class LSTM(RecurrentLayer, torch.nn.LSTM):  # type: ignore[misc]
    """torch.nn.LSTM on gatewise."""


class GRU(RecurrentLayer, torch.nn.GRU):  # type: ignore[misc]
    """torch.nn.GRU on gatewise."""


class RNN(RecurrentLayer, torch.nn.RNN):  # type: ignore[misc]
    """torch.nn.RNN on gatewise."""


def _run_layer(
    layer: Any, input: Any, hx: Any, lengths: object, resets: object, checkpoint_every: int | None
) -> tuple[Any, Any] | None:
    """Output and state after of any call; None if PyTorch's own code must run it."""
    attributes = LayerAttributes.of(layer)
    obstacle = unsupported_mode() or layer_obstacle(attributes, input, hx)
    weights: tuple[Any, ...] = ()
    if obstacle is None:
        weights = weights_of(layer, layer._flat_weights_names)  # only once: a parametrization may change with each look
        obstacle = weights_obstacle(attributes, weights, data_of(input).dtype)
    if obstacle is not None:
        refuse_own_options(obstacle, lengths, resets, checkpoint_every)
        return None
    state = (hx,) if isinstance(hx, Tensor) else hx
    architecture = layer_architecture(attributes, data_of(input).dtype)
    if isinstance(input, PackedSequence):
        if lengths is not None or resets is not None:
            raise TypeError("lengths, resets: expected none with a PackedSequence")
        return _run_packed(layer, architecture, input, state, weights, checkpoint_every)
    x, is_batched = input, input.dim() == 3
    if not is_batched:
        x, state = with_batch(x, state)
    batch_first = attributes.batch_first and is_batched
    batch, steps = (x.size(0), x.size(1)) if batch_first else (x.size(1), x.size(0))
    schedule, longest = None, steps
    if lengths is not None or resets is not None:
        layout = Layout(architecture, attributes.batch_first, not is_batched, steps, batch)
        schedule, longest = schedule_of(layout, lengths, resets)
    sizes = (steps, longest, batch)
    call = _new_call(layer, architecture, sizes, schedule, checkpoint_every, batch_first=batch_first)
    y, after = _run(layer, call, x, state, weights)
    return result_of(y, after, is_batched=is_batched)


def _run_packed(
    layer: Any,
    architecture: Architecture,
    input: Any,
    state: tuple[Tensor, ...] | None,
    weights: tuple[Any, ...],
    checkpoint_every: int | None,
) -> tuple[Any, Any]:
    """Run a PackedSequence on its rows as they lie, with states in the order of its rows."""
    batch_sizes = batch_sizes_of(input)
    if batch_sizes is None:  # another thread has changed it since it was checked
        raise RuntimeError("PackedSequence: expected batch_sizes that stay as they are")
    steps, batch = len(batch_sizes), int(batch_sizes[0])
    x, schedule, packed_rows = input.data, None, None
    if batch_sizes[-1] == batch:
        x = x.reshape(steps, batch, -1)
    else:
        lengths = steps - np.searchsorted(batch_sizes[::-1], np.arange(batch), side="right")
        schedule, packed_rows = _core.Schedule(steps, batch, lengths, None, packed=True), x.size(0)
    if state is not None and input.sorted_indices is not None:
        state = tuple(part.index_select(1, input.sorted_indices) for part in state)
    if state is not None and any(part.size(1) != batch for part in state):
        raise RuntimeError(f"hx: expected states of {batch} rows")
    sizes = (steps, steps, batch)
    call = _new_call(layer, architecture, sizes, schedule, checkpoint_every, packed_rows=packed_rows)
    y, after = _run(layer, call, x, state, weights)
    if input.unsorted_indices is not None:
        after = tuple(part.index_select(1, input.unsorted_indices) for part in after)
    sequence = PackedSequence(y.flatten(0, -2), input.batch_sizes, input.sorted_indices, input.unsorted_indices)
    return result_of(sequence, after)


def _new_call(
    layer: Any,
    architecture: Architecture,
    sizes: tuple[int, int, int],
    schedule: _core.Schedule | None,
    checkpoint_every: int | None,
    *,
    batch_first: bool = False,
    packed_rows: int | None = None,
) -> Call:
    """A call of a layer; the sizes are the steps of x, the steps of its longest row, and its rows."""
    steps, longest, batch = sizes
    every = 0 if checkpoint_every is None else whole_number("checkpoint_every", checkpoint_every, 1, 2**62)
    dropout = dropout_of(layer)
    return Call(
        architecture,
        batch_first,
        steps,
        longest,
        batch,
        schedule,
        checkpoint_every=min(every, longest),
        dropout=dropout,
        seed=int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if dropout else 0,
        packed_rows=packed_rows,
    )


def _run(
    layer: Any, call: Call, x: Tensor, state: Sequence[Tensor] | None, weights: tuple[Any, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and state after of a call that the core can take, with gradients or without."""
    x = with_dense_rows(x)
    h, c = (None if part is None else dense(part) for part in (*(state or ()), None, None)[:2])
    if _needs_gradients((x, h, c, *weights)):
        forget(layer)  # training will change the weights; in a frozen module not every optimizer's step is counted
        y, *after = RecurrentFunction.apply(call, pack(call.architecture, weights), x, h, c, *weights)
    else:
        packed = packed_weights(layer, call.architecture, layer._flat_weights_names, weights).packed
        core_call = call.on(packed)
        tape = empty((core_call.tape_bytes,), torch.uint8) if call.dropout else None
        y, *after = run_forward(call, core_call, x, h, c, tape)
    return y, tuple(part for part in after if part is not None)


def _needs_gradients(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# ---- cells


class RecurrentCell(RecurrentModule):
    """What LSTMCell, GRUCell and RNNCell share: steps without gradients on gatewise.

    With gradients PyTorch's own cells are used: the gradients of a step's weights are products of a few rows, too small
    to pay for packing. A loop over time that is trained should be a layer.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Make one step as torch.nn's cell does."""
        if torch.compiler.is_compiling():
            return super().forward(input, hx)  # type: ignore[misc]
        try:
            if torch.is_grad_enabled() or in_forward_mode():
                forget(
                    self
                )  # training will change the weights; in a frozen module not every optimizer's step is counted
                return super().forward(input, hx)  # type: ignore[misc]
            cache = caches.get(id(self))
            after = cache.weights.step(self._parameters, input, hx) if cache else None  # type: ignore[attr-defined]
            if after is None:
                after = _run_step(self, input, hx)
            return super().forward(input, hx) if after is None else after  # type: ignore[misc]
        except TypeError:
            if isinstance(self, RecurrentModule):
                raise
        return self.forward(input, hx)  # another thread has restored torch.nn's class meanwhile


class LSTMCell(RecurrentCell, torch.nn.LSTMCell):  # type: ignore[misc]
    """torch.nn.LSTMCell on gatewise."""


class GRUCell(RecurrentCell, torch.nn.GRUCell):  # type: ignore[misc]
    """torch.nn.GRUCell on gatewise."""


class RNNCell(RecurrentCell, torch.nn.RNNCell):  # type: ignore[misc]
    """torch.nn.RNNCell on gatewise."""


def _run_step(cell: Any, input: Any, hx: Any) -> Any:
    """The state after a step whose weights are not packed yet, or that is unusual; None if PyTorch must make it."""
    if unsupported_mode() is not None:
        return None
    is_lstm = isinstance(cell, torch.nn.LSTMCell)
    state = () if hx is None else tuple(hx) if is_lstm and isinstance(hx, (tuple, list)) else (hx,)
    names = cell_weight_names(cell)
    weights = weights_of(cell, names)
    if hx is not None and len(state) != 1 + is_lstm:
        return None
    architecture = step_architecture(cell, input, state, weights)
    if architecture is None:
        return None
    packed = packed_weights(cell, architecture, names, weights)
    state = tuple(dense(part) for part in state)
    return packed.step(None, with_dense_rows(input), None if not state else state if is_lstm else state[0])
