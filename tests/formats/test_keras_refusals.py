"""Files of Keras that do not load: the error says which layer and option, or what is wrong with the file."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.make_keras import COMMITTED
from gatewise.formats import keras
from gatewise.formats.errors import FormatError
from keras_files import DATA, archive, draw, entry, members, named, recurrent, write

h5py = pytest.importorskip("h5py")


def dense_file(folder: Path, *layers: dict[str, Any], **options: Any) -> Path:
    """A file of Keras 2 with a dense layer, and these layers after it."""
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
    listed = [
        (lstm, named("l", weights)) if isinstance(layer, str) else (layer, kernel.get(layer["class_name"], {}))
        for layer in layers
    ]
    write(tmp_path / "m.h5", listed)
    with pytest.raises(FormatError) as caught:
        keras.load(tmp_path / "m.h5")
    assert reason in str(caught.value)


def test_graphs_whose_masks_are_others(tmp_path: Path) -> None:
    """NotEqual and Any must compare with the value of the Masking, and along its axis."""
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
        with zipfile.ZipFile(path) as original, zipfile.ZipFile(changed, "w") as file:
            for member in original.namelist():
                data = original.read(member)
                if member == keras.CONFIG:
                    assert change(data.decode()) != data.decode()
                    data = change(data.decode()).encode()
                file.writestr(member, data)
        with pytest.raises(FormatError, match=reason):
            keras.load(changed)


def node(*layers: str, value: float | None = None, mask: str | None = None) -> list[dict[str, Any]]:
    """The one call of a layer of Keras 3."""

    def tensor(layer: str) -> dict[str, Any]:
        return {"class_name": "__keras_tensor__", "config": {"keras_history": [layer, 0, 0]}}

    arguments = [*map(tensor, layers), *([] if value is None else [value])]
    return [{"args": arguments, "kwargs": {} if mask is None else {"mask": tensor(mask)}}]


@pytest.mark.parametrize("has_mask", [True, False])
def test_a_mask_that_is_given_after_a_layer_that_ends_it(tmp_path: Path, has_mask: bool) -> None:
    """Keras 3 uses such a mask; in gatewise the convolution has ended it, so that the model is refused."""
    convolution = entry("Conv1D", "c", filters=3, kernel_size=[1], padding="same", use_bias=False, dtype="float32")
    weights = draw(1, kernel=(3, 12), recurrent_kernel=(3, 12), bias=(12,))
    layers = [
        (entry("InputLayer", "x", batch_shape=[None, None]), [], {}),
        (entry("Embedding", "e", input_dim=5, output_dim=3, mask_zero=True), node("x"), draw(2, embeddings=(5, 3))),
        (entry("NotEqual", "n"), node("x", value=0), {}),
        (convolution, node("e"), draw(3, kernel=(1, 3, 3))),
        (recurrent("LSTM", "l", 3), node("c", mask="n" if has_mask else None), weights),
    ]
    listed = [
        (layer | {"inbound_nodes": nodes, "name": layer["config"]["name"]}, named(layer["config"]["name"], arrays))
        for layer, nodes, arrays in layers
    ]
    ends = {"input_layers": ["x", 0, 0], "output_layers": ["l", 0, 0]}
    model = {"class_name": "Functional", "config": {"name": "m", "layers": [layer for layer, _ in listed], **ends}}
    write(tmp_path / "m.h5", listed, model=model, version="3.9.0")
    if has_mask:
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
        ("missing", "expected a dataset of shape .*, got nothing"), ("names", "weight_names: expected"),
        ("layers", "expected weights of 1 layers, got"), ("external", "expected only hard links, got an external"),
        ("soft", "expected only hard links, got a soft link"), ("chunks", "expected numbers in one piece"),
        ("elsewhere", "expected numbers in one piece"), ("virtual", "expected numbers in one piece"),
        ("objects", "expected float32 or float64, got texts"), ("unwritten", "bytes within the file, got 0"),
        ("group", "expected a dataset of shape .*, got a group"), ("config", "model_config: expected JSON"),
        ("deep", "nested too deeply"),
    ],
)  # fmt: skip
def test_unsound_weights(tmp_path: Path, change: str, reason: str) -> None:
    path = dense_file(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(48))
    with h5py.File(path, "r+") as file:
        group, name = file["model_weights/dense_1"], "dense_1/kernel:0"
        new: dict[str, dict[str, Any]] = {
            "shape": {"data": np.ones((4, 2), "float32")},
            "integers": {"data": np.ones((4, 3), "int32")},
            "half": {"data": np.ones((4, 3), "float16")},
            "mixed": {"data": np.ones((4, 3), "float64")},
            "chunks": {"shape": (4, 3), "dtype": "float32", "chunks": (1, 1), "compression": "gzip"},
            "elsewhere": {"shape": (4, 3), "dtype": "float32", "external": [(str(tmp_path / "secret"), 0, 48)]},
            "objects": {"data": np.full((4, 3), "x", object), "dtype": h5py.string_dtype()},
            "unwritten": {"shape": (4, 3), "dtype": "float32"},
        }
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
            text: str = file.attrs["model_config"]  # h5py returns str, although bytes were written
            file.attrs["model_config"] = text.replace(
                '"units": 3', '"units": 3, "dtype": {"class_name": "Policy", "config": {"name": "mixed_float16"}}'
            )
    with pytest.raises(FormatError, match=reason):
        keras.load(path)


def test_huge_claims_are_refused_before_there_is_room_for_them(tmp_path: Path) -> None:
    """A file of some KB claims a large shape, and in another one many layers share one dataset."""
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
    write(tmp_path / "s.h5", [(layer, {}) for layer in layers])
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        shared = file.create_dataset("shared", data=np.ones((64, 64), "float32"))
        for i in range(count):
            file[f"model_weights/d{i}/kernel:0"] = shared
            file[f"model_weights/d{i}"].attrs["weight_names"] = [b"kernel:0"]
    with pytest.raises(FormatError, match="bytes together, as the file has, got more"):
        keras.load(tmp_path / "s.h5")


def test_claims_of_texts(tmp_path: Path) -> None:
    """At these HDF5's library would allocate 4 GB, or never end."""
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


def test_archives(tmp_path: Path) -> None:
    sound, path = members(), tmp_path / "m.keras"
    keras.load(archive(path, sound, zipfile.ZIP_DEFLATED))
    keras.load(archive(path, sound | {"../../evil": b"", "assets/x": b""}))
    assert not list(tmp_path.parent.parent.glob("evil"))
    for changed, reason in (
        ({name: data for name, data in sound.items() if name != "config.json"}, "expected one config.json"),
        (sound | {"model.weights.h5": bytes(2**24)}, "members of at most .* bytes together"),
        (sound | {"model.weights.h5": sound["model.weights.h5"][:5000]}, "expected a sound HDF5 file"),
        (sound | {"config.json": b"[" * 10000}, "nested too deeply"),
        (sound | {"config.json": b"{}"}, "layers: expected a list"),
    ):
        with pytest.raises(FormatError, match=reason):
            keras.load(archive(path, changed, zipfile.ZIP_DEFLATED))
    with pytest.raises(FormatError, match="expected it stored or deflated"):
        keras.load(archive(path, sound, zipfile.ZIP_BZIP2))


def test_surplus_weights(tmp_path: Path) -> None:
    sound = members()
    data = io.BytesIO(sound["model.weights.h5"])
    with h5py.File(data, "r+") as file:
        file["layers/lstm_1/cell/vars/0"] = np.ones(3, "float32")
    with pytest.raises(FormatError, match=r"unexpected .'layers/lstm_1/cell/vars/0'"):
        keras.load(archive(tmp_path / "m.keras", sound | {"model.weights.h5": data.getvalue()}))
