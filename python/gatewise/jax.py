"""LSTM, GRU and RNN as functions for JAX: on a CPU by gatewise's core, on other devices by XLA.

    import gatewise.jax

    parameters = gatewise.LSTM(64, 128).state_dict()  # or any mapping of these names to arrays
    y, (h, c) = gatewise.jax.lstm(parameters, x)

They work inside jit, grad, vmap, scan, checkpoint and each other, forward and reverse mode, to any order.

Each call is a primitive of JAX with rules of its own, not a custom_vjp: that would take the derivative first and put
the batch of a vmap through backward example by example, where grad(vmap(f)) can have one batch, forward and backward.

    recurrent  what is called: output and state after
    recorded   the same with a tape, where a derivative is to follow
    tangent    the derivative, linear in the tangents; reverse mode turns it round into
    backward   the gradients, from the tape

Their operands are flat: x, h (and c), lengths and resets where there are any, weights in PyTorch's order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import compress
from typing import Any

import numpy as np

try:
    import jax
    import jax.ffi
    import jax.numpy as jnp
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("gatewise.jax needs JAX: pip install 'gatewise[jax]'") from error

import gatewise._core as _core
from gatewise.arguments.arrays import as_array, describe, flag, shaped, whole_number
from gatewise.arguments.sequences import restarts, whole_lengths
from gatewise.running.layout import Layout
from gatewise.weights.architecture import GATES, Architecture

__all__ = ["gru", "lstm", "rnn"]

Operands = Sequence[Any]


# ---- what a call is beside its arrays, and which of these is which


@dataclass(frozen=True)
class _Options:
    """JAX compiles once for each."""

    architecture: Architecture
    batch_first: bool
    lengths: bool
    resets: bool
    checkpoint_every: int
    backend: str

    @property
    def state_sizes(self) -> list[int]:
        """Of h, and of c where there is one."""
        of = self.architecture
        return [of.recurrent_size, of.hidden_size] if of.has_cell_state else [of.recurrent_size]

    @property
    def states(self) -> int:
        return len(self.state_sizes)

    @property
    def sequences(self) -> int:
        return self.architecture.num_layers * self.architecture.directions

    def extent(self, x: Any) -> tuple[int, int]:
        """Steps and rows of x."""
        return (x.shape[1], x.shape[0]) if self.batch_first else (x.shape[0], x.shape[1])

    def split(self, operands: Operands) -> tuple[Any, list[Any], list[Any], list[Any]]:
        """x, states, lengths and resets as far as there are any, weights."""
        x, *others = operands
        extras = self.states + self.lengths + self.resets
        return x, others[: self.states], others[self.states : extras], others[extras:]

    @property
    def axes(self) -> list[int]:
        """The axis of rows of each operand before the weights."""
        rows = 0 if self.batch_first else 1
        return [rows] + [1] * self.states + [0] * self.lengths + [rows] * self.resets

    def weights_of(self, weights: Sequence[Any]) -> list[list[Any]]:
        """Those of each layer and direction."""
        count = len(weights) // self.sequences
        return [list(weights[first : first + count]) for first in range(0, len(weights), count)]

    def results(self, x: Any) -> list[jax.ShapeDtypeStruct]:
        """y, h and c after."""
        of, (steps, batch) = self.architecture, self.extent(x)
        rows = (batch, steps) if self.batch_first else (steps, batch)
        shapes = [(*rows, of.output_size), *((self.sequences, batch, size) for size in self.state_sizes)]
        return [jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes]

    def sizes(self, steps: int, batch: int) -> tuple[int, int]:
        """Bytes of the packed weights and of a tape."""
        of = self.architecture
        if not isinstance(steps * batch, int):
            raise NotImplementedError(
                f"x: expected sizes that are numbers where a derivative is to follow, got ({steps}, {batch})"
            )
        return _core.xla_sizes(
            self.backend, of.cell, of.dtype.itemsize, of.input_size, of.hidden_size, of.proj_size, of.num_layers,
            of.directions, steps, batch, min(self.checkpoint_every, steps),
        )  # fmt: skip

    def attributes(self, *, weights_only: bool = False, record: bool = False) -> dict[str, Any]:
        """As the handlers ask for them; see Numbers in cpp/bindings/frameworks/xla.cpp."""
        of = self.architecture
        numbers = [of.input_size, of.hidden_size, of.proj_size, of.num_layers, of.directions, of.bias]
        others = [self.batch_first, self.lengths, self.resets, self.checkpoint_every, record]
        numbers += [0] * len(others) if weights_only else others
        return {"numbers": np.array(numbers, np.int64), "backend": self.backend, "cell": of.cell}


# ---- the primitives on a CPU


def _bytes(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), np.uint8)


def _pack(of: _Options, weights: Sequence[Any]) -> Any:
    """A step of its own, which XLA takes out of loops, and makes once for forward and backward."""
    return jax.ffi.ffi_call("gatewise_pack", _bytes(of.sizes(0, 0)[0]))(*weights, **of.attributes(weights_only=True))


def _call_forward(*operands: Any, of: _Options, tape_bytes: int = 0) -> list[Any]:
    x, states, extras, weights = of.split(operands)
    results = of.results(x) + [_bytes(tape_bytes)] * (tape_bytes > 0)
    call = jax.ffi.ffi_call("gatewise_forward", results)
    return list(call(x, *states, *extras, _pack(of, weights), **of.attributes(record=tape_bytes > 0)))


def _call_backward(*operands: Any, of: _Options, given: tuple[bool, ...], wanted: tuple[bool, ...]) -> list[Any]:
    """Operands: those of forward, y, tape, and those gradients of y, h and c after that are `given`.

    Results: gradients of x if that is `wanted`, of the states, of the weights of each layer and direction that is.
    """
    forward, y, tape, grads = _split_backward(operands, given)
    x, states, extras, weights = of.split(forward)
    call = jax.ffi.ffi_call("gatewise_backward", _results_of_backward(of, x, states, weights, wanted))
    flags = {"given": np.array([*given, False][:3], np.int64), "wanted": np.array(wanted, np.int64)}
    return list(call(x, *states, y, tape, *grads, *extras, _pack(of, weights), **flags, **of.attributes()))


def _split_backward(operands: Operands, given: tuple[bool, ...]) -> tuple[Operands, Any, Any, Operands]:
    end = len(operands) - sum(given)
    *forward, y, tape = operands[:end]
    return forward, y, tape, operands[end:]


def _results_of_backward(of: _Options, x: Any, states: Any, weights: Any, wanted: tuple[bool, ...]) -> list[Any]:
    like = [x] * wanted[0] + list(states)
    for own in compress(of.weights_of(weights), wanted[1:]):
        like += own
    return [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in like]


# ---- the same in jax.numpy: what derivatives of derivatives, forward mode and other devices use


def _lstm(input_sums: Any, hidden_sums: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    i, f, g, o = jnp.split(input_sums + hidden_sums, 4, axis=-1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(input_sums: Any, hidden_sums: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    x_r, x_z, x_n = jnp.split(input_sums, 3, axis=-1)
    h_r, h_z, h_n = jnp.split(hidden_sums, 3, axis=-1)
    z = jax.nn.sigmoid(x_z + h_z)
    return ((1 - z) * jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n) + z * state[0],)


def _rnn(activation: Any, input_sums: Any, hidden_sums: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    return (activation(input_sums + hidden_sums),)


_CELLS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "lstm": _lstm, "gru": _gru, "rnn_tanh": partial(_rnn, jnp.tanh), "rnn_relu": partial(_rnn, jax.nn.relu),
}  # fmt: skip


def _sequence(
    of: Architecture, weights: Sequence[Any], x: Any, state: tuple[Any, ...], active: Any, restart: Any, reverse: bool
) -> tuple[Any, tuple[Any, ...]]:
    """One layer in one direction: x [T, B, I], h [B, R], c [B, H], flags [T, B, 1] -> y [T, B, R], state after."""
    weight_ih, weight_hh = weights[:2]
    bias_ih, bias_hh = (weights[2][None, None], weights[3][None]) if of.bias else (0, 0)
    weight_hr = weights[-1] if of.proj_size else None

    def step(before: tuple[Any, ...], at: tuple[Any, Any, Any]) -> tuple[tuple[Any, ...], Any]:
        input_sums, active, restart = at
        state = tuple(jnp.where(restart, 0, part) for part in before)
        h, *others = _CELLS[of.cell](input_sums, state[0] @ weight_hh.T + bias_hh, state)
        h = h if weight_hr is None else h @ weight_hr.T
        after = tuple(jnp.where(active, new, old) for new, old in zip((h, *others), state, strict=True))
        return after, jnp.where(active, h, 0)

    after, y = jax.lax.scan(step, state, (x @ weight_ih.T + bias_ih, active, restart), reverse=reverse)
    return y, after


def _walk(*operands: Any, of: _Options) -> list[Any]:
    """y, h and c after."""
    x, states, extras, weights = of.split(operands)
    steps, batch = of.extent(x)
    x = x.swapaxes(0, 1) if of.batch_first else x
    active = jnp.ones((steps, batch, 1), bool)
    restart = jnp.zeros((steps, batch, 1), bool)
    if of.lengths:
        active = jnp.arange(steps)[:, None, None] < extras[0][None, :, None]
    if of.resets:
        restart = (extras[-1].T if of.batch_first else extras[-1])[..., None] & active
    # What separates two steps separates them in the reverse direction, too.
    restarts = restart, jnp.concatenate([restart[1:], jnp.zeros_like(restart[:1])])
    after: list[tuple[Any, ...]] = []
    x = jnp.where(active, x, 0)
    for _ in range(of.architecture.num_layers):
        outputs = []
        for direction in range(of.architecture.directions):
            place = len(after)
            y, end = _sequence(
                of.architecture, of.weights_of(weights)[place], x, tuple(part[place] for part in states), active,
                restarts[direction], direction == 1,
            )  # fmt: skip
            outputs.append(y)
            after.append(end)
        x = jnp.concatenate(outputs, -1)
    return [x.swapaxes(0, 1) if of.batch_first else x, *(jnp.stack(parts) for parts in zip(*after, strict=True))]


def _walk_recorded(*operands: Any, of: _Options, tape_bytes: int, **_: Any) -> list[Any]:
    return [*_walk(*operands, of=of), jnp.zeros(tape_bytes, np.uint8)]


def _walk_tangent(*operands: Any, of: _Options, linear: tuple[bool, ...]) -> list[Any]:
    """Operands: those of forward, y, tape, and tangents of those of x, states and weights that `linear` flags."""
    forward, tangents = _split_tangent(operands, linear)
    x, states, extras, weights = of.split(forward)
    given = iter(tangents)
    variables = [x, *states, *weights]
    dots = [next(given) if flag else jnp.zeros_like(one) for flag, one in zip(linear, variables, strict=True)]

    def walk(x: Any, *others: Any) -> list[Any]:
        return _walk(x, *others[: of.states], *extras, *others[of.states :], of=of)

    found: list[Any] = jax.jvp(walk, variables, dots)[1]
    return found


def _split_tangent(operands: Operands, linear: tuple[bool, ...]) -> tuple[Operands, Operands]:
    end = len(operands) - sum(linear)
    return operands[: end - 2], operands[end:]


def _walk_backward(*operands: Any, of: _Options, given: tuple[bool, ...], wanted: tuple[bool, ...]) -> list[Any]:
    forward, _, _, grads = _split_backward(operands, given)
    x, states, extras, weights = of.split(forward)

    def walk(x: Any, states: Any, weights: Any) -> list[Any]:
        return _walk(x, *states, *extras, *weights, of=of)

    outputs, undo = jax.vjp(walk, x, states, weights)
    found = iter(grads)
    grad_x, grad_states, grad_weights = undo(
        [next(found) if flag else jnp.zeros_like(one) for flag, one in zip(given, outputs, strict=True)]
    )
    results = [grad_x] * wanted[0] + list(grad_states)
    for own in compress(of.weights_of(grad_weights), wanted[1:]):
        results += own
    return results


# ---- rules


# Inside shard_map an array may vary over the axes of a mesh or be the same on all its devices. All operands of a call
# must be of one kind, as those of an addition must, and their results are; where the weights are made to vary, their
# gradients are summed over the devices.


def _varying(abstract: Any) -> frozenset[Any]:
    of = getattr(abstract, "mat", abstract)  # JAX 0.10; before that, the abstract value itself
    return frozenset(getattr(of, "varying" if of is not abstract else "vma", ()))


def _alike(operands: Operands) -> list[Any]:
    if not hasattr(jax, "typeof"):  # JAX 0.5, which does not tell them apart
        return list(operands)
    own = [_varying(jax.typeof(one)) for one in operands]
    axes = frozenset().union(*own)
    vary = partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else getattr(jax.lax, "pvary", None)
    return [
        vary(one, tuple(axes - varying)) if vary and axes - varying else one
        for one, varying in zip(operands, own, strict=True)
    ]


def _abstract(one: jax.ShapeDtypeStruct, like: Any) -> Any:
    if not _varying(like):
        return jax.core.ShapedArray(one.shape, one.dtype)
    spec = jax.sharding.PartitionSpec(*(None for _ in one.shape))
    return like.update(
        shape=one.shape, dtype=np.dtype(one.dtype), weak_type=False, sharding=like.sharding.update(spec=spec)
    )


def _primitive(name: str, shapes: Callable[..., list[Any]], on_cpu: Any, elsewhere: Any) -> Any:
    primitive = Primitive(f"gatewise_{name}")
    primitive.multiple_results = True

    def run(*operands: Any, **options: Any) -> Any:
        return jax.lax.platform_dependent(
            *operands, cpu=partial(on_cpu, **options), default=partial(elsewhere, **options)
        )

    primitive.def_impl(jax.jit(run, static_argnames=("of", "tape_bytes", "wanted", "given", "linear")))
    primitive.def_abstract_eval(
        lambda *operands, **options: [_abstract(one, operands[0]) for one in shapes(*operands, **options)]
    )
    if on_cpu is not elsewhere:
        mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=True), platform="cpu")
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=True))
    return primitive


def _shapes_of_recorded(x: Any, *_: Any, of: _Options, tape_bytes: int, wanted: Any) -> list[Any]:
    return [*of.results(x), _bytes(tape_bytes)]


def _shapes_of_backward(*operands: Any, of: _Options, given: tuple[bool, ...], wanted: tuple[bool, ...]) -> list[Any]:
    x, states, _, weights = of.split(_split_backward(operands, given)[0])
    return _results_of_backward(of, x, states, weights, wanted)


def _call_recorded(*operands: Any, of: _Options, tape_bytes: int, wanted: Any) -> list[Any]:
    return _call_forward(*operands, of=of, tape_bytes=tape_bytes)


# `wanted` says whether anyone will ask for the gradients of x, and of the weights of each layer and direction. Of a
# recorded call only the rule of vmap reads it.
recurrent = _primitive("recurrent", lambda x, *_, of: of.results(x), _call_forward, _walk)
recorded = _primitive("recorded", _shapes_of_recorded, _call_recorded, _walk_recorded)
tangent = _primitive("tangent", lambda x, *_, of, linear: of.results(x), _walk_tangent, _walk_tangent)
backward = _primitive("backward", _shapes_of_backward, _call_backward, _walk_backward)


def _wanted(of: _Options, linear: tuple[bool, ...]) -> tuple[bool, ...]:
    return linear[0], *(any(own) for own in of.weights_of(linear[1 + of.states :]))


def _recorded_with_tangents(
    operands: Operands, tangents: Operands, of: _Options, tape_bytes: int
) -> tuple[list[Any], list[Any]]:
    """y, h and c after, the tape; and the tangents of all but the tape."""
    x, states, _, weights = of.split(tangents)
    variables = [x, *states, *weights]
    linear = tuple(type(one) is not ad.Zero for one in variables)
    wanted = _wanted(of, linear)
    results = recorded.bind(*operands, of=of, tape_bytes=tape_bytes, wanted=wanted)
    dots = tangent.bind(*operands, results[0], results[-1], *compress(variables, linear), of=of, linear=linear)
    return results, dots


def _recurrent_jvp(operands: Operands, tangents: Operands, *, of: _Options) -> tuple[Any, Any]:
    results, dots = _recorded_with_tangents(operands, tangents, of, of.sizes(*of.extent(operands[0]))[1])
    return results[:-1], dots


def _recorded_jvp(operands: Operands, tangents: Operands, *, of: _Options, tape_bytes: int, wanted: Any) -> Any:
    results, dots = _recorded_with_tangents(operands, tangents, of, tape_bytes)
    return results, [*dots, ad.Zero(jax.core.ShapedArray((tape_bytes,), jax.dtypes.float0))]


def _tangent_transpose(grads: Operands, *operands: Any, of: _Options, linear: tuple[bool, ...]) -> list[Any]:
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
ad.primitive_jvps[tangent] = _jvp_by(tangent, _walk_tangent)
ad.primitive_jvps[backward] = _jvp_by(backward, _walk_backward)
ad.primitive_transposes[tangent] = _tangent_transpose


# ---- vmap: another axis of rows


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


def _merged(operands: Operands, dims: Sequence[int | None], of: _Options, size: int) -> list[Any]:
    """Those of forward with the examples as rows; the weights, the last of them, have no such axis."""
    count = len(of.axes)
    rows = [_merge(*one, size) for one in zip(operands[:count], dims[:count], of.axes, strict=True)]
    return [*rows, *operands[count:]]


def _sizes(operands: Operands, dims: Sequence[int | None], of: _Options) -> tuple[int, int]:
    """How many examples there are, and rows in each."""
    size = next(one.shape[dim] for one, dim in zip(operands, dims, strict=True) if dim is not None)
    shape = [extent for axis, extent in enumerate(operands[0].shape) if axis != dims[0]]
    return size, shape[of.axes[0]]


def _parted(results: Sequence[Any], axes: Sequence[int], size: int, rows: int) -> tuple[list[Any], Sequence[int]]:
    return [_part(one, axis, size, rows) for one, axis in zip(results, axes, strict=True)], axes


def _apart(dims: Sequence[int | None], of: _Options, wanted: tuple[bool, ...] = (False,)) -> bool:
    """Whether examples have weights, or gradients of weights, of their own."""
    return any(wanted[1:]) or any(dim is not None for dim in of.split(dims)[3])


def _recurrent_batch(operands: Operands, dims: Sequence[int | None], *, of: _Options) -> tuple[Any, Any]:
    if _apart(dims, of):
        return _one_by_one(recurrent, operands, dims, of=of)
    size, rows = _sizes(operands, dims, of)
    results = recurrent.bind(*_merged(operands, dims, of, size), of=of)
    return _parted(results, of.axes[: 1 + of.states], size, rows)


def _recorded_batch(
    operands: Operands, dims: Sequence[int | None], *, of: _Options, tape_bytes: int, wanted: tuple[bool, ...]
) -> tuple[Any, Any]:
    """Where the examples become rows there is no tape: one of all rows could not be cut into those of examples."""
    if _apart(dims, of, wanted):
        return _one_by_one(recorded, operands, dims, of=of, tape_bytes=tape_bytes, wanted=wanted)
    results, axes = _recurrent_batch(operands, dims, of=of)
    return [*results, jnp.zeros(tape_bytes, np.uint8)], [*axes, None]


def _backward_batch(
    operands: Operands, dims: Sequence[int | None], *, of: _Options, given: tuple[bool, ...], wanted: tuple[bool, ...]
) -> tuple[Any, Any]:
    forward, y, _, grads = _split_backward(operands, given)
    forward_dims, y_dim, tape_dim, grad_dims = _split_backward(dims, given)
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
    results = jax.vmap(partial(_walk_tangent, **options), in_axes=tuple(dims))(*operands)
    return results, [0] * len(results)


batching.primitive_batchers[recurrent] = _recurrent_batch
batching.primitive_batchers[recorded] = _recorded_batch
batching.primitive_batchers[backward] = _backward_batch
batching.primitive_batchers[tangent] = _tangent_batch

for _name, _handler in _core.xla_handlers().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")


# ---- the functions


def lstm(
    parameters: Mapping[str, Any], x: Any, state: Any = None, *, batch_first: bool = False, lengths: Any = None,
    resets: Any = None, checkpoint_every: int | None = None,
) -> tuple[Any, tuple[Any, Any]]:  # fmt: skip
    """Run a stack of LSTM layers, as `torch.nn.LSTM` defines it.

    Parameters
    ----------
    parameters : mapping of names to arrays
        PyTorch's names, shapes and gate order (i f g o): `weight_ih_l0` (4*H, I), `weight_hh_l0` (4*H, R), with biases
        `bias_ih_l0` and `bias_hh_l0` (4*H,), with a projection `weight_hr_l0` (P, H); for the reverse direction
        `..._l0_reverse`; for the next layer `..._l1`. The names and shapes say what the stack is. A layer's
        `state_dict()` is such a mapping, and a pytree.
    x : array
        float32 or, where JAX has it enabled, float64, as the parameters: (T, B, I), with batch_first (B, T, I), or
        unbatched (T, I).
    state : pair of arrays, optional
        h (L*D, B, R) and c (L*D, B, H) before the first step, unbatched without B; by default zero.
    lengths : array of integers, optional
        (B,): the steps of each row. Output behind a row's end is zero, its state after is the one at its end.
    resets : array of bools, optional
        In the order of x's axes, (T, B): where the state is set to zero before the step.
    checkpoint_every : int, optional
        For gradients, keep only the state of every so many steps and make the gates between them again.

    Returns
    -------
    y : array
        (T, B, D*R), the axes in the order of x's.
    (h, c) : arrays
        The state after the last step.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. Lengths that are known only when a compiled program runs
        are checked there; JAX raises its own error then.
    """
    y, h, c = _run("lstm", parameters, x, state, batch_first, lengths, resets, checkpoint_every)
    return y, (h, c)


def gru(
    parameters: Mapping[str, Any], x: Any, state: Any = None, *, batch_first: bool = False, lengths: Any = None,
    resets: Any = None, checkpoint_every: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Run a stack of GRU layers, as `torch.nn.GRU` defines it: gates r z n, and the state is one array h.

    Else as `lstm`, without a projection. Returns y and h.
    """
    y, h = _run("gru", parameters, x, state, batch_first, lengths, resets, checkpoint_every)
    return y, h


def rnn(
    parameters: Mapping[str, Any], x: Any, state: Any = None, *, nonlinearity: str = "tanh", batch_first: bool = False,
    lengths: Any = None, resets: Any = None, checkpoint_every: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Run a stack of simple recurrent layers, as `torch.nn.RNN` defines it, with nonlinearity "tanh" or "relu".

    Else as `gru`.
    """
    if not isinstance(nonlinearity, str) or nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    y, h = _run(f"rnn_{nonlinearity}", parameters, x, state, batch_first, lengths, resets, checkpoint_every)
    return y, h


def _run(
    cell: str, parameters: Any, x: Any, state: Any, batch_first: bool, lengths: Any, resets: Any,
    checkpoint_every: int | None,
) -> Any:  # fmt: skip
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters: expected a mapping of names to arrays, got {type(parameters).__name__}")
    for name in parameters:
        if not isinstance(name, str):
            raise TypeError(f"parameters: expected names, got {name!r}")
    batch_first = flag("batch_first", batch_first)
    every = 0 if checkpoint_every is None else whole_number("checkpoint_every", checkpoint_every, 1, 2**31 - 1)
    x = _floating("x", x)
    weights = {name: _floating(name, value, x.dtype) for name, value in parameters.items()}
    architecture = _architecture(cell, x.dtype, tuple((name, one.shape) for name, one in weights.items()))
    layout = Layout.of(architecture, batch_first, "x", x)
    states = _states(layout, state)
    if lengths is not None:
        lengths = _lengths(layout, lengths)
    if resets is not None:
        resets = _resets(layout, resets)
    of = _Options(
        architecture, batch_first or layout.unbatched, lengths is not None, resets is not None, every, _core.backend()
    )
    ordered = [weights[name] for name in architecture.shapes()]
    return _call(of, layout.unbatched, x, states, lengths, resets, ordered)


@partial(jax.jit, static_argnums=(0, 1))
def _call(of: _Options, unbatched: bool, x: Any, states: Any, lengths: Any, resets: Any, weights: Any) -> Any:
    extras = [one for one in (lengths, resets) if one is not None]
    if states is None:
        batch = () if unbatched else of.extent(x)[1:]
        states = [jnp.zeros((of.sequences, *batch, size), x.dtype) for size in of.state_sizes]
    if not unbatched:
        return recurrent.bind(*_alike([x, *states, *extras, *weights]), of=of)
    one_row = [x[None], *(part[:, None] for part in states), *(one[None] for one in extras)]
    y, *after = recurrent.bind(*_alike([*one_row, *weights]), of=of)
    return [y[0], *(part[:, 0] for part in after)]


def _floating(name: str, value: Any, dtype: Any = None) -> Any:
    array = value if isinstance(value, jax.Array) else as_array(name, value)
    if array.dtype.newbyteorder("=") not in (np.float32, np.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {array.dtype}")
    if not isinstance(array, jax.Array):
        array = jnp.asarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} as x, got {array.dtype}")
    return array


@lru_cache(maxsize=1024)
def _architecture(cell: str, dtype: Any, given: tuple[tuple[str, tuple[int, ...]], ...]) -> Architecture:
    """What the names and shapes of weights say."""
    shapes = dict(given)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        if name not in shapes:
            raise ValueError(f"parameters: expected {name} among them, got {', '.join(shapes) or 'none'}")
        if len(shapes[name]) != 2:
            raise ValueError(f"{name}: expected two axes, got shape {describe(shapes[name])}")
    rows, input_size = shapes["weight_ih_l0"]
    gates = len(GATES[cell])
    hidden_size = rows // gates
    projection = shapes["weight_hr_l0"][0] if shapes.get("weight_hr_l0") else 0
    if rows == 0 or rows % gates or input_size == 0:
        raise ValueError(
            f"weight_ih_l0: expected shape ({gates}*H, I) of {cell}, got {describe(shapes['weight_ih_l0'])}"
        )
    if projection and cell != "lstm":
        raise ValueError(f"weight_hr_l0: expected no projection of {cell}, got one")
    layers = 1
    while f"weight_ih_l{layers}" in shapes:
        layers += 1
    found = Architecture(
        cell, input_size, hidden_size, layers, "bias_ih_l0" in shapes, "weight_ih_l0_reverse" in shapes, projection,
        np.dtype(dtype),
    )  # fmt: skip
    expected = found.shapes()
    if shapes.keys() != expected.keys():
        raise ValueError(f"parameters: expected {', '.join(expected)}, got {', '.join(shapes)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{name}: expected shape {describe(shape)}, got {describe(shapes[name])}")
    found.check_size()
    return found


def _states(layout: Layout, state: Any) -> list[Any] | None:
    """h, and c where there is one; None: zeros."""
    if state is None:
        return None
    of = layout.architecture
    several = isinstance(state, (tuple, list))
    got = f"a {type(state).__name__} of {len(state)}" if several else type(state).__name__
    if of.has_cell_state and (not several or len(state) != 2):
        raise TypeError(f"state: expected a pair (h, c), got {got}")
    if not of.has_cell_state and several:
        raise TypeError(f"state: expected an array h, got {got}")
    parts = {"state": (state, of.recurrent_size)}
    if of.has_cell_state:
        parts = {"state[0]": (state[0], of.recurrent_size), "state[1]": (state[1], of.hidden_size)}
    return [
        shaped(name, _floating(name, part, of.dtype), layout.state_shape(size)) for name, (part, size) in parts.items()
    ]


def _lengths(layout: Layout, lengths: Any) -> Any:
    if not isinstance(lengths, jax.core.Tracer):
        return whole_lengths(lengths, layout.rows, layout.steps).astype(np.int32)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths: expected whole numbers, got {lengths.dtype}")
    # Into the range of int32, where no wrong one becomes a right one.
    least = 0 if jnp.issubdtype(lengths.dtype, jnp.unsignedinteger) else -1
    most = min(np.iinfo(np.int32).max, jnp.iinfo(lengths.dtype).max)
    return jnp.clip(shaped("lengths", lengths, layout.rows), least, most).astype(np.int32)


def _resets(layout: Layout, resets: Any) -> Any:
    shape = layout.shape(1)[:-1]
    if not isinstance(resets, jax.core.Tracer):
        return restarts(resets, shape)
    if resets.dtype != bool:
        raise TypeError(f"resets: expected bools, got {resets.dtype}")
    return shaped("resets", resets, shape)
