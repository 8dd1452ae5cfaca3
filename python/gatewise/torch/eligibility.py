"""Which calls the core can take, and for all others the reason why PyTorch's own code must."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from gatewise.torch.architectures import LayerAttributes, cell_architecture, have_shapes_of, layer_architecture
from gatewise.torch.tensors import DTYPES, is_plain
from gatewise.weights.architecture import Architecture

# The reason for calls that PyTorch refuses as well, by an error of its own.
INVALID_FOR_TORCH = "something that PyTorch refuses"


# ---- what PyTorch is doing


def unsupported_mode() -> str | None:
    """What PyTorch is doing at the moment that gatewise cannot take part in; None if there is nothing."""
    if torch._C._is_any_autocast_enabled():
        return "autocast"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    if in_forward_mode():
        return "forward-mode derivatives"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a compiler"
    if torch._C._len_torch_dispatch_stack() or (torch._C._len_torch_function_stack() and not _only_default_device()):
        return "a mode that watches PyTorch's operations"
    return None


def in_forward_mode() -> bool:
    return bool(forward_ad._current_level >= 0)


def _only_default_device() -> bool:
    """Whether torch.set_default_device is the only mode. It is harmless: gatewise's tensors are on the CPU by name."""
    modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    return all(type(mode).__name__ == "DeviceContext" for mode in modes)


# ---- layers


def layer_obstacle(layer: LayerAttributes, input: Any, hx: Any) -> str | None:
    """Why PyTorch's own code must take this call of a layer, if only to raise its error; None if the core can."""
    x = data_of(input)
    if hx is not None and isinstance(hx, Tensor) is (layer.mode == "LSTM"):
        return INVALID_FOR_TORCH
    state = () if hx is None else (hx,) if isinstance(hx, Tensor) else hx
    if not isinstance(state, tuple) or not is_plain(x) or not all(map(is_plain, state)):
        return "tensors that are not plain ones on the CPU"
    if x.dtype not in DTYPES or any(part.dtype is not x.dtype for part in state):
        return "a dtype other than float32 or float64, or several"
    batch_sizes = batch_sizes_of(input) if isinstance(input, PackedSequence) else None
    if isinstance(input, PackedSequence) and (batch_sizes is None or x.dim() != 2):
        return INVALID_FOR_TORCH
    return None if _has_valid_shapes(layer, x, None if hx is None else state, batch_sizes) else INVALID_FOR_TORCH


def weights_obstacle(layer: LayerAttributes, weights: Sequence[Any], dtype: torch.dtype) -> str | None:
    """The same, because of a layer's weights."""
    if not all(is_plain(weight) and weight.dtype is dtype for weight in weights):
        return "weights that are not plain tensors of the input's dtype"
    return None if have_shapes_of(layer_architecture(layer, dtype), weights) else INVALID_FOR_TORCH


def traced_obstacle(layer: LayerAttributes, input: Any, hx: Any, dtype: torch.dtype) -> str | None:
    """Why a compiler must trace PyTorch's own code for this call of a layer with weights of `dtype`.

    A compiler cannot look at memory, and sizes may be symbols.
    """
    if not isinstance(input, Tensor):
        return "a PackedSequence in a compiler"
    if torch.is_autocast_enabled("cpu") or in_forward_mode():
        return "autocast or forward-mode derivatives in a compiler"
    if hx is not None and isinstance(hx, Tensor) is (layer.mode == "LSTM"):
        return INVALID_FOR_TORCH
    state = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    for tensor in (input, *state):
        if tensor.device.type != "cpu" or tensor.dtype != dtype or dtype not in DTYPES:
            return "another device, another dtype or several"
    if not _has_valid_shapes(layer, input, None if hx is None else state):
        return INVALID_FOR_TORCH
    return "an export to ONNX" if torch.onnx.is_in_onnx_export() else None


def _has_valid_shapes(layer: LayerAttributes, x: Any, state: Sequence[Any] | None, batch_sizes: Any = None) -> bool:
    """Whether torch.nn's layer takes an input and a state of these shapes, whose sizes may be symbols.

    x is [T, B, I], with batch_first [B, T, I], or [T, I]; or [rows, I] with the batch_sizes [T] of a PackedSequence.
    """
    if x.dim() not in (2, 3) or x.size(-1) != layer.input_size:
        return False
    batch: tuple[Any, ...] = ()
    if batch_sizes is not None:
        steps, batch = len(batch_sizes), (int(batch_sizes[0]),)
    elif x.dim() == 3:
        steps, batch = x.size(1 if layer.batch_first else 0), (x.size(0 if layer.batch_first else 1),)
    else:
        steps = x.size(0)
    if steps == 0:
        return False
    if state is None:
        return True
    sequences = layer.num_layers * (2 if layer.bidirectional else 1)
    units = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
    return len(state) == len(units) and all(
        list(part.shape) == [sequences, *batch, size] for part, size in zip(state, units, strict=True)
    )


def refuse_own_options(obstacle: str, lengths: object, resets: object, checkpoint_every: object) -> None:
    """Raise if a call that goes to PyTorch has options that torch.nn's layers lack.

    Calls that PyTorch refuses go on, so that its error is raised.
    """
    has_options = lengths is not None or resets is not None or checkpoint_every is not None
    if has_options and obstacle != INVALID_FOR_TORCH:
        raise NotImplementedError(f"lengths, resets, checkpoint_every: expected a call on gatewise, got {obstacle}")


# ---- packed sequences


def data_of(input: Any) -> Any:
    return input.data if isinstance(input, PackedSequence) else input


def batch_sizes_of(sequence: Any) -> Any:
    """The rows of each step, [T], of a PackedSequence; None if it is not valid. A copy, since the core relies on it."""
    sizes = sequence.batch_sizes
    if not is_plain(sizes) or sizes.dtype is not torch.int64 or sizes.dim() != 1 or sizes.numel() == 0:
        return None
    counts, rows = sizes.numpy().copy(), sequence.data.size(0)
    if counts[-1] < 1 or counts[0] > rows or (counts[1:] > counts[:-1]).any() or counts.sum() != rows:
        return None
    for order in (sequence.sorted_indices, sequence.unsorted_indices):
        if order is not None and tuple(order.shape) != (int(counts[0]),):
            return None
    return counts


# ---- cells


def step_architecture(cell: Any, x: Any, state: Sequence[Any], weights: Sequence[Any]) -> Architecture | None:
    """The architecture for a step of a cell in the core; None if PyTorch's own code must make the step.

    x is [B, I] or [I], and each part of the state [B, H] or [H].
    """
    if not all(map(is_plain, (x, *state, *weights))) or x.dtype not in DTYPES:
        return None
    if any(tensor.dtype is not x.dtype for tensor in (*state, *weights)):
        return None
    architecture = cell_architecture(cell, x.dtype)
    if architecture is None or not 1 <= x.dim() <= 2 or x.size(-1) != architecture.input_size:
        return None
    if not (x.numel() and architecture.hidden_size and have_shapes_of(architecture, weights)):
        return None
    has_state_shapes = all(part.shape == (*x.shape[:-1], architecture.hidden_size) for part in state)
    return architecture if has_state_shapes else None
