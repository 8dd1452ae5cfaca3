"""RTNeural's JSON: what it says of a model, in Keras's layouts; and nothing that a file says does harm."""

import json
import os

import gatewise as gw
import numpy as np
import pytest
from conftest import assert_same_bits, random


def model_of():
    return gw.Sequential(
        [
            gw.TimeDistributed(gw.Dense(3, 4, activation="tanh", seed=1)),
            gw.Conv1D(4, 5, 3, dilation=2, activation="relu", seed=2),
            gw.GRU(5, 6, 2, seed=3),
            gw.Dropout(),
            gw.BatchNorm(6),
            gw.LSTM(6, 4, seed=4),
            gw.Activation("elu"),
            gw.Dense(4, 2, bias=False, activation="sigmoid", seed=5),
        ]
    )


def test_round_trip(tmp_path):
    path, model = tmp_path / "model.json", model_of()
    gw.save(model, path)
    again = gw.load(path)
    x = random((7, 3), "float32")
    np.testing.assert_allclose(again(x), model(x), rtol=1e-6, atol=1e-6)
    kinds = [layer["type"] for layer in json.loads(path.read_text())["layers"]]
    assert kinds == ["dense", "conv1d", "gru", "gru", "batchnorm", "lstm", "activation", "dense"]
    gw.save(again, path)
    assert_same_bits(gw.load(path).state_dict(), again.state_dict())


def test_a_file_as_its_exporter_writes_it(tmp_path):
    """Equations written out with Keras's order of gates: z r h, and i f c o."""
    rng = np.random.default_rng(0)
    units, x = 2, rng.standard_normal((5, 1)).astype("f")
    gru = [rng.standard_normal(shape) / 2 for shape in ((1, 3 * units), (units, 3 * units), (2, 3 * units))]
    lstm = [rng.standard_normal(shape) / 2 for shape in ((units, 4 * units), (units, 4 * units), (4 * units,))]
    layers = [
        {
            "type": kind,
            "activation": "tanh",
            "shape": [None, None, units],
            "weights": [array.tolist() for array in arrays],
        }
        for kind, arrays in (("gru", gru), ("lstm", lstm))
    ]
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"in_shape": [None, None, 1], "layers": layers}))

    def sigmoid(value):
        return 1 / (1 + np.exp(-value))

    h, below, c, expected = np.zeros(units), np.zeros(units), np.zeros(units), []
    for sample in x:
        from_x, from_h = np.split(sample @ gru[0] + gru[2][0], 3), np.split(below @ gru[1] + gru[2][1], 3)
        z, r = sigmoid(from_x[0] + from_h[0]), sigmoid(from_x[1] + from_h[1])
        below = z * below + (1 - z) * np.tanh(from_x[2] + r * from_h[2])
        i, f, g, o = np.split(below @ lstm[0] + h @ lstm[1] + lstm[2], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        expected.append(h)
    np.testing.assert_allclose(gw.load(path)(x), np.array(expected), atol=1e-6)


def test_layers_that_it_lacks(tmp_path):
    for model, name in [
        (gw.LSTM(3, 4, bidirectional=True), "LSTM"), (gw.RNN(3, 4), "RNN"), (gw.LSTM(3, 4, proj_size=2), "LSTM"),
        (gw.GRU(3, 4, reset_after=False), "GRU"), (gw.LSTM(3, 4, recurrent_activation="hard_sigmoid"), "hard_sigmoid"),
        (gw.LSTM(3, 4, peepholes=True), "peepholes"), (gw.GRU(3, 4, clip=1.0), "clip"),
        (gw.Dense(3, 4, activation="gelu"), "gelu"),
        (gw.Conv1D(3, 4, 3, padding="same"), "Conv1D"), (gw.LayerNorm(3), "LayerNorm"),
        (gw.Sequential([gw.LSTM(3, 4), gw.Last()]), "Last"), (gw.Sequential([gw.Masking(), gw.LSTM(3, 4)]), "Masking"),
        (gw.Sequential([gw.LSTM(3, 4), gw.Reverse()]), "Reverse"), (gw.Embedding(3, 4), "embedding"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"model: layers\[\d\]: RTNeural has .*{name}"):
            gw.save(model, tmp_path / "model.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"path: expected one that ends in \.safetensors, \.onnx or \.json"):
        gw.save(gw.LSTM(3, 4), tmp_path / "model.keras")


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softmax", "elu", "linear", "TANH", None, 7, ["tanh"], {}])
def test_activations_of_recurrent_layers(kind, activation, tmp_path):
    """The exporter writes Keras's option there, and RTNeural computes tanh whatever it says."""
    path = tmp_path / "model.json"
    gw.save({"lstm": gw.LSTM, "gru": gw.GRU}[kind](3, 4), path)
    description = json.loads(path.read_text())
    layer = description["layers"][0]
    for computed in ("", "tanh", ...):
        layer["activation"] = computed
        if computed is ...:
            del layer["activation"]
        path.write_text(json.dumps(description))
        gw.load(path)
    layer["activation"] = activation
    path.write_text(json.dumps(description))
    with pytest.raises(gw.FormatError, match=r"layers\[0\]: activation: expected tanh or nothing, got"):
        gw.load(path)


@pytest.mark.parametrize(
    ("layer", "option", "neutral", "others"),
    [
        (None, "in_skip", [0, 0.0, False, None, ...], [1, 2, True, "1", -1]),
        (None, "in_gain", [0, -0.0, None, ...], [-3.5, 1, "0", [1], float("nan")]),
        (None, "out_gain", [0, None, ...], [6, 1e-9]),
        ("conv1d", "groups", [1, [1], ...], [2, [2]]),
        ("conv1d", "strides", [1, [1], ...], [2, [2], [1, 1]]),
        ("conv1d", "padding", ["causal", ...], ["same", "valid"]),
        ("gru", "reset_after", [True, ...], [False]),
        ("gru", "recurrent_activation", ["sigmoid", ...], ["hard_sigmoid"]),
        ("lstm", "recurrent_activation", ["sigmoid", ...], ["hard_sigmoid"]),
        ("lstm", "go_backwards", [False, ...], [True]),
        ("lstm", "shape", [[None, None, 4], [None, 4], [4], 4], [[None, 1, 1, 4]]),
        ("batchnorm", "activation", ["", ...], ["relu"]),
    ],
)
def test_options_that_would_change_the_numbers(layer, option, neutral, others, tmp_path):
    """Options of AIDA-X or of Keras that RTNeural ignores: neutral values load, others are refused."""
    path = tmp_path / "model.json"
    gw.save(model_of(), path)
    description = json.loads(path.read_text())
    target = description
    if layer is not None:
        target = next(member for member in description["layers"] if member["type"] == layer)
    for value in neutral:
        target.pop(option, None)
        if value is not ...:
            target[option] = value
        path.write_text(json.dumps(description))
        gw.load(path)
    for value in others:
        target[option] = value
        path.write_text(json.dumps(description))
        with pytest.raises(gw.FormatError, match=f"{option}: expected"):
            gw.load(path)


def mutated(rng, value):
    """The same value with one member, anywhere in it, changed or removed."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        key = rng.choice(list(value)) if isinstance(value, dict) else int(rng.integers(len(value)))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else value[:key]
        copied = value.copy()
        copied[key] = mutated(rng, value[key])
        return copied
    others = [None, True, -1, 0, 7, 2**31, 2**80, 1e300, float("nan"), "x", "relu", [], {}, [[1]], [value, value]]
    return others[rng.integers(len(others))]


def test_paths_that_are_not_files(tmp_path):
    """A directory, and a pipe that nobody writes to, by any name."""
    for ending in ("keras", "h5", "onnx", "json", "pt", "safetensors"):
        folder, pipe = tmp_path / f"folder.{ending}", tmp_path / f"pipe.{ending}"
        folder.mkdir()
        os.mkfifo(pipe)
        for path in (folder, pipe):
            with pytest.raises(gw.FormatError, match=rf"{path.name}: expected a file"):
                gw.load(path)
        with pytest.raises(FileNotFoundError):
            gw.load(tmp_path / f"missing.{ending}")


def test_mutants(tmp_path):
    """Of bytes and of what they say: another model, or a FormatError."""
    path = tmp_path / "model.json"
    gw.save(model_of(), path)
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    parsed = json.loads(good)
    for number in range(2000):
        if number % 2:
            path.write_text(json.dumps(mutated(rng, parsed)))
        else:
            bad = bytearray(good)
            for place in rng.integers(0, len(bad), rng.integers(1, 4)):
                bad[place] = rng.integers(0, 256)
            path.write_bytes(bad[: rng.integers(0, len(bad))] if rng.random() < 0.3 else bad)
        try:
            gw.load(path)
        except gw.FormatError:
            refused += 1
    assert 1000 < refused < 2000
    for text, reason in (
        ("[" * 100000, "expected JSON, got one that is nested too deeply"),
        ("{}", "expected an object with 'in_shape'"),
        ("3", "expected an object with 'in_shape'"),
        ('{"in_shape": [1], "layers": 3}', "layers: expected a list, got int"),
        ('{"in_shape": [1], "layers": [{"type": []}]}', r"layers\[0\]: expected an object with 'shape'"),
        (
            '{"in_shape": [1], "layers": [{"type": [], "shape": 1}]}',
            r"layers\[0\]: type: expected lstm, .*, got '\[\]'",
        ),
    ):
        path.write_text(text)
        with pytest.raises(gw.FormatError, match=rf"model\.json: {reason}$"):
            gw.load(path)
