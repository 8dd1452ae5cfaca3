"""Protocol Buffers, checked before they are parsed: what would take far more memory than the file is refused first."""

import random

import gatewise as gw
import onnx
import pytest
from children import assert_refused, load_in_child
from gatewise.formats.onnx import protobuf

MODEL = onnx.ModelProto.DESCRIPTOR
COUNT = 500_000


def number(value):
    text = b""
    while value > 127:
        text += bytes([value & 127 | 128])
        value >>= 7
    return text + bytes([value])


def tag(field, kind=2):
    return number(field << 3 | kind)


def message(*fields_and_content):
    """Bytes inside fields inside fields: message(7, 1, b"") is an empty node of the graph."""
    *fields, content = fields_and_content
    for field in reversed(fields):
        content = tag(field) + number(len(content)) + content
    return content


HOLLOW = {
    "nodes": message(7, message(1, b"") * COUNT),
    "attributes": message(7, 1, message(5, b"") * COUNT),
    "initializers": message(7, message(5, b"") * COUNT),
    "sparse initializers": message(7, message(15, b"") * COUNT),
    "inputs": message(7, message(11, b"") * COUNT),
    "outputs": message(7, message(12, b"") * COUNT),
    "values": message(7, message(13, b"") * COUNT),
    "nodes of a body": message(7, 1, 5, 6, message(1, b"") * COUNT),
    "bodies": message(7, 1, 5, message(11, b"") * COUNT),
    "tensors of an attribute": message(7, 1, 5, message(10, b"") * COUNT),
    "axes": message(7, 11, 2, 1, 2, message(1, b"") * COUNT),
    "types": message(7, 1, 5, message(15, b"") * COUNT),
    "kinds of a type": message(7, 11, 2, (message(1, b"") + message(4, b"")) * COUNT),
    "operator sets": message(8, b"") * COUNT,
    "functions": message(25, b"") * COUNT,
    "properties": message(14, b"") * COUNT,
    "training": message(20, b"") * COUNT,
    "values with types": message(7, message(13, 2, 1, 2, 1, b"") * (COUNT // 4)),
}


def test_hollow_messages(tmp_path):
    small = tmp_path / "small.onnx"
    gw.save(gw.RNN(3, 4, seed=1), small)
    paths = []
    for name, data in HOLLOW.items():
        paths.append(tmp_path / f"{name}.onnx")
        paths[-1].write_bytes(small.read_bytes() + data)
    assert_refused(paths, factor=2, spare=16 << 20, warm_up=small)


def test_hollow_numbers(tmp_path):
    """They may load, in a few times their size."""
    small = tmp_path / "small.onnx"
    gw.save(gw.RNN(3, 4, seed=1), small)
    bodies = {
        "packed": message(7, 1, 5, 8, b"\1" * 4 * COUNT),
        "unpacked": message(7, 1, 5, (tag(8, 0) + b"\1") * COUNT),
        "texts": message(7, 1, message(1, b"a") * COUNT),
        "no texts": message(7, 1, message(1, b"") * COUNT),
        "unknown": message(7, 1, (message(1, b"") + tag(15, 0) + b"\1") * COUNT),
        "unknown kinds": message(7, 1, 5, (tag(20, 0) + b"\x63" + tag(2, 5) + bytes(4)) * COUNT),
        "groups": message(7, 1, (tag(15, 3) + tag(15, 4)) * COUNT),
    }
    paths = []
    for name, data in bodies.items():
        paths.append(tmp_path / f"{name}.onnx")
        paths[-1].write_bytes(small.read_bytes() + data)
    for path, outcome in zip(paths, load_in_child(paths, warm_up=small), strict=True):
        assert outcome.peak < 24 * path.stat().st_size + (64 << 20), f"{path.name}: {outcome}"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x3a", "the end is missing"),
        (b"\x3a\x02\x0a", "longer"),
        (b"\x3a\x02\x0a\x01", "longer"),
        (b"\x3a\x02\x0a\x01\x00", "longer"),
        (b"\x08", "the end is missing"),
        (b"\x08" + b"\xff" * 10, "a number that is too long"),
        (b"\x3a" + b"\xff" * 9 + b"\x01", "longer"),
        (b"\x3b", "the end is missing"),
        (b"\x3c", "a group ends"),
        (b"\x3b\x44", "a group ends"),
        (message(7, tag(9, 3)) + tag(9, 4), "a group ends|longer|missing"),
        (b"\x0e", "a kind of field"),
        (b"\x0f", "a kind of field"),
        (b"\xff\xff\xff\xff\x7f\x00", "a tag that is too large"),
        (tag(9, 3) * 200 + tag(9, 4) * 200, "nested too deeply"),
        (message(*(7, *(1, 5, 6) * 50), b""), "nested too deeply"),
        (b"\x09\0\0\0", "longer"),
        (b"\x0d\0\0", "longer"),
    ],
)
def test_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        protobuf.check(data, MODEL, 2**40)


def test_what_protobuf_takes_is_taken():
    """Fields that nobody knows, groups, numbers written longer than they must be."""
    for data in (
        b"",
        tag(900, 0) + b"\x80\x80\x01",
        tag(900, 3) + message(5, b"abc") + tag(7, 3) + tag(7, 4) + tag(900, 4),
        b"\xba\x00\x80\x00",
        message(7, 1, 5, 8, b"\xff\xff\x01\x02"),
        message(7, 1, 5, tag(8, 0) + b"\x01"),
        tag(1, 5) + bytes(4),
        message(*(7, *(1, 5, 6) * 30), b""),
    ):
        onnx.ModelProto.FromString(data)
        protobuf.check(data, MODEL, 2**20)


def test_what_is_refused_is_none(tmp_path):
    """Whatever bytes the check does not take as messages, protobuf takes neither."""
    gw.save(gw.Sequential([gw.Conv1D(3, 4, 2, seed=1), gw.GRU(4, 3, seed=2)]), tmp_path / "m.onnx")
    source = (tmp_path / "m.onnx").read_bytes()
    chance = random.Random(0)
    both = 0
    for _ in range(3000):
        data = bytearray(source)
        for _change in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        data = bytes(data[: chance.randrange(len(data))] if chance.random() < 0.2 else data)
        try:
            protobuf.check(data, MODEL, 2**30)
        except ValueError:
            both += 1
            with pytest.raises(Exception):  # noqa: B017 -- each implementation has its own
                onnx.ModelProto.FromString(data)
    assert both > 500
