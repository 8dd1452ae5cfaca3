"""Saved layers: back as they were, readable by others, and nothing that a file says does harm."""

import json
import os
import stat
import threading
import tracemalloc

import gatewise as gw
import numpy as np
import pytest
from conftest import make_layer, random

LAYERS = [
    ("lstm", {}),
    ("lstm", {"num_layers": 2, "bidirectional": True, "proj_size": 3, "dropout": 0.25, "batch_first": True}),
    ("gru", {"bias": False, "seed": 2**64 - 1}),
    ("rnn_tanh", {"num_layers": 3}),
    ("rnn_relu", {"bidirectional": True}),
]


def parts(path):
    """Header and numbers of a file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write(path, header, numbers=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "layer.safetensors"


@pytest.mark.parametrize(("cell", "options"), LAYERS, ids=str)
def test_round_trip(cell, options, dtype, path):
    layer = make_layer(cell, 5, 9, dtype=dtype, **options)
    layer.call_count = 2**64 - 1
    gw.save(layer, str(path))
    again = gw.load(path)
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    assert (again.seed, again.call_count) == (layer.seed, layer.call_count)
    assert list(again.state_dict()) == list(layer.state_dict())
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(again.parameters[name], value)
    x = random((4, 3, 5), dtype)
    np.testing.assert_array_equal(again(x)[0], layer(x)[0])
    first = path.read_bytes()
    gw.save(again, path)
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == [path.name]


def test_other_readers_and_writers(path):
    numpy = pytest.importorskip("safetensors.numpy")
    safetensors = pytest.importorskip("safetensors")
    layer = make_layer("lstm", 5, 9, bidirectional=True)
    gw.save(layer, path)
    theirs = numpy.load_file(path)
    assert theirs.keys() == layer.state_dict().keys()
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(theirs[name], value)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["gatewise"] == "1"
    # They may change the order of the tensors.
    numpy.save_file({name: 2 * value for name, value in reversed(theirs.items())}, path, metadata)
    again = gw.load(path)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(again.parameters[name], 2 * value)
    numpy.save_file(theirs, path)
    with pytest.raises(gw.FormatError, match=r"expected 'gatewise' in the metadata.*load_state_dict"):
        gw.load(path)


def test_the_numbers_lie_where_processors_like_them(path):
    for size in range(1, 9):
        gw.save(make_layer("gru", 1, size, dtype="float64"), path)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_a_file_is_replaced_as_a_whole(path, monkeypatch):
    """Its mode stays, a link stays one; and after an error all is as it was."""
    one, other = make_layer("gru", 5, 9), make_layer("gru", 6, 9)
    gw.save(one, path)
    path.chmod(0o640)
    link = path.with_name("link")
    link.symlink_to(path)
    gw.save(other, link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert gw.load(path).input_size == 6

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        gw.save(one, path)
    assert gw.load(path).input_size == 6
    assert sorted(os.listdir(path.parent)) == ["layer.safetensors", "link"]
    with pytest.raises(FileNotFoundError):
        gw.save(one, path.parent / "missing" / "layer")


def test_who_reads_while_it_is_written_gets_one_or_the_other(path):
    layers = [make_layer("gru", size, 9) for size in (5, 6)]
    gw.save(layers[0], path)
    done = threading.Event()

    def write_both():
        for _ in range(50):
            for layer in layers:
                gw.save(layer, path)
        done.set()

    writer = threading.Thread(target=write_both)
    writer.start()
    while not done.is_set():
        assert gw.load(path).input_size in (5, 6)
    writer.join()


def test_bad_arguments(path, tmp_path):
    class Own(gw.LSTM):
        pass

    for wrong in (None, "model", {}, Own(3, 4)):
        with pytest.raises(TypeError, match="model: expected gatewise's own LSTM, GRU, RNN, got"):
            gw.save(wrong, path)
    assert not path.exists()
    with pytest.raises(TypeError):
        gw.load(3)
    with pytest.raises(FileNotFoundError):
        gw.load(path)
    with pytest.raises(gw.FormatError, match="expected a file"):
        gw.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(gw.FormatError, match="expected a file"):
        gw.load(tmp_path / "pipe")
    for special in (tmp_path, tmp_path / "pipe", "/", "/dev/null"):
        before = os.stat(special)
        with pytest.raises(OSError, match="expected a file, or nothing yet"):
            gw.save(make_layer("gru", 5, 9), special)
        assert os.stat(special).st_ino == before.st_ino
    for name in (b"bytes", "a" * 255):
        target = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
        gw.save(make_layer("gru", 5, 9), target)
        assert gw.load(target).hidden_size == 9
    assert issubclass(gw.FormatError, ValueError)


def change_model(**changes):
    def change(header):
        model = {**json.loads(header["__metadata__"]["model"]), **changes}
        model = {name: value for name, value in model.items() if value is not ...}
        header["__metadata__"]["model"] = json.dumps(model)

    return change


def change_metadata(**changes):
    return lambda header: header["__metadata__"].update(changes)


def change_tensor(**changes):
    return lambda header: header["weight_hh_l0"].update(changes)


def without(name):
    return lambda header: header.pop(name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("__metadata__"), "expected 'gatewise' in the metadata"),
        (change_metadata(gatewise="2"), "expected format version 1, got '2'"),
        (change_metadata(gatewise=1), "__metadata__: expected names and texts"),
        (lambda header: header["__metadata__"].pop("model"), "expected 'model'"),
        (change_metadata(model="{"), "Expecting"),
        (change_metadata(model="[" * 100000), "nested too deeply"),
        (change_metadata(model="[]"), "model: expected a kind"),
        (change_model(kind="CNN"), "model: expected a kind of LSTM, GRU, RNN"),
        (change_model(kind=[1]), "model: expected a kind"),
        (change_model(kind="LSTM"), "model: expected batch_first"),
        (change_model(hidden_size=...), "model: expected"),
        (change_model(more=1), "model: expected"),
        (change_model(input_size=0), "input_size: expected"),
        (change_model(input_size=5.0), "input_size: expected a whole number"),
        (change_model(hidden_size=2**31 - 1), r"weight_ih_l0: expected shape \(6442450941, 5\), got \(27, 5\)"),
        (change_model(num_layers=2), "missing bias_hh_l1"),
        (change_model(num_layers=2**16), "num_layers: expected a number from 1 to 4"),
        (change_model(bidirectional=True), "missing bias_hh_l0_reverse"),
        (change_model(bias=False), "missing none, surplus bias_hh_l0, bias_ih_l0"),
        (change_model(bias=1), "bias: expected True or False"),
        (change_model(dropout=2), "dropout: expected"),
        (change_model(dropout="a"), "dropout: expected"),
        (change_model(seed=-1), "seed: expected"),
        (change_model(seed=None), "seed: expected"),
        (change_model(call_count=2**64), "call_count: expected"),
        (change_model(dtype="float64"), "weight_ih_l0: expected float64, got float32"),
        (change_model(dtype="float16"), "dtype: expected float32 or float64"),
        (change_model(dtype=None), "dtype: expected float32 or float64"),
        (without("weight_hh_l0"), "expected numbers from byte"),
        (change_tensor(dtype="F16"), "expected a dtype of F32, F64, got 'F16'"),
        (change_tensor(dtype=["F32"]), "expected a dtype"),
        (change_tensor(dtype="F64"), "data_offsets: expected 1944 bytes"),
        (change_tensor(shape=[9, 27]), r"expected shape \(27, 9\), got \(9, 27\)"),
        (change_tensor(shape=[-27, -9]), "shape: expected a few whole numbers"),
        (change_tensor(shape=[27.0, 9]), "shape: expected a few whole numbers"),
        (change_tensor(shape=[True] * 9), "shape: expected a few whole numbers"),
        (change_tensor(shape="27"), "shape: expected a few whole numbers"),
        (change_tensor(shape=[2**62, 2**62]), "data_offsets: expected"),
        (change_tensor(data_offsets=[0, 972]), "expected numbers from byte"),
        (change_tensor(data_offsets=[2**70, 2**70 + 972]), "expected numbers from byte"),
        (change_tensor(data_offsets=[540]), "data_offsets: expected"),
        (change_tensor(more=1), "expected dtype, shape and data_offsets"),
        (lambda header: header.update(more=[]), "more: expected dtype, shape and data_offsets"),
        (
            lambda header: header.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
            "tensors: missing none, surplus more",
        ),
    ],
)
def test_wrong_headers(change, match, path):
    gw.save(make_layer("gru", 5, 9), path)
    header, numbers = parts(path)
    change(header)
    with pytest.raises(gw.FormatError, match=match) as caught:
        gw.load(write(path, header, numbers))
    assert str(caught.value).startswith(str(path))


def test_messages_can_be_printed(path):
    gw.save(make_layer("gru", 5, 9), path)
    header, numbers = parts(path)
    for name in ("\ud800", "a" * 100_000):
        with pytest.raises(gw.FormatError) as caught:
            gw.load(write(path, {**header, name: {}}, numbers))
        assert str(caught.value).encode("ascii")
        assert len(str(caught.value)) < 3000


def test_wrong_files(path):
    gw.save(make_layer("gru", 5, 9), path)
    data = path.read_bytes()
    header, numbers = parts(path)
    text = json.dumps(header).encode()
    for wrong in (
        b"", data[:7], data[:8], data[:100], data[:-1], data + b"a", b"\xff" * 8 + data[8:], b"\xff" * 100,
        (10**9).to_bytes(8, "little") + data[8:],
    ):  # fmt: skip
        path.write_bytes(wrong)
        with pytest.raises(gw.FormatError):
            gw.load(path)
    for wrong in (
        b"", b"null", b"[]", b"1", b'"a"', b"\xff\xfe", text[:-1], text + text, b"{" + text, b"[" * 100_000,
        text.replace(b'"bias_hh_l0"', b'"bias_ih_l0"'), text.replace(b"[27, 9]", b"[27, NaN]"),
        text.replace(b"[27, 9]", b"[27, " + b"9" * 5000 + b"]"),
    ):  # fmt: skip
        with pytest.raises(gw.FormatError):
            gw.load(write(path, wrong, numbers))


def test_memory_is_bounded_by_the_file(path):
    """Whatever sizes it speaks of."""
    gw.save(make_layer("gru", 5, 9), path)
    header, numbers = parts(path)
    change_model(hidden_size=2**31 - 1, input_size=2**31 - 1)(header)
    change_tensor(shape=[2**40, 2**20], data_offsets=[0, 2**62])(header)
    write(path, header, numbers)
    tracemalloc.start()
    with pytest.raises(gw.FormatError):
        gw.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(("cell", "options"), LAYERS[1:4], ids=str)
def test_mutated_files(cell, options, path):
    """A layer or a FormatError, and nothing else: 3,000 files with bytes changed, left out, doubled or swapped."""
    gw.save(make_layer(cell, 3, 5, **options), path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(1000):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, end if rng.random() < 0.9 else len(changed)))
            how = rng.integers(0, 5)
            if how == 0:
                changed[at] = rng.integers(0, 256)
            elif how == 1:
                del changed[at : at + int(rng.integers(1, 20))]
            elif how == 2:
                changed[at:at] = changed[at : at + int(rng.integers(1, 20))]
            elif how == 3:
                changed[at] ^= 1 << int(rng.integers(0, 8))
            else:
                changed[at : at + 1] = rng.choice([b"9", b"-", b"{", b"]", b'"', b"e", b"null", b"\\u0000", b"1e9"])
        path.write_bytes(changed)
        try:
            assert isinstance(gw.load(path), gw.LSTM | gw.GRU | gw.RNN)
        except gw.FormatError:
            refused += 1
    assert refused > 800
