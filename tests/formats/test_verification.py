"""Comparisons of models with their originals: what tells them apart, and what does not."""

import json
import sys
from types import SimpleNamespace

import gatewise as gw
import numpy as np
import pytest
from conftest import random

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

WORDS = 731


class Tokens(nn.Module):
    """Rows of a vocabulary that end where a token stands for padding."""

    def __init__(self, padding=0, layer=None, *, ends=False):
        super().__init__()
        self.table = nn.Embedding(WORDS, 6, padding_idx=padding)
        self.recurrent = layer or nn.GRU(6, 5, batch_first=True, bidirectional=not ends)
        self.head = nn.Linear(5 if ends else 10, 3)
        self.padding, self.ends = padding, ends

    def lengths(self, x):
        return (x != self.padding).sum(1).clamp(min=1)

    def forward(self, x):
        packed = pack_padded_sequence(self.table(x), self.lengths(x), batch_first=True, enforce_sorted=False)
        output, state = self.recurrent(packed)
        if self.ends:
            return self.head(state[-1])
        return self.head(pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0])


class Whole(Tokens):
    def lengths(self, x):
        return torch.full((len(x),), x.shape[1])


class Numbers(nn.Module):
    """A function of the input in front of a layer that remembers far back."""

    def __init__(self, function=lambda x: x, *, ends=False):
        super().__init__()
        self.recurrent, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)
        nn.init.constant_(self.recurrent.bias_ih_l0[6:12], 6.0)
        self.function, self.ends = function, ends

    def forward(self, x):
        y = self.recurrent(self.function(x))[0]
        return self.head(y[:, -1] if self.ends else y)


def blank(x, value):
    """Zeros from the first row of nothing but `value` on."""
    after = torch.cumsum((x == value).all(-1), 1) > 0
    return x.masked_fill(after[..., None], 0.5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


TOKENS = {
    "token 0": (lambda make: make(0, ends=True), "rows that end in token 0"),
    "token 0, all steps": (lambda make: make(0), "rows that end in token 0"),
    "the last token": (lambda make: make(WORDS - 1, ends=True), f"rows that end in token {WORDS - 1}"),
    "another token": (lambda make: make(17), "rows that end in token 17"),
}
NUMBERS = {
    "zeros": (lambda x: blank(x, 0), False, "rows that end in 0"),
    "ones below zero": (lambda x: blank(x, -1), False, "rows that end in -1"),
    "a gap": (lambda x: x + 5 * ((x == 0).all(-1) & (x.roll(-1, 1) != 0).any(-1))[..., None], False, "rows .* 0"),
    "the first 150 steps": (lambda x: x[:, :150], False, "300 steps"),
    "the last 150 steps": (lambda x: x[:, -150:], True, "300 steps"),
    "clamped": (lambda x: x.clamp(-8, 8), False, "large numbers"),
    "clamped far away": (lambda x: x.clamp(-90, 90), False, "large numbers"),
    "without NaN": (torch.nan_to_num, False, "NaN"),
}


@pytest.mark.parametrize("name", TOKENS)
def test_padding_of_tokens(name):
    """The token for padding is hardly ever drawn from a large vocabulary."""
    make, shown = TOKENS[name]
    module, plain = make(Tokens), make(Whole)
    plain.load_state_dict(module.state_dict())
    model = gw.load(plain)
    assert gw.verify(model, plain).passed
    verification = gw.verify(model, module)
    assert not verification.passed
    assert verification.input == shown
    assert gw.verify(model, module, steps=30, batch=6).input == shown
    with pytest.raises(ValueError, match=rf"got .*outputs that differ by .* on {shown}.* check=False .* lengths="):
        gw.load(module)


@pytest.mark.parametrize("name", NUMBERS)
def test_special_numbers(name):
    function, ends, shown = NUMBERS[name]
    module, plain = Numbers(function, ends=ends), Numbers(ends=ends)
    plain.load_state_dict(module.state_dict())
    model = gw.load(plain)
    verification = gw.verify(model, module)
    assert not verification.passed
    with pytest.raises(ValueError, match=rf"outputs that differ by .* on {shown}"):
        gw.load(module)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_right_models_pass(kind, dtype):
    """Special numbers make no difference: NaN and large ones go through every function."""
    wide = 6
    functions = [nn.ReLU(), nn.SELU(), nn.SiLU(), nn.Softsign(), nn.ELU(), nn.GELU(), nn.Softplus(), nn.Hardsigmoid()]
    for function in functions:
        module = nn.Sequential(nn.Linear(4, wide), function, kind(wide, 5, 2, bidirectional=True))
        assert gw.verify(gw.load(module.to(getattr(torch, dtype))), module).passed, function


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("times", [3, 20])
def test_roundings_that_a_network_amplifies(nonlinearity, times):
    """A chaotic network, or one that grows beyond all numbers, is right, though no two runs of it agree in the end."""
    module = nn.RNN(8, 48, nonlinearity=nonlinearity)
    with torch.no_grad():
        module.weight_hh_l0 *= times
    layer, x = gw.load(module), random((300, 1, 8), "float32")
    with torch.no_grad():
        expected = module(torch.from_numpy(x))[0].numpy()
    if times == 20:
        assert not np.allclose(layer(x)[0], expected, atol=0.1)  # else this is no test

    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = module

        def forward(self, x):
            return self.recurrent(x.clamp(-9, 9))[0]

    with pytest.raises(ValueError, match="large numbers"):
        gw.load(Clamped())


def test_originals_that_refuse_special_input():
    """Such input is left out of the comparison."""

    def finite(x):
        assert torch.isfinite(x).all()
        assert x.shape[1] < 100
        return x

    module = Numbers(finite)
    assert gw.verify(gw.load(module), module).passed


def test_verification_says_how_far():
    layer = gw.GRU(4, 5, seed=1)
    other = gw.GRU(4, 5, seed=1)
    assert gw.verify(layer, other) == (0.0, 0.0, 1e-4, "random input")
    other.parameters["bias_ih_l0"] = other.parameters["bias_ih_l0"] + 0.1
    verification = gw.verify(layer, other)
    assert not verification.passed
    assert verification.sequences > 1e-3
    assert verification.windows > 1e-3
    assert not gw.verify(layer, lambda x: np.full((*x.shape[:2], 5), np.nan)).passed
    with_nan = gw.verify(layer, lambda x: layer(x)[0] * (np.nan if len(x) == 1 else 1))  # only in windows
    assert with_nan.sequences == 0
    assert not with_nan.passed
    with pytest.raises(ValueError, match="original: expected an output of shape"):
        gw.verify(layer, lambda x: x)
    with pytest.raises(TypeError, match="model: expected a Sequential or a layer, got int"):
        gw.verify(3, layer)
    with pytest.raises(TypeError, match="safe_mode: expected True or False, got 1"):
        gw.verify(layer, layer, safe_mode=1)


def test_originals_of_one_size(tmp_path):
    """An original that takes only one number of rows and steps is not run on others."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    layer = gw.LSTM(3, 4, seed=1)
    gw.save(layer, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    for value in (*graph.graph.input, *graph.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = {"time": 7}.get(size.dim_param, 1)
    onnx.save(graph, tmp_path / "model.onnx")
    verification = gw.verify(layer, tmp_path / "model.onnx")
    assert verification.passed
    assert verification.windows is None


# -----------------------------------------------------------------------------------------------------------
# Files of Keras, which may hold programs


def test_keras_executes_nothing_unless_asked(tmp_path, monkeypatch):
    """A file that gatewise's own reader does not take never comes to Keras; one that it takes is read in safe mode."""
    h5py = pytest.importorskip("h5py")
    dense = {"class_name": "Dense", "config": {"name": "d", "units": 2, "activation": "linear", "use_bias": True}}
    program = {"class_name": "Lambda", "config": {"name": "l", "function": {"class_name": "__lambda__"}}}
    model, asked = gw.Sequential([gw.Dense(3, 2, seed=0)], batch_first=True), []
    weights = model.state_dict()
    for name, layers in (("good", [dense]), ("bad", [dense, program])):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"layers": layers}})
            file.attrs["keras_version"] = "2.9.0"
            group = file.create_group("model_weights")
            group.attrs["layer_names"] = [layer["config"]["name"].encode() for layer in layers]
            group.attrs["keras_version"] = b"2.9.0"
            for layer in layers:
                layer_group = group.create_group(layer["config"]["name"])
                layer_group.attrs["weight_names"] = [b"d/kernel", b"d/bias"] if layer is dense else np.zeros(0, "S1")
            group["d/d/kernel"], group["d/d/bias"] = weights["0.weight"].T, weights["0.bias"]

    def load_model(path, **options):
        asked.append((path, options))
        return model

    keras = SimpleNamespace(models=SimpleNamespace(load_model=load_model))
    monkeypatch.setitem(sys.modules, "keras", keras)
    good, bad = str(tmp_path / "good.h5"), str(tmp_path / "bad.h5")
    assert gw.verify(model, good).passed
    assert asked == [(good, {"compile": False, "safe_mode": True})]
    with pytest.raises(ValueError, match=r"original: .*bad\.h5: layer 'l' \(Lambda\).*safe_mode=False"):
        gw.verify(model, bad)
    assert len(asked) == 1
    assert gw.verify(model, bad, safe_mode=False).passed
    assert asked[1] == (bad, {"compile": False, "safe_mode": False})
