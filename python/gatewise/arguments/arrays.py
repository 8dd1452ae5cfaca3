"""Arguments become arrays and numbers that the core can use, or an error says what is wrong with them."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import gatewise._core as _core

Array: TypeAlias = npt.NDArray[Any]

RECYCLED_FROM = 1 << 20  # bytes; larger arrays take memory that the core recycles

MAX_SIZE = 2**31 - 1  # of an axis
MAX_BYTES = 2**46  # of all weights, or of a state


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised array. A large one takes recycled memory, whose pages need not be faulted in again."""
    array: Array = np.empty(shape, dtype) if _bytes(shape, dtype) < RECYCLED_FROM else _core.empty(list(shape), dtype)
    return array


def _bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return size


def describe(shape: Sequence[int | str]) -> str:
    """A shape as text: (T, B, 64)."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def whole_number(name: str, value: object, least: int, most: int) -> int:
    """`value` as an int between `least` and `most`; bools and fractions are refused."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {value!r}") from None
    if not least <= number <= most:
        raise ValueError(f"{name}: expected a number from {least} to {most}, got {number}")
    return number


def number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> float:
    """`value` as a finite float between `least` and `most`."""
    bounds = [f" from {least:g}"] * (least > -math.inf) + [f" to {most:g}"] * (most < math.inf)
    expected = f"{name}: expected a number{''.join(bounds)}, got {value!r}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(expected)
    try:
        converted = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        converted = math.inf
    if not (least <= converted <= most and math.isfinite(converted)):
        raise ValueError(expected)
    return converted


def real_dtype(value: object) -> np.dtype[Any]:
    """float32 or float64, from any of its names."""
    known = (np.dtype(np.float32), np.dtype(np.float64))
    try:
        dtype = None if value is None else np.dtype(value)  # type: ignore[call-overload]  # None is float64 to NumPy
    except TypeError:
        dtype = None
    for candidate in known:
        if dtype is not None and dtype == candidate:
            return candidate
    raise ValueError(f"dtype: expected float32 or float64, got {value!r}")


def tokens(name: str, value: object, count: int) -> Array:
    """A copy of `value`, whole numbers from 0 to `count` - 1, as int64."""
    array = as_array(name, value)
    if array.dtype.kind not in "iu" and not (array.size == 0 and array.dtype == np.float64):
        raise TypeError(f"{name}: expected whole numbers, got {_kind(value, array)}")
    copied = np.array(array, order="C")  # so that nobody changes it after the check
    for wrong in copied[(copied < 0) | (copied >= count)].flat:
        raise ValueError(f"{name}: expected numbers from 0 to {count - 1}, got {wrong}")
    return copied.astype(np.int64).view(np.int64)  # NumPy has two types of 64 bits: make it the one called int64


def flag(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def as_array(name: str, value: object) -> Array:
    """`value` as an array."""
    if type(value) is np.ndarray:
        return value
    _refuse_mask(name, value)
    try:
        return np.asarray(value)
    except ValueError as error:
        got = "a sequence of uneven lengths" if "inhomogeneous" in str(error) else f"{type(value).__name__} ({error})"
        raise ValueError(f"{name}: expected an array, got {got}") from None
    except Exception as error:
        raise TypeError(f"{name}: expected an array, got {type(value).__name__} ({error})") from None


def _refuse_mask(name: str, value: object) -> None:
    """Refuse a masked array, or a list of masked arrays: NumPy would use the numbers that the mask hides."""
    is_list = isinstance(value, (list, tuple)) and value and isinstance(value[0], np.ndarray)
    for item in value if is_list else (value,):  # type: ignore[attr-defined]
        if isinstance(item, np.ma.MaskedArray) and np.ma.is_masked(item):
            raise TypeError(f"{name}: expected an array without a mask, got a masked array; filled() removes the mask")


def without_graph(weight: object) -> object:
    """`weight` itself; a tensor of PyTorch without its autograd graph.

    Weights are copied, and nobody expects gradients through them. bfloat16, which NumPy lacks, becomes float32.
    """
    tensor_type = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor_type is None or not isinstance(weight, tensor_type):
        return weight
    tensor: Any = weight.detach()
    return tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor


def floating(name: str, value: object, dtype: np.dtype[Any]) -> Array:
    """`value` as an array of `dtype`, converted only if needed. It must consist of real floating numbers."""
    array = as_array(name, value)
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: expected floating numbers ({dtype}), got {_kind(value, array)}")
    converted: Array = array.astype(dtype, copy=False)
    return converted


def _kind(value: object, array: Array) -> str:
    """The kind of numbers in an array, or the type of `value`: NumPy makes arrays of any object."""
    if array.dtype.kind != "O":
        return str(array.dtype)
    return "objects that are not numbers" if array.ndim else type(value).__name__


def exact(name: str, value: object, dtype: np.dtype[Any]) -> Array:
    """`value` itself, which must be an array of exactly this dtype, as calls with `out` require."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array of {dtype}, got {type(value).__name__}")
    if type(value) is not np.ndarray:
        _refuse_mask(name, value)
    if value.dtype != dtype:
        got = f"byte-swapped {value.dtype.name}" if value.dtype.newbyteorder() == dtype else value.dtype
        raise TypeError(f"{name}: expected exactly {dtype} with `out`, got {got}")
    return value


def shaped(name: str, array: Array, expected: Sequence[int | str]) -> Array:
    """`array` itself, which must have the shape `expected`, where a letter stands for any size."""
    if array.shape == expected:
        return array
    if len(expected) != array.ndim or any(
        isinstance(extent, int) and extent != size for extent, size in zip(expected, array.shape, strict=True)
    ):
        raise ValueError(f"{name}: expected shape {describe(expected)}, got {describe(array.shape)}")
    return array


def rows(array: Array) -> Array:
    """`array` itself if the core can read it by strides, else a contiguous copy."""
    item, strides = array.itemsize, array.strides
    is_readable = array.flags.aligned and (strides[-1] == item or array.shape[-1] <= 1)
    for stride in strides:  # a loop: this runs at each call, and the generator of all(...) would take longer
        is_readable = is_readable and stride % item == 0
    if is_readable:
        return array
    contiguous: Array = np.require(array, requirements=["C", "A"])
    return contiguous


def output(
    name: str, value: object, dtype: np.dtype[Any], shape: tuple[int, ...], *inputs: tuple[str, Array | None]
) -> Array:
    """`value` itself, which must be an array that the core can write to without changing the inputs."""
    array = shaped(name, exact(name, value, dtype), shape)
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise ValueError(f"{name}: expected a C-contiguous array, got strides {array.strides}")
    if not array.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    for input_name, input_array in inputs:
        if input_array is not None and _overlap(array, input_array):
            raise ValueError(f"{name}: expected memory of its own, got an array that overlaps {input_name}")
    return array


def _overlap(a: Array, b: Array) -> bool:
    """Whether the ranges of memory of two arrays overlap, even if no element is in both."""
    return bool(np.may_share_memory(a, b))


def read_only(array: Array) -> Array:
    """A view of `array` that cannot be made writable, since the owner of its memory becomes read-only, too."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner.flags.writeable = False
        owner = owner.base
    view: Array = array.view()
    return view
