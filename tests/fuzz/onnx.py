"""ONNX files: graphs as protobuf's messages, and the tags and lengths that they are written as."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gatewise as gw
import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.fuzz.inputs import NUMBERS, Input, changed_bytes

DATA = Path(__file__).parent.parent / "data"
OPERATORS = (
    "Identity", "Dropout", "Constant", "Cast", "Transpose", "Squeeze", "Unsqueeze", "Shape", "Reshape", "Concat",
    "Gather", "Slice", "Split", "ConstantOfShape", "Expand", "If", "Loop", "Scan", "Tile", "Range", "Where", "Pad",
    "Erf", "Softmax", "MatMul", "Gemm", "LayerNormalization", "BatchNormalization", "Conv", "Clip", "Min", "Max",
    "Greater", "Pow", "Add", "Sub", "Mul", "Div", "Equal", "Sqrt", "Neg", "Reciprocal", "ReduceSum", "ReduceProd",
    "ReduceMean", "Relu", "Tanh", "Sigmoid", "LSTM", "GRU", "RNN", "ReverseSequence", "Bogus",
)  # fmt: skip
MAX_BYTES = 300_000


def seeds() -> list[Input]:
    models = [
        gw.Sequential([gw.Conv1D(2, 3, 2, seed=1), gw.GRU(3, 2, 2, seed=2), gw.Last(), gw.Dense(2, 1, seed=3)]),
        gw.Sequential([gw.Embedding(7, 3, seed=1), gw.LSTM(3, 2, bidirectional=True, seed=2), gw.Activation("gelu")]),
        gw.LSTM(2, 3, peepholes=True, clip=2.0, activation="relu", bidirectional=True, seed=1),
        gw.Sequential([gw.Reverse(), gw.RNN(2, 3, seed=1), gw.LayerNorm(3), gw.BatchNorm(3)]),
    ]
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            path = Path(folder) / "model.onnx"
            gw.save(model, path)
            files.append(path.read_bytes())
    files += [(DATA / f"tf2onnx_{name}.onnx").read_bytes() for name in ("ends", "around", "chain", "tokens")]
    return [Input(".onnx", data) for data in (*files, _of_shapes())]


def _of_shapes() -> bytes:
    """A graph that works out shapes, as PyTorch's exporters write it, with a branch."""
    N = helper.make_node
    arrays = {
        "W": np.ones((1, 9, 2), "f"), "R": np.ones((1, 9, 3), "f"), "zero": np.array(0), "one": np.array([1]),
        "three": np.array([3]), "yes": np.array(True), "long": np.array([2, 3, 4, 5]),
    }  # fmt: skip
    value = helper.make_tensor_value_info
    body = helper.make_graph([N("Squeeze", ["Y", "one"], ["b"])], "then", [], [value("b", 1, None)])
    nodes = [
        N("Shape", ["x"], ["s"]),
        N("Gather", ["s", "one"], ["rows"], axis=0),
        N("Concat", ["one", "rows", "three"], ["sizes"], axis=0),
        N("ConstantOfShape", ["sizes"], ["h"]),
        N("Range", ["zero", "zero", "zero"], ["r"]),
        N("Expand", ["three", "long"], ["e"]),
        N("Mul", ["rows", "three"], ["m"]),
        N("GRU", ["x", "W", "R", "", "", "h"], ["Y", "last"], hidden_size=3, linear_before_reset=1, name="node"),
        N("If", ["yes"], ["y"], then_branch=body, else_branch=body),
    ]
    held = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [value("x", 1, ["T", "B", 2])], [value("y", 1, None)], held)
    model = helper.make_model(graph, producer_name="pytorch", opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())


def changed(chance: random.Random, valid: Input) -> Input:
    data = valid.data
    if chance.random() < 0.8:
        model = onnx.ModelProto.FromString(data)
        for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
            _change_message(chance, model)
        data = bytes(model.SerializePartialToString())
    if chance.random() < 0.25:
        data = _with_other_fields(chance, data)
    if chance.random() < 0.2:
        data = changed_bytes(chance, data)
    options = {"node": chance.choice(("node", "GRU_5", "LSTM_3", "sequence_1"))} if chance.random() < 0.1 else {}
    return Input(valid.suffix, data[:MAX_BYTES], options)


# ---- messages


def _messages(root: Any) -> Iterator[Any]:
    """All messages of a tree; it has no more than the depth that protobuf takes."""
    yield root
    for field, value in root.ListFields():
        if field.message_type is not None:
            for message in value if _is_repeated(value) else [value]:
                yield from _messages(message)


def _is_repeated(value: Any) -> bool:
    return hasattr(value, "extend")


def _change_message(chance: random.Random, model: Any) -> None:
    everything = [*_messages(model)]
    kinds = sorted({type(message).__name__ for message in everything})
    kind = chance.choice(kinds)  # so that the rare ones have their share
    message = chance.choice([message for message in everything if type(message).__name__ == kind])
    alike = [one for one in everything if type(one) is type(message)]
    if chance.random() < 0.15:
        content = chance.choice(alike).SerializePartialToString()
        message.ParseFromString(content)
        return
    if chance.random() < 0.1 and kind == "NodeProto":
        message.op_type = chance.choice(OPERATORS)
        return
    if chance.random() < 0.1 and kind == "GraphProto":
        _nest(chance, message)
        return
    field = chance.choice(message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    if field.message_type is not None:
        _change_inner(chance, message, field.name, value, everything)
    elif _is_repeated(value):
        _change_list(chance, value, lambda: _scalar(chance, field, model))
    elif chance.random() < 0.15:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(chance, field, model))


def _change_inner(chance: random.Random, message: Any, name: str, value: Any, everything: list[Any]) -> None:
    if not _is_repeated(value):
        if chance.random() < 0.3:
            message.ClearField(name)
        else:
            alike = [one for one in everything if type(one) is type(value)]
            content = chance.choice(alike).SerializePartialToString() if alike else b""
            value.ParseFromString(content)
        return
    what, count = chance.randrange(5), len(value)
    if what == 0 and count:
        del value[chance.randrange(count)]
    elif what == 1 and count:
        value.extend([value[chance.randrange(count)]] * chance.choice((1, 1, 2, 300)))
    elif what == 2 and count:
        one, other = chance.randrange(count), chance.randrange(count)
        first, second = (value[i].SerializePartialToString() for i in (one, other))
        value[one].ParseFromString(second)
        value[other].ParseFromString(first)
    elif what == 3:
        for _ in range(chance.choice((1, 3, 3000))):
            value.add()
    elif count:
        order = [*range(count)]
        chance.shuffle(order)
        copies = [value[i].SerializePartialToString() for i in order]
        for i, content in enumerate(copies):
            value[i].ParseFromString(content)


def _change_list(chance: random.Random, values: Any, new: Any) -> None:
    what, count = chance.randrange(4), len(values)
    if what == 0 and count:
        del values[chance.randrange(count)]
    elif what == 1 and count:
        values[chance.randrange(count)] = new()
    elif what == 2 and count:
        values.extend([values[chance.randrange(count)]] * chance.choice((1, 2, 7, 2000)))
    else:
        values.append(new())


def _scalar(chance: random.Random, field: Any, model: Any) -> Any:
    """A value that a field can hold: for texts a name that the graph has, or another one."""
    if field.enum_type is not None:
        return chance.choice([value.number for value in field.enum_type.values])
    if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
        names = [name for node in model.graph.node for name in (*node.input, *node.output, node.name)] or [""]
        more = ["", "x", "a" * 2000, "axis", "axes", "then_branch", "forward", "Tanh", "../x", *OPERATORS[:3]]
        text = chance.choice((chance.choice(names), chance.choice(more)))
        raw = [text.encode(), bytes(chance.choice((0, 1, 4, 8, 64)))]
        return text if field.type == field.TYPE_STRING else chance.choice(raw)
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return chance.choice((0.0, 1.0, -1.0, 0.5, 1e30, float("inf"), float("nan")))
    bits = 64 if field.type in (field.TYPE_INT64, field.TYPE_UINT64) else 32
    number = chance.choice((*NUMBERS, chance.randrange(-4, 12))) % 2**bits
    is_signed = field.type in (field.TYPE_INT64, field.TYPE_INT32)
    return number - 2**bits if is_signed and number >= 2 ** (bits - 1) else number


def _nest(chance: random.Random, graph: Any) -> None:
    """All nodes as the body of one."""
    kind = chance.choice(("If", "Loop", "Scan"))
    depth = chance.choice((1, 1, 2, 12))
    for _ in range(depth):
        body = onnx.GraphProto()
        body.node.extend(graph.node)
        body.output.extend(graph.output)
        del graph.node[:]
        node = graph.node.add(op_type=kind)
        if kind == "If":
            node.input.append("yes")
        node.output.extend(output.name for output in body.output)
        for name in ("then_branch", "else_branch") if kind == "If" else ("body",):
            node.attribute.add(name=name, type=onnx.AttributeProto.GRAPH).g.CopyFrom(body)
        if graph.ByteSize() > MAX_BYTES:
            break


# ---- tags and lengths


def _fields(data: bytes) -> list[tuple[int, int, int]]:
    """Where each field of a message begins, its content, and the next one."""
    fields, at = [], 0
    while at < len(data):
        begin = at
        tag, at = _number(data, at)
        kind = tag & 7
        content = at
        if kind == 2:
            length, content = _number(data, at)
            at = content + length
        elif kind == 0:
            _, at = _number(data, at)
        else:
            at += {1: 8, 5: 4}.get(kind, 0)
        fields.append((begin, content, min(at, len(data))))
    return fields


def _number(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(data):
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            break
    return number, at


def _written(number: int) -> bytes:
    text = b""
    while number > 127:
        text += bytes([number & 127 | 128])
        number >>= 7
    return text + bytes([number])


def _with_other_fields(chance: random.Random, data: bytes, depth: int = 0) -> bytes:
    """A field that nobody knows, a group, an empty message or a wrong length, at some depth."""
    fields = _fields(data)
    if not fields:
        return data
    begin, content, end = chance.choice(fields)
    if depth < 6 and data[begin] & 7 == 2 and end - content > 4 and chance.random() < 0.7:
        inner = _with_other_fields(chance, data[content:end], depth + 1)
        return data[:begin] + _written(data[begin]) + _written(len(inner)) + inner + data[end:]
    tag = _written(chance.choice((1, 2, 5, 7, 15, 20, 900)) << 3 | chance.randrange(8))
    more = chance.choice(
        (
            data[begin:end] * chance.choice((1, 2, 50)),
            tag,
            tag + _written(chance.choice(NUMBERS) % 2**64),
            (tag + b"\0") * chance.choice((1, 1000)),
            _written(99 << 3 | 3) * chance.choice((1, 2, 300)),
            _written(99 << 3 | 3) + b"\x08\x01" + _written(99 << 3 | 4),
            b"\xff" * 12,
        )
    )
    return data[:begin] + more + data[begin if chance.random() < 0.7 else end :]
