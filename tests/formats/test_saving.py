"""Every layer, option and activation in every format: what comes back computes the same, or the format lacks it.

What each format lacks stands here once more, with the reason that the refusal must give: a format that refuses
something else, or for another reason, fails.
"""

import ast
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gatewise as gw
import numpy as np
import pytest
from conftest import assert_same_bits, random
from gatewise import formats
from gatewise.formats import files
from gatewise.weights.functions import NUMBERS
from tolerances import assert_close

ACTIVATIONS = [
    gw.Activation(name, *numbers) for name, defaults in NUMBERS.items() for numbers in {(), (0.3, 0.7)[: len(defaults)]}
]
IN_CELLS = [activation for activation in ACTIVATIONS if activation.name != "softmax"]
OPTIONS = [{}, {"bias": False}, {"num_layers": 2}, {"bidirectional": True}, {"clip": 0.2}]
GATED = [
    *OPTIONS,
    *({"activation": activation} for activation in IN_CELLS),
    *({"recurrent_activation": activation} for activation in IN_CELLS),
]
LSTMS = [{"peepholes": True}, {"proj_size": 2}, *({"output_activation": activation} for activation in IN_CELLS)]
GRUS = [{"reset_after": False}, {"reset_after": False, "clip": 0.2}]
RECURRENT = [
    *((gw.LSTM, options) for options in [*GATED, *LSTMS]),
    *((gw.GRU, options) for options in [*GATED, *GRUS]),
    *((gw.RNN, options) for options in [{"clip": 0.2}, *({"nonlinearity": activation} for activation in IN_CELLS)]),
]

# ---- recurrent layers that a format must refuse; it must save all others

CELLS_OF_RTNEURAL = [
    {},
    {"bias": False},
    {"num_layers": 2},
    {"activation": gw.Activation("tanh")},
    {"output_activation": gw.Activation("tanh")},
    {"recurrent_activation": gw.Activation("sigmoid")},
]
NOT_IN_CELLS_OF_ONNX = {"selu", "silu", "gelu"}


def onnx_refusal(kind, options):
    if "proj_size" in options:
        return "layers[0]: expected no proj_size, which ONNX's LSTM "
    for option in options.values():
        if getattr(option, "name", None) in NOT_IN_CELLS_OF_ONNX:
            return f"layers[0]: expected no {option.name}, which ONNX's cells "
    return None


def rtneural_refusal(kind, options):
    if kind is gw.RNN or repr(options) not in map(repr, CELLS_OF_RTNEURAL):
        return f"model: layers[0]: RTNeural has nothing for {kind(3, 4, **options)!r}"
    return None


REFUSALS = {"safetensors": lambda kind, options: None, "onnx": onnx_refusal, "json": rtneural_refusal}

# ---- networks, each with the refusals of the formats that lack one of its layers

RTNEURAL_ACTIVATIONS = [repr(gw.Activation(name)) for name in ("linear", "relu", "elu", "tanh", "sigmoid", "softmax")]
MASKS = "layers[0]: expected no steps that are left out, which ONNX cannot say"


def in_rtneural(activation, layer):
    """The refusal of an activation at this layer, if RTNeural lacks it."""
    is_known = repr(activation) in RTNEURAL_ACTIVATIONS
    return {} if is_known else {"json": f"model: layers[{layer}]: RTNeural has nothing for {activation!r}"}


NETWORKS = {
    "masking": (
        lambda: [gw.Masking(), gw.LSTM(3, 4, seed=0)],
        {"onnx": MASKS, "json": "model: layers[0]: RTNeural has nothing for Masking"},
    ),
    "masking of a value": (
        lambda: [gw.Masking(-1.0), gw.LSTM(3, 4, seed=0), gw.Last()],
        {"onnx": MASKS, "json": "model: layers[0]: RTNeural has nothing for Masking"},
    ),
    "reverse": (
        lambda: [gw.Reverse(), gw.GRU(3, 4, seed=0)],
        {"json": "model: layers[0]: RTNeural has nothing for Reverse"},
    ),
    "reverse and last": (
        lambda: [gw.Reverse(), gw.LSTM(3, 4, seed=0), gw.Last(), gw.Dense(4, 2, seed=1)],
        {"json": "model: layers[0]: RTNeural has nothing for Reverse"},
    ),
    "between reverses": (
        lambda: [gw.LSTM(3, 4, seed=0), gw.Reverse(), gw.LSTM(4, 4, seed=1), gw.Reverse()],
        {"json": "model: layers[1]: RTNeural has nothing for Reverse"},
    ),
    "masked tokens": (
        lambda: [gw.Embedding(9, 4, mask_zero=True, seed=0), gw.LSTM(4, 4, seed=0), gw.Last()],
        {"onnx": MASKS, "json": "model: layers[0]: RTNeural has no embedding"},
    ),
    "merged directions": (
        lambda: [
            gw.Embedding(9, 4, seed=0),
            gw.Bidirectional(gw.GRU(4, 3, bidirectional=True, seed=0), "mul"),
            gw.Last(),
        ],
        {"json": "model: layers[0]: RTNeural has no embedding"},
    ),
    "last": (
        lambda: [gw.GRU(3, 4, seed=0), gw.Last()],
        {"json": "model: layers[1]: RTNeural has nothing for Last"},
    ),
    "layer norm": (
        lambda: [gw.GRU(3, 4, seed=0), gw.LayerNorm(4)],
        {"json": "model: layers[1]: RTNeural has nothing for LayerNorm"},
    ),
    "convolution that looks ahead": (
        lambda: [gw.Conv1D(3, 4, 3, padding="same", seed=0)],
        {"json": "model: layers[0]: RTNeural has nothing for Conv1D"},
    ),
    "convolution": (lambda: [gw.Conv1D(3, 4, 3, seed=0), gw.BatchNorm(4), gw.Dropout(), gw.Dense(4, 2, seed=1)], {}),
    **{
        f"{activation!r} by itself": (
            lambda activation=activation: [gw.LSTM(3, 4, seed=0), activation],
            in_rtneural(activation, 1),
        )
        for activation in ACTIVATIONS
    },
    **{
        f"{activation!r} in a Dense": (
            lambda activation=activation: [gw.Dense(3, 4, activation=activation, seed=0)],
            in_rtneural(activation, 0),
        )
        for activation in ACTIVATIONS
    },
}


@pytest.fixture(params=["safetensors", "onnx", "json"])
def path(request, tmp_path):
    if request.param == "onnx":
        pytest.importorskip("onnx")
    return tmp_path / f"model.{request.param}"


def check(model, x, path, refusal):
    """That a model is refused for this reason, or without one saved as it is."""
    if refusal is not None:
        with pytest.raises(ValueError, match=f"^{re.escape(refusal)}"):
            gw.save(model, path)
        assert not path.exists()
        return
    gw.save(model, path)
    again = gw.load(path)
    y, y_again = (layer(x) for layer in (model, again))
    if isinstance(model, (gw.LSTM, gw.GRU, gw.RNN)):
        y = y[0]
    if isinstance(again, (gw.LSTM, gw.GRU, gw.RNN)):
        y_again = y_again[0]
    assert_close(y_again, y, "float32")


@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=str)
def test_recurrent_layers(kind, options, path):
    model = kind(3, 4, seed=1, **options)
    x = 2 * random((5, 2, 3), "float32")
    x[1, 0] = 0
    check(model, x, path, REFUSALS[path.suffix[1:]](kind, options))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, path):
    make, refusals = NETWORKS[name]
    model = gw.Sequential(make())
    x = 2 * random((5, 2, 3), "float32")
    x[1, 0], x[2, 1] = 0, -1
    if isinstance(model[0], gw.Embedding):
        x = np.random.default_rng(0).integers(0, 3, (5, 2))
    check(model, x, path, refusals.get(path.suffix[1:]))


# -----------------------------------------------------------------------------------------------------------
# Names, folders, and files that a killed process leaves


@pytest.mark.parametrize("name", ["model.npz", "model.pt", "model.v2", "model.h5", "MODEL.TXT", "model."])
def test_other_endings_are_refused(name, tmp_path):
    """Nobody would look for a safetensors file under such a name."""
    with pytest.raises(ValueError, match=r"path: expected one that ends in \.safetensors, \.onnx or \.json, got"):
        gw.save(gw.GRU(3, 4), tmp_path / name)
    assert not list(tmp_path.iterdir())


CONTENTS = {
    b"\x89HDF\r\n\x1a\n": "HDF5", b"PK\x03\x04": "a zip archive", b"\x93NUMPY\1": "an array of NumPy",
    b"\x1c\0\0\0TFL3": "TensorFlow Lite", b'{"layers": []}': "JSON", b"  [1]": "JSON", b"\x80\x04\x95": "a pickle",
    b"def f():\n\treturn 1\n": "text", b"\x08\x07\x12\x07pytorch": "protobuf", b"": "nothing",
    b"\x10\0\0\0\0\0\0\0{}": "safetensors", b"\xff\xfe\0": "bytes of no known format",
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
def test_files_of_other_names_are_refused(content, tmp_path):
    """With the endings that are known, and what the first bytes look like."""
    for name in ("model.npz", "model.7", "model.py"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            gw.FormatError, match=rf"expected a name .*\.onnx.*, got '{name[5:]}', .*{CONTENTS[content]}"
        ):
            gw.load(tmp_path / name)
    (tmp_path / "model").write_bytes(content)  # without an ending it should be a file of gatewise
    with pytest.raises(
        gw.FormatError, match=rf"expected a {CONTENTS[content]}|expected a safetensors.*{CONTENTS[content]}"
    ):
        gw.load(tmp_path / "model")


def test_folders_are_refused(tmp_path):
    with pytest.raises(gw.FormatError, match=r"expected a file$"):
        gw.load(tmp_path)
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(gw.FormatError, match="got a SavedModel of TensorFlow"):
        gw.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "model.onnx", "model"])
def test_a_missing_folder_is_reported_as_it_was_given(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.endswith("onnx"):
        pytest.importorskip("onnx")
    with pytest.raises(FileNotFoundError) as caught:
        gw.save(gw.Sequential([gw.GRU(3, 4)]), f"nowhere/{name}")
    assert caught.value.filename == f"nowhere/{name}"


KILLED = """
import os, signal, sys
import gatewise as gw
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
gw.save(gw.LSTM(3, 4), sys.argv[1])
"""


def test_what_a_killed_process_left_is_removed(tmp_path):
    """The next save under this name removes it, but neither files that others still write nor those of other names."""
    pytest.importorskip("fcntl")
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    for target in (path, path, other):
        process = subprocess.run([sys.executable, "-c", KILLED, target], timeout=120)
        assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    file, name = files._new_temporary(str(path))
    with file:
        gw.save(gw.LSTM(3, 4, seed=1), path)
        assert Path(name).exists()
        assert len(list(tmp_path.iterdir())) == 3  # the model, what is being written, and what is left of the other
    gw.save(gw.LSTM(3, 4, seed=1), path)
    gw.save(gw.LSTM(3, 4, seed=1), other)
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_many_save_at_once(tmp_path):
    """None removes the file of another as abandoned before it is written."""
    path, layer = tmp_path / "model.safetensors", gw.LSTM(3, 4, seed=1)
    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(gw.save, layer, path) for _ in range(200)]:
            future.result()
    assert list(tmp_path.iterdir()) == [path]
    assert_same_bits(gw.load(path).state_dict(), layer.state_dict())


def test_imports_of_formats_are_spelled_out():
    """Programs that freeze others follow such imports, but not names that are put together."""
    tree = ast.parse(Path(formats.__file__).read_text())
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "gatewise.formats"
    ]
    assert {*formats.ENDINGS.values()} <= {alias.name for node in imports for alias in node.names}
