"""Models of Keras: what loads gives Keras's outputs, and what does not says why, whatever the file holds."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.make_keras import COMMITTED
from data.make_keras2 import COMMITTED as COMMITTED_2
from gatewise import reference
from gatewise.formats import keras
from gatewise.formats.errors import FormatError
from tolerances import assert_close

h5py = pytest.importorskip("h5py")

DATA = Path(__file__).parent / "data"
NAMES = (
    "stack", "around", "affine", "activations", "plain", "cells", "steps", "both_concat", "both_sum", "both_mul",
    "both_ave", "chain", "trained", "wide", "masked", "masked_tokens", "masks_that_end", "unused_mask", "backwards",
    "functions", "masked_graph", "masked_graphs",
)  # fmt: skip


def config_of(path: Path) -> Path | None:
    return path.with_suffix("").with_suffix(".json") if path.name.endswith(".weights.h5") else None


def assert_same(path: Path) -> None:
    """That a model gives the outputs that Keras gave, on a whole sequence and step by step."""
    model = keras.load(path, config_of(path))
    assert model.batch_first
    with np.load(path.parent / f"{path.name.partition('.')[0]}.npz") as found:
        x, y = found["x"], found["y"]
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
    """Files that the installed Keras writes, in a process of its own, which TensorFlow changes a lot in."""
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
    """hard_sigmoid is another line in Keras 3: what a configuration without a version says must tell."""
    path = tmp_path / "m.weights.h5"
    with h5py.File(path, "w") as file:
        for i, array in enumerate(draw(1, kernel=(3, 5), bias=(5,)).values()):
            file.create_dataset(f"layers/dense/vars/{i}", data=array)
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}, "registered_name": None}
    for told, expected in (({"dtype": policy}, (1 / 6, 0.5)), ({"batch_input_shape": [None, 3]}, (0.2, 0.5))):
        config = [entry("Dense", "d", units=5, activation="hard_sigmoid", **told)]
        assert keras.load(path, config)[0].activation.function.numbers == expected
    with pytest.raises(FormatError, match="activation: expected a configuration that tells its version of Keras"):
        keras.load(path, [entry("Dense", "d", units=5, activation="hard_sigmoid")])


def test_a_live_configuration(tmp_path: Path) -> None:
    """Whose lists are tuples here and there."""
    config = json.loads((DATA / "chain.json").read_text())["config"]
    ends = {name: tuple(config[name]) for name in ("input_layers", "output_layers")}
    keras.load(DATA / "chain.weights.h5", config | ends)
    with pytest.raises(FormatError, match="config: expected values that JSON has"):
        keras.load(DATA / "chain.weights.h5", config | {"layers": object()})


@pytest.mark.parametrize("form", ["text", "whole", "config", "path"])
def test_forms_of_config(form: str) -> None:
    path = DATA / "chain.json"
    text = path.read_text()
    forms = {"text": text, "whole": json.loads(text), "config": json.loads(text)["config"], "path": str(path)}
    model = keras.load(DATA / "chain.weights.h5", forms[form])
    assert [type(layer).__name__ for layer in model] == [
        "Dense", "BatchNorm", "Dense", "LSTM", "BatchNorm", "Dense", "LSTM", "Last", "Dense",
    ]  # fmt: skip


# ---- files of Keras 2, by hand

Arrays = Mapping[str, np.ndarray]


def entry(kind: str, name: str, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": {"name": name, "trainable": True, **config}}


def recurrent(kind: str, name: str, units: int, **config: Any) -> dict[str, Any]:
    """A recurrent layer as Keras 2 describes it."""
    options = {} if kind.startswith("CuDNN") else {"activation": "tanh", "use_bias": True, "implementation": 1}
    if kind in ("LSTM", "GRU"):
        options["recurrent_activation"] = "sigmoid"
    both = {"return_sequences": True, "return_state": False, "go_backwards": False, "stateful": False}
    return entry(kind, name, units=units, **both | options | config)


def write(
    path: Path, layers: Sequence[tuple[dict[str, Any], Mapping[str, np.ndarray]]], *, bare: bool = True,
    version: str = "2.1.6", whole: bool = True, model: Any = None,
) -> Any:  # fmt: skip
    """A file as Keras 2 wrote it; the model's configuration comes back."""
    entries = [one for one, _ in layers]
    if model is None:
        config = entries if bare else {"name": "sequential", "layers": entries}
        model = {"class_name": "Sequential", "config": config}
    with h5py.File(path, "w") as file:
        group = file
        if whole:
            file.attrs["model_config"] = json.dumps(model).encode()
            file.attrs["keras_version"] = version.encode()
            file.attrs["training_config"] = b"{}"
            group = file.create_group("model_weights")
        group.attrs["layer_names"] = [one["config"]["name"].encode() for one in entries]
        group.attrs["keras_version"] = version.encode()
        for one, weights in layers:
            inside = group.create_group(one["config"]["name"])
            inside.attrs["weight_names"] = [name.encode() for name in weights]
            for name, array in weights.items():
                inside.create_dataset(name, data=array)
    return model


def draw(seed: int, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(0, 0.5, shape).astype("float32") for name, shape in shapes.items()}


def named(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}:0": array for name, array in arrays.items()}


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
    """Gates z, r, h; the reset before the product, unless there are two biases."""
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
    weights, dense = (
        draw(1, kernel=(3, 20), recurrent_kernel=(5, 20), bias=(20,)), draw(2, kernel=(5, 2), bias=(2,))
    )  # fmt: skip
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
        write(tmp_path / "weights.h5", layers, whole=False)
        assert_close(keras.load(tmp_path / "weights.h5", config)(x), expected, "keras_float32")
        assert_close(keras.load(tmp_path / "weights.h5", json.dumps(config["config"]))(x), expected, "keras_float32")


def hard_sigmoid(x: np.ndarray) -> np.ndarray:
    """As it was before Keras 3."""
    return np.clip(0.2 * x + 0.5, 0, 1)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gates_of_keras_before_tensorflow_2(tmp_path: Path, kind: str) -> None:
    """Whose default they were; and a dense layer's."""
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
    """CuDNN's matrices as those of LSTM and GRU, as Keras 2 itself turned them when it loaded one as the other."""
    inputs = [k.T.reshape(k.shape, order="F") for k in np.hsplit(kernel, gates)]
    return np.hstack(inputs), np.hstack([k.T for k in np.hsplit(recurrent_kernel, gates)])


@pytest.mark.parametrize("kind", ["CuDNNLSTM", "CuDNNGRU"])
def test_cudnn(tmp_path: Path, kind: str) -> None:
    gates = 4 if kind == "CuDNNLSTM" else 3
    weights = draw(1, kernel=(3, 5 * gates), recurrent_kernel=(5, 5 * gates), bias=(10 * gates,))
    write(tmp_path / "m.h5", [(recurrent(kind, "cu", 5, return_sequences=False), named("cu", weights))])
    kernel, recurrent_kernel = from_cudnn(weights["kernel"], weights["recurrent_kernel"], gates)
    both = weights["bias"].reshape(2, -1)
    x = numbers(4, 9, 3)
    turned = {"kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": both.sum(0) if gates == 4 else both}
    expected = (keras_lstm if gates == 4 else keras_gru)(x, turned)[:, -1]
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
    """With a model inside, whose weights that do not train come last, and pieces of a long list of names."""
    dense, norm, last = (
        draw(1, kernel=(3, 4), bias=(4,)),
        {name: np.abs(array) + 0.5 for name, array in draw(2, gamma=(4,), beta=(4,), moving_mean=(4,),
                                                           moving_variance=(4,)).items()},
        draw(3, kernel=(4, 2), bias=(2,)),
    )  # fmt: skip
    inner = entry(
        "Sequential", "inner", layers=[
            entry("Dense", "a", units=4, activation="linear"),
            entry("BatchNormalization", "n", axis=[2], epsilon=0.01), entry("Dense", "b", units=2, activation="elu"),
        ],
    )  # fmt: skip
    layers = [
        entry("InputLayer", "input_1", batch_input_shape=[None, None, 3]) | {"inbound_nodes": []},
        inner | {"inbound_nodes": [[["input_1", 0, 0, {}]]]},
        entry("LeakyReLU", "leaky", alpha=0.3) | {"inbound_nodes": [[["inner", 1, 0, {}]]]},
    ]
    for one in layers:
        one["name"] = one["config"]["name"]
    model = {
        "class_name": "Model",
        "config": {
            "name": "m", "layers": layers, "input_layers": [["input_1", 0, 0]], "output_layers": [["leaky", 0, 0]],
        },
    }  # fmt: skip
    everything = named("a", dense) | named("n", norm) | named("b", last)
    ordered = sorted(everything, key=lambda name: "moving" in name)
    write(
        tmp_path / "m.h5", [(layers[0], {}), (inner, {name: everything[name] for name in ordered}), (layers[2], {})],
        model=model, version="2.4.0",
    )  # fmt: skip
    x = numbers(4, 9, 3)
    y = x @ dense["kernel"] + dense["bias"]
    y = (y - norm["moving_mean"]) / np.sqrt(norm["moving_variance"] + 0.01) * norm["gamma"] + norm["beta"]
    expected = reference.leaky_relu(reference.elu(y @ last["kernel"] + last["bias"]), 0.3)
    assert_close(keras.load(tmp_path / "m.h5")(x), expected, "keras_float32")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        of = file["model_weights/inner"].attrs
        of["weight_names0"], of["weight_names1"] = of["weight_names"][:3], of["weight_names"][3:]
        del of["weight_names"]
    assert_close(keras.load(tmp_path / "m.h5")(x), expected, "keras_float32")


# ---- what is refused


def dense_file(folder: Path, *layers: dict[str, Any], **options: Any) -> Path:
    """A file of Keras 2 with a dense layer and what else is asked."""
    first = entry("Dense", "dense_1", units=3, activation="linear", batch_input_shape=[None, 9, 4])
    weights = draw(1, kernel=(4, 3), bias=(3,))
    write(folder / "m.h5", [(first, named("dense_1", weights)), *((layer, {}) for layer in layers)], **options)
    return folder / "m.h5"


LSTM_OPTIONS = {"units": 3, "activation": "tanh", "recurrent_activation": "sigmoid"}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (recurrent("LSTM", "lstm_1", 3, recurrent_activation="exponential"),
         "layer 'lstm_1' (LSTM): recurrent_activation: expected one of linear, "),
        (recurrent("LSTM", "l", 3, activation="softmax"),
         "layer 'l' (LSTM): activation: expected a function of one unit, got 'softmax'"),
        (recurrent("GRU", "g", 3, go_backwards=1), "layer 'g' (GRU): go_backwards: expected True or False, got 1"),
        (recurrent("GRU", "g", 3, return_state=True), "layer 'g' (GRU): return_state: expected False or None"),
        (recurrent("GRU", "g", 0), "layer 'g' (GRU): units: expected a whole number from 1 to"),
        (recurrent("GRU", "g", True), "layer 'g' (GRU): units: expected a whole number from 1 to"),
        (recurrent("LSTM", "g", 3, time_major=True), "layer 'g' (LSTM): time_major: expected False"),
        (entry("Masking", "m", mask_value=0.0), "layer 'm' (Masking): expected it as the first layer"),
        (entry("Lambda", "evil", function=["code", None, None]), "layer 'evil' (Lambda): expected a layer of Keras"),
        (entry("Attention", "a"), "layer 'a' (Attention): expected a layer that gatewise has"),
        (entry("Embedding", "e", input_dim=1, output_dim=1, mask_zero=True), "(Embedding): expected it as the first"),
        (entry("Bidirectional", "b", layer=recurrent("LSTM", "l", 3), merge_mode=None),
         "layer 'b' (Bidirectional): merge_mode: expected 'concat' or 'sum' or 'mul' or 'ave', got None"),
        (entry("Bidirectional", "b", layer=entry("Dense", "d", units=3)), "layer 'b' (Bidirectional): layer: expected"),
        (entry("RNN", "r", cell=entry("Mine", "c", units=3)), "layer 'r' (RNN): cell: expected one of LSTMCell"),
        (entry("TimeDistributed", "t", layer=recurrent("LSTM", "l", 3)), "layer 't' (TimeDistributed): layer:"),
        (entry("Activation", "a", activation="mish"), "layer 'a' (Activation): activation: expected one of linear"),
        (entry("ReLU", "r", max_value=6.0), "layer 'r' (ReLU): max_value: expected None, got 6.0"),
        (entry("ReLU", "r", threshold=1.0, negative_slope=0.1), "layer 'r' (ReLU): threshold: expected 0 beside a neg"),
        (entry("Softmax", "s", axis=1), "layer 's' (Softmax): axis: expected -1, got 1"),
        (entry("Flatten", "f"), "layer 'f' (Flatten): expected one step before it"),
        (entry("Reshape", "r", target_shape=[27]), "layer 'r' (Reshape): target_shape: expected the shape before it"),
        (entry("Conv1D", "c", filters=2, kernel_size=[3], padding="valid"), "layer 'c' (Conv1D): padding: expected"),
        (entry("Conv1D", "c", filters=2, kernel_size=[3], padding="same", strides=[2]), "layer 'c' (Conv1D): strides:"),
        (entry("BatchNormalization", "n", axis=1), "layer 'n' (BatchNormalization): axis: expected -1, got 1"),
        (entry("Normalization", "n", axis=[-1], mean=[1, 2, 3], variance=[1, 2, 3], invert=True), "invert: expected"),
        (entry("Dropout", "d", dtype="float16"), "layer 'd' (Dropout): dtype: expected 'float32', as the"),
        (entry("InputLayer", "i", dtype="int32"), "layer 'i' (InputLayer): dtype: expected 'float32'"),
        (entry("BatchNormalization", "n", mode=2), "layer 'n' (BatchNormalization): mode: expected an option that"),
        (entry("Dropout", "d", training=True), "layer 'd' (Dropout): training: expected an option that gatewise knows"),
        (recurrent("LSTM", "l", 3, peepholes=True), "layer 'l' (LSTM): peepholes: expected an option that gatewise"),
        (entry("RNN", "r", cell=entry("GRUCell", "c", units=3, clip=1)), "layer 'c' (GRUCell): clip: expected an opt"),
        (entry("InputLayer", "i", ragged=True), "layer 'i' (InputLayer): ragged: expected an option that gatewise"),
        ({"module": "mine.layers", **entry("Dropout", "d")}, "layer 'd' (Dropout): expected a class of Keras, got one"),
        ({"class_name": "Dense"}, "layers[1]: Dense: expected a config"),
        ({"config": {}}, "layers[1]: expected a class and its config"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, layer: dict[str, Any], reason: str) -> None:
    layer.setdefault("config", None)
    if "class_name" not in layer or layer["config"] is None:
        path = dense_file(tmp_path)
        write(path, [], model={"class_name": "Sequential", "config": [entry("Dense", "d", units=3), layer]})
    else:
        arrays: dict[str, np.ndarray] = {}
        first = entry("Dense", "dense_1", units=3, activation="linear", batch_input_shape=[None, 9, 4])
        path = tmp_path / "m.h5"
        kernel = named("dense_1", draw(1, kernel=(4, 3), bias=(3,)))
        if layer["class_name"] in WEIGHTED:
            arrays = {f"w/{name}:0": np.ones(1, "float32") for name in WEIGHTED[layer["class_name"]]}
        write(path, [(first, kernel), (layer, arrays)])
    with pytest.raises(FormatError) as caught:
        keras.load(path)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


MASKING = entry("Masking", "m", mask_value=-1.0)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([MASKING, "lstm", entry("Conv1D", "c", filters=3, kernel_size=[1], padding="same", use_bias=False)],
         "layer 'c' (Conv1D): expected no masked steps before it"),
        ([MASKING, entry("Softmax", "s"), "lstm"], "layer 's' (Softmax): expected no masked steps before it"),
        ([MASKING, "backwards"], "layer 'l' (LSTM): go_backwards: expected False where steps are masked"),
        ([MASKING, entry("ReLU", "r")], "Masking: expected a recurrent layer after it, or mask_value=0"),
        ([MASKING, entry("Conv1D", "c", filters=3, kernel_size=[1], padding="same", use_bias=False), "lstm"],
         "layer 'c' (Conv1D): expected a Masking of mask_value=0 before it, at which the mask ends"),
        ([MASKING, "lstm", entry("Normalization", "n", axis=[-1], mean=[1, 2, 3], variance=[1, 2, 3])],
         "layer 'n' (Normalization): expected no masked steps before it"),  # which in Keras 2 does not pass masks on
        ([MASKING, "lstm", entry("TimeDistributed", "t", layer=entry("Softmax", "s"))],
         "layer 's' (Softmax): expected no masked steps before it"),
        ([entry("Masking", "m", mask_value=0.0, dtype="float64"), "lstm"], "layer 'm' (Masking): dtype: expected"),
        ([entry("TimeDistributed", "t", layer=entry("ReLU", "r", dtype="mixed_float16")), "lstm"],
         "layer 'r' (ReLU): dtype: expected 'float32'"),
        ([MASKING, "zeros"], "layer 'l' (LSTM): zero_output_for_mask: expected False or None, got True"),
    ],
)  # fmt: skip
def test_masks_that_are_refused(tmp_path: Path, layers: list[Any], reason: str) -> None:
    weights = draw(1, kernel=(3, 12), recurrent_kernel=(3, 12), bias=(12,))
    zeros = {"zero_output_for_mask": True, "return_sequences": False} if "zeros" in layers else {}
    lstm = recurrent("LSTM", "l", 3, go_backwards="backwards" in layers, **zeros)
    kernel = {"Conv1D": named("c", draw(2, kernel=(1, 3, 3)))}
    listed = [(lstm, named("l", weights)) if isinstance(layer, str) else (layer, kernel.get(layer["class_name"], {}))
              for layer in layers]  # fmt: skip
    write(tmp_path / "m.h5", listed)
    with pytest.raises(FormatError) as caught:
        keras.load(tmp_path / "m.h5")
    assert reason in str(caught.value)


def test_graphs_whose_masks_are_others(tmp_path: Path) -> None:
    """What NotEqual and Any say must be what the Masking says."""
    path = DATA / f"masked_graph{COMMITTED['masked_graph']}"
    changes = {
        "value": (
            lambda text: text.replace("}}, -1.0]", "}}, -2.0]"),
            r"layer 'not_equal_\d' \(NotEqual\): expected one call",
        ),
        "axis": (
            lambda text: text.replace('"axis": -1, "keepdims"', '"axis": 1, "keepdims"'),
            "mask: expected None in its call",
        ),
        "kind": (
            lambda text: text.replace('"class_name": "NotEqual"', '"class_name": "Equal"'),
            r"layer 'not_equal_\d' \(Equal\)",
        ),
    }
    for name, (change, reason) in changes.items():
        changed = tmp_path / f"{name}.keras"
        with zipfile.ZipFile(path) as found, zipfile.ZipFile(changed, "w") as made:
            for one in found.namelist():
                data = found.read(one)
                if one == keras.CONFIG:
                    assert change(data.decode()) != data.decode()
                    data = change(data.decode()).encode()
                made.writestr(one, data)
        with pytest.raises(FormatError, match=reason):
            keras.load(changed)


def node(*layers: str, value: float | None = None, mask: str | None = None) -> list[dict[str, Any]]:
    """The one call of a layer of Keras 3."""

    def tensor(layer: str) -> dict[str, Any]:
        return {"class_name": "__keras_tensor__", "config": {"keras_history": [layer, 0, 0]}}

    arguments = [*map(tensor, layers), *([] if value is None else [value])]
    return [{"args": arguments, "kwargs": {} if mask is None else {"mask": tensor(mask)}}]


@pytest.mark.parametrize("given", [True, False])
def test_a_mask_that_is_given_after_a_layer_that_ends_it(tmp_path: Path, given: bool) -> None:
    """Keras 3 takes it; here the convolution has ended it."""
    convolution = entry("Conv1D", "c", filters=3, kernel_size=[1], padding="same", use_bias=False, dtype="float32")
    weights = draw(1, kernel=(3, 12), recurrent_kernel=(3, 12), bias=(12,))
    layers = [
        (entry("InputLayer", "x", batch_shape=[None, None]), [], {}),
        (entry("Embedding", "e", input_dim=5, output_dim=3, mask_zero=True), node("x"), draw(2, embeddings=(5, 3))),
        (entry("NotEqual", "n"), node("x", value=0), {}),
        (convolution, node("e"), draw(3, kernel=(1, 3, 3))),
        (recurrent("LSTM", "l", 3), node("c", mask="n" if given else None), weights),
    ]
    listed = [(one | {"inbound_nodes": nodes, "name": one["config"]["name"]}, arrays) for one, nodes, arrays in layers]
    ends = {"input_layers": ["x", 0, 0], "output_layers": ["l", 0, 0]}
    model = {"class_name": "Functional", "config": {"name": "m", "layers": [one for one, _ in listed], **ends}}
    write(
        tmp_path / "m.h5", [(one, named(one["config"]["name"], arrays)) for one, arrays in listed], model=model,
        version="3.9.0",
    )  # fmt: skip
    if given:
        with pytest.raises(
            FormatError, match=r"layer 'l' \(LSTM\): mask: expected None in its call, since a layer before"
        ):
            keras.load(tmp_path / "m.h5")
    else:
        assert not keras.load(tmp_path / "m.h5")[0].mask_zero


CELL = ("kernel", "recurrent_kernel", "bias")
WEIGHTED = {
    "LSTM": CELL, "GRU": CELL, "TimeDistributed": CELL, "Embedding": ("embeddings",), "Conv1D": ("kernel", "bias"),
    "Bidirectional": (*CELL, *(f"{name}_1" for name in CELL)),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ([[["d", 0, 0, {}], ["input_1", 0, 0, {}]]], "expected one call with one input"),
        ([[["d", 0, 0, {}]], [["d", 0, 0, {}]]], "expected one call with one input"),
        ([[["d", 0, 1, {}]]], "expected one call with one input"),
        ([[["d", 0, 0, {"initial_state": ["d", 0, 0]}]]], "initial_state: expected None in its call"),
        ([[["d", 0, 0, {"training": True}]]], "training: expected None in its call, got True"),
        ([[["input_1", 0, 0, {}]]], "expected one path from its input to its output"),
        ([], "expected one call with one input"),
    ],
)  # fmt: skip
def test_graphs_are_chains(tmp_path: Path, node: Any, reason: str) -> None:
    layers = [
        entry("InputLayer", "input_1", batch_input_shape=[None, None, 3]) | {"inbound_nodes": []},
        entry("Dropout", "d", rate=0.1) | {"inbound_nodes": [[["input_1", 0, 0, {}]]]},
        entry("ReLU", "r") | {"inbound_nodes": node},
    ]
    config = {"layers": layers, "input_layers": [["input_1", 0, 0]], "output_layers": [["r", 0, 0]]}
    write(tmp_path / "m.h5", [], model={"class_name": "Functional", "config": config})
    with pytest.raises(FormatError, match=reason):
        keras.load(tmp_path / "m.h5")


def test_errors_around_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        keras.load(tmp_path / "none.h5")
    with pytest.raises(FormatError, match="expected a file"):
        keras.load(tmp_path)
    with pytest.raises(FormatError, match=f"config: {tmp_path}: expected a file"):
        keras.load(DATA / "chain.weights.h5", tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FormatError, match="expected a zip archive"):
        keras.load(tmp_path / "text")
    with pytest.raises(FormatError, match=r"config: expected model\.to_json"):
        keras.load(DATA / "chain.weights.h5")
    with pytest.raises(FormatError, match="config: expected None"):
        keras.load(DATA / "stack.keras", {})
    with pytest.raises(FormatError, match="config: expected a dict"):
        keras.load(DATA / "chain.weights.h5", 3)
    with pytest.raises(FormatError, match="expected the weights of the model's layers, got missing"):
        keras.load(DATA / "chain.weights.h5", [entry("LSTM", "l", **LSTM_OPTIONS)])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("shape", "kernel:0: expected shape"), ("integers", "expected float32 or float64, got int32"),
        ("half", "expected float32 or float64, got float16"), ("mixed", "expected float64, as in the layers before"),
        ("policy", "dtype: expected 'float32', as its weights are, got 'mixed_float16'"),
        ("missing", "expected numbers of shape .*, got nothing"), ("names", "weight_names: expected"),
        ("layers", "expected weights of 1 layers, got"), ("external", "expected only hard links, got an external"),
        ("soft", "expected only hard links, got a soft link"), ("chunks", "expected numbers in one piece"),
        ("elsewhere", "expected numbers in one piece"), ("virtual", "expected numbers in one piece"),
        ("objects", "expected float32 or float64, got texts"), ("unwritten", "bytes within the file, got 0"),
        ("group", "expected numbers of shape .*, got a group"), ("config", "model_config: expected JSON"),
        ("deep", "nested too deeply"),
    ],
)  # fmt: skip
def test_unsound_weights(tmp_path: Path, change: str, reason: str) -> None:
    path = dense_file(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(48))
    with h5py.File(path, "r+") as file:
        group, name = file["model_weights/dense_1"], "dense_1/kernel:0"
        new: dict[str, dict[str, Any]] = {
            "shape": {"data": np.ones((4, 2), "float32")}, "integers": {"data": np.ones((4, 3), "int32")},
            "half": {"data": np.ones((4, 3), "float16")}, "mixed": {"data": np.ones((4, 3), "float64")},
            "chunks": {"shape": (4, 3), "dtype": "float32", "chunks": (1, 1), "compression": "gzip"},
            "elsewhere": {"shape": (4, 3), "dtype": "float32", "external": [(str(tmp_path / "secret"), 0, 48)]},
            "objects": {"data": np.full((4, 3), "x", object), "dtype": h5py.string_dtype()},
            "unwritten": {"shape": (4, 3), "dtype": "float32"},
        }  # fmt: skip
        if change in (*new, "missing", "external", "soft", "group", "virtual"):
            del group[name]
        if change in new:
            group.create_dataset(name, **new[change])
        elif change == "external":
            group[name] = h5py.ExternalLink("secret", "/kernel")
        elif change == "soft":
            group[name] = h5py.SoftLink("/model_weights/dense_1/dense_1/bias:0")
        elif change == "group":
            group.create_group(name)
        elif change == "virtual":
            layout = h5py.VirtualLayout((4, 3), "float32")
            layout[:] = h5py.VirtualSource("secret", "x", (4, 3))
            group.create_virtual_dataset(name, layout)
        elif change == "names":
            group.attrs["weight_names"] = [b"dense_1/bias:0", b"dense_1/kernel:0"]
        elif change == "layers":
            file["model_weights"].attrs["layer_names"] = [b"dense_1", b"dense_1"]
        elif change == "config":
            file.attrs["model_config"] = "{"
        elif change == "deep":
            file.attrs["model_config"] = "[" * 30000
        elif change == "policy":
            file.attrs["model_config"] = file.attrs["model_config"].replace(  # a text, though written as bytes
                '"units": 3', '"units": 3, "dtype": {"class_name": "Policy", "config": {"name": "mixed_float16"}}'
            )
    with pytest.raises(FormatError, match=reason):
        keras.load(path)


def test_huge_claims_are_refused_before_there_is_room_for_them(tmp_path: Path) -> None:
    """Shapes that a file of some KB claims, and one dataset that many layers share."""
    big = 2**20
    model = {"class_name": "Sequential", "config": [entry("Dense", "d", units=big, activation="linear")]}
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(model)
        group = file.create_group("model_weights/d")
        file["model_weights"].attrs["layer_names"] = [b"d"]
        group.attrs["weight_names"] = [b"kernel:0", b"bias:0"]
        group.create_dataset("kernel:0", (big, big), "float32", chunks=(1024, 1024), compression="gzip")
        group.create_dataset("bias:0", (big,), "float32")
    with pytest.raises(FormatError, match="in one piece"):
        keras.load(tmp_path / "m.h5")
    count = 200
    layers = [entry("Dense", f"d{i}", units=64, activation="linear", use_bias=False) for i in range(count)]
    write(tmp_path / "s.h5", [(one, {}) for one in layers])
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        shared = file.create_dataset("shared", data=np.ones((64, 64), "float32"))
        for i in range(count):
            file[f"model_weights/d{i}/kernel:0"] = shared
            file[f"model_weights/d{i}"].attrs["weight_names"] = [b"kernel:0"]
    with pytest.raises(FormatError, match="bytes together, as the file has, got more"):
        keras.load(tmp_path / "s.h5")


def test_claims_of_texts(tmp_path: Path) -> None:
    """For which HDF5's library would make room of 4 GB, or go round for ever."""
    data = (DATA / "around.h5").read_bytes()
    with h5py.File(DATA / "around.h5") as file:
        length = len(file["model_weights"].attrs["layer_names"][0])
    lengths = data.index(length.to_bytes(4, "little"), data.index(b"layer_names\0") + 16)
    heap = int.from_bytes(data[lengths + 4 : lengths + 12], "little")
    path = tmp_path / "m.h5"
    for begin, changed, reason in (
        (lengths, b"\xff\xff\xff\xff", "got a text of 4294967295 bytes"),
        (lengths + 4, b"\xff\xff", "expected a sound HDF5 file"),
        (heap + 16, bytes(16), "got a text of .* bytes in an object of 0"),
        (heap + 24, b"\xff\xff\xff", "expected a sound HDF5 file"),
        (13, b"\x04", "expected an HDF5 file with addresses of 8 bytes"),
    ):
        path.write_bytes(data[:begin] + changed + data[begin + len(changed) :])
        with pytest.raises(FormatError, match=reason):
            keras.load(path)


def archive(path: Path, members: Mapping[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def members() -> dict[str, bytes]:
    with zipfile.ZipFile(DATA / "stack.keras") as file:
        return {name: file.read(name) for name in file.namelist()}


def test_archives(tmp_path: Path) -> None:
    found, path = members(), tmp_path / "m.keras"
    keras.load(archive(path, found, zipfile.ZIP_DEFLATED))
    keras.load(archive(path, found | {"../../evil": b"", "assets/x": b""}))
    assert not list(tmp_path.parent.parent.glob("evil"))
    for changed, reason in (
        ({name: data for name, data in found.items() if name != "config.json"}, "expected one config.json"),
        (found | {"model.weights.h5": bytes(2**24)}, "members of at most .* bytes together"),
        (found | {"model.weights.h5": found["model.weights.h5"][:5000]}, "expected a sound HDF5 file"),
        (found | {"config.json": b"[" * 10000}, "nested too deeply"),
        (found | {"config.json": b"{}"}, "layers: expected a list"),
    ):
        with pytest.raises(FormatError, match=reason):
            keras.load(archive(path, changed, zipfile.ZIP_DEFLATED))
    with pytest.raises(FormatError, match="expected it stored or deflated"):
        keras.load(archive(path, found, zipfile.ZIP_BZIP2))


def test_surplus_weights(tmp_path: Path) -> None:
    found = members()
    data = io.BytesIO(found["model.weights.h5"])
    with h5py.File(data, "r+") as file:
        file["layers/lstm_1/cell/vars/0"] = np.ones(3, "float32")
    with pytest.raises(FormatError, match=r"unexpected .'layers/lstm_1/cell/vars/0'"):
        keras.load(archive(tmp_path / "m.keras", found | {"model.weights.h5": data.getvalue()}))


# ---- what nobody wrote on purpose

SECONDS = 2.5  # of each kind,
LEAST = 50  # but so many at least


def mutations(data: bytes, count: int) -> Iterator[bytes]:
    generator = np.random.default_rng(3)
    for i in range(count):
        if i % 4 == 0:
            yield data[: generator.integers(8, len(data))]
            continue
        changed = bytearray(data)
        for _ in range(int(generator.integers(1, 12))):
            changed[generator.integers(8, len(data))] = generator.choice([0, 1, 255, generator.integers(256)])
        yield bytes(changed)


def json_mutations(text: str, count: int) -> Iterator[str]:
    """The same JSON with a value, somewhere, that is another one."""
    generator = np.random.default_rng(4)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        2**31,
        2**70,
        1e308,
        float("nan"),
        "",
        "x",
        [],
        {},
        [[1]],
        {"class_name": 3},
    ]
    for _ in range(count):
        root = json.loads(text)
        places = []
        waiting = [root]
        while waiting:
            at = waiting.pop()
            for key in at if isinstance(at, dict) else range(len(at)):
                places.append((at, key))
                if isinstance(at[key], (dict, list)):
                    waiting.append(at[key])
        at, key = places[generator.integers(len(places))]
        other, that = places[generator.integers(len(places))]
        at[key] = values[generator.integers(len(values))] if generator.random() < 0.7 else json.loads(
            json.dumps(other[that])
        )  # fmt: skip
        yield json.dumps(root)


def assert_only_format_errors(path: Path, files: Iterator[bytes], config: object = None) -> int:
    """Each loads, or is refused; in the time that there is. How many there were."""
    end, count = time.monotonic() + SECONDS, 0
    for data in files:
        path.write_bytes(data)
        with suppress(FormatError):
            keras.load(path, config)
        count += 1
        if time.monotonic() > end and count > LEAST:
            break
    return count


@pytest.mark.parametrize("name", COMMITTED)
def test_mutated_files(tmp_path: Path, name: str) -> None:
    path = DATA / (name + COMMITTED[name])
    config = config_of(path)
    found = assert_only_format_errors(tmp_path / path.name, mutations(path.read_bytes(), 2000), config)
    assert found > 20


def test_mutated_weights_in_an_archive(tmp_path: Path) -> None:
    found = members()
    files = (
        archive(tmp_path / "a", found | {"model.weights.h5": data}).read_bytes()
        for data in mutations(found["model.weights.h5"], 2000)
    )
    assert assert_only_format_errors(tmp_path / "m.keras", files) > 20


def test_mutated_configurations(tmp_path: Path) -> None:
    text = (DATA / "chain.json").read_text()
    weights = (DATA / "chain.weights.h5").read_bytes()
    count = 0
    end = time.monotonic() + SECONDS
    for config in json_mutations(text, 1000):
        count += assert_only_format_errors(tmp_path / "m.weights.h5", iter([weights]), config)
        if time.monotonic() > end and count > LEAST:
            break
    found = members()
    files = (
        archive(tmp_path / "a", found | {"config.json": config.encode()}).read_bytes()
        for config in json_mutations(found["config.json"].decode(), 1000)
    )
    assert assert_only_format_errors(tmp_path / "m.keras", files) + count > 40
