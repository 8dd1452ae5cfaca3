"""The primitives, and their derivatives."""

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
from gatewise.jax.equations import walk, walk_backward, walk_recorded, walk_tangent
from gatewise.jax.options import Operands, Options, results_of_backward, split_backward
from gatewise.jax.sharding import abstract

for _name, _handler in _core.xla_handlers().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")


def byte_array(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), np.uint8)


def _pack(of: Options, weights: Sequence[Any]) -> Any:
    """A step of its own, which XLA takes out of loops, and makes once for forward and backward."""
    return jax.ffi.ffi_call("gatewise_pack", byte_array(of.sizes(0, 0)[0]))(
        *weights, **of.attributes(weights_only=True)
    )


def _call_forward(*operands: Any, of: Options, tape_bytes: int = 0) -> list[Any]:
    x, states, extras, weights = of.split(operands)
    results = of.results(x) + [byte_array(tape_bytes)] * (tape_bytes > 0)
    call = jax.ffi.ffi_call("gatewise_forward", results)
    return list(call(x, *states, *extras, _pack(of, weights), **of.attributes(record=tape_bytes > 0)))


def _call_backward(*operands: Any, of: Options, given: tuple[bool, ...], wanted: tuple[bool, ...]) -> list[Any]:
    """Operands: those of forward, y, tape, and those gradients of y, h and c after that are `given`.

    Results: gradients of x if that is `wanted`, of the states, of the weights of each layer and direction that is.
    """
    forward, y, tape, grads = split_backward(operands, given)
    x, states, extras, weights = of.split(forward)
    call = jax.ffi.ffi_call("gatewise_backward", results_of_backward(of, x, states, weights, wanted))
    flags = {"given": np.array([*given, False][:3], np.int64), "wanted": np.array(wanted, np.int64)}
    return list(call(x, *states, y, tape, *grads, *extras, _pack(of, weights), **flags, **of.attributes()))


def _primitive(name: str, shapes: Callable[..., list[Any]], on_cpu: Any, elsewhere: Any) -> Any:
    primitive = Primitive(f"gatewise_{name}")
    primitive.multiple_results = True

    def run(*operands: Any, **options: Any) -> Any:
        return jax.lax.platform_dependent(
            *operands, cpu=partial(on_cpu, **options), default=partial(elsewhere, **options)
        )

    primitive.def_impl(jax.jit(run, static_argnames=("of", "tape_bytes", "wanted", "given", "linear")))
    primitive.def_abstract_eval(
        lambda *operands, **options: [abstract(one, operands[0]) for one in shapes(*operands, **options)]
    )
    if on_cpu is not elsewhere:
        mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=True), platform="cpu")
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=True))
    return primitive


def _shapes_of_recorded(x: Any, *_: Any, of: Options, tape_bytes: int, wanted: Any) -> list[Any]:
    return [*of.results(x), byte_array(tape_bytes)]


def _shapes_of_backward(*operands: Any, of: Options, given: tuple[bool, ...], wanted: tuple[bool, ...]) -> list[Any]:
    x, states, _, weights = of.split(split_backward(operands, given)[0])
    return results_of_backward(of, x, states, weights, wanted)


def _call_recorded(*operands: Any, of: Options, tape_bytes: int, wanted: Any) -> list[Any]:
    return _call_forward(*operands, of=of, tape_bytes=tape_bytes)


# `wanted` says whether anyone will ask for the gradients of x, and of the weights of each layer and direction. Of a
# recorded call only the rule of vmap reads it.
recurrent = _primitive("recurrent", lambda x, *_, of: of.results(x), _call_forward, walk)
recorded = _primitive("recorded", _shapes_of_recorded, _call_recorded, walk_recorded)
tangent = _primitive("tangent", lambda x, *_, of, linear: of.results(x), walk_tangent, walk_tangent)
backward = _primitive("backward", _shapes_of_backward, _call_backward, walk_backward)


def _wanted(of: Options, linear: tuple[bool, ...]) -> tuple[bool, ...]:
    return linear[0], *(any(own) for own in of.weights_of(linear[1 + of.states :]))


def _recorded_with_tangents(
    operands: Operands, tangents: Operands, of: Options, tape_bytes: int
) -> tuple[list[Any], list[Any]]:
    """y, h and c after, the tape; and the tangents of all but the tape."""
    x, states, _, weights = of.split(tangents)
    variables = [x, *states, *weights]
    linear = tuple(type(one) is not ad.Zero for one in variables)
    wanted = _wanted(of, linear)
    results = recorded.bind(*operands, of=of, tape_bytes=tape_bytes, wanted=wanted)
    dots = tangent.bind(*operands, results[0], results[-1], *compress(variables, linear), of=of, linear=linear)
    return results, dots


def _recurrent_jvp(operands: Operands, tangents: Operands, *, of: Options) -> tuple[Any, Any]:
    results, dots = _recorded_with_tangents(operands, tangents, of, of.sizes(*of.extent(operands[0]))[1])
    return results[:-1], dots


def _recorded_jvp(operands: Operands, tangents: Operands, *, of: Options, tape_bytes: int, wanted: Any) -> Any:
    results, dots = _recorded_with_tangents(operands, tangents, of, tape_bytes)
    return results, [*dots, ad.Zero(jax.core.ShapedArray((tape_bytes,), jax.dtypes.float0))]


def _tangent_transpose(grads: Operands, *operands: Any, of: Options, linear: tuple[bool, ...]) -> list[Any]:
    end = len(operands) - sum(linear)
    given = tuple(type(grad) is not ad.Zero for grad in grads)
    if not any(given):
        return [None] * len(operands)
    wanted = _wanted(of, linear)
    found = iter(backward.bind(*operands[:end], *compress(grads, given), of=of, given=given, wanted=wanted))
    gradients = [next(found) if linear[0] else None, *(next(found) for _ in range(of.states))]
    for own in of.weights_of(linear[1 + of.states :]):
        gradients += [next(found) if any(own) else None for _ in own]
    return [*([None] * end), *compress(gradients, linear)]


def _jvp_by(primitive: Any, function: Any) -> Callable[..., Any]:
    """The derivative of a primitive by that of the function that says the same in jax.numpy."""

    def jvp(operands: Operands, tangents: Operands, **options: Any) -> tuple[Any, Any]:
        moving = [type(one) is not ad.Zero for one in tangents]

        def of_moving(*given: Any) -> list[Any]:
            each = iter(given)
            own = [next(each) if moves else one for moves, one in zip(moving, operands, strict=True)]
            return list(function(*own, **options))

        results = primitive.bind(*operands, **options)
        return results, jax.jvp(of_moving, list(compress(operands, moving)), list(compress(tangents, moving)))[1]

    return jvp


ad.primitive_jvps[recurrent] = _recurrent_jvp
ad.primitive_jvps[recorded] = _recorded_jvp
ad.primitive_jvps[tangent] = _jvp_by(tangent, walk_tangent)
ad.primitive_jvps[backward] = _jvp_by(backward, walk_backward)
ad.primitive_transposes[tangent] = _tangent_transpose
