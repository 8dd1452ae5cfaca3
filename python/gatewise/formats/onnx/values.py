"""What the values of an ONNX graph mean: axes made of atoms, and the steps that made a tensor of the path.

A tensor on the path is known by its axes, each the product of some *atoms* (an axis of the input, two directions, the
units of a layer), and by the steps that made it. What is not understood is `Unclear`, which matters only if the output
needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gatewise.arguments.arrays import Array
from gatewise.weights.functions import NUMBERS, Function, function_of

SINCE = (7, 14, 22)  # the versions of these operators that are known
FLOATS: dict[int, np.dtype[Any]] = {1: np.dtype(np.float32), 11: np.dtype(np.float64)}  # by TensorProto's numbers
WHOLE: dict[int, np.dtype[Any]] = {
    2: np.dtype(np.uint8), 3: np.dtype(np.int8), 6: np.dtype(np.int32), 7: np.dtype(np.int64),
}  # fmt: skip
TYPES: dict[int, np.dtype[Any]] = {**FLOATS, **WHOLE, 9: np.dtype(np.bool_)}
# ONNX's names of the functions that it has in cells, of which most are operators, too.
IN_CELLS = {
    "relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid", "affine": "Affine", "leaky_relu": "LeakyRelu",
    "thresholded_relu": "ThresholdedRelu", "scaled_tanh": "ScaledTanh", "hard_sigmoid": "HardSigmoid", "elu": "Elu",
    "softsign": "Softsign", "softplus": "Softplus",
}  # fmt: skip
SELU = {"alpha": 1.6732632, "gamma": 1.050701}
MERGES = {"ReduceSum": "sum", "ReduceProd": "mul", "ReduceMean": "ave", "Add": "sum", "Mul": "mul"}


EXTREMES = {"Min": "at most", "Max": "at least"}
WAITING = (*EXTREMES.values(), "above")  # kinds of steps that mean something only with the next one


class NotUnderstoodError(ValueError):
    """A node that means nothing here."""


class MaskError(NotUnderstoodError):
    """A node that begins a mask."""


@dataclass(frozen=True, slots=True)
class Atom:
    """A part of an axis; without a size where the file leaves it open."""

    name: str  # of the input, or of the node whose units or directions these are
    size: int | None
    place: int | None = None  # which axis of the input it is
    part: tuple[int, int] | None = None  # only these entries of that axis

    def is_of(self, source: str) -> bool:
        """Whether it is a whole axis of this input."""
        return self.place is not None and self.name == source and self.part is None


Axis = tuple[Atom, ...]  # their product; none: an axis of one


MAX_AXES = 8  # whose sizes are multiplied: a batch and its steps are two
# What the objects of Python take that a node becomes, in bytes.
REFERENCE_BYTES = 8
VALUE_BYTES = 300  # a tensor or an array, without its numbers, and its name
STEP_BYTES = 500
LAYER_BYTES = 1500


@dataclass
class Budget:
    """What may still be done for a file, in bytes."""

    memory: int
    work: int  # numbers that are looked at again by one node after the other

    def spend(self, count: int) -> None:
        """To be told of every number of bytes before they are taken."""
        if count > self.memory:
            raise NotUnderstoodError("it would take far more memory than the file")
        self.memory -= count

    def look_at(self, count: int) -> None:
        if count > self.work:
            raise NotUnderstoodError("it would take far more time than a file of that size")
        self.work -= count


@dataclass(frozen=True, slots=True)
class Size:
    """How many entries an axis of the input has, as a number inside the graph."""

    axis: Axis


@dataclass(frozen=True, slots=True)
class Filled:
    """One number, in an array of any shape."""

    value: Any


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What one layer of the model will be."""

    kind: str
    node: str
    options: Mapping[str, Any] = field(default_factory=dict)
    time: Axis | None = None
    batch: Axis | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Steps:
    """The steps that made a tensor, from the input on.

    Tensors share those that they have in common, so that the 10,000th node takes no more memory and time than the
    first. Two are equal if they are the same object.
    """

    before: Steps | None = None  # without the last one
    last: Step | None = None
    count: int = 0
    time: Axis | None = None  # as the first step has it that tells
    batch: Axis | None = None
    known: dict[Any, Steps] = field(default_factory=dict)  # with one more that is the same whoever asks for it

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Step]:
        return reversed([here.last for here in self.ends() if here.last is not None])

    def ends(self) -> Iterator[Steps]:
        """All that these begin with, themselves first."""
        here: Steps | None = self
        while here is not None:
            yield here
            here = here.before

    def then(self, step: Step) -> Steps:
        time = step.time if self.time is None else self.time
        return Steps(self, step, self.count + 1, time, step.batch if self.batch is None else self.batch)

    def then_known(self, key: Any, step: Step) -> Steps:
        if key not in self.known:
            self.known[key] = self.then(step)
        return self.known[key]

    def without_last(self) -> Steps:
        return self if self.before is None else self.before

    def instead(self, step: Step) -> Steps:
        """With this one in place of the last."""
        return self.without_last().then(step)

    def with_state(self) -> Steps:
        """Up to the last state of a recurrent step; for two directions that are joined again it must be the same."""
        assert self.last is not None
        return self.then_known("state", Step("last", self.last.node, {"own": True}))


NO_STEPS = Steps()


@dataclass(frozen=True, slots=True)
class Centred:
    """Which part of the formula of a layer normalisation a tensor is, and what it holds so far."""

    kind: str
    eps: float = 0.0
    weight: Array | None = field(default=None, compare=False)  # which `is` compares
    bias: Array | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that depends on an input of the graph."""

    source: str
    axes: tuple[Axis, ...]
    type: int
    given_type: int  # of the input
    units: Axis | None = None  # None: no step has told yet which axis they are
    steps: Steps = NO_STEPS
    direction: int | None = None  # one of two alone
    before: tuple[int, str | None, Axis] | None = None  # so many steps joined in front: of this input, or zeros; axis
    state: str = ""  # "h" or "c": what a recurrent node ends with, as long as nothing was made of it
    gelu: tuple[str, float] | None = None  # inside the formula of it
    centred: Centred | None = None  # inside the formula of a layer normalisation


@dataclass(frozen=True, slots=True)
class Stack:
    """The last states of several layers, one after the other on the first axis."""

    entries: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Unclear:
    reason: str
    is_state: bool = False  # made of last states only
    is_mask: bool = False


class Attributes:
    """Of a node, with their kinds checked."""

    def __init__(self, node: Any) -> None:
        self._of = {attribute.name: attribute for attribute in node.attribute}
        if len(self._of) != len(node.attribute):
            raise NotUnderstoodError("an attribute occurs twice")

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def _get(self, name: str, kind: int) -> Any:
        attribute = self._of[name]
        if attribute.ref_attr_name or attribute.type != kind:
            raise NotUnderstoodError(f"{name}: an attribute of another kind than it should be")
        return attribute

    def whole(self, name: str, default: int | None = None) -> Any:
        return int(self._get(name, 2).i) if name in self._of else default

    def real(self, name: str, default: float) -> float:
        return decimal(self._get(name, 1).f) if name in self._of else default

    def text(self, name: str, default: str) -> str:
        return str(self._get(name, 3).s.decode("utf-8", "backslashreplace")) if name in self._of else default

    def wholes(self, name: str) -> list[int] | None:
        return [int(i) for i in self._get(name, 7).ints] if name in self._of else None

    def reals(self, name: str) -> list[float] | None:
        return [decimal(f) for f in self._get(name, 6).floats] if name in self._of else None

    def texts(self, name: str) -> list[str] | None:
        if name not in self._of:
            return None
        return [s.decode("utf-8", "backslashreplace") for s in self._get(name, 8).strings]

    def tensor(self, name: str) -> Any:
        return self._get(name, 4).t


def decimal(number: float) -> float:
    """The shortest number that is this one in float32: 0.2, not 0.20000000298."""
    return float(str(np.float32(number)))


def label(node: Any) -> str:
    """Its name, or where it has none that of what it gives."""
    return str(node.name or next((name for name in node.output if name), "without a name"))


def subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.type == 5:
            yield attribute.g
        elif attribute.type == 10:
            yield from attribute.graphs


def is_zero(value: Any) -> bool:
    if isinstance(value, Filled):
        return not isinstance(value.value, Size) and value.value == 0
    with np.errstate(all="ignore"):  # NaNs of a kind that is not quiet
        return isinstance(value, np.ndarray) and value.dtype != object and not value.any()


def ready(value: Any) -> Tensor:
    """A tensor of the path, as a layer can take it."""
    if not isinstance(value, Tensor):
        raise NotUnderstoodError("expected what comes from the input")
    x: Tensor = value
    if value.state == "c":
        raise NotUnderstoodError("the cell state of a layer is used as data")
    if value.steps.last and value.steps.last.kind in WAITING:
        raise NotUnderstoodError("data cut off on one side, or compared")
    if value.direction is not None:
        raise NotUnderstoodError("one of two directions alone is used")
    if value.before is not None:
        raise NotUnderstoodError("steps joined in front of others, and no convolution behind")
    if value.centred is not None:
        raise NotUnderstoodError("a mean that is not part of a layer normalisation")
    if value.gelu is not None:
        kind, factor = value.gelu
        if kind != "x" or value.type not in FLOATS:
            raise NotUnderstoodError("an error function that is not part of gelu")
        options = {"op": "Mul", "numbers": np.asarray(factor), "dtype": FLOATS[value.type]}
        steps = x.steps.then_known((factor, value.type), Step("affine", "a factor", options))
        x = replace(x, gelu=None, steps=steps)
    return replace(x, state="")


def time_of(x: Tensor) -> tuple[Axis | None, Axis | None]:
    """The axes of time and of rows, as far as a step has told them."""
    return x.steps.time, x.steps.batch


def turned_round(x: Tensor, node: str, time: Axis, batch: Axis | None, options: Mapping[str, Any]) -> Tensor:
    """The steps in the other order; own: those of each row within its length."""
    return replace(x, steps=x.steps.then(Step("reverse", node, options, time, batch)), state="")


def check_axes(x: Tensor, time: Axis, batch: Axis) -> None:
    for name, axis in (("time", time), ("batch", batch)):
        if len(axis) > 1 or not all(atom.is_of(x.source) for atom in axis):
            raise NotUnderstoodError(f"the axis of {name}: expected one of the input's")
    if not time:
        raise NotUnderstoodError("the axis of time: expected one of the input's, got a single step")
    known = zip(time_of(x), (time, batch), strict=True)
    if any(before is not None and before != axis for before, axis in known):
        raise NotUnderstoodError("time and batch: expected the same axes as in the layers before")


def check_units(x: Tensor, axis: int, size: int) -> None:
    found = x.axes[axis]
    if x.units is not None and found != x.units:
        raise NotUnderstoodError("expected the units of the layer before on the last axis, in their order")
    if x.units is None and (len(found) != 1 or not found[0].is_of(x.source) or found[0].size not in (None, size)):
        raise NotUnderstoodError(f"expected {size} units")
    if x.type in WHOLE:
        raise NotUnderstoodError("expected numbers, got tokens")


def is_input(value: Any) -> bool:
    """Whether it is an input as it came, or parts of it."""
    if not isinstance(value, Tensor) or value.steps:
        return False
    return value.gelu is None and value.centred is None and value.before is None


def named_function(name: str, *numbers: float) -> Function:
    """With 1/6 and other numbers of ours in place of what float32 makes of them."""
    own = zip(NUMBERS[name], numbers, strict=True)
    alpha, beta = (*(usual if decimal(usual) == number else number for usual, number in own), None, None)[:2]
    return function_of(name, alpha, beta)


def lengths_of(value: Any, time: Axis, source: str) -> str | None:
    if value is None or (isinstance(value, Filled) and value.value == Size(time)):
        return None
    if isinstance(value, np.ndarray) and value.size and time and (value == time[0].size).all():
        return None
    is_own = is_input(value) and value.source != source and len(value.axes) == 1
    if is_own and not any(atom.part for atom in value.axes[0]):
        return str(value.source)
    raise NotUnderstoodError("sequence_lens: expected an input of the graph, or all steps")
