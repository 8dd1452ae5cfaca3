"""Every layer, option and activation in every format: what comes back computes the same, or the format lacks it.

Which of them a format lacks is told here once more, so that nothing is refused that could be saved.
"""

import ast
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

ACTIVATIONS = [gw.Activation(name, *numbers) for name, defaults in NUMBERS.items()
               for numbers in {(), (0.3, 0.7)[: len(defaults)]}]  # fmt: skip
IN_CELLS = [one for one in ACTIVATIONS if one.name != "softmax"]
RECURRENT = [
    (kind, options)
    for kind, own in {
        gw.LSTM: [{"peepholes": True}, {"proj_size": 2}, *({"output_activation": one} for one in IN_CELLS)],
        gw.GRU: [{"reset_after": False}, {"reset_after": False, "clip": 0.2}],
    }.items()
    for options in [
        {}, {"bias": False}, {"num_layers": 2}, {"bidirectional": True}, {"clip": 0.2}, *own,
        *({"activation": one} for one in IN_CELLS), *({"recurrent_activation": one} for one in IN_CELLS),
    ]
] + [(gw.RNN, options) for options in [{"clip": 0.2}, *({"nonlinearity": one} for one in IN_CELLS)]]  # fmt: skip
NETWORKS = [
    lambda: [gw.Masking(), gw.LSTM(3, 4, seed=0)],
    lambda: [gw.Masking(-1.0), gw.LSTM(3, 4, seed=0), gw.Last()],
    lambda: [gw.Reverse(), gw.GRU(3, 4, seed=0)],
    lambda: [gw.Reverse(), gw.LSTM(3, 4, seed=0), gw.Last(), gw.Dense(4, 2, seed=1)],
    lambda: [gw.LSTM(3, 4, seed=0), gw.Reverse(), gw.LSTM(4, 4, seed=1), gw.Reverse()],
    lambda: [gw.Embedding(9, 4, mask_zero=True, seed=0), gw.LSTM(4, 4, seed=0), gw.Last()],
    lambda: [gw.Embedding(9, 4, seed=0), gw.Bidirectional(gw.GRU(4, 3, bidirectional=True, seed=0), "mul"), gw.Last()],
    *((lambda one=one: [gw.LSTM(3, 4, seed=0), one]) for one in ACTIVATIONS),
    *((lambda one=one: [gw.Dense(3, 4, activation=one, seed=0)]) for one in ACTIVATIONS),
]


# What RTNeural computes.
CELLS_OF_RTNEURAL = [repr(options) for options in [
    {}, {"bias": False}, {"num_layers": 2}, {"activation": gw.Activation("tanh")},
    {"output_activation": gw.Activation("tanh")}, {"recurrent_activation": gw.Activation("sigmoid")},
]]  # fmt: skip
FUNCTIONS_OF_RTNEURAL = [repr(gw.Activation(name)) for name in ("linear", "relu", "elu", "tanh", "sigmoid", "softmax")]
NOT_IN_CELLS_OF_ONNX = {"selu", "silu", "gelu"}


def is_saved(kind, options, path):
    """Whether a format has a recurrent layer of these options."""
    if path.suffix == ".json":
        return kind is not gw.RNN and repr(options) in CELLS_OF_RTNEURAL
    if path.suffix == ".onnx":
        names = {getattr(option, "name", None) for option in options.values()}
        return "proj_size" not in options and not names & NOT_IN_CELLS_OF_ONNX
    return True


def is_network_saved(model, path):
    """Whether a format has all layers of a network."""
    if path.suffix == ".json":
        functions = [getattr(one, "activation", one) for one in model if not isinstance(one, gw.LSTM)]
        return all(repr(one) in FUNCTIONS_OF_RTNEURAL for one in functions)
    if path.suffix == ".onnx":
        return not any(isinstance(one, gw.Masking) or getattr(one, "mask_zero", False) for one in model)
    return True


@pytest.fixture(params=["safetensors", "onnx", "json"])
def path(request, tmp_path):
    if request.param == "onnx":
        pytest.importorskip("onnx")
    return tmp_path / f"model.{request.param}"


def check(model, x, path, is_saved):
    if not is_saved:
        with pytest.raises(ValueError, match=r"layers\[\d\]: (RTNeural has|.*ONNX)"):
            gw.save(model, path)
        assert not path.exists()
        return
    gw.save(model, path)
    y, again = (one(x)[0] if isinstance(one, (gw.LSTM, gw.GRU, gw.RNN)) else one(x) for one in (model, gw.load(path)))
    assert_close(again, y, "float32")


@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=str)
def test_recurrent_layers(kind, options, path):
    model = kind(3, 4, seed=1, **options)
    x = 2 * random((5, 2, 3), "float32")
    x[1, 0] = 0
    check(model, x, path, is_saved(kind, options, path))


@pytest.mark.parametrize("number", range(len(NETWORKS)))
def test_networks(number, path):
    model = gw.Sequential(NETWORKS[number]())
    x = 2 * random((5, 2, 3), "float32")
    x[1, 0], x[2, 1] = 0, -1
    if isinstance(model[0], gw.Embedding):
        x = np.random.default_rng(0).integers(0, 3, (5, 2))
    check(model, x, path, is_network_saved(model, path))


# -----------------------------------------------------------------------------------------------------------
# Names, places, and what is left behind


@pytest.mark.parametrize("name", ["model.npz", "model.pt", "model.v2", "model.h5", "MODEL.TXT", "model."])
def test_other_endings_are_refused(name, tmp_path):
    """Nobody looks for a safetensors file under such a name."""
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
    (tmp_path / "model").write_bytes(content)  # without an ending it is one of gatewise's own
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
    """By the next one that saves under this name; what others are still writing stays, and other names' files do."""
    pytest.importorskip("fcntl")
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    for target in (path, path, other):
        done = subprocess.run([sys.executable, "-c", KILLED, target], timeout=120)
        assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    busy, name = files._new_temporary(str(path))
    with busy:
        gw.save(gw.LSTM(3, 4, seed=1), path)
        assert Path(name).exists()
        assert len(list(tmp_path.iterdir())) == 3  # the model, what is being written, and what is left of the other
    gw.save(gw.LSTM(3, 4, seed=1), path)
    gw.save(gw.LSTM(3, 4, seed=1), other)
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_many_save_at_once(tmp_path):
    """Nobody takes for left behind what another is about to write."""
    path, layer = tmp_path / "model.safetensors", gw.LSTM(3, 4, seed=1)
    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(gw.save, layer, path) for _ in range(200)]:
            done.result()
    assert list(tmp_path.iterdir()) == [path]
    assert_same_bits(gw.load(path).state_dict(), layer.state_dict())


def test_formats_are_imported_in_so_many_words():
    """What freezes programs follows such imports, and no names that are put together."""
    tree = ast.parse(Path(formats.__file__).read_text())
    named = [one for one in ast.walk(tree) if isinstance(one, ast.ImportFrom) and one.module == "gatewise.formats"]
    assert {*formats.ENDINGS.values()} <= {name.name for one in named for name in one.names}
