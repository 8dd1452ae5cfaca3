"""vmap: another axis of rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import batching

from gatewise.jax.equations import walk_tangent
from gatewise.jax.options import Operands, Options, split_backward
from gatewise.jax.primitives import backward, recorded, recurrent, tangent


def _merge(value: Any, dim: int | None, axis: int, size: int) -> Any:
    """`value` with its axis `dim`, or copies where it has none, put into the axis of rows."""
    moved = jnp.moveaxis(value, dim, axis) if dim is not None else jnp.repeat(jnp.expand_dims(value, axis), size, axis)
    return moved.reshape(*moved.shape[:axis], size * moved.shape[axis + 1], *moved.shape[axis + 2 :])


def _part(value: Any, axis: int, size: int, rows: int) -> Any:
    """The inverse: axis `axis` counts the examples, the one behind it the rows of each."""
    return value.reshape(*value.shape[:axis], size, rows, *value.shape[axis + 1 :])


def _one_by_one(primitive: Any, operands: Operands, dims: Sequence[int | None], **options: Any) -> tuple[Any, Any]:
    mapped = [jnp.moveaxis(one, dim, 0) for one, dim in zip(operands, dims, strict=True) if dim is not None]

    def one(own: Sequence[Any]) -> Any:
        each = iter(own)
        return primitive.bind(
            *(one if dim is None else next(each) for one, dim in zip(operands, dims, strict=True)), **options
        )

    results = jax.lax.map(one, mapped)
    return results, [0] * len(results)


def _merged(operands: Operands, dims: Sequence[int | None], of: Options, size: int) -> list[Any]:
    """Those of forward with the examples as rows; the weights, the last of them, have no such axis."""
    count = len(of.axes)
    rows = [_merge(*one, size) for one in zip(operands[:count], dims[:count], of.axes, strict=True)]
    return [*rows, *operands[count:]]


def _sizes(operands: Operands, dims: Sequence[int | None], of: Options) -> tuple[int, int]:
    """How many examples there are, and rows in each."""
    size = next(one.shape[dim] for one, dim in zip(operands, dims, strict=True) if dim is not None)
    shape = [extent for axis, extent in enumerate(operands[0].shape) if axis != dims[0]]
    return size, shape[of.axes[0]]


def _parted(results: Sequence[Any], axes: Sequence[int], size: int, rows: int) -> tuple[list[Any], Sequence[int]]:
    return [_part(one, axis, size, rows) for one, axis in zip(results, axes, strict=True)], axes


def _apart(dims: Sequence[int | None], of: Options, wanted: tuple[bool, ...] = (False,)) -> bool:
    """Whether examples have weights, or gradients of weights, of their own."""
    return any(wanted[1:]) or any(dim is not None for dim in of.split(dims)[3])


def _recurrent_batch(operands: Operands, dims: Sequence[int | None], *, of: Options) -> tuple[Any, Any]:
    if _apart(dims, of):
        return _one_by_one(recurrent, operands, dims, of=of)
    size, rows = _sizes(operands, dims, of)
    results = recurrent.bind(*_merged(operands, dims, of, size), of=of)
    return _parted(results, of.axes[: 1 + of.states], size, rows)


def _recorded_batch(
    operands: Operands, dims: Sequence[int | None], *, of: Options, tape_bytes: int, wanted: tuple[bool, ...]
) -> tuple[Any, Any]:
    """Where the examples become rows there is no tape: one of all rows could not be cut into those of examples."""
    if _apart(dims, of, wanted):
        return _one_by_one(recorded, operands, dims, of=of, tape_bytes=tape_bytes, wanted=wanted)
    results, axes = _recurrent_batch(operands, dims, of=of)
    return [*results, jnp.zeros(tape_bytes, np.uint8)], [*axes, None]


def _backward_batch(
    operands: Operands, dims: Sequence[int | None], *, of: Options, given: tuple[bool, ...], wanted: tuple[bool, ...]
) -> tuple[Any, Any]:
    forward, y, _, grads = split_backward(operands, given)
    forward_dims, y_dim, tape_dim, grad_dims = split_backward(dims, given)
    if tape_dim is not None or _apart(forward_dims, of, wanted):
        return _one_by_one(backward, operands, dims, of=of, given=given, wanted=wanted)
    size, rows = _sizes(operands, dims, of)
    axes = of.axes[: 1 + of.states]
    results = backward.bind(
        *_merged(forward, forward_dims, of, size), _merge(y, y_dim, axes[0], size), jnp.zeros(0, np.uint8),
        *(_merge(*one, size) for one in zip(grads, grad_dims, compress(axes, given), strict=True)),
        of=of, given=given, wanted=wanted,
    )  # fmt: skip
    return _parted(results, axes[not wanted[0] :], size, rows)


def _tangent_batch(operands: Operands, dims: Sequence[int | None], **options: Any) -> tuple[Any, Any]:
    results = jax.vmap(partial(walk_tangent, **options), in_axes=tuple(dims))(*operands)
    return results, [0] * len(results)


batching.primitive_batchers[recurrent] = _recurrent_batch
batching.primitive_batchers[recorded] = _recorded_batch
batching.primitive_batchers[backward] = _backward_batch
batching.primitive_batchers[tangent] = _tangent_batch
