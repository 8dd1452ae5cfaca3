"""Saved layers and models: back as they were, readable by others, and nothing that a file says does harm."""

import importlib
import json
import os
import stat
import threading
import tracemalloc
from pathlib import Path

import gatewise as gw
import numpy as np
import pytest
from conftest import assert_same_bits, make_layer, random
from gatewise.formats import files

LAYERS = [
    ("lstm", {}),
    ("lstm", {"num_layers": 2, "bidirectional": True, "proj_size": 3, "dropout": 0.25, "batch_first": True}),
    ("gru", {"bias": False, "seed": 2**64 - 1}),
    ("gru", {"reset_after": False}),
    ("rnn_tanh", {"num_layers": 3}),
    ("rnn_relu", {"bidirectional": True}),
]


MODELS = {
    "tagger": lambda dtype: [
        gw.Embedding(11, 6, dtype=dtype),
        gw.Bidirectional(make_layer("lstm", 6, 5, bidirectional=True, dtype=dtype), "ave"),
        gw.Dropout(0.1),
        gw.TimeDistributed(gw.Dense(5, 4, activation="softmax", dtype=dtype)),
    ],
    "classifier": lambda dtype: [
        gw.Dropout(1),
        gw.Conv1D(3, 6, 2, dilation=3, activation=gw.Activation("leaky_relu", 0.3), dtype=dtype),
        gw.Conv1D(6, 6, 3, padding="same", bias=False, dtype=dtype),
        gw.BatchNorm(6, eps=1e-3, dtype=dtype),
        make_layer("gru", 6, 7, 2, dropout=0.25, seed=2**64 - 1, dtype=dtype),
        gw.Last(),
        gw.LayerNorm(7, eps=0.125, bias=False, dtype=dtype),
        gw.Dense(7, 2, bias=False, activation=gw.Activation("elu", 1 / 3), dtype=dtype),
        gw.Activation("softmax"),
    ],
    "projected": lambda dtype: [
        gw.Normalization(4, dtype=dtype),
        make_layer("lstm", 4, 9, 2, bidirectional=True, proj_size=3, dtype=dtype),
        make_layer("rnn_relu", 6, 5, dtype=dtype),
        make_layer("rnn_tanh", 5, 5, dtype=dtype),
        make_layer("gru", 5, 5, reset_after=False, dtype=dtype),
        gw.LayerNorm(5, elementwise_affine=False, dtype=dtype),
        gw.BatchNorm(5, affine=False, dtype=dtype),
        gw.Activation("elu"),
        gw.TimeDistributed(gw.TimeDistributed(gw.Activation("leaky_relu", -2.5))),
    ],
    "batch first": lambda dtype: [
        gw.Bidirectional(make_layer("gru", 3, 4, bidirectional=True, batch_first=True, dtype=dtype), "mul")
    ],
    **{
        merge: lambda dtype, merge=merge: [
            gw.Bidirectional(make_layer("rnn_relu", 3, 4, bidirectional=True, dtype=dtype), merge)
        ]
        for merge in ("concat", "sum")
    },
}  # fmt: skip


def make_model(layers, **options):
    """Of these layers, with weights of which none is as it was drawn; variances stay positive."""
    model = gw.Sequential(layers, **options)
    with model.edit() as weights:
        for i, value in enumerate(weights.values()):
            value[...] = np.random.default_rng(i).uniform(0.1, 1, value.shape)
    for i, layer in enumerate(model):
        layer = getattr(layer, "layer", layer)
        if hasattr(layer, "call_count"):
            layer.call_count = 2**64 - 1 - i
    return model


def model_input(model, dtype):
    first = next(layer for layer in model if not isinstance(layer, gw.Dropout))
    if isinstance(first, gw.Embedding):
        return np.random.default_rng(0).integers(0, first.num_embeddings, (8, 3))
    return random((8, 3, first._stage.input_size), dtype)


def everything(layer):
    """All that a layer holds, weights apart."""
    held = {name: value for name, value in vars(layer).items() if name != "_holder"}
    return type(layer), {
        name: everything(value) if hasattr(value, "_holder") else value for name, value in held.items()
    }


def assert_same_model(again, model, x):
    """Down to the bits of its results."""
    assert type(again) is gw.Sequential
    assert repr(again) == repr(model)
    assert (again.batch_first, again.dtype) == (model.batch_first, model.dtype)
    assert [everything(layer) for layer in again] == [everything(layer) for layer in model]
    assert list(again.state_dict()) == list(model.state_dict())
    assert_same_bits(again.state_dict(), model.state_dict())
    assert_same_bits(again(x), model(x))


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


@pytest.mark.parametrize(
    "layer",
    [make_layer("lstm", 5, 9, bidirectional=True), make_model(MODELS["tagger"]("float64"))],
    ids=["layer", "model"],
)
def test_other_readers_and_writers(layer, path):
    numpy = pytest.importorskip("safetensors.numpy")
    safetensors = pytest.importorskip("safetensors")
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
    if isinstance(layer, gw.LSTM):  # whose weights tell what it is
        assert_same_bits(gw.load(path).state_dict(), layer.state_dict())
    else:
        with pytest.raises(gw.FormatError, match="expected only the weights of one recurrent layer, got layers"):
            gw.load(path)


@pytest.mark.parametrize("name", MODELS)
def test_models_round_trip(name, dtype, path):
    model = make_model(MODELS[name](dtype))
    gw.save(model, path)
    again = gw.load(path)
    assert_same_model(again, model, model_input(model, dtype))
    first = path.read_bytes()
    gw.save(again, path)
    assert path.read_bytes() == first
    with again.edit() as weights:  # they are its own
        for value in weights.values():
            value[...] = 0


def random_layer(rng, units, batch_first, dtype):
    def one_of(*values):
        return values[rng.integers(len(values))]

    def flag():
        return one_of(True, False)

    name = one_of("linear", "relu", "tanh", "sigmoid", "softmax", "hard_sigmoid", "elu", "gelu", "softplus")
    activation = gw.Activation(name, float(rng.standard_normal()) if name == "elu" else None)
    recurrent = one_of(gw.LSTM, gw.GRU, gw.RNN)
    out, size, dilation = (int(rng.integers(1, 6)) for _ in range(3))
    p, eps = rng.random(2)
    how = {"bias": flag(), "dtype": dtype}
    options = {"batch_first": batch_first, "dropout": p, **how}
    return one_of(
        lambda: recurrent(units, out, size, bidirectional=flag(), **options),
        lambda: gw.Bidirectional(recurrent(units, out, bidirectional=True, **options), one_of("sum", "mul", "ave")),
        lambda: gw.Dense(units, out, activation=activation, **how),
        lambda: gw.TimeDistributed(gw.Dense(units, out, activation=activation, **how)),
        lambda: gw.Conv1D(
            units, out, size, dilation=dilation, padding=one_of("causal", "same"), activation=activation, **how
        ),
        lambda: gw.LayerNorm(units, eps=eps, elementwise_affine=flag(), **how),
        lambda: gw.BatchNorm(units, eps=eps, affine=flag(), dtype=dtype),
        lambda: gw.Normalization(units, dtype=dtype),
        lambda: gw.Dropout(p),
        lambda: activation,
    )()


@pytest.mark.parametrize("seed", range(20))
def test_models_of_random_layers_round_trip(seed, dtype, path):
    rng = np.random.default_rng(seed)
    batch_first = bool(rng.integers(2))
    layers = [gw.Embedding(7, 4, dtype=dtype)] if rng.integers(2) else [gw.Normalization(4, dtype=dtype)]
    units = 4
    for _ in range(rng.integers(1, 9)):
        layers.append(random_layer(rng, units, batch_first, dtype))
        units = layers[-1]._stage.output_size(units)
    model = make_model([*layers, gw.Last(), gw.Dense(units, 2, dtype=dtype)], batch_first=batch_first)
    gw.save(model, path)
    assert_same_model(gw.load(path), model, model_input(model, dtype))


@pytest.mark.parametrize(
    "layer", [gw.Dense(3, 4, activation="elu", seed=1), gw.Embedding(3, 4, seed=1), gw.Last()], ids=str
)
def test_blocks_round_trip_by_themselves(layer, path):
    gw.save(layer, path)
    again = gw.load(path)
    assert repr(again) == repr(layer)
    assert everything(again) == everything(layer)
    assert_same_bits(again.state_dict(), layer.state_dict())


def test_files_say_of_later_options_only_what_is_new(path):
    gw.save(gw.GRU(3, 4), path)
    assert "reset_after" not in parts(path)[0]["__metadata__"]["model"]
    gw.save(gw.GRU(3, 4, reset_after=False), path)
    assert json.loads(parts(path)[0]["__metadata__"]["model"])["reset_after"] is False
    header, numbers = parts(path)
    change_model(reset_after=True)(header)
    assert gw.load(write(path, header, numbers)).reset_after
    gw.save(gw.LSTM(3, 4), path)
    header, numbers = parts(path)
    change_model(reset_after=True)(header)
    with pytest.raises(gw.FormatError, match=r"model: expected .*, got .*reset_after"):
        gw.load(write(path, header, numbers))


def test_only_what_was_given_is_shown():
    """An activation without alpha says nothing of it, though its file does."""
    assert repr(gw.Activation("relu")) == "Activation(name='relu')"
    assert repr(gw.Activation("elu")) == "Activation(name='elu', alpha=1.0)"


def test_what_could_not_be_loaded_is_not_saved(path, monkeypatch):
    gw.save(gw.Sequential([gw.BatchNorm(3)]), path)
    before = path.read_bytes()
    monkeypatch.setattr("gatewise.formats.safetensors.tensors.MOST_HEADER", int.from_bytes(before[:8], "little"))
    gw.save(gw.Sequential([gw.BatchNorm(3)]), path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="model: expected a header of at most"):
        gw.save(gw.Sequential([gw.BatchNorm(3), gw.Dropout()]), path)
    assert path.read_bytes() == before


def test_files_of_earlier_versions(path):
    """They can be read, and are still written, byte by byte."""
    header = (
        rb'{"__metadata__": {"gatewise": "1", "model": "{\"kind\": \"LSTM\", \"input_size\": 1, \"hidden_size\": 2, '
        rb"\"num_layers\": 1, \"bias\": false, \"batch_first\": false, \"dropout\": 0.5, \"bidirectional\": false, "
        rb'\"seed\": 3, \"proj_size\": 1, \"dtype\": \"float32\", \"call_count\": 0}"}, '
        rb'"weight_ih_l0": {"dtype": "F32", "shape": [8, 1], "data_offsets": [0, 32]}, '
        rb'"weight_hh_l0": {"dtype": "F32", "shape": [8, 1], "data_offsets": [32, 64]}, '
        rb'"weight_hr_l0": {"dtype": "F32", "shape": [1, 2], "data_offsets": [64, 72]}}     '
    )
    numbers = np.arange(18, dtype="<f4")
    write(path, header, numbers.tobytes())
    layer = gw.load(path)
    assert repr(layer) == "LSTM(1, 2, bias=False, dropout=0.5, proj_size=1)"
    assert (layer.seed, layer.call_count) == (3, 0)
    np.testing.assert_array_equal(np.concatenate([value.ravel() for value in layer.state_dict().values()]), numbers)
    first = path.read_bytes()
    gw.save(layer, path)
    assert path.read_bytes() == first


def test_nothing_is_drawn(path, monkeypatch):
    gw.save(make_model(MODELS["classifier"]("float32")), path)
    monkeypatch.setattr(np.random, "default_rng", None)
    assert len(gw.load(path)) == 9


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


def test_a_file_that_is_written_by_its_name_is_replaced_too(path):
    """As the command line writes results; and an error about the new file names the one that it was for."""
    path.write_text("before")
    with files.replacing(str(path)) as file:
        Path(file.name).write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"

    def fail(error):
        with files.replacing(str(path)) as file:
            file.write(b"half of it")
            raise error(file.name)

    with pytest.raises(OSError, match="No space left") as caught:
        fail(lambda name: OSError(28, "No space left on device", name))
    assert caught.value.filename == str(path)
    with pytest.raises(KeyboardInterrupt):
        fail(lambda name: KeyboardInterrupt())
    assert path.read_text() == "after"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["keras", "pytorch", "rtneural", "safetensors"])
def test_readers_do_not_wait_for_pipes(name, tmp_path):
    """Nor does any of them open a directory."""
    reader = importlib.import_module(f"gatewise.formats.{name}")
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(gw.FormatError, match=f"^{special}: expected a file$"):
            reader.load(special)


def test_a_configuration_is_not_read_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    weights = Path(__file__).parent / "data" / "chain.weights.h5"
    with pytest.raises(gw.FormatError, match=f": config: {tmp_path / 'pipe'}: expected a file$"):
        gw.load(weights, config=tmp_path / "pipe")


def test_bad_arguments(path, tmp_path):
    class Own(gw.LSTM):
        pass

    class Dense(gw.Dense):
        pass

    class Model(gw.Sequential):
        pass

    expected = "expected a Sequential or a layer of gatewise itself, got"
    own = Own(3, 4, bidirectional=True)
    for wrong, match in (
        (None, f"model: {expected} NoneType"),
        ("model", f"model: {expected} str"),
        ({}, f"model: {expected} dict"),
        (gw.LSTM, f"model: {expected} type"),
        (own, f"model: {expected} .*Own"),
        (Dense(3, 4), f"model: {expected} .*Dense"),
        (Model([gw.Dense(3, 4)]), f"model: {expected} .*Model"),
        (gw.Sequential([gw.Dropout(), own]), rf"model: layers\[1\]: {expected} .*Own"),
        (gw.Sequential([gw.Bidirectional(own)]), rf"model: layers\[0\]: layer: {expected} .*Own"),
    ):
        with pytest.raises(TypeError, match=match):
            gw.save(wrong, path)
    layer = gw.Dense(3, 4)
    for _ in range(7):
        layer = gw.TimeDistributed(layer)
    with pytest.raises(ValueError, match="activation: expected at most 8 layers inside each other"):
        gw.save(gw.Sequential([layer]), path)
    for _ in range(1000):
        layer = gw.TimeDistributed(layer)
    with pytest.raises(ValueError, match="layer: expected at most 8 layers inside each other"):
        gw.save(gw.Sequential([layer]), path)
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
        (change_tensor(shape=[-27, -9]), "shape: expected at most 8 whole numbers"),
        (change_tensor(shape=[27.0, 9]), "shape: expected at most 8 whole numbers"),
        (change_tensor(shape=[True] * 9), "shape: expected at most 8 whole numbers"),
        (change_tensor(shape="27"), "shape: expected at most 8 whole numbers"),
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


DENSE = {
    "kind": "Dense", "in_features": 3, "out_features": 2, "bias": True, "dtype": "float32",
    "activation": {"kind": "Activation", "name": "elu", "alpha": 0.5},
}  # fmt: skip


def change_activation(**changes):
    activation = {**DENSE["activation"], **changes}
    return {"activation": {name: value for name, value in activation.items() if value is not ...}}


def write_model(path, layers, header=None, numbers=b"", **changes):
    """A file that describes a model of such layers."""
    description = {"kind": "Sequential", "batch_first": False, "layers": layers, **changes}
    description = {name: value for name, value in description.items() if value is not ...}
    tensors = {name: entry for name, entry in (header or {}).items() if name != "__metadata__"}
    return write(path, {"__metadata__": {"gatewise": "1", "model": json.dumps(description)}, **tensors}, numbers)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch_first": None}, "model: batch_first: expected True or False, got None"),
        ({"batch_first": 1}, "model: batch_first: expected True or False, got 1"),
        ({"batch_first": ...}, "model: expected batch_first, kind, layers, got kind, layers"),
        ({"name": "mine"}, "model: expected batch_first, kind, layers, got batch_first, kind, layers, name"),
        ({"layers": []}, "model: layers: expected one layer at least"),
        ({"layers": {"0": DENSE}}, "model: layers: expected a list, got dict"),
        ({"layers": [[DENSE]]}, r"model: layers\[0\]: expected a kind of LSTM"),
        ({"layers": [None]}, r"model: layers\[0\]: expected a kind of LSTM"),
        ({"layers": [{"kind": "Sequential", "batch_first": True, "layers": []}]}, r"\[0\]: expected a kind of LSTM"),
        ({"layers": [DENSE, DENSE]}, r"layers\[1\]: tensors: missing bias, weight"),
        ({"layers": [{"kind": "Last"}]}, r"layers\[0\]: tensors: surplus bias, weight"),
        ({"layers": [{"kind": "TimeDistributed", "layer": {"kind": "Last"}}]}, r"\[0\]: layer: expected one that"),
        ({"layers": [{"kind": "TimeDistributed", "layer": 3}]}, r"layers\[0\]: layer: expected one that"),
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
    both = {"0": header["0.weight"], "0.": header["0.bias"], **header}
    del both["0.weight"], both["0.bias"]
    with pytest.raises(gw.FormatError, match="missing"):
        gw.load(write(path, both, numbers))


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
        (data[:-1], "expected 1728 bytes of numbers, got 1727$"),
        (data + b"a", "expected 1728 bytes of numbers, got 1729$"),
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
    whole = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(os, "fstat", lambda _: whole)
    with pytest.raises(gw.FormatError, match=r"layers\[0\]: the file was cut while it was read"):
        gw.load(path)


def test_memory_is_bounded_by_the_file(path):
    """Whatever sizes it speaks of."""
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
    """Whatever sizes the layers say they have."""
    layers = [
        gw.Embedding(2, 2), gw.Conv1D(2, 2, 1), gw.Dense(2, 2), gw.LayerNorm(2), gw.BatchNorm(2), gw.Normalization(2),
        gw.LSTM(2, 2), gw.GRU(2, 2), gw.TimeDistributed(gw.Dense(2, 2)), gw.RNN(2, 2),
    ]  # fmt: skip
    gw.save(gw.Sequential(layers), path)
    header, numbers = parts(path)
    described = json.loads(header["__metadata__"]["model"])["layers"]
    changed = [
        layer | {n: s // factor for n, s in SIZES[kind].items()} if layer["kind"] == kind else layer
        for layer in described
    ]
    assert changed != described
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
    """However often a file speaks of them."""
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


@pytest.mark.parametrize("name", ["tagger", "classifier"])
def test_mutated_descriptions(name, path):
    """JSON that is right in itself: a model or a FormatError, and little memory."""
    gw.save(make_model(MODELS[name]("float32")), path)
    header, numbers = parts(path)
    text = header["__metadata__"]["model"]
    rng = np.random.default_rng(2)
    others = [
        0, 1, -1, 2, 3, 2**20, 2**31 - 1, 2**31, 2**64, 10**400, 0.5, 1.0, -0.0, 1e300, True, False, None, "", "elu",
        "sum", "float64", "Dense", "LSTM", "Sequential", [], {}, [[]], [1], {"kind": "Last"}, DENSE,
        {"kind": "Activation", "name": "gelu", "alpha": None},
    ]  # fmt: skip

    def places(value):
        """Each container in it, with each of its keys."""
        if isinstance(value, dict | list):
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                yield value, key
                yield from places(value[key])

    def other():
        return others[rng.integers(len(others))]

    refused = 0
    tracemalloc.start()
    for _ in range(500):
        description = json.loads(text)
        for _ in range(rng.integers(1, 3)):
            spots = list(places(description))
            if not spots:
                break
            container, key = spots[rng.integers(len(spots))]
            how = rng.integers(0, 6)
            if how < 3:
                container[key] = other()
            elif how == 3:
                del container[key]
            elif how == 4 and isinstance(container, dict):
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
            assert isinstance(gw.load(path), kinds)
        except gw.FormatError:
            refused += 1
    assert refused > 800
