"""Saved layers and models: they come back as they were, others can read them, and no file is ever half written."""

import importlib
import json
import os
import stat
import threading
from pathlib import Path

import gatewise as gw
import numpy as np
import pytest
from conftest import assert_same_bits, make_layer, random
from gatewise.formats import files
from safetensors_files import (
    LAYERS,
    MODELS,
    change_model,
    make_model,
    parts,
    write,
)


def model_input(model, dtype):
    first = next(layer for layer in model if not isinstance(layer, gw.Dropout))
    if isinstance(first, gw.Embedding):
        return np.random.default_rng(0).integers(0, first.num_embeddings, (8, 3))
    return random((8, 3, first._stage.input_size), dtype)


def everything(layer):
    """All attributes of a layer, without its weights."""
    attributes = {name: value for name, value in vars(layer).items() if name != "_slot"}
    return type(layer), {
        name: everything(value) if hasattr(value, "_slot") else value for name, value in attributes.items()
    }


def assert_same_model(again, model, x):
    """That two models are the same, down to the bits of their results."""
    assert type(again) is gw.Sequential
    assert repr(again) == repr(model)
    assert (again.batch_first, again.dtype) == (model.batch_first, model.dtype)
    assert [everything(layer) for layer in again] == [everything(layer) for layer in model]
    assert list(again.state_dict()) == list(model.state_dict())
    assert_same_bits(again.state_dict(), model.state_dict())
    assert_same_bits(again(x), model(x))


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
    # Other writers may change the order of the tensors.
    numpy.save_file({name: 2 * value for name, value in reversed(theirs.items())}, path, metadata)
    again = gw.load(path)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(again.parameters[name], 2 * value)
    numpy.save_file(theirs, path)
    if isinstance(layer, gw.LSTM):  # its weights tell what it is
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
    with again.edit() as weights:  # which are not shared with the file
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
    common = {"bias": flag(), "dtype": dtype}
    options = {"batch_first": batch_first, "dropout": p, **common}
    return one_of(
        lambda: recurrent(units, out, size, bidirectional=flag(), **options),
        lambda: gw.Bidirectional(recurrent(units, out, bidirectional=True, **options), one_of("sum", "mul", "ave")),
        lambda: gw.Dense(units, out, activation=activation, **common),
        lambda: gw.TimeDistributed(gw.Dense(units, out, activation=activation, **common)),
        lambda: gw.Conv1D(
            units, out, size, dilation=dilation, padding=one_of("causal", "same"), activation=activation, **common
        ),
        lambda: gw.LayerNorm(units, eps=eps, elementwise_affine=flag(), **common),
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


def test_only_options_that_were_given_are_shown():
    """The repr of an activation without an alpha does not show one, though its file has it."""
    assert repr(gw.Activation("relu")) == "Activation(name='relu')"
    assert repr(gw.Activation("elu")) == "Activation(name='elu', alpha=1.0)"


def test_a_model_that_could_not_be_loaded_is_not_saved(path, monkeypatch):
    gw.save(gw.Sequential([gw.BatchNorm(3)]), path)
    before = path.read_bytes()
    monkeypatch.setattr("gatewise.formats.safetensors.tensors.MAX_HEADER", int.from_bytes(before[:8], "little"))
    gw.save(gw.Sequential([gw.BatchNorm(3)]), path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="model: expected a header of at most"):
        gw.save(gw.Sequential([gw.BatchNorm(3), gw.Dropout()]), path)
    assert path.read_bytes() == before


def test_files_of_earlier_versions(path):
    """They can be read, and the same bytes are still written."""
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


def test_the_numbers_are_aligned(path):
    for size in range(1, 9):
        gw.save(make_layer("gru", 1, size, dtype="float64"), path)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_a_file_is_replaced_as_a_whole(path, monkeypatch):
    """Its mode stays, a link stays a link; and after an error nothing has changed."""
    layer, other = make_layer("gru", 5, 9), make_layer("gru", 6, 9)
    gw.save(layer, path)
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
        gw.save(layer, path)
    assert gw.load(path).input_size == 6
    assert sorted(os.listdir(path.parent)) == ["layer.safetensors", "link"]
    with pytest.raises(FileNotFoundError):
        gw.save(layer, path.parent / "missing" / "layer")


def test_a_file_can_be_read_while_it_is_replaced(path):
    """Readers get the old one or the new one."""
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
    weights = Path(__file__).parents[1] / "data" / "chain.weights.h5"
    with pytest.raises(gw.FormatError, match=f": config: {tmp_path / 'pipe'}: expected a file$"):
        gw.load(weights, config=tmp_path / "pipe")


def test_bad_models(path):
    class Derived(gw.LSTM):
        pass

    class Dense(gw.Dense):
        pass

    class Model(gw.Sequential):
        pass

    expected = "expected a Sequential or a layer of gatewise itself, got"
    derived = Derived(3, 4, bidirectional=True)
    for wrong, match in (
        (None, f"model: {expected} NoneType"),
        ("model", f"model: {expected} str"),
        ({}, f"model: {expected} dict"),
        (gw.LSTM, f"model: {expected} type"),
        (derived, f"model: {expected} .*Derived"),
        (Dense(3, 4), f"model: {expected} .*Dense"),
        (Model([gw.Dense(3, 4)]), f"model: {expected} .*Model"),
        (gw.Sequential([gw.Dropout(), derived]), rf"model: layers\[1\]: {expected} .*Derived"),
        (gw.Sequential([gw.Bidirectional(derived)]), rf"model: layers\[0\]: layer: {expected} .*Derived"),
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


def test_bad_paths(path, tmp_path):
    with pytest.raises(TypeError, match=r"source: expected a path or a torch.nn.Module, got int"):
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
