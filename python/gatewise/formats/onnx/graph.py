"""What an ONNX graph does to one path of data: every value by its meaning, worked out without running anything.

What does not depend on the input is folded, within bounds.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from gatewise.arguments.arrays import Array
from gatewise.formats.onnx.operators import OPERATIONS, Call
from gatewise.formats.onnx.values import (
    FLOATS,
    IN_CELLS,
    MAX_AXES,
    REFERENCE_BYTES,
    STEP_BYTES,
    VALUE_BYTES,
    Atom,
    Attributes,
    Axis,
    Budget,
    MaskError,
    NotUnderstoodError,
    Stack,
    Step,
    Tensor,
    Unclear,
    check_axes,
    check_units,
    is_input,
    is_zero,
    label,
    lengths_of,
    named_function,
    ready,
    subgraphs,
    turned_round,
)
from gatewise.weights.architecture import Formula
from gatewise.weights.functions import Function

RECURRENT = {"LSTM": (4, (0, 2, 3, 1)), "GRU": (3, (1, 0, 2)), "RNN": (1, (0,))}  # gates; PyTorch's order of ONNX's
PEEPHOLES = (0, 2, 1)  # our order of ONNX's
# The numbers of a function in a cell where a file gives none. None: ONNX Runtime takes zero there, and the operator of
# that name something else, if there is one.
LEFT_OUT: dict[str, tuple[float | None, ...]] = {
    "leaky_relu": (0.01,), "elu": (1.0,), "hard_sigmoid": (0.2, 0.5), "affine": (None, 0.0),
    "thresholded_relu": (None,), "scaled_tanh": (None, None),
}  # fmt: skip


MAX_INPUTS = 8  # of a recurrent node
MAX_REASON = 1000  # letters, of which each node behind may tell again


class Scope:
    """The values of one graph, by name, worked out node after node.

    Parameters
    ----------
    graph : GraphProto
    version : the version of ONNX's own operators
    read : what makes an array of a TensorProto
    budget : what the file may still take
    outer : the values around the body of a Loop, Scan or If
    is_pytorchs : whether PyTorch's exporter wrote it, which fixes sizes that are open
    """

    def __init__(
        self, graph: Any, version: int, read: Callable[[Any], Array], budget: Budget,
        outer: MutableMapping[str, Any] | None = None, is_pytorchs: bool = False,
    ) -> None:  # fmt: skip
        self.is_pytorchs = is_pytorchs
        self.graph, self.version, self.read, self.budget = graph, version, read, budget
        self.spend = budget.spend
        self.spend(VALUE_BYTES * (len(graph.initializer) + len(graph.input)))
        self.values: ChainMap[str, Any] = ChainMap({}, *([] if outer is None else [outer]))
        self.inputs: dict[str, tuple[Atom, ...]] = {}
        self.pending = {tensor.name: tensor for tensor in graph.initializer}  # read when they are needed
        for given in graph.input:
            if given.name not in self.pending:
                self.values[given.name] = self._input(given, is_body=outer is not None)

    def run(self, until: Any = None) -> None:
        """Every node, up to this one if there is one."""
        for node in self.graph.node:
            if node is until:
                return
            # Outside of what makes a node unclear: where this is too much, the whole file is refused.
            self.spend(REFERENCE_BYTES * len(node.input) + VALUE_BYTES * len(node.output))
            outputs = self._outputs(node)
            for name, value in zip(node.output, outputs, strict=False):
                if name:
                    self.values[name] = value
                    self.pending.pop(name, None)

    def inside(self, body: Any) -> Scope:
        """Of the body of a node, which sees these values."""
        return Scope(body, self.version, self.read, self.budget, self.values, self.is_pytorchs)

    def value(self, name: str) -> Any:
        if name in self.pending:
            try:
                self.values[name] = self.read(self.pending[name])
            except NotUnderstoodError as error:
                self.values[name] = Unclear(f"initializer {name!r}: {error}")
            del self.pending[name]
        value = self.values.get(name)
        return Unclear(f"{name!r}: nothing in front of its use gives it") if value is None else value

    def _input(self, given: Any, is_body: bool) -> Any:
        kind = given.type.tensor_type
        if is_body or not given.type.HasField("tensor_type"):
            return Unclear(f"input {given.name!r}: no tensor whose meaning is known")
        if not kind.HasField("shape"):
            return Unclear(f"input {given.name!r}: expected a shape, got none")
        if len(kind.shape.dim) > MAX_AXES:
            return Unclear(f"input {given.name!r}: expected at most {MAX_AXES} axes, got {len(kind.shape.dim)}")
        self.spend(VALUE_BYTES * len(kind.shape.dim))
        sizes = [int(d.dim_value) if d.HasField("dim_value") else None for d in kind.shape.dim]
        atoms = tuple(Atom(given.name, size, i) for i, size in enumerate(sizes))
        self.inputs[given.name] = atoms
        return Tensor(given.name, tuple((atom,) for atom in atoms), int(kind.elem_type), int(kind.elem_type))

    def _outputs(self, node: Any) -> Sequence[Any]:
        count = len(node.output)
        own = node.domain in ("", "ai.onnx")
        is_recurrent = own and node.op_type in RECURRENT
        if own and node.op_type in ("Loop", "Scan"):
            return [self._loop(node)] * count
        given = []
        for name in node.input[: MAX_INPUTS if is_recurrent else None]:
            given.append(self.value(name) if name else None)
            if isinstance(given[-1], Unclear) and not is_recurrent:
                return [given[-1]] * count
        try:
            self.budget.look_at(sum(value.nbytes for value in given if isinstance(value, np.ndarray)))
            if is_recurrent:
                return self._recurrent(node, given)
            operation = OPERATIONS.get(node.op_type) if own else None
            if operation is None:
                raise NotUnderstoodError("the operator is not one that is known here")
            with np.errstate(all="ignore"):
                result = operation(Call(self, node, given, Attributes(node)))
            return result if isinstance(result, list) else [result]
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            own_words = isinstance(error, ValueError)  # and not Python's
            why = str(error)[:MAX_REASON] if own_words else "what it is given is nothing that it takes here"
            wrong = f"node {label(node)!r} ({node.op_type}): {why}"
            self.spend(len(wrong))
            return [Unclear(wrong, _makes_state(node, given), isinstance(error, MaskError))] * count

    def _loop(self, node: Any) -> Unclear:
        """What is said of it: nothing of the nodes inside, but of a mask that they need, if there is one."""
        inside = (name for body in subgraphs(node) for inner in body.node for name in inner.input)
        for value in map(self.values.get, chain(node.input, inside)):
            if isinstance(value, Unclear) and value.is_mask:
                return value
        return Unclear(
            f"node {label(node)!r} ({node.op_type}): a loop, and no layer; tf2onnx writes one for SimpleRNN, "
            "GRU(reset_after=False), RNN(cells), other activations and masks, which Keras's own files have"
        )

    # -- recurrent nodes

    def weights(self, node: Any) -> dict[str, Any]:
        """What a recurrent node is: its cell, directions, layout, and weights as PyTorch has them."""
        attributes = Attributes(node)
        op = node.op_type
        gates, order = RECURRENT[op]
        cell, formula = _cell(op, attributes)
        directions = 2 if cell["bidirectional"] else 1
        names = [*node.input[:MAX_INPUTS], *[""] * MAX_INPUTS][:MAX_INPUTS]
        w, r, b = (self._weight(kind, name) for kind, name in zip("WRB", names[1:4], strict=True))
        if w is None or r is None:
            raise NotUnderstoodError("W, R: expected weights, got none")
        if w.ndim != 3 or r.ndim != 3 or r.shape[1] != gates * r.shape[2] or 0 in (*w.shape, *r.shape):
            raise NotUnderstoodError(
                f"W, R: expected [D, {gates}H, I] and [D, {gates}H, H], got {w.shape} and {r.shape}"
            )
        units = r.shape[2]
        if w.shape[:2] != (directions, gates * units) or r.shape[0] != directions:
            raise NotUnderstoodError(
                f"W, R: expected {directions} directions of the same size, got {w.shape} and {r.shape}"
            )
        if attributes.whole("hidden_size", units) != units:
            raise NotUnderstoodError(
                f"hidden_size: expected {units}, as R has it, got {attributes.whole('hidden_size')}"
            )
        if b is not None and b.shape != (directions, 2 * gates * units):
            raise NotUnderstoodError(f"B: expected shape {(directions, 2 * gates * units)}, got {b.shape}")
        if any(one is not None and one.dtype != w.dtype for one in (r, b)):
            raise NotUnderstoodError("W, R, B: expected one dtype")
        p = self._peepholes(names[7], (directions, 3 * units), w.dtype) if op == "LSTM" else None
        forgets = _is_coupled(op, attributes, formula.gate)
        arrays = {}
        for d in range(directions):
            suffix = "_l0" + ("_reverse" if d else "")
            parts = {"weight_ih": (w[d], order), "weight_hh": (r[d], order)}
            if b is not None:
                parts |= {"bias_ih": (b[d][: gates * units], order), "bias_hh": (b[d][gates * units :], order)}
            if p is not None:
                parts["weight_ch"] = p[d], PEEPHOLES
            for kind, (part, places) in parts.items():
                blocks = [part[gate * units : (gate + 1) * units] for gate in places]
                if forgets:  # 1 - s(x) = s(-x), whatever is added to x
                    blocks[1] = -blocks[0]
                self.spend(2 * part.nbytes)
                arrays[kind + suffix] = np.concatenate(blocks)
        layout = attributes.whole("layout", 0)
        if layout not in (0, 1):
            raise NotUnderstoodError(f"layout: expected 0 or 1, got {layout}")
        return {
            **cell, "input_size": w.shape[2], "hidden_size": units, "bias": b is not None, "dtype": w.dtype.name,
            "arrays": arrays, "layout": layout, "merge": None, "formula": formula._replace(peepholes=p is not None),
        }  # fmt: skip

    def _peepholes(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
        """Zeros, however they are written, are none."""
        if not name or is_zero(self.value(name)):
            return None
        p = self._weight("P", name)
        if p is None or p.shape != shape or p.dtype != dtype:
            kind = None if p is None else f"{p.shape} and {p.dtype}"
            raise NotUnderstoodError(f"P: expected shape {shape} and the dtype of W, got {kind}")
        return p

    def _weight(self, kind: str, name: str) -> Array | None:
        if not name:
            return None
        value = self.value(name)
        if isinstance(value, Unclear):
            raise NotUnderstoodError(f"{kind}: expected weights that the file holds, got {value.reason}")
        if not isinstance(value, np.ndarray) or value.dtype not in FLOATS.values():
            raise NotUnderstoodError(f"{kind}: expected float32 or float64 weights that the file holds")
        return value

    def _recurrent(self, node: Any, given: Sequence[Any]) -> list[Any]:
        of = self.weights(node)
        given = [*given, *[None] * MAX_INPUTS][:MAX_INPUTS]
        x, lens = given[0], given[4]
        if isinstance(x, Unclear):
            return [x] * 3
        x = ready(x)
        self.spend(4 * STEP_BYTES)
        if len(x.axes) != 3:
            raise NotUnderstoodError(f"X: expected 3 axes, got {len(x.axes)}")
        batch, time = (x.axes[0], x.axes[1]) if of["layout"] else (x.axes[1], x.axes[0])
        check_axes(x, time, batch)
        check_units(x, 2, of["input_size"])
        of["lengths"] = lengths_of(lens, time, x.source)
        of["states"] = tuple(
            _initial(kind, one, of, x.source) for kind, one in zip(("initial_h", "initial_c"), given[5:7], strict=True)
        )
        if of["reverse"]:
            x = turned_round(x, label(node), time, batch, {"own": True, "lengths": of["lengths"]})
        step = Step("recurrent", label(node), of, time, batch)
        units: Axis = (Atom(f"{step.node}.units", of["hidden_size"]),)
        directions: Axis = (Atom(f"{step.node}.directions", 2),) if of["bidirectional"] else ()
        axes: tuple[Axis, ...] = (batch, time, directions, units) if of["layout"] else (time, directions, batch, units)
        y = replace(x, axes=axes, units=directions + units, steps=x.steps.then(step))
        axes = (batch, directions, units) if of["layout"] else (directions, batch, units)
        h = replace(y, axes=axes, steps=y.steps.with_state(), state="h")
        if of["reverse"]:
            y = turned_round(y, step.node, time, batch, {"own": True, "lengths": of["lengths"]})
        return [y, h, replace(h, state="c")]


def _cell(op: str, attributes: Attributes) -> tuple[dict[str, Any], Formula]:
    """Which cell it is and how it reads; whatever else it should be is refused by the attribute's name."""
    known = (
        "hidden_size", "direction", "layout", "activations", "activation_alpha", "activation_beta", "clip",
        "input_forget", "linear_before_reset",
    )  # fmt: skip
    for name in attributes:
        if name not in known:
            raise NotUnderstoodError(f"{name}: the attribute is not supported")
    direction = attributes.text("direction", "forward")
    if direction not in ("forward", "reverse", "bidirectional"):
        raise NotUnderstoodError(f"direction: expected forward, reverse or bidirectional, got {direction!r}")
    two = direction == "bidirectional"
    cell = "gru_reset_before" if op == "GRU" and not attributes.whole("linear_before_reset", 0) else op.lower()
    of = {"cell": cell, "bidirectional": two, "reverse": direction == "reverse"}
    return of, _formula(op, attributes, 2 if two else 1)


def _formula(op: str, attributes: Attributes, directions: int) -> Formula:
    """Functions and clip."""
    clip = attributes.real("clip", math.inf)
    if not clip > 0 or ("clip" in attributes and clip == math.inf):
        raise NotUnderstoodError(f"clip: expected a positive number, got {clip}")
    usual = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}[op]
    names = attributes.texts("activations") or usual * directions
    count, expected = len(usual), len(usual) * directions
    if len(names) != expected and (op, len(names)) != ("RNN", 2):  # which are its default for one direction, too
        raise NotUnderstoodError(f"activations: expected {expected} functions, got {len(names)}")
    functions = _functions(attributes, names)[:expected]
    if functions[:count] != functions[-count:]:
        raise NotUnderstoodError("activations: expected the same functions for both directions")
    if op == "RNN":
        return Formula(candidate=functions[0], clip=clip)
    gate, candidate, output = (*functions[:count], Formula().output)[:3]
    return Formula(gate, candidate, output, clip)


def _functions(attributes: Attributes, names: Sequence[str]) -> list[Function]:
    """The functions of a cell, each of which takes as many of the numbers in their order as it has."""
    functions = []
    given = {name: attributes.reals(name) or [] for name in ("activation_alpha", "activation_beta")}
    ours = {theirs.lower(): own for own, theirs in IN_CELLS.items()}
    for name in names:
        if name.lower() not in ours:
            raise NotUnderstoodError(f"activations: expected {', '.join(IN_CELLS.values())}, got {name!r}")
        function, numbers = ours[name.lower()], []
        for (which, left), usual in zip(given.items(), LEFT_OUT.get(function, ()), strict=False):
            number = left.pop(0) if left else usual
            if number is None:
                raise NotUnderstoodError(f"{which}: expected a number for {name}, which has no common default")
            if not math.isfinite(number):
                raise NotUnderstoodError(f"{which}: expected a finite number, got {number}")
            numbers.append(number)
        functions.append(named_function(function, *numbers))
    for which, left in given.items():
        if left:
            raise NotUnderstoodError(f"{which}: expected no more numbers than the functions have, got {left} besides")
    return functions


def _is_coupled(op: str, attributes: Attributes, gate: Function) -> bool:
    """Whether the forget gate is what the input gate leaves."""
    if not attributes.whole("input_forget", 0):
        return False
    if op != "LSTM":
        raise NotUnderstoodError(f"input_forget: expected none, since {op} has no such gates")
    if gate.name != "sigmoid" and not (gate.name == "hard_sigmoid" and gate.beta == 0.5):
        raise NotUnderstoodError(
            f"input_forget: expected gates of Sigmoid, or of HardSigmoid with beta 0.5, got {gate.name}"
        )
    return True


def _initial(name: str, value: Any, of: Mapping[str, Any], source: str) -> tuple[str, Atom | None] | None:
    """From where a node's first state comes: an input of the graph, and which part of it; None: it is zero."""
    if value is None or is_zero(value):
        return None
    if isinstance(value, Unclear):
        raise NotUnderstoodError(f"{name}: {value.reason}")
    directions = 2 if of["bidirectional"] else 1
    if is_input(value) and value.source != source and len(value.axes) == 3:
        first, batch = (value.axes[1], value.axes[0]) if of["layout"] else value.axes[:2]
        fits = [len(axis) <= 1 for axis in (first, batch)] + [len(value.axes[2]) == 1]
        size = first[0].size if first else 1
        units = value.axes[2][0].size if value.axes[2] else 1
        places = [atom.place for axis in value.axes for atom in axis]
        whole = not any(atom.part for axis in (batch, value.axes[2]) for atom in axis)
        ours = whole and None not in places and len({*places}) == len(places) and value.axes[2][0].place == 2
        if all(fits) and ours and size in (None, directions) and units in (None, of["hidden_size"]):
            return value.source, first[0] if first else None
    raise NotUnderstoodError(f"{name}: expected zeros, or an input of the graph of {directions} directions")


def _makes_state(node: Any, given: Sequence[Any]) -> bool:
    """Whether a node does nothing but arrange last states in another way."""
    arranges = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Slice", "Gather", "Split", "Identity")
    parts = [value for value in given if isinstance(value, (Tensor, Stack, Unclear))]
    are_states = [isinstance(value, Stack) or bool(getattr(value, "state", False)) for value in parts]
    return node.op_type in arranges and bool(parts) and all(are_states)
