"""Tensors as the core sees them: which ones it can read, what it must know of PyTorch, and memory for new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gatewise._core as _core

DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}

# What the core asks PyTorch during a plain call. If one of the functions in the last tuple returns something true,
# PyTorch is in a mode that such a call would ignore, and the core leaves the call to Python.
tensor_library = _core.TensorLibrary(
    Tensor.__dlpack_c_exchange_api__,
    Tensor,
    torch.nn.Parameter,
    Tensor.is_neg,
    torch.get_num_threads,
    (
        torch._C._is_any_autocast_enabled,
        torch._C._functorch.peek_interpreter_stack,
        torch._C._get_tracing_state,
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
    ),
)


def is_plain(tensor: Any) -> bool:
    """Whether it is a dense tensor in this process's memory, and not an object that only behaves like one."""
    kind = type(tensor)
    return (
        (kind is Tensor or kind is torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and _has_memory(tensor)
    )


def _has_memory(tensor: Tensor) -> bool:
    """Whether there is memory to read. One of several gradients at once (`is_grads_batched`) does not have any."""
    try:
        return bool(tensor.numel() == 0 or tensor.data_ptr() != 0)
    except RuntimeError:
        return False


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if its memory is misaligned, as that of a file mapped into memory may be."""
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


def with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is dense and its memory is aligned, else a copy."""
    return _aligned(tensor if tensor.stride(-1) == 1 or tensor.size(-1) <= 1 else tensor.contiguous())


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if all of it is dense and its memory is aligned, else a copy."""
    return _aligned(tensor.contiguous())


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in memory of the core, which recycles large blocks."""
    tensor: Tensor = tensor_library.empty(shape, dtype.itemsize)
    return tensor


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
