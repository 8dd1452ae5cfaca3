"""The primitives of JAX: how a CPU runs them, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import jax
import jax.ffi
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import gatewise._core as _core
import gatewise.jax.equations as equations
from gatewise.jax.options import Flags, Operands, Options, split_backward
from gatewise.jax.sharding import abstract_result

for _name, _handler in _core.xla_handlers().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")


# ---- calls of the core's handlers


def byte_array(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), np.uint8)


def pack(options: Options, weights: Sequence[Any]) -> Any:
    """Pack the weights in a call of its own, which XLA moves out of loops and shares between forward and backward."""
    packed_bytes, _ = options.packed_and_tape_bytes(0, 0)
    call = jax.ffi.ffi_call("gatewise_pack", byte_array(packed_bytes))
    return call(*weights, **options.attributes(weights_only=True))


def _run_forward(*operands: Any, options: Options, tape_bytes: int = 0, **_: Any) -> list[Any]:
    x, states, extras, weights = options.split(operands)
    is_recorded = tape_bytes > 0
    call = jax.ffi.ffi_call("gatewise_forward", options.result_shapes(x) + [byte_array(tape_bytes)] * is_recorded)
    return list(call(x, *states, *extras, pack(options, weights), **options.attributes(record=is_recorded)))


def _run_backward(*operands: Any, options: Options, nonzero_grads: Flags, needed_grads: Flags) -> list[Any]:
    forward, y, tape, grads = split_backward(operands, nonzero_grads)
    x, states, extras, weights = options.split(forward)
    call = jax.ffi.ffi_call("gatewise_backward", options.gradient_shapes(forward, needed_grads))
    flags = {
        "given": np.array([*nonzero_grads, False][:3], np.int64),  # always three flags: y, h and c
        "wanted": np.array(needed_grads, np.int64),
    }
    return list(call(x, *states, y, tape, *grads, *extras, pack(options, weights), **flags, **options.attributes()))


# ---- the primitives


# What the primitives take besides their operands.
_PARAMETERS = ("options", "tape_bytes", "nonzero_tangents", "nonzero_grads", "needed_grads")


def _make_primitive(name: str, shapes: Callable[..., list[Any]], on_cpu: Any, elsewhere: Any) -> Any:
    primitive = Primitive(f"gatewise_{name}")
    primitive.multiple_results = True

    def run(*operands: Any, **parameters: Any) -> Any:
        return jax.lax.platform_dependent(
            *operands, cpu=partial(on_cpu, **parameters), default=partial(elsewhere, **parameters)
        )

    def abstract_results(*operands: Any, **parameters: Any) -> list[Any]:
        return [abstract_result(shape, operands[0]) for shape in shapes(*operands, **parameters)]

    primitive.def_impl(jax.jit(run, static_argnames=_PARAMETERS))
    primitive.def_abstract_eval(abstract_results)
    if on_cpu is not elsewhere:
        mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=True), platform="cpu")
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=True))
    return primitive


def _forward_shapes(x: Any, *_: Any, options: Options, **__: Any) -> list[Any]:
    return options.result_shapes(x)


def _recorded_shapes(x: Any, *_: Any, options: Options, tape_bytes: int, needed_grads: Flags) -> list[Any]:
    return [*options.result_shapes(x), byte_array(tape_bytes)]


def _backward_shapes(*operands: Any, options: Options, nonzero_grads: Flags, needed_grads: Flags) -> list[Any]:
    return options.gradient_shapes(split_backward(operands, nonzero_grads)[0], needed_grads)


# recurrent: x, states, lengths, resets, weights -> y, h and c after.
# recorded: the same -> the same, and the tape. `needed_grads` says whether anyone will ask for the gradients of x, and
#     of the weights of each layer and direction; only the rule for vmap reads it.
# tangent: operands of recorded, y, tape, nonzero tangents of x, states and weights -> tangents of y, h and c after.
# backward: operands of recorded, y, tape, nonzero gradients of y, h and c after -> gradients of x if needed, of the
#     states, and of the weights of each layer and direction as needed.
recurrent = _make_primitive("recurrent", _forward_shapes, _run_forward, equations.recurrent)
recorded = _make_primitive("recorded", _recorded_shapes, _run_forward, equations.recorded)
tangent = _make_primitive("tangent", _forward_shapes, equations.tangent, equations.tangent)
backward = _make_primitive("backward", _backward_shapes, _run_backward, equations.backward)


# ---- derivatives


def _nonzero(tangents: Operands) -> Flags:
    return tuple(type(tangent) is not ad.Zero for tangent in tangents)


def _needed_grads(options: Options, nonzero_tangents: Flags) -> Flags:
    """Of x, and of the weights of each layer and direction."""
    of_weights = options.by_sequence(nonzero_tangents[1 + options.num_states :])
    return nonzero_tangents[0], *(any(flags) for flags in of_weights)


def _record_with_tangents(
    operands: Operands, tangents: Operands, options: Options, tape_bytes: int
) -> tuple[list[Any], list[Any]]:
    """Compute y, h and c after, and the tape; and the tangents of all but the tape."""
    x, states, _, weights = options.split(tangents)
    variable_tangents = [x, *states, *weights]
    flags = _nonzero(variable_tangents)
    results = recorded.bind(
        *operands, options=options, tape_bytes=tape_bytes, needed_grads=_needed_grads(options, flags)
    )
    y, tape = results[0], results[-1]
    nonzero = compress(variable_tangents, flags)
    return results, tangent.bind(*operands, y, tape, *nonzero, options=options, nonzero_tangents=flags)


def _recurrent_jvp(operands: Operands, tangents: Operands, *, options: Options) -> tuple[Any, Any]:
    _, tape_bytes = options.packed_and_tape_bytes(*options.steps_and_batch(operands[0]))
    results, result_tangents = _record_with_tangents(operands, tangents, options, tape_bytes)
    return results[:-1], result_tangents


def _recorded_jvp(
    operands: Operands, tangents: Operands, *, options: Options, tape_bytes: int, needed_grads: Flags
) -> tuple[Any, Any]:
    results, result_tangents = _record_with_tangents(operands, tangents, options, tape_bytes)
    return results, [*result_tangents, ad.Zero(jax.core.ShapedArray((tape_bytes,), jax.dtypes.float0))]


def _tangent_transpose(grads: Operands, *operands: Any, options: Options, nonzero_tangents: Flags) -> list[Any]:
    """The gradients of the tangents, by `backward`; the other operands have none."""
    first_tangent = len(operands) - sum(nonzero_tangents)
    nonzero_grads = _nonzero(grads)
    if not any(nonzero_grads):
        return [None] * len(operands)
    results = iter(
        backward.bind(
            *operands[:first_tangent],
            *compress(grads, nonzero_grads),
            options=options,
            nonzero_grads=nonzero_grads,
            needed_grads=_needed_grads(options, nonzero_tangents),
        )
    )
    gradients = [next(results) if nonzero_tangents[0] else None, *(next(results) for _ in range(options.num_states))]
    for flags in options.by_sequence(nonzero_tangents[1 + options.num_states :]):
        gradients += [next(results) if any(flags) else None for _ in flags]
    return [*([None] * first_tangent), *compress(gradients, nonzero_tangents)]


def _jvp_of_equations(primitive: Any, function: Any) -> Callable[..., Any]:
    """The derivative of a primitive, by differentiating the same function in jax.numpy."""

    def jvp(operands: Operands, tangents: Operands, **parameters: Any) -> tuple[Any, Any]:
        flags = _nonzero(tangents)

        def function_of_variables(*variables: Any) -> list[Any]:
            following = iter(variables)
            completed = [next(following) if flag else operand for flag, operand in zip(flags, operands, strict=True)]
            return list(function(*completed, **parameters))

        results = primitive.bind(*operands, **parameters)
        variables, nonzero_tangents = list(compress(operands, flags)), list(compress(tangents, flags))
        return results, jax.jvp(function_of_variables, variables, nonzero_tangents)[1]

    return jvp


ad.primitive_jvps[recurrent] = _recurrent_jvp
ad.primitive_jvps[recorded] = _recorded_jvp
ad.primitive_jvps[tangent] = _jvp_of_equations(tangent, equations.tangent)
ad.primitive_jvps[backward] = _jvp_of_equations(backward, equations.backward)
ad.primitive_transposes[tangent] = _tangent_transpose
