"""The rules for vmap: the examples become rows of one batch wherever they share their weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import compress
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import batching

import gatewise.jax.equations as equations
from gatewise.jax.options import Flags, Operands, Options, split_backward
from gatewise.jax.primitives import backward, recorded, recurrent, tangent

# For each operand the axis that counts the examples; None if the examples share the operand.
ExampleAxes: TypeAlias = Sequence[int | None]


def _merge_into_batch(array: Any, example_axis: int | None, batch_axis: int, examples: int) -> Any:
    """Merge the axis of examples into the batch axis; examples that share the array get copies of it."""
    if example_axis is None:
        separate = jnp.repeat(jnp.expand_dims(array, batch_axis), examples, batch_axis)
    else:
        separate = jnp.moveaxis(array, example_axis, batch_axis)
    shape = separate.shape
    return separate.reshape(*shape[:batch_axis], examples * shape[batch_axis + 1], *shape[batch_axis + 2 :])


def _merge_all_into_batch(operands: Operands, example_axes: ExampleAxes, options: Options, examples: int) -> list[Any]:
    """Merge the examples of all operands of a forward call but the weights, which they share."""
    batch_axes = options.batch_axes
    first_weight = len(batch_axes)
    merged = [
        _merge_into_batch(operand, example_axis, batch_axis, examples)
        for operand, example_axis, batch_axis in zip(
            operands[:first_weight], example_axes[:first_weight], batch_axes, strict=True
        )
    ]
    return [*merged, *operands[first_weight:]]


def _split_batch(
    results: Sequence[Any], batch_axes: Sequence[int], examples: int, rows: int
) -> tuple[list[Any], Sequence[int]]:
    """The inverse: the batch axis of each result becomes two, of examples and of the rows of an example."""
    split = [
        array.reshape(*array.shape[:axis], examples, rows, *array.shape[axis + 1 :])
        for array, axis in zip(results, batch_axes, strict=True)
    ]
    return split, batch_axes


def _examples_and_rows(operands: Operands, example_axes: ExampleAxes, options: Options) -> tuple[int, int]:
    """How many examples there are, and how many rows each of them has."""
    examples = next(
        operand.shape[axis] for operand, axis in zip(operands, example_axes, strict=True) if axis is not None
    )
    shape_of_example = [size for axis, size in enumerate(operands[0].shape) if axis != example_axes[0]]
    return examples, shape_of_example[options.batch_axes[0]]


def _has_own_weights(example_axes: ExampleAxes, options: Options, needed_grads: Flags = (False,)) -> bool:
    """Whether each example has its own weights, or needs its own gradients of them."""
    return any(needed_grads[1:]) or any(axis is not None for axis in options.split(example_axes)[3])


def _run_one_by_one(
    primitive: Any, operands: Operands, example_axes: ExampleAxes, **parameters: Any
) -> tuple[Any, Any]:
    own_operands = [
        jnp.moveaxis(operand, axis, 0) for operand, axis in zip(operands, example_axes, strict=True) if axis is not None
    ]

    def run_example(own_operands: Sequence[Any]) -> Any:
        following = iter(own_operands)
        completed = [
            operand if axis is None else next(following) for operand, axis in zip(operands, example_axes, strict=True)
        ]
        return primitive.bind(*completed, **parameters)

    results = jax.lax.map(run_example, own_operands)
    return results, [0] * len(results)


def _batch_recurrent(operands: Operands, example_axes: ExampleAxes, *, options: Options) -> tuple[Any, Any]:
    if _has_own_weights(example_axes, options):
        return _run_one_by_one(recurrent, operands, example_axes, options=options)
    examples, rows = _examples_and_rows(operands, example_axes, options)
    results = recurrent.bind(*_merge_all_into_batch(operands, example_axes, options, examples), options=options)
    return _split_batch(results, options.batch_axes[: 1 + options.num_states], examples, rows)


def _batch_recorded(
    operands: Operands, example_axes: ExampleAxes, *, options: Options, tape_bytes: int, needed_grads: Flags
) -> tuple[Any, Any]:
    """Where the examples become rows the tape is zeros, since that of a batch cannot be split into its examples."""
    if _has_own_weights(example_axes, options, needed_grads):
        return _run_one_by_one(
            recorded, operands, example_axes, options=options, tape_bytes=tape_bytes, needed_grads=needed_grads
        )
    results, axes = _batch_recurrent(operands, example_axes, options=options)
    return [*results, jnp.zeros(tape_bytes, np.uint8)], [*axes, None]


def _batch_backward(
    operands: Operands, example_axes: ExampleAxes, *, options: Options, nonzero_grads: Flags, needed_grads: Flags
) -> tuple[Any, Any]:
    """Where the examples become rows there is no tape, and the core runs forward again."""
    parameters = {"options": options, "nonzero_grads": nonzero_grads, "needed_grads": needed_grads}
    forward, y, _, grads = split_backward(operands, nonzero_grads)
    forward_axes, y_axis, tape_axis, grad_axes = split_backward(example_axes, nonzero_grads)
    if tape_axis is not None or _has_own_weights(forward_axes, options, needed_grads):
        return _run_one_by_one(backward, operands, example_axes, **parameters)
    examples, rows = _examples_and_rows(operands, example_axes, options)
    batch_axes = options.batch_axes[: 1 + options.num_states]
    merged_grads = [
        _merge_into_batch(grad, example_axis, batch_axis, examples)
        for grad, example_axis, batch_axis in zip(grads, grad_axes, compress(batch_axes, nonzero_grads), strict=True)
    ]
    results = backward.bind(
        *_merge_all_into_batch(forward, forward_axes, options, examples),
        _merge_into_batch(y, y_axis, batch_axes[0], examples),
        jnp.zeros(0, np.uint8),
        *merged_grads,
        **parameters,
    )
    return _split_batch(results, batch_axes if needed_grads[0] else batch_axes[1:], examples, rows)


def _batch_tangent(operands: Operands, example_axes: ExampleAxes, **parameters: Any) -> tuple[Any, Any]:
    results = jax.vmap(partial(equations.tangent, **parameters), in_axes=tuple(example_axes))(*operands)
    return results, [0] * len(results)


batching.primitive_batchers[recurrent] = _batch_recurrent
batching.primitive_batchers[recorded] = _batch_recorded
batching.primitive_batchers[backward] = _batch_backward
batching.primitive_batchers[tangent] = _batch_tangent
