"""What each operator of ONNX does to the meaning of its inputs; recurrent nodes are in graph.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from gatewise.arguments.arrays import Array
from gatewise.formats.onnx.values import (
    EXTREMES,
    FLOATS,
    IN_CELLS,
    MAX_AXES,
    MERGES,
    REFERENCE_BYTES,
    SELU,
    STEP_BYTES,
    TYPES,
    VALUE_BYTES,
    WAITING,
    WHOLE,
    Atom,
    Attributes,
    Axis,
    Centred,
    Filled,
    MaskError,
    NotUnderstoodError,
    Size,
    Stack,
    Step,
    Steps,
    Tensor,
    Unclear,
    check_axes,
    check_units,
    decimal,
    is_input,
    is_zero,
    label,
    lengths_of,
    named_function,
    ready,
    time_of,
    turned_round,
)
from gatewise.weights.functions import Function

if TYPE_CHECKING:
    from gatewise.formats.onnx.graph import Scope


@dataclass(frozen=True)
class Call:
    """One node with what it is given."""

    scope: Scope
    node: Any
    given: Sequence[Any]
    attributes: Attributes

    @property
    def version(self) -> int:
        return self.scope.version

    def array(self, i: int, default: Any = None) -> Array:
        """An input that is known."""
        value = self.given[i] if i < len(self.given) else None
        if value is None and default is not None:
            return np.asarray(default)
        if not isinstance(value, np.ndarray):
            raise NotUnderstoodError(f"input {i}: expected numbers that the file holds")
        return value

    def wholes(self, i: int, attribute: str, since: int) -> list[int] | None:
        """Whole numbers that were an attribute before some version, and an input since."""
        if self.version < since or (i >= len(self.given) or self.given[i] is None):
            return self.attributes.wholes(attribute)
        return [_whole(entry) for entry in self.array(i).reshape(-1)]

    def step(self, x: Tensor, kind: str, **options: Any) -> Tensor:
        return self.stepped(x, Step(kind, label(self.node), options))

    def stepped(self, x: Tensor, step: Step) -> Tensor:
        arrays = [step.options.get("weight"), *step.options.get("arrays", {}).values()]
        self.scope.spend(STEP_BYTES + 2 * sum(array.nbytes for array in arrays if array is not None))
        return replace(x, steps=x.steps.then(step), state="")


def _whole(entry: Any) -> int:
    if isinstance(entry, (float, np.floating, Size)) or entry is None:
        raise NotUnderstoodError("expected whole numbers that are known")
    return int(entry)


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise NotUnderstoodError(f"axis: expected one of {rank}, got {axis}")
    return axis % rank


def _identity(call: Call) -> Any:
    return call.given[0]


def _dropout(call: Call) -> Any:
    training = call.given[2] if len(call.given) > 2 else None
    if training is not None and not is_zero(training):
        raise NotUnderstoodError("training_mode: expected inference")
    return [call.given[0], Unclear("the mask of a dropout")]


def _constant(call: Call) -> Any:
    of = call.attributes
    if "value" in of:
        return call.scope.read(of.tensor("value"))
    for name, get, kind in (
        ("value_int", of.whole, np.int64), ("value_ints", of.wholes, np.int64),
        ("value_float", of.real, np.float32), ("value_floats", of.reals, np.float32),
    ):  # fmt: skip
        if name in of:
            number: Any = get
            return np.array(of.real(name, 0.0) if name == "value_float" else number(name), kind)
    raise NotUnderstoodError("expected numbers")


def _cast(call: Call) -> Any:
    value, to = call.given[0], call.attributes.whole("to")
    if to not in TYPES:
        raise NotUnderstoodError(f"to: a dtype that is not supported, number {to}")
    if isinstance(value, np.ndarray):
        call.scope.spend(value.size * 8)
        return value if value.dtype == object else value.astype(TYPES[to])
    if isinstance(value, Tensor):
        if to == value.type or (value.type in WHOLE and to in (6, 7)):
            return value
        if not value.steps and value.type in TYPES and to in (6, 7):
            return replace(value, type=to)  # tokens that come as numbers of another kind
        if is_input(value) and value.type in WHOLE and to in FLOATS and value.given_type in WHOLE:  # not cut off before
            return replace(value, type=to)
        raise NotUnderstoodError("to: another dtype than that of the data")
    return value


def _transpose(call: Call) -> Any:
    value = call.given[0]
    if isinstance(value, Filled):
        return value
    rank = len(value.axes) if isinstance(value, Tensor) else value.ndim
    order = call.attributes.wholes("perm") or [*range(rank)][::-1]
    if sorted(order) != [*range(rank)]:
        raise NotUnderstoodError(f"perm: expected an order of {rank} axes, got {order}")
    if isinstance(value, Tensor):
        return replace(value, axes=tuple(value.axes[i] for i in order))
    return value.transpose(order)


def _squeeze(call: Call) -> Any:
    value, axes = call.given[0], call.wholes(1, "axes", 13)
    if isinstance(value, Filled):
        return value
    if isinstance(value, np.ndarray):
        return value.squeeze(None if axes is None else tuple(axes))
    rank = len(value.axes)
    if axes is None:
        raise NotUnderstoodError("axes: expected which")
    gone = {_axis(axis, rank) for axis in axes}
    if any(value.axes[i] for i in gone):
        raise NotUnderstoodError("axes: expected some of size 1")
    return replace(value, axes=tuple(axis for i, axis in enumerate(value.axes) if i not in gone))


def _unsqueeze(call: Call) -> Any:
    value, axes = call.given[0], call.wholes(1, "axes", 13)
    if isinstance(value, Filled):
        return value
    if axes is None or len(axes) > 8:
        raise NotUnderstoodError("axes: expected a few")
    if isinstance(value, np.ndarray):
        return np.expand_dims(value, tuple(axes))
    rank = len(value.axes) + len(axes)
    if rank > MAX_AXES:
        raise NotUnderstoodError(f"axes: expected at most {MAX_AXES} in all")
    new = {_axis(axis, rank) for axis in axes}
    if len(new) != len(axes):
        raise NotUnderstoodError("axes: expected each of them once")
    wider = [*value.axes]
    for i in sorted(new):
        wider.insert(i, ())
    return replace(value, axes=tuple(wider))


def _shape(call: Call) -> Any:
    value = call.given[0]
    if isinstance(value, Tensor):
        _check_sizes(value)
        entries = [_entry(axis) for axis in value.axes]
    elif isinstance(value, np.ndarray):
        entries = [*value.shape]
    else:
        raise NotUnderstoodError("a shape that is not known")
    first, end = call.attributes.whole("start", 0), call.attributes.whole("end", None)
    return _objects(entries[first:end])


def _check_sizes(x: Tensor) -> None:
    if x.before is not None:
        raise NotUnderstoodError("the size of an axis with steps joined in front")


def _objects(entries: Sequence[Any]) -> Array:
    array = np.empty(len(entries), object)
    array[:] = entries
    return array


def _entry(axis: Axis) -> Any:
    if any(atom.place is not None for atom in axis):
        return Size(axis)
    return math.prod(atom.size or 0 for atom in axis)


def _reshape(call: Call) -> Any:
    value, target = call.given[0], [*call.array(1).reshape(-1)]
    if isinstance(value, Filled):
        return value
    if len(target) > 8:
        raise NotUnderstoodError("shape: expected a few axes")
    allow = call.attributes.whole("allowzero", 0)
    if isinstance(value, np.ndarray):
        shape = [_whole(entry) for entry in target]
        shape = [value.shape[i] if n == 0 and not allow else n for i, n in enumerate(shape)]
        call.scope.spend(value.nbytes)
        return value.reshape(shape)
    _check_sizes(value)
    wanted: list[Any] = []
    for i, entry in enumerate(target):
        if not isinstance(entry, Size) and _whole(entry) == 0:
            if allow:
                raise NotUnderstoodError("shape: an axis of size 0")
            entry = value.axes[i]
        wanted.append(entry.axis if isinstance(entry, Size) else entry)
    wanted = _reopened(call.scope, value, wanted)
    return replace(value, axes=_regrouped([atom for axis in value.axes for atom in axis], wanted))


def _reopened(scope: Scope, x: Tensor, wanted: list[Any]) -> list[Any]:
    """Behind a node PyTorch's exporter may fix a size that the input has open: that of the first axis."""
    last = x.steps.last
    is_output = len(x.axes) == 4 and last is not None and last.kind == "recurrent" and not x.state
    is_fixed = len(wanted) == 3 and not any(isinstance(entry, tuple) for entry in wanted) and wanted[1] == -1
    if (
        not scope.is_pytorchs
        or not is_output
        or not is_fixed
        or len(x.axes[0]) != 1
        or x.axes[0][0].size is not None
        or wanted[0] < 2
    ):
        return wanted
    return [x.axes[0], *wanted[1:]] if x.units and wanted[2] == _count(x.units) else wanted


def _regrouped(atoms: list[Atom], wanted: Sequence[Any]) -> tuple[Axis, ...]:
    """The atoms in their order as other axes: each wanted as so many entries, as these atoms, or -1 as what is left."""
    open_at = next((i for i, entry in enumerate(wanted) if not isinstance(entry, tuple) and entry == -1), None)
    rest = list(atoms)
    front = [_taken(rest, entry, at_end=False) for entry in wanted[:open_at]]
    if open_at is None:
        if rest:
            raise NotUnderstoodError("shape: axes that do not fit those of the data")
        return tuple(front)
    back = [_taken(rest, entry, at_end=True) for entry in reversed(wanted[open_at + 1 :])]
    return (*front, tuple(rest), *reversed(back))


def _taken(rest: list[Atom], entry: Any, at_end: bool) -> Axis:
    """Atoms off one end of those that are left."""
    if isinstance(entry, tuple):
        count = len(entry)
        found = tuple(rest[len(rest) - count :] if at_end else rest[:count])
        if found != entry:
            raise NotUnderstoodError("shape: axes in another order than those of the data")
        del rest[len(rest) - count if at_end else 0 : len(rest) if at_end else count]
        return found
    wanted, size, taken = _whole(entry), 1, list[Atom]()
    if wanted < 1:
        raise NotUnderstoodError(f"shape: expected sizes, got {wanted}")
    while size != wanted or (wanted == 1 and not taken and rest and rest[-1 if at_end else 0].size == 1):
        if not rest or rest[-1 if at_end else 0].size is None or wanted % (rest[-1 if at_end else 0].size or wanted):
            raise NotUnderstoodError("shape: sizes that do not fit those of the data")
        atom = rest.pop(-1 if at_end else 0)
        size *= atom.size or 1
        taken.insert(0, atom) if at_end else taken.append(atom)
        if size > wanted:
            raise NotUnderstoodError("shape: sizes that do not fit those of the data")
    return tuple(taken)


def _concat(call: Call) -> Any:
    values = [value for value in call.given if value is not None]
    axis = call.attributes.whole("axis", 1 if call.version < 4 else None)
    if not values or axis is None:
        raise NotUnderstoodError("expected several inputs and an axis")
    if len(values) == 1:
        return values[0]
    if all(map(is_zero, values)) and any(isinstance(value, Filled) for value in values):
        return Filled(0)
    if all(isinstance(value, np.ndarray) for value in values):
        call.scope.spend(sum(value.nbytes for value in values))
        return np.concatenate(values, axis)
    if all(isinstance(value, (Tensor, Stack)) and _is_last(value) for value in values) and axis == 0:
        entries = [entry for value in values for entry in _entries(value)]
        new = sum(2 for value in values if isinstance(value, Tensor))
        call.scope.spend(REFERENCE_BYTES * len(entries) + VALUE_BYTES * new)
        return Stack(tuple(entries))
    if len(values) == 2 and isinstance(values[1], Tensor):
        if isinstance(values[0], Tensor) and values[0].direction is not None:
            return _both(values[0], values[1], axis)
        return _in_front(values[0], values[1], axis)
    raise NotUnderstoodError("several tensors that depend on the input are joined")


def _is_last(value: Any) -> bool:
    if isinstance(value, Stack):
        return True
    ends = value.steps.last and value.steps.last.kind == "last" and value.state in ("h", "c")
    return bool(ends) and value.direction is None and len(value.axes) == 3 and value.axes[0] == (value.units or ())[:-1]


def _entries(value: Any) -> list[Tensor]:
    """The last states, each without its axis of directions."""
    if isinstance(value, Stack):
        return [*value.entries]
    if not value.axes[0]:
        return [replace(value, axes=value.axes[1:])]
    return [_one_direction(value, 0, d, keeps=False) for d in (0, 1)]


def _one_direction(x: Tensor, axis: int, index: int, keeps: bool) -> Tensor:
    assert x.units is not None
    middle: tuple[Axis, ...] = ((),) if keeps else ()
    return replace(x, axes=(*x.axes[:axis], *middle, *x.axes[axis + 1 :]), direction=index)


def _both(one: Tensor, other: Tensor, axis: int) -> Tensor:
    """Two directions that were taken apart, again side by side."""
    if (one.direction, other.direction) != (0, 1) or replace(one, direction=1) != other or one.units is None:
        raise NotUnderstoodError("expected the two directions of one layer, forward first")
    at = _axis(axis, len(one.axes))
    if one.axes[at] == one.units[1:]:
        joined = one.units
    elif one.axes[at] == ():
        joined = one.units[:1]
    else:
        raise NotUnderstoodError("axis: expected that of the units or the directions")
    return replace(one, axes=(*one.axes[:at], joined, *one.axes[at + 1 :]), direction=None)


def _in_front(first: Any, x: Tensor, axis: int) -> Tensor:
    """Earlier steps in front of a sequence, for a convolution."""
    x, at = ready(x), _axis(axis, len(x.axes))
    if is_input(first) and first.source != x.source and len(first.axes) == len(x.axes):
        size, source = first.axes[at][0].size if len(first.axes[at]) == 1 else None, first.source
    elif is_zero(first) and isinstance(first, np.ndarray) and first.ndim == len(x.axes):
        size, source = first.shape[at], None
    else:
        raise NotUnderstoodError("several tensors that depend on the input are joined")
    if size is None or len(x.axes[at]) != 1:
        raise NotUnderstoodError("expected a known number of steps in front of others")
    return replace(x, before=(size, source, x.axes[at]))


def _pad(call: Call) -> Any:
    x = ready(call.given[0])
    pads = call.wholes(1, "pads", 11)
    mode, value = call.attributes.text("mode", "constant"), call.given[2] if len(call.given) > 2 else None
    by_axis = len(call.given) > 3 and call.given[3] is not None
    if mode != "constant" or (value is not None and not is_zero(value)) or call.attributes.real("value", 0.0):
        raise NotUnderstoodError("expected zeros")
    if pads is None or by_axis or len(pads) != 2 * len(x.axes):
        raise NotUnderstoodError("pads: expected two for each axis")
    at = [i for i, count in enumerate(pads) if count]
    if not at:
        return x
    if len(at) > 1 or at[0] >= len(x.axes) or pads[at[0]] < 0 or len(x.axes[at[0]]) != 1:
        raise NotUnderstoodError("pads: expected some in front of one axis")
    return replace(x, before=(pads[at[0]], None, x.axes[at[0]]))


def _gather(call: Call) -> Any:
    value, index = call.given[0], call.given[1]
    axis = call.attributes.whole("axis", 0)
    if isinstance(index, Tensor):
        return _embedding(call, ready(index), axis)
    index = call.array(1)
    if isinstance(value, Filled):
        return value
    if isinstance(value, np.ndarray):
        axis = _axis(axis, value.ndim)
        size = value.size // max(value.shape[axis], 1) * index.size
        call.scope.spend(size * value.itemsize)
        found: Any = np.take(value, index.astype(np.int64), axis)
        return found if isinstance(found, np.ndarray) else _scalar(found)
    if index.size != 1:
        raise NotUnderstoodError("indices: expected one")
    place = _whole(index.reshape(-1)[0])
    if isinstance(value, Stack):
        if axis != 0 or not -len(value.entries) <= place < len(value.entries):
            raise NotUnderstoodError("indices: expected one of the layers")
        found = value.entries[place]
        return found if index.ndim == 0 else replace(found, axes=((), *found.axes))
    return _picked(call, value, _axis(axis, len(value.axes)), place, index.ndim)


def _scalar(entry: Any) -> Array:
    array = np.empty((), object if isinstance(entry, (Size, int)) else np.asarray(entry).dtype)
    array[()] = entry
    return array


def _picked(call: Call, x: Tensor, axis: int, place: int, kept: int) -> Tensor:
    """One entry of an axis, which goes or is kept with size 1."""
    found = x.axes[axis]
    if kept > 1:
        raise NotUnderstoodError("indices: expected one at most")
    if not found and place in (0, -1):
        return x if kept else replace(x, axes=(*x.axes[:axis], *x.axes[axis + 1 :]))
    if not x.steps:
        return _part(x, axis, place, place + 1 if place != -1 else None, bool(kept))
    if found and x.units is not None and len(x.units) == 2 and found == x.units[:1] and place in (0, 1, -1, -2):
        return _one_direction(x, axis, place % 2, bool(kept))
    time = time_of(x)[0]
    if x.direction is not None and found == time:
        return _end_of_direction(call, x, axis, place, bool(kept))
    is_last = time is not None and _is_end(place, time)
    if time is not None and found == time and place == 0 and x.steps.last and x.steps.last.kind == "reverse":
        return _last_read(call, x, axis, bool(kept))
    if time is not None and found == time and is_last:
        last = call.step(ready(x), "last", own=False)
        middle: tuple[Axis, ...] = ((),) if kept else ()
        return replace(last, axes=(*x.axes[:axis], *middle, *x.axes[axis + 1 :]))
    raise NotUnderstoodError(f"entry {place} of an axis: expected the last step, or a direction")


def _is_end(place: int, time: Axis) -> bool:
    return place == -1 or 0 < place == (time[0].size or 0) - 1


def _end_of_direction(call: Call, x: Tensor, axis: int, place: int, keeps: bool) -> Tensor:
    """The step with which one of two directions ends: the last one of the sequence, or the first one."""
    step, time = x.steps.last, x.axes[axis]
    size = time[0].size
    is_end = _is_end(place, time) if x.direction == 0 else place == 0 or (size is not None and place == -size)
    if step is None or step.kind != "recurrent" or not (is_end or size == 1):
        raise NotUnderstoodError(f"entry {place} of one of two directions: expected the one with which it ends")
    if step.options["lengths"] is not None:
        raise NotUnderstoodError("the last step of all rows, which with sequence_lens is not that of each")
    middle: tuple[Axis, ...] = ((),) if keeps else ()
    axes = (*x.axes[:axis], *middle, *x.axes[axis + 1 :])
    call.scope.spend(STEP_BYTES)
    return replace(x, axes=axes, steps=x.steps.with_state(), state="")


def _last_read(call: Call, x: Tensor, axis: int, keeps: bool) -> Tensor:
    """The first step of what was turned round: the last one before that."""
    steps = ready(x).steps
    turn, before = steps.last, steps.without_last()
    if turn is None or turn.kind != "reverse":
        raise NotUnderstoodError("a factor between two changes of the order")
    two = before.last is not None and before.last.options.get("bidirectional", False)
    last = call.step(replace(x, steps=before), "last", own=turn.options["own"] and not two)
    middle: tuple[Axis, ...] = ((),) if keeps else ()
    return replace(last, axes=(*x.axes[:axis], *middle, *x.axes[axis + 1 :]))


def _part(x: Tensor, axis: int, first: int, end: int | None, keeps: bool) -> Tensor:
    """A part of an input, such as the first state of one layer of several."""
    if len(x.axes[axis]) != 1:
        raise NotUnderstoodError("a part of an axis of size 1")
    (atom,) = x.axes[axis]
    if first < 0 and atom.size is not None:
        first, end = first + atom.size, atom.size if end is None else end
    if end is None or end < 0:
        end = None if atom.size is None else (atom.size if end is None else end + atom.size)
    if end is not None and atom.size is not None:
        end = min(end, atom.size)
    if first < 0 or end is None or end <= first:
        raise NotUnderstoodError("a part of an input that cannot be placed")
    begin = atom.part[0] if atom.part else 0
    part = replace(atom, size=end - first, part=(begin + first, begin + end))
    if keeps:
        return replace(x, axes=(*x.axes[:axis], (part,), *x.axes[axis + 1 :]))
    # Which part it was must not be lost: the axis stays, and the next Unsqueeze would be a second one.
    raise NotUnderstoodError("a single entry of an input")


def _embedding(call: Call, tokens: Tensor, axis: int) -> Tensor:
    table = call.array(0)
    if tokens.steps or tokens.type not in (6, 7) or axis not in (0, -2) or table.ndim != 2:
        raise NotUnderstoodError("expected rows of a table for tokens from the input")
    if table.dtype not in FLOATS.values() or 0 in table.shape:
        raise NotUnderstoodError("expected a table of float32 or float64")
    units: Axis = (Atom(f"{label(call.node)}.units", table.shape[1]),)
    kind = next(number for number, dtype in FLOATS.items() if dtype == table.dtype)
    x = call.step(replace(tokens, units=units, axes=(*tokens.axes, units), type=kind), "embedding", weight=table)
    return x


def _slice(call: Call) -> Any:
    value = call.given[0]
    if isinstance(value, Filled):
        return value
    rank = value.ndim if isinstance(value, np.ndarray) else len(value.axes) if isinstance(value, Tensor) else 3
    if call.version < 10:
        starts, ends = call.attributes.wholes("starts"), call.attributes.wholes("ends")
        axes, strides = call.attributes.wholes("axes"), None
    else:
        starts, ends = call.wholes(1, "", 0), call.wholes(2, "", 0)
        axes, strides = call.wholes(3, "", 0), call.wholes(4, "", 0)
    if starts is None or ends is None:
        raise NotUnderstoodError("expected starts and ends")
    axes = [*range(len(starts))] if axes is None else axes
    strides = [1] * len(starts) if strides is None else strides
    if not len(starts) == len(ends) == len(axes) == len(strides):
        raise NotUnderstoodError("expected as many starts as ends")
    if isinstance(value, np.ndarray):
        cut = [slice(None)] * rank
        for first, end, axis, stride in zip(starts, ends, axes, strides, strict=True):
            backwards = stride < 0 and end < -value.shape[axis]
            cut[_axis(axis, rank)] = slice(first, None if backwards else end, stride)
        return value[tuple(cut)]
    if strides == [-1] and isinstance(value, Tensor):
        return _backwards(call, value, _axis(axes[0], rank), starts[0], ends[0])
    if strides != [1] * len(strides):
        raise NotUnderstoodError("steps: expected 1, or -1 alone")
    for first, end, axis in zip(starts, ends, axes, strict=True):
        value = _sliced(call, value, _axis(axis, rank), first, end)
    return value


def _backwards(call: Call, value: Tensor, axis: int, first: int, end: int) -> Tensor:
    """All steps from the last to the first."""
    x = ready(value)
    time = x.axes[axis]
    if len(time) != 1 or not time[0].is_of(x.source) or time_of(x)[0] not in (None, time):
        raise NotUnderstoodError("steps: expected -1 for the axis of time alone")
    size = time[0].size
    from_last = first == -1 or first >= (2**31 if size is None else size) - 1
    to_first = end < (-(2**31) + 2 if size is None else -size)
    if not from_last or not to_first:
        raise NotUnderstoodError("starts, ends: expected all steps where they are -1")
    call.scope.spend(STEP_BYTES)
    return turned_round(x, label(call.node), time, None, {"own": False})


def _reverse_sequence(call: Call) -> Any:
    x, of = ready(call.given[0]), call.attributes
    rank = len(x.axes)
    time, batch = x.axes[_axis(of.whole("time_axis", 0), rank)], x.axes[_axis(of.whole("batch_axis", 1), rank)]
    check_axes(x, time, batch)
    lengths = lengths_of(call.given[1] if len(call.given) > 1 else None, time, x.source)
    call.scope.spend(STEP_BYTES)
    return turned_round(x, label(call.node), time, batch, {"own": True, "lengths": lengths})


def _sliced(call: Call, value: Any, axis: int, first: int, end: int) -> Any:
    whole = end >= 2**31 - 1
    if isinstance(value, Stack):
        entries = value.entries[first : None if whole else end]
        call.scope.spend(REFERENCE_BYTES * len(entries))
        if axis or not entries:
            raise NotUnderstoodError("expected some of the layers")
        if len(entries) == 1:
            return replace(entries[0], axes=((), *entries[0].axes))
        both = len(entries) == 2 and entries[0].direction == 0 and entries[1] == replace(entries[0], direction=1)
        if both:
            units = entries[0].units
            assert units is not None
            return replace(entries[0], axes=(units[:1], *entries[0].axes), direction=None)
        return Stack(entries)
    if whole and first == 0:
        return value
    if value.before is not None and (whole or end == 0) and first < 0:
        return Unclear("the last inputs of a convolution", is_state=True)
    found = value.axes[axis]
    if not found and first in (0, -1) and (whole or end == 1):
        return value
    if not value.steps and len(found) == 1 and value.before is None:
        return _part(value, axis, first, None if whole else end, keeps=True)
    size = found[0].size if len(found) == 1 else None
    if size is not None and end == size and value.before is None:
        if first == 0:
            return value
        whole = True
    if whole and size is not None and first == size - 1:
        first = -1
    if (whole and first == -1) or (first >= 0 and end == first + 1) or (first < -1 and end == first + 1):
        return _picked(call, value, axis, first, kept=1)
    raise NotUnderstoodError("a part of an axis: expected the last step, or a direction")


def _split(call: Call) -> Any:
    value, count = call.given[0], len(call.node.output)
    axis = call.attributes.whole("axis", 0)
    sizes = call.wholes(1, "split", 13)
    if isinstance(value, Filled):
        return [value] * count
    if isinstance(value, np.ndarray):
        axis = _axis(axis, value.ndim)
        if sizes is None:
            each = -(-value.shape[axis] // count)
            sizes = [each] * (count - 1) + [value.shape[axis] - each * (count - 1)]
        if min(sizes, default=0) < 0 or sum(sizes) != value.shape[axis] or len(sizes) != count:
            raise NotUnderstoodError("split: sizes that do not fit")
        return np.split(value, np.cumsum(sizes)[:-1].tolist(), axis)
    axis = _axis(axis, len(value.axes))
    size = value.axes[axis][0].size if len(value.axes[axis]) == 1 else None
    if size is None:
        raise NotUnderstoodError("an axis of unknown size")
    if sizes is None:
        each = -(-size // count)
        sizes = [each] * (count - 1) + [size - each * (count - 1)]
    if min(sizes) < 1 or sum(sizes) != size or len(sizes) != count:
        raise NotUnderstoodError("split: sizes that do not fit")
    ends = accumulate(sizes)
    return [_sliced(call, value, axis, end - n, end) for end, n in zip(ends, sizes, strict=True)]


def _constant_of_shape(call: Call) -> Any:
    value = call.scope.read(call.attributes.tensor("value")) if "value" in call.attributes else np.zeros(1, np.float32)
    if value.size != 1:
        raise NotUnderstoodError("value: expected one number")
    return _filled(call, value.reshape(()), [*call.array(0).reshape(-1)])


def _expand(call: Call) -> Any:
    value, target = call.given[0], [*call.array(1).reshape(-1)]
    if isinstance(value, Filled):
        return value
    if isinstance(value, Tensor):
        if len(target) <= len(value.axes) and all(not isinstance(n, Size) and n == 1 for n in target):
            return value
        raise NotUnderstoodError("the data is repeated")
    same = value.size and all(entry == value.flat[0] for entry in (value.flat if value.size < 64 else ()))
    if same or (value.dtype != object and value.size and (value == value.flat[0]).all()):
        shape = target
        if not any(isinstance(n, Size) or n is None for n in target):
            shape = [*_broadcast(value.shape, [_whole(n) for n in target])]
        return _filled(call, _scalar(value.flat[0]), shape)
    shape = [*_broadcast(value.shape, [_whole(n) for n in target])]
    call.scope.spend(math.prod(shape) * value.itemsize)
    return np.broadcast_to(value, shape)


def _tile(call: Call) -> Any:
    value = call.given[0]
    if isinstance(value, Filled):
        return value
    if isinstance(value, np.ndarray) and value.size == 1:
        return _filled(call, value.reshape(()), [*call.array(1).reshape(-1)])
    raise NotUnderstoodError("numbers that are repeated")


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape of all together; NumPy's own function refuses large ones."""
    rank = max(map(len, shapes))
    if rank > 8:
        raise NotUnderstoodError("expected a few axes")
    found = [1] * rank
    for shape in shapes:
        for i, size in enumerate(shape, rank - len(shape)):
            if size < 0 or (size != 1 and found[i] not in (1, size)):
                raise NotUnderstoodError("shapes that do not fit each other")
            found[i] = size if size != 1 else found[i]
    return tuple(found)


def _filled(call: Call, value: Array, shape: Sequence[Any]) -> Any:
    """One number in a shape: as an array if that is small, else as what it is."""
    if not any(isinstance(n, Size) or n is None for n in shape) and len(shape) <= 8:
        sizes = [_whole(n) for n in shape]
        if min(sizes, default=0) < 0:
            raise NotUnderstoodError("expected sizes")
        if math.prod(sizes) <= 4096 and value.dtype != object:
            call.scope.spend(math.prod(sizes) * value.itemsize)
            return np.full(sizes, value)
    return Filled(value[()])


def _range(call: Call) -> Any:
    first, end, step = (_whole(call.array(i).reshape(-1)[0]) for i in range(3))
    if not step or abs(end - first) > 4096:
        raise NotUnderstoodError("expected few numbers")
    call.scope.spend(8 * abs(end - first))
    return np.arange(first, end, step)


def _arithmetic(call: Call) -> Any:
    op, (one, other) = call.node.op_type, call.given[:2]
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        shape = _broadcast(one.shape, other.shape)
        call.scope.spend(math.prod(shape) * 8)
        if one.dtype == object or other.dtype == object:
            if math.prod(shape) > 64:
                raise NotUnderstoodError("sizes: expected few")
            return _sizes(op, one, other, shape)
        if op == "Div" and one.dtype.kind in "iu":
            raise NotUnderstoodError("whole numbers are divided")
        return _FUNCTIONS[op](one, other)
    if op == "Equal" and isinstance(one, Tensor):
        raise MaskError("a mask, or another comparison of data; Keras's own files tell of masks")
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _together(call, op, one, other)
    if any(isinstance(value, Tensor) for value in (one, other)) and any(isinstance(v, Filled) for v in (one, other)):
        raise NotUnderstoodError("data and one number in an array whose shape might repeat them")
    if isinstance(one, Tensor) and isinstance(other, np.ndarray):
        return _affine(call, op, one, other)
    if isinstance(other, Tensor) and isinstance(one, np.ndarray) and op == "Sub":
        return _offset(other, one)
    if isinstance(other, Tensor) and isinstance(one, np.ndarray) and op in ("Add", "Mul"):
        return _affine(call, op, other, one)
    if isinstance(one, Filled) and isinstance(other, Filled) and op == "Mul" and (is_zero(one) or is_zero(other)):
        return Filled(0)
    raise NotUnderstoodError("two tensors that depend on the input meet")


def _together(call: Call, op: str, one: Tensor, other: Tensor) -> Tensor:
    """Two tensors that both come from the input: directions, or the parts of a formula."""
    if op in ("Add", "Mul") and one.direction is not None:
        if other.direction == 0:
            one, other = other, one
        if (one.direction, other.direction) == (0, 1) and replace(one, direction=1) == other:
            return _merged(call, replace(one, direction=None), MERGES[op])
    if one.centred is not None or other.centred is not None:
        return _centred(call, op, one, other)
    if all(x.gelu is None or x.gelu[0] == "x" for x in (one, other)):
        return _silu(call, op, one, other)
    return _gelu_product(call, one, other)


_FUNCTIONS: dict[str, Any] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Equal": np.equal,
}  # fmt: skip


def _sizes(op: str, one: Array, other: Array, shape: tuple[int, ...]) -> Array:
    def of(a: Any, b: Any) -> Any:
        if op == "Equal":
            if a == b or not (isinstance(a, Size) or isinstance(b, Size)):
                return a == b
            negative = any(not isinstance(n, Size) and n is not None and n < 0 for n in (a, b))
            return False if negative else None  # a size that is open may be any other
        if not isinstance(a, Size) and not isinstance(b, Size) and a is not None and b is not None:
            return _known_size(op, _whole(a), _whole(b))
        if op == "Mul":
            if isinstance(a, Size) and isinstance(b, Size):
                if len(a.axis) + len(b.axis) > MAX_AXES:
                    raise NotUnderstoodError(f"expected a product of at most {MAX_AXES} sizes")
                return Size(a.axis + b.axis)
            if 1 in (a, b):
                return a if b == 1 else b
        return None

    found = np.empty(shape, object)
    pairs = zip(np.broadcast_to(one, shape).flat, np.broadcast_to(other, shape).flat, strict=True)
    found.reshape(-1)[:] = _objects([of(a, b) for a, b in pairs])
    return found


def _known_size(op: str, a: int, b: int) -> int:
    size = a // max(b, 1) if op == "Div" else {"Add": a + b, "Sub": a - b, "Mul": a * b}[op]
    if not -(2**63) <= size < 2**63:  # as whole numbers of Python they would go on to grow
        raise NotUnderstoodError("expected sizes of 64 bits")
    return size


def _where(call: Call) -> Any:
    if isinstance(call.given[0], Tensor):
        return _softplus(*call.given[:3])
    condition, one, other = (call.array(i) for i in range(3))
    if condition.dtype == object and any(entry is None for entry in condition.flat):
        raise NotUnderstoodError("condition: it depends on sizes that are open")
    shape = _broadcast(condition.shape, one.shape, other.shape)
    call.scope.spend(math.prod(shape) * 8)
    return np.where(condition.astype(bool), one, other)


def _branch(call: Call) -> Any:
    """The branch that is always taken, if that is known."""
    condition = call.array(0)
    if condition.size != 1 or condition.reshape(-1)[0] is None:
        raise NotUnderstoodError("which branch is taken depends on the data")
    wanted = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
    body = next((attribute.g for attribute in call.node.attribute if attribute.name == wanted), None)
    if body is None:
        raise NotUnderstoodError(f"{wanted}: expected a graph, got none")
    outer = call.scope
    for name in [*outer.pending]:
        outer.value(name)
    scope = outer.inside(body)
    scope.run()
    return [scope.value(output.name) for output in body.output]


def _unary(call: Call) -> Any:
    if isinstance(call.given[0], Tensor):
        return _spread(call, call.given[0])
    value = call.array(0)
    call.scope.spend(value.nbytes)
    function: Any = {"Sqrt": np.sqrt, "Neg": np.negative, "Reciprocal": np.reciprocal}[call.node.op_type]
    return function(value)


def _numbers(call: Call, x: Tensor, value: Any) -> Array:
    """A constant that stands for every unit, or once for all: its numbers."""
    if isinstance(value, Filled):
        if isinstance(value.value, Size):
            raise NotUnderstoodError("a size is used as data")
        return np.asarray(value.value, np.float64).reshape(())
    if value.dtype not in FLOATS.values():
        raise NotUnderstoodError("expected float32 or float64")
    wide = [i - value.ndim + len(x.axes) for i, size in enumerate(value.shape) if size != 1]
    if not wide:
        return np.asarray(value.reshape(()))
    if len(wide) > 1 or (x.units is not None and x.axes[wide[0]] != x.units):
        raise NotUnderstoodError("a constant along another axis than that of the units")
    check_units(x, wide[0], value.size)
    if x.units is not None and math.prod(atom.size or 0 for atom in x.units) != value.size:
        raise NotUnderstoodError(f"a constant of {value.size} units, where the data has others")
    return np.asarray(value.reshape(-1))


def _affine(call: Call, op: str, x: Tensor, value: Any) -> Tensor:
    """A shift or a scale: a layer's bias, or part of a normalisation."""
    if isinstance(value, np.ndarray) and value.ndim > len(x.axes):
        raise NotUnderstoodError("a constant of more axes than the data has")
    if x.centred is not None:
        return _widened(op, x, value)
    if (x.gelu is not None and (x.gelu[0] != "x" or op in ("Mul", "Div"))) or (
        op in ("Mul", "Div") and _is_close(value, (0.5, 2.0, math.sqrt(2), math.sqrt(0.5)))
    ):
        return _gelu_scaled(call, op, x, value)
    x = ready(x)
    if x.type not in FLOATS:
        raise NotUnderstoodError("expected numbers of float32 or float64")
    numbers = _numbers(call, x, value)
    if x.units is None and numbers.ndim == 1:
        at = next(i for i, size in enumerate((1,) * (len(x.axes) - value.ndim) + value.shape) if size != 1)
        x = replace(x, units=x.axes[at])
    last = x.steps.last
    if op == "Add" and last and last.kind in ("dense", "convolution") and last.options["bias"] is None:
        weight = last.options["weight"]
        bias = np.broadcast_to(numbers, weight.shape[:1])
        if bias.dtype == weight.dtype or not numbers.ndim:
            return call.stepped(_without_last(x), replace(last, options={**last.options, "bias": bias}))
    if last and last.kind == "layer_norm" and numbers.ndim:
        part = _part_of_norm(op, last.options, numbers)
        if part:
            return call.stepped(_without_last(x), replace(last, options={**last.options, **part}))
    dtype = FLOATS[x.type]
    return call.step(x, "affine", op=op, numbers=numbers, dtype=dtype)


def _without_last(x: Tensor) -> Tensor:
    return replace(x, steps=x.steps.without_last())


def _is_close(value: Any, numbers: Sequence[float]) -> bool:
    found = value.value if isinstance(value, Filled) else value
    if isinstance(found, Size) or np.size(found) != 1:
        return False
    number = float(np.asarray(found).reshape(-1)[0])
    return any(math.isclose(number, one, rel_tol=1e-6) for one in numbers)


# The formula x * 0.5 * (1 + erf(x / sqrt(2))) in any order: x times a number, the error function, one added to it,
# and x times that, each with the factor that stands before it.


def _gelu_scaled(call: Call, op: str, x: Tensor, value: Any) -> Tensor:
    found = value.value if isinstance(value, Filled) else np.asarray(value)
    is_waiting = x.steps.last is not None and x.steps.last.kind in WAITING
    if np.size(found) != 1 or isinstance(found, Size) or is_waiting:
        raise NotUnderstoodError("an error function that is not part of gelu, or a bound that is not the last")
    number = float(np.asarray(found).reshape(-1)[0])
    kind, factor = x.gelu or ("x", 1.0)
    if op in ("Mul", "Div"):
        factor = factor * number if op == "Mul" else factor / number
        if kind == "gelu" and math.isclose(factor, 0.5, rel_tol=1e-6):
            return _activated(replace(x, gelu=None), call, "gelu")
        return replace(x, gelu=(kind, factor))
    if op == "Add" and kind == "erf" and number == 1 and factor == 1:
        return replace(x, gelu=("cdf", 1.0))
    raise NotUnderstoodError("an error function that is not part of gelu")


def _erf(call: Call) -> Tensor:
    x = call.given[0]
    if not isinstance(x, Tensor) or x.gelu is None or x.gelu[0] != "x":
        raise NotUnderstoodError("an error function that is not part of gelu")
    if not math.isclose(x.gelu[1], math.sqrt(0.5), rel_tol=1e-6):
        raise NotUnderstoodError("an error function that is not part of gelu")
    return replace(x, gelu=("erf", 1.0))


def _gelu_product(call: Call, one: Tensor, other: Tensor) -> Tensor:
    first, second = sorted((one, other), key=lambda x: (x.gelu or ("x",))[0], reverse=True)
    kinds = first.gelu or ("x", 1.0), second.gelu or ("x", 1.0)
    same = replace(first, gelu=None) == replace(second, gelu=None)
    if call.node.op_type != "Mul" or not same or (kinds[0][0], kinds[1][0]) != ("x", "cdf"):
        raise NotUnderstoodError("two tensors that depend on the input meet")
    factor = kinds[0][1] * kinds[1][1]
    x = replace(first, gelu=None)
    return _activated(x, call, "gelu") if math.isclose(factor, 0.5, rel_tol=1e-6) else replace(x, gelu=("gelu", factor))


# The formula of a layer normalisation taken apart, (x - mean) / sqrt(mean((x - mean)**2) + eps), or in other words
# x / sqrt(...) - mean / sqrt(...): each tensor inside it has the steps of x, says which part it is, and holds what was
# added so far.

_NO_PART = "a mean that is not part of a layer normalisation"


def _mean(call: Call, x: Tensor, axes: Sequence[int], op: str) -> Tensor:
    """Over the units: the mean of x or of squares, or the sum of squares."""
    part = op, None if x.centred is None else x.centred.kind
    kind = {
        ("ReduceMean", None): "mean", ("ReduceMean", "square"): "variance", ("ReduceSumSquare", "deviation"): "sum",
    }.get(part)  # fmt: skip
    if kind is None:
        raise NotUnderstoodError(_NO_PART)
    x = ready(x) if x.centred is None else x
    gone = {_axis(axis, len(x.axes)) for axis in axes}
    wide = [x.axes[i] for i in gone if x.axes[i]]
    if len(wide) != 1 or not (wide[0] == x.units or (x.units is None and _is_free(x, wide[0]))):
        raise NotUnderstoodError("a mean that is not one of all units")
    keeps = call.attributes.whole("keepdims", 1)
    left = tuple(() if i in gone else axis for i, axis in enumerate(x.axes) if keeps or i not in gone)
    return replace(x, axes=left, units=wide[0], centred=Centred(kind), state="")


def _is_free(x: Tensor, axis: Axis) -> bool:
    """Whether it may be that of the units, as no step has told yet."""
    return len(axis) == 1 and axis[0].is_of(x.source)


def _power(call: Call) -> Tensor:
    x = call.given[0]
    if not isinstance(x, Tensor) or not _is_close(call.array(1), (2.0,)):
        raise NotUnderstoodError("expected the square of what comes from the input")
    return _centred(call, "Mul", x, x)


def _is_over(part: Tensor, x: Tensor) -> bool:
    """Whether it has one number for all units of this one, and for each entry of the other axes one of its own."""
    narrow = tuple(() if axis == part.units else axis for axis in x.axes)
    return part.axes == narrow and _is_same(part, x)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """But for the axes and the part that they are."""
    return replace(one, axes=other.axes, units=other.units, centred=None) == replace(other, centred=None, state="")


def _centred(call: Call, op: str, one: Tensor, other: Tensor) -> Tensor:
    """Two parts of it meet."""
    if op in ("Mul", "Add"):
        one, other = sorted((one, other), key=lambda x: _ORDER.index(_kind(x)))
    kinds = op, _kind(one), _kind(other)
    part = other.centred or Centred("x")
    if kinds == ("Mul", "deviation", "deviation") and one == other:
        return replace(one, centred=Centred("square"))
    if kinds == ("Sub", "x", "mean") and _is_over(other, ready(one)):
        return replace(ready(one), units=other.units, centred=Centred("deviation"))
    if kinds == ("Div", "deviation", "spread") and _is_over(other, one):
        return _normalised(call, one, part)
    if kinds == ("Mul", "x", "inverse") and _fits(other, ready(one)):
        return replace(ready(one), units=other.units, centred=replace(part, kind="scaled"))
    if kinds == ("Mul", "mean", "inverse") and _fits(one, other):
        return replace(other, centred=replace(part, kind="shift"))
    if kinds == ("Mul", "minus", "inverse") and _fits(one, other):
        return replace(other, centred=replace(part, kind="offset"))
    is_whole = kinds in (("Add", "scaled", "offset"), ("Sub", "scaled", "shift")) and _fits(other, one)
    if is_whole and one.centred is not None and (part.weight is one.centred.weight and part.eps == one.centred.eps):
        return _normalised(call, one, part)
    raise NotUnderstoodError(_NO_PART)


_ORDER = (
    "x",
    "mean",
    "minus",
    "inverse",
    "scaled",
    "shift",
    "offset",
    "deviation",
    "spread",
    "square",
    "sum",
    "variance",
)


def _kind(x: Tensor) -> str:
    return "x" if x.centred is None else x.centred.kind


def _fits(part: Tensor, x: Tensor) -> bool:
    return _is_over(part, x) or (part.axes == x.axes and _is_same(part, x))


def _widened(op: str, x: Tensor, value: Any) -> Tensor:
    """A constant joins a part: how many squares there are, what is added to their mean, the weight."""
    assert x.centred is not None
    found = value.value if isinstance(value, Filled) else value
    if (op, x.centred.kind) == ("Mul", "inverse") and x.centred.weight is None and isinstance(found, np.ndarray):
        return _with_numbers(x, found, "weight")
    if isinstance(found, Size) or np.size(found) != 1:
        raise NotUnderstoodError(_NO_PART)
    number = np.asarray(found).reshape(-1)[0]
    if (op, x.centred.kind) == ("Div", "sum") and number in (Size(x.units or ()), _count(x.units)):
        return replace(x, centred=Centred("variance"))
    if (op, x.centred) == ("Add", Centred("variance")) and isinstance(number, (float, np.floating)):
        return replace(x, centred=Centred("variance", decimal(float(number)) if x.type == 1 else float(number)))
    raise NotUnderstoodError(_NO_PART)


def _count(units: Axis | None) -> int:
    return math.prod(atom.size or 0 for atom in units or ())


def _with_numbers(x: Tensor, numbers: Array, name: str) -> Tensor:
    """A weight or a bias of each unit, on the last axis."""
    assert x.centred is not None
    size = _count(x.units)
    if numbers.size != size or numbers.shape[-1:] != (size,) or numbers.ndim > len(x.axes) or x.type not in FLOATS:
        raise NotUnderstoodError(_NO_PART)
    if x.axes[-1] not in ((), x.units) or numbers.dtype != FLOATS[x.type] or x.units is None:
        raise NotUnderstoodError(_NO_PART)
    kept: dict[str, Any] = {name: numbers.reshape(-1)}
    return replace(x, axes=(*x.axes[:-1], x.units), centred=replace(x.centred, **kept))


def _spread(call: Call, x: Tensor) -> Tensor:
    """A function of one part."""
    after = {
        ("Sqrt", "variance"): "spread", ("Reciprocal", "spread"): "inverse", ("Neg", "mean"): "minus",
        ("Neg", "shift"): "offset",
    }  # fmt: skip
    kind = after.get((call.node.op_type, _kind(x)))
    if kind is None or x.centred is None:
        raise NotUnderstoodError("expected what is part of a layer normalisation")
    return replace(x, centred=replace(x.centred, kind=kind))


def _offset(x: Tensor, bias: Array) -> Tensor:
    """The bias without the shift."""
    if x.centred is None or x.centred.kind != "shift":
        raise NotUnderstoodError("expected what comes from the input on the left")
    offset = _with_numbers(x, bias, "bias")
    assert offset.centred is not None
    return replace(offset, centred=replace(offset.centred, kind="offset"))


def _norm_of_rows(call: Call, x: Tensor) -> Tensor:
    """A batch normalisation of each row by its own mean and variance, as Keras's fused layer normalisation has it."""
    scale, bias, mean, variance = call.given[1:5]
    x = ready(x)
    given = [one for one in (mean, variance) if isinstance(one, Tensor) and one.axes == x.axes[1:2]]
    parts = [one.centred for one in given if _is_same(one, x)]
    rows = [axis for axis in x.axes if axis and axis != mean.units]
    if parts != [Centred("mean"), Centred("variance")] or rows != [*x.axes[1:2]]:
        raise NotUnderstoodError("expected the mean and the variance of all units of each row")
    if not _is_all(scale, 1) or not _is_all(bias, 0) or call.attributes.whole("training_mode", 0):
        raise NotUnderstoodError("expected no weights of each row")
    eps = call.attributes.real("epsilon", 1e-5)
    return _normalised(call, replace(x, units=mean.units), Centred("x", eps))


def _is_all(value: Any, number: int) -> bool:
    found = value.value if isinstance(value, Filled) else value
    return not isinstance(found, (Size, Tensor)) and bool((np.asarray(found) == number).all())


def _normalised(call: Call, x: Tensor, part: Centred) -> Tensor:
    size = _count(x.units)
    if not size or x.type not in FLOATS or not 0 <= part.eps < math.inf:
        raise NotUnderstoodError("a layer normalisation of how many units, or of what, is not known")
    call.scope.spend(size * FLOATS[x.type].itemsize)
    weight = np.ones(size, FLOATS[x.type]) if part.weight is None else part.weight
    options = {"weight": weight, "bias": part.bias, "eps": part.eps, "is_plain": part.weight is None}
    return call.step(replace(x, centred=None), "layer_norm", **options)


def _part_of_norm(op: str, of: Mapping[str, Any], numbers: Array) -> dict[str, Any]:
    """The weight or the bias of one that was taken apart, which come in this order behind it."""
    if numbers.dtype != of["weight"].dtype or of["bias"] is not None:
        return {}
    if op == "Mul" and of.get("is_plain"):
        return {"weight": numbers, "is_plain": False}
    return {"bias": numbers} if op == "Add" else {}


def _extreme(call: Call) -> Tensor:
    """The smaller or the larger of the data and a number: of both in a row, the first waits for the second."""
    given = sorted(call.given, key=lambda value: not isinstance(value, Tensor))
    x, bound = (given[0], _bound(given[1])) if len(given) == 2 else (None, 0.0)
    if not isinstance(x, Tensor) or math.isinf(bound) or np.ndim(given[1]) > len(x.axes):
        raise NotUnderstoodError("expected the data and a number")
    x = ready(x) if x.gelu is not None else x
    kind, last = EXTREMES[call.node.op_type], x.steps.last
    if kind == "at most" and last and last.options.get("function") == Function("relu"):
        return _clipped(call, _without_last(x), 0.0, bound)
    if last and last.kind in EXTREMES.values() and last.kind != kind:
        bounds = {last.kind: last.options["bound"], kind: bound}
        return _clipped(call, _without_last(x), bounds["at least"], bounds["at most"])
    if kind == "at least" and bound == 0:
        return _activated(x, call, "relu")
    return call.step(ready(x), kind, bound=bound)


def _greater(call: Call) -> Tensor:
    x, bound = ready(call.given[0]), _bound(call.given[1])
    if np.ndim(call.given[1]) > len(x.axes):
        raise NotUnderstoodError("expected the data and a number")
    return call.step(x, "above", bound=bound)


def _softplus(condition: Tensor, one: Any, other: Any) -> Tensor:
    """PyTorch's, which above 20 is the number itself: no other one then, either."""
    last, end = condition.steps.last, other.steps.last if isinstance(other, Tensor) else None
    if last is None or last.kind != "above" or not isinstance(other, Tensor) or end is None:
        raise NotUnderstoodError("condition: it depends on the data")
    is_softplus = end.options.get("function") == Function("softplus")
    x = _without_last(condition)
    same = isinstance(one, Tensor) and ready(one) == x == _without_last(other)
    if not is_softplus or not same or last.options["bound"] < (20 if x.type == 1 else 40):
        raise NotUnderstoodError("condition: it depends on the data, and is not that of softplus")
    return other


def _bound(value: Any) -> float:
    found = value.value if isinstance(value, Filled) else value
    if not isinstance(found, (np.ndarray, np.generic)) or found.dtype not in FLOATS.values() or found.size != 1:
        raise NotUnderstoodError("expected a number")
    return float(found.reshape(-1)[0])


def _clip(call: Call) -> Any:
    given, of = [*call.given, None, None], call.attributes
    if call.version < 11:
        least, most = of.real("min", -math.inf), of.real("max", math.inf)
    else:
        least = -math.inf if given[1] is None else _bound(given[1])
        most = math.inf if given[2] is None else _bound(given[2])
    if least == 0 and most > np.finfo(np.float32).max:
        return _activated(call.given[0], call, "relu")
    return _clipped(call, ready(call.given[0]), least, most)


def _clipped(call: Call, x: Tensor, least: float, most: float) -> Tensor:
    """A straight line that is cut off, in units of its height."""
    height = most - least
    if not (0 < height < math.inf) or not math.isfinite(least):
        raise NotUnderstoodError("expected two bounds, of which the second is larger")
    if height > (2**20 if least == 0 else 16):  # where what is small would be rounded as what is large
        raise NotUnderstoodError(f"bounds: expected some that lie close together, got {least} and {most}")
    if (least, most) == (0, 1):
        steps, numbers = _without_line(x)
        return _activated(replace(x, steps=steps), call, "hard_sigmoid", *numbers)
    x = _activated(x, call, "hard_sigmoid", 1 / height, 0.0 - least / height)
    for op, number in (("Mul", height), ("Add", least)):
        x = call.step(x, "affine", op=op, numbers=np.asarray(number), dtype=FLOATS[x.type])
    return x


def _without_line(x: Tensor) -> tuple[Steps, tuple[float, float]]:
    """The steps without a x + b at the end, and a and b."""
    steps, before = x.steps, x.steps.without_last()
    ends = [step for step in (before.last, steps.last) if step is not None]
    last = [step.options for step in ends if step.kind == "affine" and not step.options["numbers"].ndim]
    if [of["op"] for of in last] != ["Mul", "Add"] or not all(np.isfinite(of["numbers"]) for of in last):
        return steps, (1.0, 0.0)
    slope, offset = (float(of["numbers"]) if x.type != 1 else decimal(float(of["numbers"])) for of in last)
    return before.without_last(), (slope, offset)


def _silu(call: Call, op: str, one: Tensor, other: Tensor) -> Tensor:
    """x * sigmoid(x), in any order."""
    x, gate = sorted((ready(one), ready(other)), key=lambda value: len(value.steps))
    last = gate.steps.last
    is_gate = last is not None and last.options.get("function") == Function("sigmoid")
    if op != "Mul" or not is_gate or _without_last(gate) != x:
        raise NotUnderstoodError("two tensors that depend on the input meet")
    return _activated(x, call, "silu")


def _activated(value: Any, call: Call, name: str, *numbers: float) -> Tensor:
    x = ready(value)
    if x.type not in FLOATS:
        raise NotUnderstoodError("expected numbers of float32 or float64")
    return call.step(x, "activation", function=named_function(name, *numbers))


def _activation(call: Call) -> Any:
    op, of = call.node.op_type, call.attributes
    if op == "Gelu" and of.text("approximate", "none") != "none":
        raise NotUnderstoodError("approximate: expected none")
    for name, number in SELU.items():
        if op == "Selu" and not _is_close(of.real(name, number), (number,)):
            raise NotUnderstoodError(f"{name}: expected {number}, got {of.real(name, number)}")
    if op == "Swish" and of.real("alpha", 1.0) != 1:
        raise NotUnderstoodError(f"alpha: expected 1, got {of.real('alpha', 1.0)}")
    usual = {"Elu": (1.0,), "LeakyRelu": (0.01,), "ThresholdedRelu": (1.0,), "HardSigmoid": (0.2, 0.5)}.get(op, ())
    numbers = [of.real(name, number) for name, number in zip(("alpha", "beta"), usual, strict=False)]
    names = {theirs: own for own, theirs in IN_CELLS.items()} | {"Swish": "silu"}
    return _activated(call.given[0], call, names.get(op, op.lower()), *numbers)


def _softmax(call: Call) -> Any:
    x = ready(call.given[0])
    axis = call.attributes.whole("axis", 1 if call.version < 13 else -1)
    last = len(x.axes) - 1
    if _axis(axis, len(x.axes)) != last:
        raise NotUnderstoodError(f"axis: expected the last one, got {axis}")
    return _activated(_with_units_last(x), call, "softmax")


def _with_units_last(x: Tensor) -> Tensor:
    """The last axis is that of the units: as steps before have told, or what follows must take it to be."""
    last = x.axes[-1]
    is_free = x.units is None and len(last) == 1 and last[0].is_of(x.source)
    if not is_free and last != x.units:
        raise NotUnderstoodError("expected the units of the layer before on the last axis")
    return replace(x, units=last)


def _matmul(call: Call) -> Any:
    if isinstance(call.given[1], Tensor):
        raise NotUnderstoodError("a product with what comes from the input on the right")
    return _product(call, ready(call.given[0]), call.array(1).T, None)


def _gemm(call: Call) -> Any:
    of, x = call.attributes, ready(call.given[0])
    weight = call.array(1)
    if of.whole("transA", 0) or of.real("alpha", 1.0) != 1 or len(x.axes) != 2:
        raise NotUnderstoodError("transA, alpha: expected the data times the weights")
    if not of.whole("transB", 0):
        weight = weight.T
    bias = call.given[2] if len(call.given) > 2 else None
    if bias is not None:
        if of.real("beta", 1.0) != 1 or not isinstance(bias, np.ndarray) or weight.ndim != 2:
            raise NotUnderstoodError("beta, C: expected a bias of the weights' size")
        if bias.size != 1 and bias.shape not in (weight.shape[:1], (1, *weight.shape[:1])):
            raise NotUnderstoodError("C: expected a bias of the weights' size")
        bias = np.broadcast_to(bias.reshape(-1), weight.shape[:1])
    return _product(call, x, weight, bias)


def _product(call: Call, x: Tensor, weight: Array, bias: Array | None) -> Tensor:
    if weight.ndim != 2 or weight.dtype not in FLOATS.values() or 0 in weight.shape:
        raise NotUnderstoodError("expected a matrix of float32 or float64")
    if bias is not None and bias.dtype != weight.dtype:
        raise NotUnderstoodError("expected a bias of the weights' dtype")
    check_units(x, len(x.axes) - 1, weight.shape[1])
    units: Axis = (Atom(f"{label(call.node)}.units", weight.shape[0]),)
    known = math.prod(atom.size or 0 for atom in x.axes[-1])
    if x.units is not None and known not in (0, weight.shape[1]):
        raise NotUnderstoodError(f"expected weights for {known} units, got {weight.shape[1]}")
    return call.step(replace(x, axes=(*x.axes[:-1], units), units=units), "dense", weight=weight, bias=bias)


def _layer_norm(call: Call) -> Any:
    x, of = ready(call.given[0]), call.attributes
    if _axis(of.whole("axis", -1), len(x.axes)) != len(x.axes) - 1:
        raise NotUnderstoodError("axis: expected the last one")
    weight = call.array(1)
    bias = call.array(2) if len(call.given) > 2 and call.given[2] is not None else None
    if weight.dtype not in FLOATS.values() or weight.ndim != 1 or (bias is not None and bias.shape != weight.shape):
        raise NotUnderstoodError("expected a scale and a bias for every unit")
    check_units(x, len(x.axes) - 1, weight.size)
    x = replace(x, units=x.axes[-1])
    return call.step(x, "layer_norm", weight=weight, bias=bias, eps=of.real("epsilon", 1e-5))


def _batch_norm(call: Call) -> Any:
    if isinstance(call.given[0], Tensor) and isinstance(call.given[3], Tensor):
        return _norm_of_rows(call, call.given[0])
    x, of = ready(call.given[0]), call.attributes
    trains = of.whole("training_mode", 0) or (call.version < 14 and len([*filter(None, call.node.output)]) > 1)
    if trains or of.whole("spatial", 1) != 1 or len(x.axes) < 2:
        raise NotUnderstoodError("training_mode: expected inference")
    weight, bias, mean, variance = (call.array(i) for i in range(1, 5))
    if any(one.shape != weight.shape or one.dtype != weight.dtype or one.ndim != 1 for one in (bias, mean, variance)):
        raise NotUnderstoodError("expected four numbers for every unit")
    if weight.dtype not in FLOATS.values():
        raise NotUnderstoodError("expected float32 or float64")
    check_units(x, 1, weight.size)
    x = replace(x, units=x.axes[1])
    arrays = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
    return call.step(x, "batch_norm", arrays=arrays, eps=of.real("epsilon", 1e-5))


def _reduce(call: Call) -> Any:
    value, axes = call.given[0], call.wholes(1, "axes", 13 if call.node.op_type == "ReduceSum" else 18)
    if isinstance(value, np.ndarray):
        return _product_of_sizes(call, value, axes)
    if not isinstance(value, Tensor) or not axes:
        raise NotUnderstoodError("expected the directions to be merged")
    axis = _axis(axes[0], len(value.axes))
    is_merge = value.units is not None and len(value.units) == 2 and value.axes[axis] == value.units[:1]
    if not is_merge and call.node.op_type in ("ReduceMean", "ReduceSumSquare"):
        return _mean(call, value, axes, call.node.op_type)
    if not is_merge or not value.steps or len(axes) > 1 or call.node.op_type not in MERGES:
        raise NotUnderstoodError("expected the directions to be merged")
    keeps: tuple[Axis, ...] = ((),) if call.attributes.whole("keepdims", 1) else ()
    x = replace(value, axes=(*value.axes[:axis], *keeps, *value.axes[axis + 1 :]))
    return _merged(call, x, MERGES[call.node.op_type])


def _pool(call: Call) -> Any:
    """The mean of all axes behind the second, which of steps with their units last are the units."""
    x = call.given[0]
    if not isinstance(x, Tensor) or len(x.axes) < 3:
        raise NotUnderstoodError("expected what comes from the input")
    return _mean(call, x, [*range(2, len(x.axes))], "ReduceMean")


def _product_of_sizes(call: Call, value: Array, axes: list[int] | None) -> Array:
    """Of a shape, or of a part of one."""
    are_sizes = value.ndim == 1 and (value.dtype == object or value.dtype in WHOLE.values())
    if call.node.op_type != "ReduceProd" or not are_sizes or value.size > MAX_AXES or axes not in (None, [], [0], [-1]):
        raise NotUnderstoodError("expected the product of a few sizes")
    if not axes and call.attributes.whole("noop_with_empty_axes", 0):
        return value
    found = _objects([1])
    for entry in value:
        found = _sizes("Mul", found, _objects([entry]), (1,))
    return found if call.attributes.whole("keepdims", 1) else found.reshape(())


def _merged(call: Call, x: Tensor, mode: str) -> Tensor:
    """Two directions as one: right behind the layer, or behind its last step."""
    last = x.steps.last
    ends = last is not None and last.kind == "last" and last.options["own"]
    steps = x.steps.without_last() if ends else x.steps
    step = steps.last
    if x.units is None or step is None or step.kind != "recurrent" or x.state == "c" or x.gelu is not None:
        raise NotUnderstoodError("expected the directions to be merged right behind their layer")
    call.scope.spend(2 * STEP_BYTES)
    steps = steps.instead(replace(step, options={**step.options, "merge": mode}))
    return replace(x, steps=steps.then(last) if ends and last else steps, units=x.units[1:], state="")


def _convolution(call: Call) -> Any:
    value, of, weight = call.given[0], call.attributes, call.array(1)
    if not isinstance(value, Tensor):
        raise NotUnderstoodError("expected what comes from the input")
    before = value.before
    x = ready(replace(value, before=None))
    spatial = [i for i in range(2, len(x.axes)) if x.axes[i]]
    if len(spatial) != 1 or weight.ndim != len(x.axes) or weight.dtype not in FLOATS.values() or 0 in weight.shape:
        raise NotUnderstoodError("expected a convolution over time alone")
    if before and before[2] != x.axes[spatial[0]]:
        raise NotUnderstoodError("steps joined in front of others on another axis than that of time")
    count, at = len(x.axes) - 2, spatial[0] - 2
    if any(size != 1 for i, size in enumerate(weight.shape[2:]) if i != at):
        raise NotUnderstoodError("expected a convolution over time alone")
    taps = weight.shape[spatial[0]]
    dilation = (of.wholes("dilations") or [1] * count)[at]
    if (of.wholes("strides") or [1] * count)[at] != 1 or of.whole("group", 1) != 1 or dilation < 1:
        raise NotUnderstoodError("strides, group: expected 1")
    if (of.wholes("kernel_shape") or [*weight.shape[2:]]) != [*weight.shape[2:]]:
        raise NotUnderstoodError("kernel_shape: another one than the weights have")
    reach = (taps - 1) * dilation
    automatic = of.text("auto_pad", "NOTSET")
    pads = of.wholes("pads") or [0] * (2 * count)
    if automatic != "NOTSET" and any(pads):
        raise NotUnderstoodError("auto_pad, pads: expected one of them")
    if automatic == "SAME_UPPER":
        pads = [0] * (2 * count)
        pads[at], pads[count + at] = reach // 2, reach - reach // 2
    elif automatic not in ("NOTSET", "VALID"):
        raise NotUnderstoodError(f"auto_pad: expected SAME_UPPER, got {automatic}")
    if len(pads) != 2 * count or any(n for i, n in enumerate(pads) if i not in (at, count + at)):
        raise NotUnderstoodError("pads: expected some of time alone")
    around = (pads[at] + (before[0] if before else 0), pads[count + at])
    if around == (reach, 0):
        padding = "causal"
    elif around == (reach // 2, reach - reach // 2) and not (before and before[1]):
        padding = "same"
    else:
        raise NotUnderstoodError(f"pads: expected {reach} steps in front, or half of them on each side, got {around}")
    bias = call.array(2) if len(call.given) > 2 and call.given[2] is not None else None
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise NotUnderstoodError("B: expected a bias of the weights' size")
    time, batch = x.axes[spatial[0]], x.axes[0]
    check_axes(x, time, batch)
    check_units(x, 1, weight.shape[1])
    if x.units is not None and math.prod(atom.size or 0 for atom in x.units) != weight.shape[1]:
        raise NotUnderstoodError("expected weights for as many units as there are")
    units: Axis = (Atom(f"{label(call.node)}.units", weight.shape[0]),)
    options = {
        "weight": weight.reshape(weight.shape[0], weight.shape[1], taps), "bias": bias, "dilation": dilation,
        "padding": padding, "states": (None if not before or before[1] is None else (before[1], None),),
    }  # fmt: skip
    step = Step("convolution", label(call.node), options, time, batch)
    return call.stepped(replace(x, axes=(x.axes[0], units, *x.axes[2:]), units=units), step)


OPERATIONS: dict[str, Callable[[Call], Any]] = {
    "Identity": _identity, "Dropout": _dropout, "Constant": _constant, "Cast": _cast, "Transpose": _transpose,
    "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Shape": _shape, "Reshape": _reshape, "Concat": _concat,
    "Gather": _gather, "Slice": _slice, "Split": _split, "ConstantOfShape": _constant_of_shape, "Expand": _expand,
    "If": _branch, "Tile": _tile, "Range": _range, "Where": _where, "Pad": _pad, "Erf": _erf, "Softmax": _softmax,
    "MatMul": _matmul, "Gemm": _gemm, "LayerNormalization": _layer_norm, "BatchNormalization": _batch_norm,
    "Conv": _convolution, "Clip": _clip, "Min": _extreme, "Max": _extreme, "Greater": _greater, "Pow": _power,
    "GlobalAveragePool": _pool, "ReverseSequence": _reverse_sequence,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Equal"), _arithmetic),
    **dict.fromkeys(("Sqrt", "Neg", "Reciprocal"), _unary),
    **dict.fromkeys(("ReduceSum", "ReduceProd", "ReduceMean", "ReduceSumSquare"), _reduce),
    **dict.fromkeys(("Relu", "Tanh", "Sigmoid", "Elu", "LeakyRelu", "Softplus", "HardSigmoid", "Gelu"), _activation),
    **dict.fromkeys(("ThresholdedRelu", "Softsign", "Selu", "Swish"), _activation),
}  # fmt: skip
