"""Damaged safetensors files: refused with the reason, in memory bounded by the file."""

import json
import os
import tracemalloc

import gatewise as gw
import numpy as np
import pytest
from conftest import make_layer
from safetensors_files import (
    DENSE,
    LAYERS,
    MODELS,
    change_activation,
    change_metadata,
    change_model,
    change_tensor,
    make_model,
    parts,
    without,
    write,
    write_model,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "layer.safetensors"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (change_metadata(gatewise="2"), "expected format version 1, got '2'"),
        (change_metadata(gatewise=1), "__metadata__: expected names and texts"),
        (lambda header: header["__metadata__"].pop("model"), "expected 'model'"),
        (change_metadata(model="{"), "Expecting"),
        (change_metadata(model="[" * 100000), "nested too deeply"),
        (change_metadata(model="[]"), "model: expected a kind"),
        (change_model(kind="CNN"), "model: expected a kind of Sequential, LSTM, GRU, RNN"),
        (change_model(kind=[1]), "model: expected a kind"),
        (change_model(kind="LSTM"), "model: expected batch_first"),
        (change_model(kind="Sequential"), "model: expected batch_first, kind, layers, got batch_first, bias"),
        (change_model(kind="Dense"), "model: expected activation, bias"),
        (change_model(hidden_size=...), "model: expected"),
        (change_model(more=1), "model: expected"),
        (change_model(input_size=0), "input_size: expected"),
        (change_model(input_size=5.0), "input_size: expected a whole number"),
        (change_model(hidden_size=2**20), r"weight_ih_l0: expected shape \(3145728, 5\), got \(27, 5\)"),
        (change_model(hidden_size=2**31 - 1), r"hidden_size: expected weights of at most"),
        (change_model(num_layers=2), "missing bias_hh_l1"),
        (change_model(num_layers=2**16), "num_layers: expected a number from 1 to 4"),
        (change_model(bidirectional=True), "missing bias_hh_l0_reverse"),
        (change_model(bias=False), "tensors: surplus bias_hh_l0, bias_ih_l0"),
        (change_model(bias=1), "bias: expected True or False"),
        (change_model(reset_after=0), "reset_after: expected True or False"),
        (change_model(proj_size=0), "model: expected .*, got .*proj_size"),
        (change_model(dropout=2), "dropout: expected"),
        (change_model(dropout="a"), "dropout: expected"),
        (change_model(seed=-1), "seed: expected"),
        (change_model(seed=None), "seed: expected"),
        (change_model(call_count=2**64), "call_count: expected"),
        (change_model(dtype="float64"), "weight_ih_l0: expected float64, got float32"),
        (change_model(dtype="float16"), "dtype: expected float32 or float64"),
        (change_model(dtype=None), "dtype: expected float32 or float64"),
        (change_model(dtype=json.loads("[" * 500 + "]" * 500)), "nested too deeply|dtype: expected"),
        (without("weight_hh_l0"), "expected numbers from byte"),
        (change_tensor(dtype="F16"), "expected a dtype of F32, F64, got 'F16'"),
        (change_tensor(dtype=["F32"]), "expected a dtype"),
        (change_tensor(dtype="F64"), "data_offsets: expected 1944 bytes"),
        (change_tensor(shape=[9, 27]), r"expected shape \(27, 9\), got \(9, 27\)"),
        (change_tensor(shape=[-27, -9]), "shape: expected a list of at most 8 whole numbers from 0 on"),
        (change_tensor(shape=[27.0, 9]), "shape: expected a list of at most 8 whole numbers from 0 on"),
        (change_tensor(shape=[True] * 9), "shape: expected a list of at most 8 whole numbers from 0 on"),
        (change_tensor(shape="27"), "shape: expected a list of at most 8 whole numbers from 0 on"),
        (change_tensor(shape=[2**62, 2**62]), "data_offsets: expected"),
        (change_tensor(data_offsets=[0, 972]), "expected numbers from byte"),
        (change_tensor(data_offsets=[2**70, 2**70 + 972]), "expected numbers from byte"),
        (change_tensor(data_offsets=[540]), "data_offsets: expected"),
        (change_tensor(more=1), "expected dtype, shape and data_offsets"),
        (lambda header: header.update(more=[]), "more: expected dtype, shape and data_offsets"),
        (
            lambda header: header.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
            "tensors: surplus more",
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


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch_first": None}, "model: batch_first: expected True or False, got None"),
        ({"batch_first": 1}, "model: batch_first: expected True or False, got 1"),
        ({"batch_first": ...}, "model: expected batch_first, kind, layers, got kind, layers"),
        ({"name": "mine"}, "model: expected batch_first, kind, layers, got batch_first, kind, layers, name"),
        ({"layers": []}, "model: layers: expected at least one layer"),
        ({"layers": {"0": DENSE}}, "model: layers: expected a list, got dict"),
        ({"layers": [[DENSE]]}, r"model: layers\[0\]: expected a kind of LSTM"),
        ({"layers": [None]}, r"model: layers\[0\]: expected a kind of LSTM"),
        ({"layers": [{"kind": "Sequential", "batch_first": True, "layers": []}]}, r"\[0\]: expected a kind of LSTM"),
        ({"layers": [DENSE, DENSE]}, r"layers\[1\]: tensors: missing bias, weight"),
        ({"layers": [{"kind": "Last"}]}, r"layers\[0\]: tensors: surplus bias, weight"),
        ({"layers": [{"kind": "TimeDistributed", "layer": {"kind": "Last"}}]}, r"\[0\]: layer: expected a layer of"),
        ({"layers": [{"kind": "TimeDistributed", "layer": 3}]}, r"layers\[0\]: layer: expected a layer of"),
        ({"layers": [{"kind": "Bidirectional", "layer": DENSE, "merge_mode": "sum"}]}, "layer: expected LSTM, GRU or"),
    ],
)  # fmt: skip
def test_wrong_models(changes, match, path):
    gw.save(gw.Sequential([gw.Dense(3, 2, activation=gw.Activation("elu", 0.5))]), path)
    gw.load(write_model(path, [DENSE], *parts(path)))
    header, numbers = parts(path)
    layers = changes.pop("layers", [DENSE])
    with pytest.raises(gw.FormatError, match=match):
        gw.load(write_model(path, layers, header, numbers, **changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"in_features": ...}, "expected activation, bias, dtype, in_features, kind, out_features, got activation"),
        ({"seed": 3}, "expected activation, .*, got .*seed"),
        ({"self": 3}, "expected activation, .*, got .*self"),
        ({"kind": "Wide"}, "expected a kind of"),
        ({"in_features": "3"}, "in_features: expected a whole number, got '3'"),
        ({"in_features": 3.0}, "in_features: expected a whole number, got 3.0"),
        ({"in_features": True}, "in_features: expected a whole number, got True"),
        ({"in_features": 2**31}, "in_features: expected a number from 1 to 2147483647"),
        ({"in_features": 2**31 - 1}, r"weight: expected shape \(2, 2147483647\), got \(2, 3\)"),
        ({"in_features": DENSE}, "in_features: expected a whole number"),
        ({"in_features": 2, "out_features": 3}, r"weight: expected shape \(3, 2\), got \(2, 3\)"),
        ({"bias": 1}, "bias: expected True or False, got 1"),
        ({"bias": False}, "tensors: surplus bias"),
        ({"dtype": "float64"}, "weight: expected float64, got float32"),
        ({"dtype": "f4"}, "dtype: expected float32 or float64, got 'f4'"),
        ({"dtype": ["float32"]}, "dtype: expected float32 or float64"),
        ({"activation": None}, "activation: expected linear"),
        ({"activation": DENSE}, "activation: expected linear"),
        (change_activation(name="relu"), "activation: alpha: expected none"),
        (change_activation(name=["relu"]), "activation: name: expected linear"),
        (change_activation(alpha=...), "activation: expected alpha, kind, name, got kind, name"),
        (change_activation(alpha=True), "activation: alpha: expected a number, got True"),
        (change_activation(alpha="1"), "activation: alpha: expected a number, got '1'"),
        (change_activation(alpha=10**400), "activation: alpha: expected a number, got 1000"),
        ({"activation": {"kind": "Dropout", "p": 0.5}}, "activation: expected linear"),
    ],
)  # fmt: skip
def test_wrong_layers_of_models(changes, match, path):
    gw.save(gw.Sequential([gw.Dense(3, 2)]), path)
    layer = {name: value for name, value in {**DENSE, **changes}.items() if value is not ...}
    with pytest.raises(gw.FormatError, match=rf"model: layers\[0\]: {match}"):
        gw.load(write_model(path, [layer], *parts(path)))


def test_wrong_names_of_tensors(path):
    gw.save(gw.Sequential([gw.Dense(3, 2), gw.LayerNorm(2)]), path)
    header, numbers = parts(path)
    for wrong in ("weight", "0", "0.", "00.weight", "0.weight ", "1.bia", "2.weight", "-1.weight", "0.0.weight", "."):
        changed = {wrong if name == "0.weight" else name: entry for name, entry in header.items()}
        with pytest.raises(gw.FormatError, match="missing weight"):
            gw.load(write(path, changed, numbers))
        more = {**header, wrong: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
        with pytest.raises(gw.FormatError, match="surplus"):
            gw.load(write(path, more, numbers))
    renamed = {"0": header["0.weight"], "0.": header["0.bias"], **header}
    del renamed["0.weight"], renamed["0.bias"]
    with pytest.raises(gw.FormatError, match="missing bias, weight"):
        gw.load(write(path, renamed, numbers))


@pytest.mark.parametrize("depth", [8, 9, 300, 400, 900, 5000])
def test_nested_layers(depth, path):
    text = (
        '{"kind": "TimeDistributed", "layer": ' * (depth - 1)
        + '{"kind": "LayerNorm", "normalized_shape": 3, "eps": 1, '
    )
    text += '"elementwise_affine": false, "bias": false, "dtype": "float32"}' + "}" * (depth - 1)
    model = f'{{"kind": "Sequential", "batch_first": false, "layers": [{text}]}}'
    write(path, {"__metadata__": {"gatewise": "1", "model": model}})
    if depth == 8:
        model = gw.load(path)
        gw.save(model, path)
        assert repr(gw.load(path)) == repr(model)
    else:
        with pytest.raises(gw.FormatError, match=r"layers inside each other|nested too deeply"):
            gw.load(path)


def test_messages_can_be_printed(path):
    gw.save(make_layer("gru", 5, 9), path)
    header, numbers = parts(path)
    for name in ("\ud800", "a" * 100_000):
        with pytest.raises(gw.FormatError, match=r"expected dtype, shape and|: a{1000} \.\.\.$") as caught:
            gw.load(write(path, {**header, name: {}}, numbers))
        assert str(caught.value).encode("ascii")
        assert len(str(caught.value)) < 3000


def test_wrong_files(path):
    gw.save(make_layer("gru", 5, 9), path)
    data = path.read_bytes()
    header, numbers = parts(path)
    text = json.dumps(header).encode()
    says_too_much, length = "got one of {} bytes that says its header has {}$", int.from_bytes(data[:8], "little")
    for wrong, reason in (
        (b"", says_too_much.format(0, 0)),
        (data[:7], says_too_much.format(7, length)),
        (data[:8], says_too_much.format(8, length)),
        (data[:100], says_too_much.format(100, length)),
        (data[:-1], "expected 1728 bytes of data after the header, got 1727$"),
        (data + b"a", "expected 1728 bytes of data after the header, got 1729$"),
        (b"\xff" * 8 + data[8:], says_too_much.format(len(data), 2**64 - 1)),
        (b"\xff" * 100, says_too_much.format(100, 2**64 - 1)),
        ((10**9).to_bytes(8, "little") + data[8:], says_too_much.format(len(data), 10**9)),
    ):
        path.write_bytes(wrong)
        with pytest.raises(gw.FormatError, match=reason):
            gw.load(path)
    for wrong, reason in (
        (b"", "expected JSON: Expecting value"),
        (b"null", "expected names and tensors in the header$"),
        (b"[]", "expected names and tensors in the header$"),
        (b"1", "expected names and tensors in the header$"),
        (b'"a"', "expected names and tensors in the header$"),
        (b"\xff\xfe", "expected JSON: Expecting value"),
        (text[:-1], "expected JSON: Expecting ',' delimiter"),
        (text + text, "expected JSON: Extra data"),
        (b"{" + text, "expected JSON: Expecting property name"),
        (b"[" * 100_000, "expected JSON, got one that is nested too deeply$"),
        (text.replace(b'"bias_hh_l0"', b'"bias_ih_l0"'), "expected JSON: a name occurs twice$"),
        (text.replace(b"[27, 9]", b"[27, NaN]"), "expected JSON: NaN is not a number of JSON$"),
        (text.replace(b"[27, 9]", b"[27, " + b"9" * 5000 + b"]"), "expected JSON: Exceeds the limit"),
    ):
        with pytest.raises(gw.FormatError, match=reason):
            gw.load(write(path, wrong, numbers))


def test_a_file_that_is_cut_while_it_is_read(path, monkeypatch):
    gw.save(gw.Sequential([gw.Dense(3, 2)]), path)
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(os, "fstat", lambda _: before)
    with pytest.raises(gw.FormatError, match=r"layers\[0\]: the file was cut while it was read"):
        gw.load(path)


def test_memory_is_bounded_by_the_file(path):
    """Whatever sizes the header claims."""
    gw.save(make_layer("gru", 5, 9), path)
    header, numbers = parts(path)
    change_model(hidden_size=2**31 - 1, input_size=2**31 - 1)(header)
    change_tensor(shape=[2**40, 2**20], data_offsets=[0, 2**62])(header)
    write(path, header, numbers)
    tracemalloc.start()
    with pytest.raises(gw.FormatError, match="weight_hh_l0: expected numbers from byte 540 on, got 0"):
        gw.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


HUGE = 2**31 - 1
SIZES = {
    "Embedding": {"num_embeddings": HUGE, "embedding_dim": HUGE},
    "Dense": {"in_features": HUGE, "out_features": HUGE},
    "Conv1D": {"in_channels": HUGE, "out_channels": HUGE, "kernel_size": 2**20},
    "LayerNorm": {"normalized_shape": HUGE},
    "BatchNorm": {"num_features": HUGE},
    "Normalization": {"num_features": HUGE},
    "LSTM": {"input_size": 2**20, "hidden_size": 2**20},
    "GRU": {"num_layers": 2**16},
    "RNN": {"hidden_size": 2**31 - 1},
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("factor", [1, 1000])
def test_memory_of_models_is_bounded_by_the_file(kind, factor, path):
    """Whatever sizes the layers claim."""
    layers = [
        gw.Embedding(2, 2),
        gw.Conv1D(2, 2, 1),
        gw.Dense(2, 2),
        gw.LayerNorm(2),
        gw.BatchNorm(2),
        gw.Normalization(2),
        gw.LSTM(2, 2),
        gw.GRU(2, 2),
        gw.TimeDistributed(gw.Dense(2, 2)),
        gw.RNN(2, 2),
    ]
    gw.save(gw.Sequential(layers), path)
    header, numbers = parts(path)
    descriptions = json.loads(header["__metadata__"]["model"])["layers"]
    changed = [
        layer | {n: s // factor for n, s in SIZES[kind].items()} if layer["kind"] == kind else layer
        for layer in descriptions
    ]
    assert changed != descriptions
    reason = r"model: layers\[\d\]: .*(expected shape|hidden_size: expected|num_layers: expected)"
    with pytest.raises(gw.FormatError, match=reason):  # the first load also makes what is made only once
        gw.load(write_model(path, changed, header, numbers))
    tracemalloc.start()
    with pytest.raises(gw.FormatError, match=reason):
        gw.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_numbers_are_read_once(path):
    """However often a description refers to them."""
    gw.save(gw.Sequential([gw.Dense(512, 512, activation=gw.Activation("elu", 0.5))]), path)
    size, (header, numbers) = path.stat().st_size, parts(path)
    dense = DENSE | {"in_features": 512, "out_features": 512}
    again = path.with_name("again")
    write_model(
        again, [dense | dict.fromkeys(("in_features", "out_features", "bias", "dtype"), dense)], header, numbers
    )
    tracemalloc.start()
    with pytest.raises(gw.FormatError, match="missing bias, weight"):
        gw.load(again)
    assert len(gw.load(path)) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * size


VALUES = [
    0, 1, -1, 2, 3, 2**20, 2**31 - 1, 2**31, 2**64, 10**400, 0.5, 1.0, -0.0, 1e300, True, False, None, "", "elu",
    "sum", "float64", "Dense", "LSTM", "Sequential", [], {}, [[]], [1], {"kind": "Last"}, DENSE,
    {"kind": "Activation", "name": "gelu", "alpha": None},
]  # fmt: skip


@pytest.mark.parametrize("name", ["tagger", "classifier"])
def test_mutated_descriptions(name, path):
    """Valid JSON: a model or a FormatError, and little memory."""
    gw.save(make_model(MODELS[name]("float32")), path)
    header, numbers = parts(path)
    text = header["__metadata__"]["model"]
    rng = np.random.default_rng(2)

    def places(value):
        """Each container in a value, with each of its keys."""
        if isinstance(value, dict | list):
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                yield value, key
                yield from places(value[key])

    def other():
        return VALUES[rng.integers(len(VALUES))]

    refused = 0
    tracemalloc.start()
    for _ in range(500):
        description = json.loads(text)
        for _ in range(rng.integers(1, 3)):
            members = list(places(description))
            if not members:
                break
            container, key = members[rng.integers(len(members))]
            change = rng.integers(0, 6)
            if change < 3:
                container[key] = other()
            elif change == 3:
                del container[key]
            elif change == 4 and isinstance(container, dict):
                container[["more", "seed", "alpha", "call_count"][rng.integers(4)]] = other()
            else:
                container[key] = json.loads(json.dumps(description)) if rng.random() < 0.5 else [container[key]]
        header["__metadata__"]["model"] = json.dumps(description)
        write(path, header, numbers)
        try:
            assert isinstance(gw.load(path), gw.Sequential)
        except gw.FormatError:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 400
    assert peak < 4 << 20


@pytest.mark.parametrize(("cell", "options"), LAYERS[1:5], ids=str)
def test_mutated_files(cell, options, path):
    gw.save(make_layer(cell, 3, 5, **options), path)
    assert_mutants_are_refused(path, gw.LSTM | gw.GRU | gw.RNN)


@pytest.mark.parametrize("name", ["tagger", "classifier"])
def test_mutated_files_of_models(name, path):
    gw.save(make_model(MODELS[name]("float32")), path)
    assert_mutants_are_refused(path, gw.Sequential)


def assert_mutants_are_refused(path, kinds):
    """A model or a FormatError, and nothing else: 1,000 files with bytes changed, left out, doubled or swapped."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(1000):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            i = int(rng.integers(0, end if rng.random() < 0.9 else len(changed)))
            change = rng.integers(0, 5)
            if change == 0:
                changed[i] = rng.integers(0, 256)
            elif change == 1:
                del changed[i : i + int(rng.integers(1, 20))]
            elif change == 2:
                changed[i:i] = changed[i : i + int(rng.integers(1, 20))]
            elif change == 3:
                changed[i] ^= 1 << int(rng.integers(0, 8))
            else:
                changed[i : i + 1] = rng.choice([b"9", b"-", b"{", b"]", b'"', b"e", b"null", b"\\u0000", b"1e9"])
        path.write_bytes(changed)
        try:
            assert isinstance(gw.load(path), kinds)
        except gw.FormatError:
            refused += 1
    assert refused > 800
