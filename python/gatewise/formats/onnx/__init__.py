"""ONNX files: networks that other frameworks wrote, and gatewise's own for other runtimes.

What is read here may come from anywhere: memory is bounded by the size of the file, nothing in it is run, and what is
not understood is refused by its name.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from gatewise.arguments.arrays import Array
from gatewise.formats.errors import reading
from gatewise.formats.files import write_pieces
from gatewise.formats.onnx import protobuf
from gatewise.formats.onnx.graph import PEEPHOLES, RECURRENT, Scope
from gatewise.formats.onnx.values import (
    IN_CELLS,
    LAYER_BYTES,
    SINCE,
    TYPES,
    Atom,
    Axis,
    Budget,
    NotUnderstoodError,
    Stack,
    Step,
    Steps,
    Tensor,
    Unclear,
    is_input,
    label,
    ready,
    subgraphs,
    time_of,
)
from gatewise.layers.activation import Activation
from gatewise.layers.block import Block
from gatewise.layers.layer import Layer
from gatewise.layers.normalization import BatchNorm, LayerNorm, Normalization
from gatewise.layers.products import Conv1D, Dense, Embedding
from gatewise.layers.recurrent import GRU, LSTM, RNN, shown
from gatewise.layers.sequential import Sequential
from gatewise.layers.structure import Bidirectional, Last, Masking, Reverse, TimeDistributed
from gatewise.running.network import Identity
from gatewise.weights.architecture import GATES, Formula
from gatewise.weights.functions import Function
from gatewise.weights.module import Module

OLDEST = 7
OPSET = 17
# What a file may take, in bytes for each of its own and besides: parsed; folded, and as layers; looked at.
PARSED, FOLDED, WORK = 16, 16, 64
EXTRA = 2**24
NUMBER_BYTES = 24  # of one that is no raw data, on the way to an array
MAX_NAMES, MAX_LETTERS = 20, 200  # of recurrent nodes in a message


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ModuleNotFoundError(
            "ONNX files need the package onnx: pip install 'gatewise[onnx]'", name="onnx"
        ) from error
    return onnx


# ---- loading


def load(path: str | os.PathLike[str], node: str | None = None) -> Sequential | Layer:
    """Read a network from an ONNX file, such as torch.onnx.export and tf2onnx write.

    The graph must lead from one input to one output by layers that gatewise has, with LSTM, GRU or RNN nodes among
    them. First states and `sequence_lens` that are inputs of the graph become what `state=` and `lengths=` of a call
    are; last states may be outputs besides.

    Parameters
    ----------
    path : str or path-like
    node : str, optional
        The name of one LSTM, GRU or RNN node, or of what it gives, which is taken alone, out of the body of a Loop,
        Scan or If as well; the rest of the graph is not looked at.

    Returns
    -------
    Sequential, LSTM, GRU or RNN
        The layer itself where there is nothing but one recurrent node, which does not read backwards: such a one
        stands between two `Reverse`. Each other recurrent node is a layer, and has an entry of its own in the state;
        those behind each other that share one input for their first states are layers of one, as PyTorch has them.

    Raises
    ------
    FormatError
        A ValueError: the file is damaged, or a node is not understood, which is then named.
    OSError
        If it cannot be read.
    """
    if node is not None and not isinstance(node, str):
        raise TypeError(f"node: expected the name of a node, got {type(node).__name__}")
    onnx = _onnx()
    with reading(path):
        file = _File(onnx, path)
        return _network(file) if node is None else _alone(file, node)


class _File:
    """A file that was read, and how much memory it may still take."""

    def __init__(self, onnx: Any, path: str | os.PathLike[str]) -> None:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
            raise ValueError("expected a file")
        with open(path, "rb") as file:
            data = file.read()
        self._onnx = onnx
        self._folder = os.path.dirname(os.path.realpath(os.fsdecode(path)))
        self._budget = Budget(FOLDED * len(data) + 2 * EXTRA, WORK * len(data) + 4 * EXTRA)
        self._outside: set[str] = set()
        try:
            protobuf.check(data, onnx.ModelProto.DESCRIPTOR, PARSED * len(data) + EXTRA)
        except ValueError as error:
            raise ValueError(f"expected an ONNX file, got what is none: {error}") from None
        try:
            self.model = onnx.ModelProto.FromString(data)
        except Exception as error:  # protobuf's implementations each have their own
            raise ValueError(f"expected an ONNX file, got what is none ({type(error).__name__})") from None
        if not self.model.graph.node:
            raise ValueError("expected an ONNX file with a graph, got none")
        versions = {one.domain: one.version for one in self.model.opset_import}
        self.version = int(versions.get("", versions.get("ai.onnx", 1)))
        newest = onnx.defs.onnx_opset_version()
        if not OLDEST <= self.version <= newest:
            raise ValueError(
                f"opset_import: expected version {OLDEST} to {newest}, which this onnx package knows, "
                f"got {self.version}"
            )
        for op in RECURRENT:
            if onnx.defs.get_schema(op, self.version).since_version not in SINCE:
                raise ValueError(f"opset_import: version {self.version} has an {op} that is not known here")

    def scope(self, graph: Any, outer: MutableMapping[str, Any] | None = None) -> Scope:
        return Scope(graph, self.version, self.read, self._budget, outer, self.model.producer_name == "pytorch")

    def read(self, tensor: Any) -> Array:
        """The numbers of a TensorProto."""
        if tensor.data_type not in TYPES:
            raise NotUnderstoodError(f"a dtype that is not supported, number {tensor.data_type}")
        shape = tuple(int(n) for n in tensor.dims)
        if len(shape) > 8 or min(shape, default=0) < 0:
            raise NotUnderstoodError("expected a shape of a few axes")
        if tensor.data_location == 1:
            return self._from_outside(tensor, shape)
        listed = sum(len(one) for one in (tensor.float_data, tensor.double_data, tensor.int32_data, tensor.int64_data))
        self._budget.spend(tensor.ByteSize() + NUMBER_BYTES * listed)
        try:
            array = np.asarray(self._onnx.numpy_helper.to_array(tensor))
        except Exception as error:  # each version of the package has its own
            raise NotUnderstoodError(f"numbers that cannot be read ({type(error).__name__})") from None
        if array.shape != shape or array.dtype != TYPES[tensor.data_type]:
            raise NotUnderstoodError("numbers that do not fit their shape")
        return array

    def _from_outside(self, tensor: Any, shape: tuple[int, ...]) -> Array:
        """Numbers in a file beside the model, and nowhere else."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if (
            location in ("", ".", "..")
            or os.path.basename(location) != location
            or "\0" in location
            or "\\" in location
        ):
            raise NotUnderstoodError(f"external data: expected the name of a file beside the model, got {location!r}")
        dtype = TYPES[tensor.data_type].newbyteorder("<")
        size = math.prod(shape) * dtype.itemsize
        offset, length = _number(entries, "offset", 0), _number(entries, "length", size)
        try:
            with open(os.path.join(self._folder, location), "rb", opener=_unfollowed) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise NotUnderstoodError(f"external data: expected a file {location!r}, got something else")
                if length != size or offset + size > status.st_size:
                    raise NotUnderstoodError(
                        f"external data: expected {size} bytes in {location!r}, got {length} from {offset} on"
                    )
                if location not in self._outside:
                    self._outside.add(location)
                    self._budget.memory += FOLDED * status.st_size
                    self._budget.work += WORK * status.st_size
                self._budget.spend(size)
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise NotUnderstoodError(
                f"external data: expected a file {location!r} beside the model, got {error.strerror}"
            ) from None
        if len(data) != size:
            raise NotUnderstoodError("external data: the file was cut while it was read")
        array: Array = np.frombuffer(data, dtype).astype(TYPES[tensor.data_type], copy=False).reshape(shape)
        return array


def _unfollowed(path: str, flags: int) -> int:
    """A descriptor of what stands there itself: through no link, and without waiting for a writer."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _number(entries: Mapping[str, str], name: str, default: int) -> int:
    """A number of external data, which the file holds as text."""
    text = entries.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise NotUnderstoodError(f"external data: {name}: expected a number, got {text[:MAX_LETTERS]!r}")
    return int(text)


def _places(file: _File, graph: Any, around: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every recurrent node, with the graphs and nodes around it from the outermost on."""
    for node in graph.node:
        if node.op_type in RECURRENT and node.domain in ("", "ai.onnx"):
            yield node, (*around, graph)
        for body in subgraphs(node):
            yield from _places(file, body, (*around, graph, node))


def _named(places: Iterator[tuple[Any, Any]]) -> str:
    """The first of them by name, and how many more there are."""
    names = [repr(label(node)[:MAX_LETTERS]) for node, _ in islice(places, MAX_NAMES)]
    more = sum(1 for _ in places)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _alone(file: _File, name: str) -> Sequential | Layer:
    graph = file.model.graph
    ours = (place for place in _places(file, graph) if name == place[0].name or name in place[0].output)
    found = [*islice(ours, 2)] if name else []
    if len(found) != 1:
        what = "one of" if not found else "a name that only one has, of"
        names = _named(_places(file, graph)) or "some recurrent nodes, of which there are none"
        raise ValueError(f"node: expected {what} {names}")
    ((node, around),) = found
    values: MutableMapping[str, Any] | None = None
    for i in range(0, len(around), 2):
        scope = file.scope(around[i], values)
        scope.run(until=around[i + 1] if i + 1 < len(around) else node)
        values = _visible(scope)
    try:
        of = scope.weights(node)
    except NotUnderstoodError as error:
        raise ValueError(f"node {label(node)!r} ({node.op_type}): {error}") from None
    layer = _layer(of, bool(of["layout"]))
    return Sequential([Reverse(), layer, Reverse()]) if of["reverse"] else layer


def _visible(scope: Scope) -> MutableMapping[str, Any]:
    """What a body sees of the graph around it; an array is read when it is asked for."""
    for name in [*scope.pending]:
        scope.value(name)
    return scope.values


def _network(file: _File) -> Sequential | Layer:
    graph = file.model.graph
    scope = file.scope(graph)
    scope.run()
    try:
        final = _final(graph, scope)
        with np.errstate(all="ignore"):
            return _built(final, scope)
    except (ValueError, TypeError) as error:
        names = _named(_places(file, graph))
        hint = f"; load(path, node=...) takes one of its recurrent nodes alone: {names}" if names else ""
        raise ValueError(f"{error}{hint}") from None


def _final(graph: Any, scope: Scope) -> Tensor:
    """What the path ends with; the other outputs may be states."""
    data, states, stacks, unclear = list[Tensor](), list[Tensor](), dict[int, Stack](), list[str]()
    for output in graph.output:
        value = scope.value(output.name)
        if isinstance(value, Unclear) and value.is_state and output is not graph.output[0]:
            unclear.append(value.reason)
            continue
        if isinstance(value, Stack):
            stacks[id(value)] = value  # once, however many outputs it is
            continue
        if isinstance(value, Unclear):
            raise ValueError(value.reason)
        if not isinstance(value, Tensor):
            raise ValueError(f"output {output.name!r}: expected one that depends on the input")
        if is_input(value) and output is not graph.output[0]:
            continue
        is_whole = value.gelu is None and value.centred is None and value.direction is None
        if value.state and is_whole and (value.state == "c" or _is_apart(value)):
            states.append(value)
        else:
            try:
                data.append(ready(value))
            except NotUnderstoodError as error:
                raise ValueError(f"output {output.name!r}: {error}") from None
    distinct = _without_ends([*dict.fromkeys(data)])
    if not distinct and unclear:
        raise ValueError(unclear[0])
    if not distinct:  # of a node that gives nothing but its last state, the node's own steps
        distinct = [ready(value) for value in states if value.state == "h"][-1:]
    if len(distinct) != 1:
        raise ValueError(f"outputs: expected one besides the last states, got {len(distinct)}")
    (final,) = distinct
    if not final.steps:
        raise ValueError("expected a layer at least")
    on_path = {step.node for step in final.steps}
    ends = chain(states, *(stack.entries for stack in stacks.values()))
    if any(end.steps.last is None or end.steps.last.node not in on_path or end.source != final.source for end in ends):
        raise ValueError("outputs: expected no states but those of the layers that lead to the other output")
    return final


def _without_ends(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Without those that are nothing but the last step of a layer on the way to another one, and so its last state."""
    passing: dict[Steps, int] = {}  # how many of the tensors have these steps on their way
    for tensor in tensors:
        for steps in tensor.steps.ends():
            if steps in passing:
                break
            passing[steps] = 0
        passing[tensor.steps] += 1
    for steps in sorted(passing, key=len, reverse=True):
        if steps.before is not None:
            passing[steps.before] += passing[steps]
    return [tensor for tensor in tensors if not (_is_end(tensor.steps) and passing[tensor.steps.without_last()] > 1)]


def _is_end(steps: Steps) -> bool:
    layer, last = steps.without_last().last, steps.last
    is_last = last is not None and last.kind == "last" and bool(last.options["own"])
    return is_last and layer is not None and layer.kind == "recurrent"


def _is_apart(value: Tensor) -> bool:
    """Whether a last state still has the axis of directions that its node gave it."""
    return len(value.axes) == 3 and value.axes.count((value.units or ())[:-1]) == 1


def _built(final: Tensor, scope: Scope) -> Sequential | Layer:
    inputs = scope.inputs[final.source]
    steps = [*final.steps]
    time, batch = time_of(final)
    tokens = steps[0].kind == "embedding"
    sequence = [*inputs] if tokens else [*inputs[:-1]]
    if time is not None and batch is None:
        batch = tuple(atom for atom in sequence if atom not in time)
    if time is None:
        batch_first, order = False, sequence
    else:
        order = [atom for axis in (time, batch or ()) for atom in axis]
        batch_first = len(order) == 2 and order == sequence[::-1]
    if (time is not None and {*order} != {*sequence}) or (time is None and len(sequence) not in (1, 2)):
        raise ValueError(f"input {final.source!r}: expected axes of time and batch, and of units last but for tokens")
    _check_lengths(steps)
    joined = _joined(_turned_once(steps))
    if not joined:
        raise ValueError("expected a layer at least")
    as_given, is_state = _is_as_given(final)
    if not as_given:
        _check_output(final, sequence, batch)
    group = joined[0]
    if isinstance(group, list) and group[0].options["merge"] is None and len(joined) == 1 + is_state:
        return _layer(group[0].options, batch_first, group[1:])
    return Sequential([*_layers(joined, batch_first, scope.spend)], batch_first=batch_first)


def _is_as_given(final: Tensor) -> tuple[bool, bool]:
    """Whether the output is a node's own, its axes as the node gave them; and whether it is its last state."""
    last = final.steps.last
    is_state = last is not None and last.kind == "last" and bool(last.options["own"])
    step = final.steps.without_last().last if is_state and len(final.steps) > 1 else last
    if step is None or step.kind != "recurrent" or final.units is None or step.time is None or step.batch is None:
        return False, False
    directions, units, layout = final.units[:-1], final.units[-1:], step.options["layout"]
    own: tuple[Axis, ...]
    if is_state:
        own = (step.batch, directions, units) if layout else (directions, step.batch, units)
    elif layout:
        own = (step.batch, step.time, directions, units)
    else:
        own = (step.time, directions, step.batch, units)
    return final.axes == own, is_state and final.axes == own


def _check_lengths(steps: Sequence[Step]) -> None:
    lengths = {step.options["lengths"] for step in steps if "lengths" in step.options}
    if len(lengths) > 1:
        raise ValueError("sequence_lens: expected the same for all nodes that have some, or none")
    if lengths - {None} and any(step.kind == "reverse" and not step.options["own"] for step in steps):
        raise ValueError("sequence_lens: expected none where all rows are turned round, and not each within its own")
    if lengths - {None} and any(step.kind == "convolution" for step in steps):
        raise ValueError("sequence_lens: expected none with convolutions, which take what stands behind a row's end")
    if lengths - {None} and any(step.kind == "last" and not step.options["own"] for step in steps):
        raise ValueError("sequence_lens: expected none with the last step of all rows, which is not that of each")
    given = [one for step in steps for one in step.options.get("states", ()) if one is not None]
    if len(set(given)) != len(given):
        raise ValueError("initial_h, initial_c: expected for each node one of its own")


def _check_output(final: Tensor, sequence: Sequence[Atom], batch: Any) -> None:
    """The axes of the output must be those that a model gives."""
    ends = any(step.kind == "last" for step in final.steps)
    found = [axis for axis in final.axes if axis]
    rows = [*(batch or ())] if ends else [*sequence]
    if found[-1:] != [final.units] or [atom for axis in found[:-1] for atom in axis] != rows:
        raise ValueError("output: expected the axes of the input, the units last")
    if any(len(axis) != 1 for axis in found[:-1]):
        raise ValueError("output: expected axes of time and batch of their own")


def _turned_once(steps: Sequence[Step]) -> list[Step]:
    """Without two changes of the order in a row, of which the second undoes the first."""
    found: list[Step] = []
    for step in steps:
        if step.kind == "reverse" and found and found[-1].kind == "reverse":
            found.pop()
        else:
            found.append(step)
    return found


def _joined(steps: Sequence[Step]) -> list[Step | list[Step]]:
    """Recurrent nodes whose first states are parts of the same inputs as one layer of several."""
    found: list[Step | list[Step]] = []
    for step in steps:
        before = found[-1] if found else None
        if step.kind != "recurrent":
            found.append(step)
        elif isinstance(before, list) and _continues(before[-1], step):
            before.append(step)
        else:
            found.append([step])
    return found


def _continues(one: Step, other: Step) -> bool:
    a, b = one.options, other.options
    directions = 2 if a["bidirectional"] else 1
    same = ("cell", "formula", "hidden_size", "bias", "bidirectional", "dtype")
    if any(a[name] != b[name] for name in same) or a["merge"] or b["merge"]:
        return False
    if b["input_size"] != directions * a["hidden_size"]:
        return False
    parts = [pair for pair in zip(a["states"], b["states"], strict=True) if pair != (None, None)]
    return bool(parts) and all(_follows(first, second) for first, second in parts)


def _follows(first: Any, second: Any) -> bool:
    """Whether the second part of an input stands right behind the first."""
    if first is None or second is None or first[0] != second[0] or first[1] is None or second[1] is None:
        return False
    begin, end = first[1].part, second[1].part
    return begin is not None and end is not None and begin[1] == end[0]


def _layer(of: Mapping[str, Any], batch_first: bool, more: Sequence[Step] = ()) -> Layer:
    cell = of["cell"]
    options: dict[str, Any] = {
        "num_layers": 1 + len(more), "bias": of["bias"], "batch_first": batch_first,
        "bidirectional": of["bidirectional"], "dtype": of["dtype"], "seed": 0,
    }  # fmt: skip
    options |= _functions(cell, of["formula"])
    kinds: dict[str, Any] = {"lstm": LSTM, "rnn": RNN}
    layer: Layer = kinds.get(cell, GRU)(of["input_size"], of["hidden_size"], **options)
    arrays = dict(of["arrays"])
    for i, step in enumerate(more, 1):
        arrays |= {name.replace("_l0", f"_l{i}"): array for name, array in step.options["arrays"].items()}
    layer.load_state_dict(arrays)
    return layer


def _functions(cell: str, formula: Formula) -> dict[str, Any]:
    """A formula as the options of a layer."""
    gate, candidate, output = map(shown, formula[:3])
    clip = None if formula.clip == math.inf else formula.clip
    if cell == "rnn":
        return {"nonlinearity": candidate, "clip": clip}
    options: dict[str, Any] = {"activation": candidate, "recurrent_activation": gate, "clip": clip}
    if cell == "lstm":
        return {**options, "output_activation": output, "peepholes": formula.peepholes}
    return {**options, "reset_after": cell == "gru"}


def _layers(steps: Sequence[Step | list[Step]], batch_first: bool, spend: Callable[[int], None]) -> Iterator[Module]:
    """What the steps are as layers."""
    i, two = 0, False  # whether the last layer is a recurrent one of two directions
    units = next((sizes[0] for sizes in map(_sizes, steps) if sizes is not None), None)
    while i < len(steps):
        step = steps[i]
        i += 1
        spend(LAYER_BYTES)
        sizes = _sizes(step)
        units = units if sizes is None else sizes[1]
        if isinstance(step, list):
            of = step[0].options
            two = of["bidirectional"]
            layer = _layer(of, batch_first, step[1:])
            yield layer if of["merge"] is None else Bidirectional(layer, of["merge"])
            continue
        if step.kind == "last":
            if two and not step.options["own"]:
                yield Activation("linear")  # so that Last takes the last step, not that of each direction
            yield Last()
        elif step.kind in ("dense", "convolution"):
            behind = steps[i] if i < len(steps) else None
            activation: Any = "linear"
            if isinstance(behind, Step) and behind.kind == "activation":
                activation, i = _activation(behind), i + 1
            yield _product(step, activation)
        elif step.kind == "affine":
            same = [step]
            while i < len(steps) and isinstance(behind := steps[i], Step) and behind.kind == "affine":
                same.append(behind)
                i += 1
            if _is_single(same):
                yield _affine(same, ())
                continue
            width = next((step.options["numbers"].size for step in same if step.options["numbers"].ndim), units)
            if width is None:
                raise ValueError("expected a layer that tells how many units there are")
            spend(_AFFINE_BYTES * width)
            yield _affine(same, (width,))
        else:
            yield _SIMPLE[step.kind](step)
        two = False


def _sizes(step: Step | list[Step]) -> tuple[int, int] | None:
    """How many units go into a step and come out of it, if it tells."""
    first, last = (step[0], step[-1]) if isinstance(step, list) else (step, step)
    if "hidden_size" in first.options:
        directions = 2 if last.options["bidirectional"] and last.options["merge"] is None else 1
        return int(first.options["input_size"]), int(last.options["hidden_size"]) * directions
    weight = first.options.get("arrays", first.options).get("weight")
    if weight is None:
        return None
    if first.kind == "embedding" or weight.ndim == 1:
        return int(weight.shape[-1]), int(weight.shape[-1])
    return int(weight.shape[1]), int(weight.shape[0])


def _filled(layer: Any, **arrays: Array | None) -> Module:
    layer.load_state_dict({name: array for name, array in arrays.items() if array is not None})
    return layer  # type: ignore[no-any-return]


def _activation(step: Step) -> Activation:
    function = step.options["function"]
    return Activation(function.name, *function.numbers)


def _product(step: Step, activation: Activation | str) -> Module:
    of = step.options
    weight, bias = of["weight"], of["bias"]
    options: dict[str, Any] = {
        "bias": bias is not None, "activation": activation, "dtype": weight.dtype.name, "seed": 0,
    }  # fmt: skip
    if step.kind == "dense":
        return _filled(Dense(weight.shape[1], weight.shape[0], **options), weight=weight, bias=bias)
    options |= {"dilation": of["dilation"], "padding": of["padding"]}
    layer = Conv1D(weight.shape[1], weight.shape[0], weight.shape[2], **options)
    return _filled(layer, weight=weight, bias=bias)


def _embedding(step: Step) -> Module:
    weight = step.options["weight"]
    return _filled(Embedding(*weight.shape, dtype=weight.dtype.name, seed=0), weight=weight)


def _layer_norm(step: Step) -> Module:
    of = step.options
    dtype = of["weight"].dtype.name
    layer = LayerNorm(of["weight"].size, eps=of["eps"], bias=of["bias"] is not None, dtype=dtype)
    return _filled(layer, weight=of["weight"], bias=of["bias"])


def _batch_norm(step: Step) -> Module:
    arrays = step.options["arrays"]
    dtype = arrays["weight"].dtype.name
    return _filled(BatchNorm(arrays["weight"].size, eps=step.options["eps"], dtype=dtype), **arrays)


def _is_single(steps: Sequence[Step]) -> bool:
    return all(step.options["numbers"].ndim == 0 and np.isfinite(step.options["numbers"]) for step in steps)


def _affine(steps: Sequence[Step], units: tuple[int, ...]) -> Module:
    """Shifts and scales as one normalisation, (x - mean) * scale + shift; a function, if all units have the same."""
    mean, scale, shift = np.zeros(units), np.ones(units), np.zeros(units)
    is_first = True
    with np.errstate(all="ignore"):
        for step in steps:
            op, numbers = step.options["op"], step.options["numbers"].astype(np.float64)
            if op == "Sub" and is_first:
                mean = mean + numbers
            elif op in ("Add", "Sub"):
                shift = shift + numbers if op == "Add" else shift - numbers
            else:
                factor = numbers if op == "Mul" else 1 / numbers
                scale, shift = scale * factor, shift * factor
            is_first = False
    if not units:
        return Activation("affine", float(scale), float(shift - mean * scale))
    dtype = steps[0].options["dtype"]
    layer = BatchNorm(units[0], eps=0.0, dtype=dtype.name)
    arrays = {"weight": scale, "bias": shift, "running_mean": mean, "running_var": np.ones(units)}
    return _filled(layer, **{name: array.astype(dtype) for name, array in arrays.items()})


_AFFINE_BYTES = 12 * 8  # of each unit: the normalisation itself, and what it is worked out with
_SIMPLE: dict[str, Any] = {
    "embedding": _embedding, "activation": _activation, "layer_norm": _layer_norm, "batch_norm": _batch_norm,
    "reverse": lambda step: Reverse(),
}  # fmt: skip


# ---- saving


def save(model: Sequential | Layer | Block, path: str | os.PathLike[str]) -> None:
    """Write a network as an ONNX file that other runtimes can run.

    Its input is "x" and its output "y", with the axes of a call, of which those of time and batch are left open; the
    states are inputs and outputs, too, in the shapes of a call: "h0_in", "c0_in", "h0_out", "c0_out" of the first layer
    that has one, "h1_in" and so on; "x0_in" and "x0_out" of a causal Conv1D. For a state of zero give zeros. The file
    appears as a whole or not at all.

    Parameters
    ----------
    model : Sequential, or any layer
    path : str or path-like

    Raises
    ------
    TypeError
        If `model` is something else.
    ValueError
        If a layer is one that ONNX has no operator for: an LSTM with proj_size, a recurrent layer with silu, gelu or
        selu inside, Masking, an Embedding with mask_zero.
    OSError
        If the file cannot be written; what was there is untouched.
    """
    if isinstance(model, Block):
        model = Sequential([model])
    if not isinstance(model, (Sequential, Layer)):
        raise TypeError(f"model: expected Sequential or a layer, got {type(model).__qualname__}")
    onnx = _onnx()
    data = _Writer(onnx, model).model().SerializeToString()
    write_pieces(os.fsdecode(path), [data])


def _numbers(functions: Sequence[Function]) -> tuple[list[float], list[float]]:
    """The alphas of those that have one, and the betas."""
    numbers = [function.numbers for function in functions]
    alphas, betas = ([each[i] for each in numbers if len(each) > i] for i in range(2))
    return alphas, betas


class _Writer:
    """A graph that grows layer by layer; the data goes through it with time first."""

    def __init__(self, onnx: Any, model: Sequential | Layer) -> None:
        self._helper, self._numpy, self._checker = onnx.helper, onnx.numpy_helper, onnx.checker
        self._layers: tuple[Any, ...] = (model,) if isinstance(model, Layer) else model.layers
        self._batch_first = model.batch_first
        self._chain = model._chain
        self._dtype: np.dtype[Any] = model.dtype
        self._nodes: list[Any] = []
        self._arrays: dict[str, Array] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._states = 0
        self._count = 0

    def model(self) -> Any:
        """The whole of it."""
        of, order = self._chain, ["batch", "time"] if self._batch_first else ["time", "batch"]
        tokens = of.vocabulary is not None
        kind = np.dtype(np.int64) if tokens else self._dtype
        self._inputs.append(self._typed("x", kind, [*order, *of.units]))
        value, rank = "x", 2 if tokens else 3
        if self._batch_first:
            value = self._node("Transpose", [value], perm=[1, 0, 2][:rank])
        value = self._through(value)
        if self._batch_first and not of.ends_at_last:
            value = self._node("Transpose", [value], perm=[1, 0, 2])
        self._node("Identity", [value], ["y"])
        rows = ["batch"] if of.ends_at_last else order
        self._outputs.insert(0, self._typed("y", self._dtype, [*rows, of.output_size]))
        arrays = [self._numpy.from_array(array, name) for name, array in self._arrays.items()]
        graph = self._helper.make_graph(self._nodes, "gatewise", self._inputs, self._outputs, arrays)
        opsets = [self._helper.make_opsetid("", OPSET)]
        made = self._helper.make_model(graph, producer_name="gatewise", opset_imports=opsets, ir_version=8)
        if made.ByteSize() >= 2**31:
            raise ValueError("model: expected weights of less than 2 GB, which is what an ONNX file can hold")
        self._checker.check_model(made)
        return made

    def _typed(self, name: str, dtype: np.dtype[Any], shape: Sequence[Any]) -> Any:
        return self._helper.make_tensor_value_info(name, self._helper.np_dtype_to_tensor_dtype(dtype), shape)

    def _name(self, what: str) -> str:
        self._count += 1
        return f"{what}_{self._count}"

    def _node(self, op: str, given: Sequence[str], gives: Sequence[str] | None = None, **attributes: Any) -> str:
        """Add a node; the name of the first that it gives."""
        outputs = [self._name(op.lower())] if gives is None else gives
        name = self._name(op)
        self._nodes.append(self._helper.make_node(op, given, outputs, name=name, **attributes))
        return str(outputs[0])

    def _array(self, what: str, array: Any, dtype: Any = None) -> str:
        name = self._name(what)
        self._arrays[name] = np.asarray(array, self._dtype if dtype is None else dtype, order="C")
        return name

    def _whole(self, *numbers: int) -> str:
        return self._array("numbers", np.array(numbers), np.int64)

    def _through(self, value: str) -> str:
        two: tuple[Any, str] | None = None  # of a layer of two directions right before: itself, and its last states
        ended = False
        for i, given in enumerate(self._layers):
            layer = given.layer if isinstance(given, TimeDistributed) else given
            recurrent = layer.layer if isinstance(layer, Bidirectional) else layer
            if isinstance(recurrent, Layer):
                merge = layer.merge_mode if isinstance(layer, Bidirectional) else "concat"
                value, last = self._recurrent(i, recurrent, value, merge)
                two = (merge, last) if recurrent.bidirectional else None
            elif isinstance(layer, Last):
                if ended:
                    continue
                ended = True
                value = self._last(value) if two is None else self._both(two[1], two[0], has_time=False)
            elif not isinstance(layer._stage, Identity):
                value, two = self._block(i, layer, value), None
        return value

    # -- recurrent layers

    def _recurrent(self, i: int, layer: Layer, value: str, merge: str) -> tuple[str, str]:
        """Its nodes; the names of the output, and of the last states of the last node."""
        of = layer._architecture
        if of.proj_size:
            raise ValueError(f"layers[{i}]: expected no proj_size, which ONNX's LSTM has not, got {layer!r}")
        op = "RNN" if of.cell.startswith("rnn") else of.cell[:4].rstrip("_").upper()
        options = self._options(i, layer, op)
        kinds = "hc" if of.has_cell_state else "h"
        shape = [of.num_layers * of.directions, "batch", of.hidden_size]
        entry, self._states = self._states, self._states + 1
        for kind in kinds:
            self._inputs.append(self._typed(f"{kind}{entry}_in", self._dtype, shape))
        last: list[list[str]] = [[] for _ in kinds]
        for k in range(of.num_layers):
            first = [self._state_part(f"{kind}{entry}_in", k, of) for kind in kinds]
            outputs = [self._name("sequence"), *(self._name(f"last_{kind}") for kind in kinds)]
            peepholes = self._peepholes(layer, k)
            given = [value, *self._weights(layer, k, op), "", *first, *peepholes]
            self._node(op, given, outputs, **options)
            value = self._both(outputs[0], merge if k == of.num_layers - 1 else "concat", has_time=True)
            for names, name in zip(last, outputs[1:], strict=True):
                names.append(name)
        for kind, names in zip(kinds, last, strict=True):
            self._node("Concat", names, [f"{kind}{entry}_out"], axis=0)
            self._outputs.append(self._typed(f"{kind}{entry}_out", self._dtype, shape))
        return value, last[0][-1]

    def _state_part(self, name: str, k: int, of: Any) -> str:
        if of.num_layers == 1:
            return name
        first, end = k * of.directions, (k + 1) * of.directions
        return self._node("Slice", [name, self._whole(first), self._whole(end), self._whole(0)])

    def _options(self, i: int, layer: Layer, op: str) -> dict[str, Any]:
        of = layer._architecture
        options: dict[str, Any] = {
            "hidden_size": of.hidden_size, "direction": "bidirectional" if of.bidirectional else "forward",
        }  # fmt: skip
        if op == "GRU":
            options["linear_before_reset"] = int(of.cell == "gru")
        if of.cell == "rnn_relu":
            options["activations"] = ["Relu"] * of.directions
        if of.formula is None:
            return options
        gate, candidate, output = of.formula[:3]
        functions = {"LSTM": [gate, candidate, output], "GRU": [gate, candidate], "RNN": [candidate]}[op]
        functions = [Function("affine", 1.0) if one.name == "linear" else one for one in functions]
        for function in functions:
            if function.name not in IN_CELLS:
                raise ValueError(
                    f"layers[{i}]: expected no {function.name}, which ONNX's cells have not, got {layer!r}"
                )
        options["activations"] = [IN_CELLS[function.name] for function in functions] * of.directions
        for name, numbers in zip(("activation_alpha", "activation_beta"), _numbers(functions), strict=True):
            options |= {name: numbers * of.directions} if numbers else {}
        return options if of.formula.clip == math.inf else {**options, "clip": of.formula.clip}

    def _peepholes(self, layer: Layer, k: int) -> list[str]:
        of, parameters = layer._architecture, layer._slot.weights.arrays
        if of.formula is None or not of.formula.peepholes:
            return []
        suffixes = [f"_l{k}", f"_l{k}_reverse"][: of.directions]
        order = np.argsort(PEEPHOLES)
        rows = [parameters["weight_ch" + suffix].reshape(3, -1)[order].reshape(-1) for suffix in suffixes]
        return [self._array("P", np.stack(rows))]

    def _weights(self, layer: Layer, k: int, op: str) -> list[str]:
        of, parameters = layer._architecture, layer._slot.weights.arrays
        order = np.argsort(RECURRENT[op][1])  # ONNX's order of PyTorch's gates
        units = of.hidden_size

        def gates(kind: str, suffix: str) -> Array:
            array = parameters[kind + suffix]
            return array.reshape(len(GATES[of.cell]), units, *array.shape[1:])[order].reshape(array.shape)

        suffixes = [f"_l{k}", f"_l{k}_reverse"][: of.directions]
        names = [
            self._array(short, np.stack([gates(kind, suffix) for suffix in suffixes]))
            for short, kind in (("W", "weight_ih"), ("R", "weight_hh"))
        ]
        if not of.bias:
            return [*names, ""]
        rows = [np.concatenate([gates("bias_ih", suffix), gates("bias_hh", suffix)]) for suffix in suffixes]
        return [*names, self._array("B", np.stack(rows))]

    def _both(self, value: str, merge: str, has_time: bool) -> str:
        """The directions as one axis of units: of (time, directions, batch, units), or without time."""
        axis = 1 if has_time else 0
        if merge == "sum":
            return self._node("ReduceSum", [value, self._whole(axis)], keepdims=0)
        if merge in ("mul", "ave"):
            return self._node("ReduceProd" if merge == "mul" else "ReduceMean", [value], axes=[axis], keepdims=0)
        moved = self._node("Transpose", [value], perm=[0, 2, 1, 3] if has_time else [1, 0, 2])
        return self._node("Reshape", [moved, self._whole(*([0, 0, -1] if has_time else [0, -1]))])

    def _last(self, value: str) -> str:
        return self._node("Gather", [value, self._array("last", np.array(-1), np.int64)], axis=0)

    # -- other layers

    def _block(self, i: int, layer: Any, value: str) -> str:
        arrays = layer._slot.weights.arrays
        if isinstance(layer, Masking) or getattr(layer, "mask_zero", False):
            raise ValueError(f"layers[{i}]: expected no steps that are left out, which ONNX cannot say, got {layer!r}")
        if isinstance(layer, Reverse):
            ends = [self._whole(-1), self._whole(-(2**63)), self._whole(0), self._whole(-1)]
            return self._node("Slice", [value, *ends])
        if isinstance(layer, Embedding):
            return self._node("Gather", [self._array("table", arrays["weight"]), value], axis=0)
        if isinstance(layer, Dense):
            value = self._node("MatMul", [value, self._array("weight", arrays["weight"].T)])
            if layer.bias:
                value = self._node("Add", [value, self._array("bias", arrays["bias"])])
            return self._activated(layer.activation, value)
        if isinstance(layer, Activation):
            return self._activated(layer, value, alone=True)
        if isinstance(layer, LayerNorm):
            weight = arrays.get("weight", np.ones(layer.normalized_shape))
            names = [self._array("weight", weight)]
            names += [self._array("bias", arrays["bias"])] if "bias" in arrays else []
            return self._node("LayerNormalization", [value, *names], axis=-1, epsilon=layer.eps)
        if isinstance(layer, (BatchNorm, Normalization)):
            return self._normalized(layer, arrays, value)
        if isinstance(layer, Conv1D):
            return self._convolution(layer, arrays, value)
        raise TypeError(f"layers[{i}]: expected a layer that ONNX has an operator for, got {layer!r}")

    def _normalized(self, layer: Any, arrays: Mapping[str, Array], value: str) -> str:
        wide = {name: array.astype(np.float64) for name, array in arrays.items()}
        with np.errstate(all="ignore"):
            if isinstance(layer, Normalization):
                mean, scale, shift = wide["mean"], 1 / np.maximum(np.sqrt(wide["variance"]), 1e-7), None
            else:
                mean, shift = wide["running_mean"], wide.get("bias")
                scale = wide.get("weight", np.ones(mean.shape)) / np.sqrt(wide["running_var"] + layer.eps)
        value = self._node("Sub", [value, self._array("mean", mean)])
        value = self._node("Mul", [value, self._array("scale", scale)])
        return value if shift is None else self._node("Add", [value, self._array("shift", shift)])

    def _convolution(self, layer: Conv1D, arrays: Mapping[str, Array], value: str) -> str:
        reach = (layer.kernel_size - 1) * layer.dilation
        before = reach if layer.padding == "causal" else reach // 2
        pads = [before, reach - before]
        value = self._node("Transpose", [value], perm=[1, 2, 0])  # batch, channels, time
        if layer._stage.state is not None:
            entry, self._states = self._states, self._states + 1
            if reach:
                value, pads = self._with_history(entry, value, reach, layer.in_channels), [0, 0]
        names = [self._array("weight", arrays["weight"])]
        names += [self._array("bias", arrays["bias"])] if layer.bias else []
        value = self._node("Conv", [value, *names], pads=pads, dilations=[layer.dilation])
        return self._activated(layer.activation, self._node("Transpose", [value], perm=[2, 0, 1]))

    def _with_history(self, entry: int, value: str, reach: int, channels: int) -> str:
        """The last inputs of the calls before in front, and of this one as an output."""
        for name, listed in ((f"x{entry}_in", self._inputs), (f"x{entry}_out", self._outputs)):
            listed.append(self._typed(name, self._dtype, [reach, "batch", channels]))
        first = self._node("Transpose", [f"x{entry}_in"], perm=[1, 2, 0])
        value = self._node("Concat", [first, value], axis=2)
        ends = [self._whole(-reach), self._whole(2**63 - 1), self._whole(2)]
        last = self._node("Slice", [value, *ends])
        self._node("Transpose", [last], [f"x{entry}_out"], perm=[2, 0, 1])
        return value

    def _activated(self, activation: Activation, value: str, alone: bool = False) -> str:
        name, beta = activation.name, activation.beta
        if name == "linear":
            return self._node("Identity", [value]) if alone else value
        if name == "gelu":  # an operator of its own only since version 20
            scaled = self._node("Mul", [value, self._array("factor", np.array(math.sqrt(0.5)))])
            wave = self._node("Add", [self._node("Erf", [scaled]), self._array("one", np.array(1.0))])
            half = self._node("Mul", [value, self._array("half", np.array(0.5))])
            return self._node("Mul", [half, wave])
        if name == "silu":
            return self._node("Mul", [value, self._node("Sigmoid", [value])])
        if name == "affine":
            return self._node("Add", [self._times(value, activation.alpha), self._array("beta", np.array(beta))])
        if name == "scaled_tanh":
            return self._times(self._node("Tanh", [self._times(value, beta)]), activation.alpha)
        options: dict[str, Any] = dict(zip(("alpha", "beta"), activation.function.numbers, strict=False))
        if name == "softmax":
            options = {"axis": -1}
        return self._node(IN_CELLS.get(name, name.capitalize()), [value], **options)

    def _times(self, value: str, factor: float) -> str:
        return self._node("Mul", [value, self._array("factor", np.array(factor))])
