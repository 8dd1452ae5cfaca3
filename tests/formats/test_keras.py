"""Models of Keras: what loads gives the outputs of Keras."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.make_keras import COMMITTED
from data.make_keras2 import COMMITTED as COMMITTED_2
from gatewise import reference
from gatewise.formats import keras
from gatewise.formats.errors import FormatError
from keras_files import DATA, Arrays, config_of, draw, entry, named, recurrent, write
from tolerances import assert_close

h5py = pytest.importorskip("h5py")

NAMES = ["stack", "around", "affine", "activations", "plain", "cells", "steps", "chain", "trained", "wide"]
NAMES += [f"both_{merge}" for merge in ("concat", "sum", "mul", "ave")]
NAMES += ["masked", "masked_tokens", "masks_that_end", "unused_mask", "masked_graph", "masked_graphs"]
NAMES += ["backwards", "functions"]


def assert_same(path: Path) -> None:
    """That a model gives the outputs that Keras gave on the same input."""
    model = keras.load(path, config_of(path))
    assert model.batch_first
    with np.load(path.parent / f"{path.name.partition('.')[0]}.npz") as arrays:
        x, y = arrays["x"], arrays["y"]
    assert model.dtype == y.dtype
    assert_close(model(x), y, f"keras_{y.dtype}", path.name)


# ---- files of Keras itself


@pytest.mark.parametrize("name", COMMITTED)
def test_files_of_keras_3(name: str) -> None:
    assert_same(DATA / (name + COMMITTED[name]))


@pytest.mark.parametrize("name", COMMITTED_2)
def test_files_of_keras_2(name: str) -> None:
    assert_same(DATA / (name + COMMITTED_2[name]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the installed Keras writes, in another process, since TensorFlow changes much of the process."""
    if not all(importlib.util.find_spec(name) for name in ("keras", "tensorflow")):
        pytest.skip("Keras and TensorFlow are not installed")
    folder = tmp_path_factory.mktemp("keras")
    subprocess.run([sys.executable, DATA / "make_keras.py", folder, "--all"], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("ending", [".keras", ".h5", ".weights.h5"])
@pytest.mark.parametrize("name", NAMES)
def test_installed_keras(made: Path, name: str, ending: str) -> None:
    assert_same(made / f"{name}{ending}")


def test_neither_keras_nor_h5py_is_imported() -> None:
    path = DATA / f"stack{COMMITTED['stack']}"
    program = (
        "import sys; from gatewise.formats import keras; "
        f"keras.load({str(path)!r}); assert not {{'keras', 'tensorflow', 'h5py'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_from_file_to_stream() -> None:
    """The lines of docs/files.md."""
    model = keras.load(DATA / "chain.weights.h5", DATA / "chain.json")
    x = np.random.default_rng(0).normal(size=(9, 4)).astype("float32")
    stream, out = model.stream(), np.empty(2, "float32")
    for sample in x:
        stream.step(sample, out)
    assert np.array_equal(out, model(x))


def test_functions_of_the_keras_that_wrote_the_weights(tmp_path: Path) -> None:
    """hard_sigmoid has another slope in Keras 3: without a version, the names of options must tell which one it is."""
    path = tmp_path / "m.weights.h5"
    with h5py.File(path, "w") as file:
        for i, array in enumerate(draw(1, kernel=(3, 5), bias=(5,)).values()):
            file.create_dataset(f"layers/dense/vars/{i}", data=array)
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}, "registered_name": None}
    for options, expected in (({"dtype": policy}, (1 / 6, 0.5)), ({"batch_input_shape": [None, 3]}, (0.2, 0.5))):
        config = [entry("Dense", "d", units=5, activation="hard_sigmoid", **options)]
        assert keras.load(path, config)[0].activation.function.numbers == expected
    with pytest.raises(FormatError, match="activation: expected a configuration that tells its version of Keras"):
        keras.load(path, [entry("Dense", "d", units=5, activation="hard_sigmoid")])


def test_a_live_configuration(tmp_path: Path) -> None:
    """get_config() of a model has tuples in place of some lists."""
    config = json.loads((DATA / "chain.json").read_text())["config"]
    ends = {name: tuple(config[name]) for name in ("input_layers", "output_layers")}
    keras.load(DATA / "chain.weights.h5", config | ends)
    with pytest.raises(FormatError, match="config: expected values that JSON has"):
        keras.load(DATA / "chain.weights.h5", config | {"layers": object()})


@pytest.mark.parametrize("form", ["text", "description", "config", "path"])
def test_forms_of_config(form: str) -> None:
    path = DATA / "chain.json"
    text = path.read_text()
    forms = {"text": text, "description": json.loads(text), "config": json.loads(text)["config"], "path": str(path)}
    model = keras.load(DATA / "chain.weights.h5", forms[form])
    kinds = "Dense BatchNorm Dense LSTM BatchNorm Dense LSTM Last Dense"
    assert [type(layer).__name__ for layer in model] == kinds.split()


# ---- files of Keras 2, by hand


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def keras_lstm(x: np.ndarray, weights: Arrays, gate: Any = sigmoid) -> np.ndarray:
    """As Keras documents it: gates i, f, c, o along the last axis. x (B, T, I)."""
    h = c = np.zeros((len(x), weights["recurrent_kernel"].shape[0]))
    steps = []
    for sample in x.swapaxes(0, 1):
        i, f, g, o = np.split(sample @ weights["kernel"] + h @ weights["recurrent_kernel"] + weights["bias"], 4, -1)
        c = gate(f) * c + gate(i) * np.tanh(g)
        h = gate(o) * np.tanh(c)
        steps.append(h)
    return np.stack(steps, 1)


def keras_gru(x: np.ndarray, weights: Arrays, gate: Any = sigmoid) -> np.ndarray:
    """As Keras documents it: gates z, r, h; the reset comes before the product, unless there are two biases."""
    kernel, recurrent, bias = (weights[name].astype("float64") for name in ("kernel", "recurrent_kernel", "bias"))
    h = np.zeros((len(x), recurrent.shape[0]))
    after = bias.ndim == 2
    steps = []
    for sample in x.swapaxes(0, 1):
        z, r, n = np.split(sample @ kernel + (bias[0] if after else bias), 3, -1)
        uz, ur, un = np.split(recurrent, 3, -1)
        bz, br, bn = np.split(bias[1] if after else np.zeros(bias.shape), 3, -1)
        z, r = gate(z + h @ uz + bz), gate(r + h @ ur + br)
        n = np.tanh(n + (r * (h @ un + bn) if after else (r * h) @ un))
        h = z * h + (1 - z) * n
        steps.append(h)
    return np.stack(steps, 1)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape)


@pytest.mark.parametrize("style", ["lstm_1", "lstm_1/lstm_cell", "sequential/lstm_1/lstm_cell_3"])
def test_lstm_of_keras_2(tmp_path: Path, style: str) -> None:
    weights = draw(1, kernel=(3, 20), recurrent_kernel=(5, 20), bias=(20,))
    dense = draw(2, kernel=(5, 2), bias=(2,))
    layers = [
        (recurrent("LSTM", "lstm_1", 5, batch_input_shape=[None, 9, 3], dtype="float32"), named(style, weights)),
        (entry("Dropout", "dropout_1", rate=0.5), {}),
        (entry("Dense", "dense_1", units=2, activation="relu", use_bias=True), named("dense_1", dense)),
    ]
    x = numbers(4, 9, 3)
    expected = reference.relu(keras_lstm(x, weights) @ dense["kernel"] + dense["bias"])
    for bare in (True, False):
        config = write(tmp_path / "model.h5", layers, bare=bare)
        assert_close(keras.load(tmp_path / "model.h5")(x), expected, "keras_float32")
        write(tmp_path / "weights.h5", layers, has_config=False)
        assert_close(keras.load(tmp_path / "weights.h5", config)(x), expected, "keras_float32")
        assert_close(keras.load(tmp_path / "weights.h5", json.dumps(config["config"]))(x), expected, "keras_float32")


def hard_sigmoid(x: np.ndarray) -> np.ndarray:
    """The function of this name before Keras 3."""
    return np.clip(0.2 * x + 0.5, 0, 1)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gates_of_keras_before_tensorflow_2(tmp_path: Path, kind: str) -> None:
    """hard_sigmoid was the default of the gates then; here a dense layer has it, too."""
    gates = {"LSTM": 4, "GRU": 3}[kind]
    weights = draw(1, kernel=(3, 5 * gates), recurrent_kernel=(5, 5 * gates), bias=(5 * gates,))
    dense = draw(2, kernel=(5, 2), bias=(2,))
    layers = [
        (recurrent(kind, "a", 5, recurrent_activation="hard_sigmoid"), named("a", weights)),
        (entry("Dense", "d", units=2, activation="hard_sigmoid"), named("d", dense)),
    ]
    write(tmp_path / "m.h5", layers)
    x = 2 * numbers(4, 9, 3)
    y = (keras_lstm if kind == "LSTM" else keras_gru)(x, weights, hard_sigmoid)
    expected = hard_sigmoid(y @ dense["kernel"] + dense["bias"])
    assert_close(keras.load(tmp_path / "m.h5")(x), expected, "keras_float32")


@pytest.mark.parametrize("reset_after", [None, False, True])
def test_gru_of_keras_2(tmp_path: Path, reset_after: bool | None) -> None:
    """Before 2.1.4 there was no reset_after."""
    weights = draw(1, kernel=(3, 15), recurrent_kernel=(5, 15), bias=(2, 15) if reset_after else (15,))
    option = {} if reset_after is None else {"reset_after": reset_after}
    write(tmp_path / "m.h5", [(recurrent("GRU", "gru_1", 5, **option), named("gru_1", weights))])
    model = keras.load(tmp_path / "m.h5")
    assert model[0].reset_after is bool(reset_after)
    x = numbers(4, 9, 3)
    assert_close(model(x), keras_gru(x, weights), "keras_float32")


def from_cudnn(kernel: np.ndarray, recurrent_kernel: np.ndarray, gates: int) -> tuple[np.ndarray, np.ndarray]:
    """CuDNN's matrices as those of an LSTM or GRU: Keras 2 converted them so when it loaded the one as the other."""
    inputs = [k.T.reshape(k.shape, order="F") for k in np.hsplit(kernel, gates)]
    return np.hstack(inputs), np.hstack([k.T for k in np.hsplit(recurrent_kernel, gates)])


@pytest.mark.parametrize("kind", ["CuDNNLSTM", "CuDNNGRU"])
def test_cudnn(tmp_path: Path, kind: str) -> None:
    gates = 4 if kind == "CuDNNLSTM" else 3
    weights = draw(1, kernel=(3, 5 * gates), recurrent_kernel=(5, 5 * gates), bias=(10 * gates,))
    write(tmp_path / "m.h5", [(recurrent(kind, "cu", 5, return_sequences=False), named("cu", weights))])
    kernel, recurrent_kernel = from_cudnn(weights["kernel"], weights["recurrent_kernel"], gates)
    biases = weights["bias"].reshape(2, -1)
    x = numbers(4, 9, 3)
    bias = biases.sum(0) if gates == 4 else biases
    converted = {"kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": bias}
    expected = (keras_lstm if gates == 4 else keras_gru)(x, converted)[:, -1]
    assert_close(keras.load(tmp_path / "m.h5")(x), expected, "keras_float32")


@pytest.mark.parametrize("returns", [True, False])
def test_bidirectional_of_keras_2(tmp_path: Path, returns: bool) -> None:
    weights = [draw(i, kernel=(3, 8), recurrent_kernel=(2, 8), bias=(8,)) for i in (1, 2)]
    inner = recurrent("LSTM", "lstm_2", 2, return_sequences=returns)
    layer = entry("Bidirectional", "both", layer=inner, merge_mode="concat")
    names = "both/forward_lstm_2", "both/backward_lstm_2/lstm_cell"
    write(tmp_path / "m.h5", [(layer, named(names[0], weights[0]) | named(names[1], weights[1]))])
    x = numbers(4, 9, 3)
    forward, backward = keras_lstm(x, weights[0]), keras_lstm(x[:, ::-1], weights[1])
    expected = [forward, backward[:, ::-1]] if returns else [forward[:, -1], backward[:, -1]]
    assert_close(keras.load(tmp_path / "m.h5")(x), np.concatenate(expected, -1), "keras_float32")


def test_functional_of_keras_2(tmp_path: Path) -> None:
    """It has a model inside, whose weights that do not train come last; then a long list of names is in pieces."""
    dense, last = draw(1, kernel=(3, 4), bias=(4,)), draw(3, kernel=(4, 2), bias=(2,))
    norm = draw(2, gamma=(4,), beta=(4,), moving_mean=(4,), moving_variance=(4,))
    norm = {name: np.abs(array) + 0.5 for name, array in norm.items()}
    inner_layers = [
        entry("Dense", "a", units=4, activation="linear"),
        entry("BatchNormalization", "n", axis=[2], epsilon=0.01),
        entry("Dense", "b", units=2, activation="elu"),
    ]
    inner = entry("Sequential", "inner", layers=inner_layers)
    layers = [
        entry("InputLayer", "input_1", batch_input_shape=[None, None, 3]) | {"inbound_nodes": []},
        inner | {"inbound_nodes": [[["input_1", 0, 0, {}]]]},
        entry("LeakyReLU", "leaky", alpha=0.3) | {"inbound_nodes": [[["inner", 1, 0, {}]]]},
    ]
    for layer in layers:
        layer["name"] = layer["config"]["name"]
    ends = {"input_layers": [["input_1", 0, 0]], "output_layers": [["leaky", 0, 0]]}
    model = {"class_name": "Model", "config": {"name": "m", "layers": layers, **ends}}
    weights = named("a", dense) | named("n", norm) | named("b", last)
    weights = dict(sorted(weights.items(), key=lambda item: "moving" in item[0]))
    listed = [(layers[0], {}), (inner, weights), (layers[2], {})]
    write(tmp_path / "m.h5", listed, model=model, version="2.4.0")
    x = numbers(4, 9, 3)
    y = x @ dense["kernel"] + dense["bias"]
    y = (y - norm["moving_mean"]) / np.sqrt(norm["moving_variance"] + 0.01) * norm["gamma"] + norm["beta"]
    expected = reference.leaky_relu(reference.elu(y @ last["kernel"] + last["bias"]), 0.3)
    assert_close(keras.load(tmp_path / "m.h5")(x), expected, "keras_float32")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        attributes = file["model_weights/inner"].attrs
        names = attributes["weight_names"]
        attributes["weight_names0"], attributes["weight_names1"] = names[:3], names[3:]
        del attributes["weight_names"]
    assert_close(keras.load(tmp_path / "m.h5")(x), expected, "keras_float32")
