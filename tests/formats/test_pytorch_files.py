"""Models from PyTorch: modules, and files of their weights."""

import contextlib
import copy

import gatewise as gw
import gatewise.torch
import numpy as np
import pytest
import torch
from conftest import assert_same_bits, random
from gatewise.torch import accelerate
from safetensors.torch import save_file
from torch import nn

LAYERS = [
    lambda: nn.LSTM(5, 7),
    lambda: nn.LSTM(5, 7, 2, bias=False, batch_first=True, bidirectional=True),
    lambda: nn.LSTM(5, 7, 2, bidirectional=True, dtype=torch.float64),
    lambda: nn.GRU(5, 7, 3),
    lambda: nn.RNN(5, 7, nonlinearity="relu"),
    lambda: nn.RNN(5, 7, 2, bidirectional=True),
]


class Chain(nn.Module):
    """A module as people write them: `end` says which steps go on to the layers after the recurrent one."""

    def __init__(self, recurrent, end, *after):
        super().__init__()
        self.embedding = nn.Embedding(20, recurrent.input_size)
        self.recurrent = recurrent
        self.after = nn.Sequential(*after)
        self.end = end

    def forward(self, x):
        y, state = self.recurrent(self.embedding(x))
        h = state[0] if isinstance(state, tuple) else state
        time = 1 if self.recurrent.batch_first else 0
        ends = {"all": lambda: y, "last": lambda: y.select(time, -1), "state": lambda: torch.cat(list(h[-2:]), -1)}
        return self.after(ends[self.end]())


@pytest.fixture
def rng():
    torch.manual_seed(0)


def weights_of(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


@pytest.mark.usefixtures("rng")
@pytest.mark.parametrize("make", LAYERS)
def test_layers(make, tmp_path):
    """From the module, and from files of its weights, by themselves and within those of a model."""
    module = make()
    layer = gw.load(module)
    assert type(layer).__name__ == type(module).__name__
    assert_same_bits(layer.state_dict(), weights_of(module))
    assert gw.verify(layer, module).passed
    assert layer.batch_first == module.batch_first
    options = {"batch_first": module.batch_first}
    if isinstance(module, nn.RNN):
        options["nonlinearity"] = module.nonlinearity
    torch.save(module.state_dict(), tmp_path / "layer.pt")
    save_file(module.state_dict(), tmp_path / "layer.safetensors")
    whole = nn.Sequential(nn.Linear(3, 5), nn.ModuleDict({"encoder": module}))
    torch.save({"state_dict": whole.state_dict(), "epoch": 3}, tmp_path / "model.pth")
    for name, more in (("layer.pt", {}), ("layer.safetensors", {}), ("model.pth", {"prefix": "1.encoder"})):
        again = gw.load(tmp_path / name, **options, **more)
        assert repr(again) == repr(layer)
        assert_same_bits(again.state_dict(), layer.state_dict())
    with pytest.raises(
        gw.FormatError, match=r"model\.pth: expected only .*, got layers of prefix '1\.encoder\.' and 2"
    ):
        gw.load(tmp_path / "model.pth")


@pytest.mark.usefixtures("rng")
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell):
    module = cell(5, 7)
    layer, x = gw.load(module), random((3, 5), "float32")
    h = module(torch.from_numpy(x))
    expected = (h[0] if isinstance(h, tuple) else h).detach().numpy()
    np.testing.assert_allclose(layer(x[None])[0][0], expected, atol=1e-6)


@pytest.mark.usefixtures("rng")
@pytest.mark.parametrize("end", ["all", "last", "state"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_modules_of_ones_own(end, bidirectional, batch_first):
    """Only what they return tells which steps go on to the layers after the recurrent one."""
    if end == "state" and not bidirectional:
        pytest.skip("the two last states of one direction are two layers'")
    recurrent = nn.GRU(6, 7, 1, bidirectional=bidirectional, batch_first=batch_first)
    after = [nn.LayerNorm(7 * (1 + bidirectional)), nn.Dropout(0.3), nn.Linear(7 * (1 + bidirectional), 4)]
    module = Chain(recurrent, end, *after, nn.LeakyReLU(0.2), nn.Linear(4, 3, bias=False), nn.Softmax(-1))
    model = gw.load(module)
    assert module.training
    assert gw.verify(model, module, steps=9).passed
    tokens = np.random.default_rng(0).integers(0, 20, (5, 8))
    module.eval()
    with torch.no_grad():
        expected = module(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(model(tokens), expected, atol=1e-6)


@pytest.mark.usefixtures("rng")
def test_activations():
    kinds = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.GELU, nn.Softplus, nn.Identity, nn.SELU, nn.SiLU]
    activations = [*(kind() for kind in kinds), nn.Softsign(), nn.ELU(0.5)]
    module = nn.Sequential(nn.Linear(4, 5), *[nn.Sequential(layer, nn.Linear(5, 5)) for layer in activations])
    assert gw.verify(gw.load(module), module).passed


@pytest.mark.usefixtures("rng")
def test_what_has_no_counterpart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.lstm = nn.LSTM(4, 4)

        def forward(self, x):
            return self.linear(self.linear(x)) + self.lstm(x)[0]

    with pytest.raises(
        ValueError, match=r"module: expected Twice to do what its layers do one after the other, got out"
    ):
        gw.load(Twice())
    assert len(gw.load(Twice(), check=False)) == 2
    with pytest.raises(ValueError, match=r"module: expected layers that gatewise has, got Conv2d"):
        gw.load(nn.Sequential(nn.Conv2d(2, 2, 3)))
    with pytest.raises(ValueError, match=r"expected layers that gatewise has, got GELU\(approximate='tanh'\)"):
        gw.load(nn.Sequential(nn.Linear(2, 2), nn.GELU("tanh")))
    with pytest.raises(TypeError, match=r"source: expected a path or a torch\.nn\.Module, got int"):
        gw.load(3)
    for name, module in (("float16", nn.GRU(2, 3).half()), ("bfloat16", nn.Sequential(nn.Linear(2, 3).bfloat16()))):
        with pytest.raises(ValueError, match=f"^module: expected weights of float32 or of float64, got {name}"):
            gw.load(module)
    with pytest.raises(ValueError, match=r"^module: expected weights on the CPU, got weight_ih_l0 on meta"):
        gw.load(nn.GRU(2, 3, device="meta"))
    with pytest.raises(TypeError, match="load: expected no node with a module"):
        gw.load(nn.GRU(2, 3), node="x")


def test_damaged_files(tmp_path):
    """Cut, changed or of another kind: each is a FormatError or loads, and nothing is executed."""
    path = tmp_path / "layer.pt"
    torch.save(nn.GRU(3, 4).state_dict(), path)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        for place in rng.integers(0, len(bad), rng.integers(1, 6)):
            bad[place] = rng.integers(0, 256)
        path.write_bytes(bad[: rng.integers(0, len(bad))] if rng.random() < 0.3 else bad)
        with contextlib.suppress(gw.FormatError):
            gw.load(path)
    torch.save([1, 2], path)
    with pytest.raises(gw.FormatError, match="expected a state_dict, got list"):
        gw.load(path)
    for name, value in (("prefix", 3), ("batch_first", 3), ("nonlinearity", ["tanh"])):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            gw.load(path, **{name: value})
    with pytest.raises(ValueError, match="nonlinearity: expected 'tanh' or 'relu', got 'x'"):
        gw.load(path, nonlinearity="x")
    weights = nn.RNN(3, 4).state_dict()
    torch.save(weights, path)
    with pytest.raises(gw.FormatError, match="expected nonlinearity='tanh' or 'relu'"):
        gw.load(path)
    weights = nn.LSTM(3, 4, 2).state_dict()
    for name, value, reason in (
        ("weight_hh_l1", torch.zeros(16, 5), r"weight_hh_l1: expected shape \(16, 4\), got \(16, 5\)$"),
        ("bias_ih_l0", torch.zeros(3), r"bias_ih_l0: expected shape \(16,\), got \(3,\)$"),
        ("weight_ih_l7", torch.zeros(2), "expected .* weight_ih_l2, got .* weight_ih_l7$"),
    ):
        torch.save(weights | {name: value}, path)
        with pytest.raises(gw.FormatError, match=reason):
            gw.load(path)


def test_hostile_files(tmp_path):
    """Views that repeat one number, or whose numbers lie far apart: refused for the memory that they would take."""
    path = tmp_path / "weights.pt"
    torch.save(
        {"weight_ih_l0": torch.zeros(1).expand(256, 2**21), "weight_hh_l0": torch.zeros(1).expand(256, 64)}, path
    )
    with pytest.raises(gw.FormatError, match="views that repeat their numbers"):
        gw.load(path)
    far = torch.zeros(2**20)[:: 2**14].expand(256, 64)  # read from the first number to the last, for each name
    torch.save({f"weight_{kind}_l{i}": far for kind in ("ih", "hh") for i in range(20)}, path)
    with pytest.raises(gw.FormatError, match="views that repeat their numbers"):
        gw.load(path)


def test_other_dtypes_in_a_file(tmp_path):
    module = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "norm": nn.BatchNorm1d(4), "wide": nn.Linear(2, 2).half()})
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    layer = gw.load(tmp_path / "weights.safetensors", prefix="lstm")
    assert_same_bits(layer.state_dict(), weights_of(module["lstm"]))


class Own(nn.Module):
    """What `function` makes of the layers' output."""

    def __init__(self, function, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.function = function

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.function(x)


@pytest.mark.usefixtures("rng")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_modules_on_gatewise(kind):
    """What a module is counts, not how it is computed: accelerated, derived, parametrized."""
    plain = getattr(nn, kind)(5, 7)
    expected = gw.load(plain)
    derived = type("Derived", (getattr(nn, kind),), {})(5, 7)
    parametrized = nn.utils.parametrizations.weight_norm(
        copy.deepcopy(plain), "weight_hh" + "_l0" * ("Cell" not in kind)
    )
    for module in (accelerate(copy.deepcopy(plain)), getattr(gatewise.torch, kind)(5, 7), derived, parametrized):
        if module is not parametrized:
            module.load_state_dict(plain.state_dict())
        layer = gw.load(module)
        assert repr(layer) == repr(expected)
        for name, array in layer.state_dict().items():
            np.testing.assert_allclose(array, expected.parameters[name], rtol=1e-6)
    assert gw.load(accelerate(parametrized)).state_dict().keys() == expected.state_dict().keys()


@pytest.mark.usefixtures("rng")
def test_networks_on_gatewise():
    module = Chain(nn.GRU(6, 7, 2, batch_first=True), "last", nn.Linear(7, 3), nn.Softmax(-1))
    expected = gw.load(module)
    model = gw.load(accelerate(module))
    assert repr(model) == repr(expected)
    assert_same_bits(model.state_dict(), expected.state_dict())


@pytest.mark.usefixtures("rng")
def test_cells_that_are_more():
    """A class derived from a cell is run like any other."""

    class Doubled(nn.GRUCell):
        def forward(self, x, h=None):
            return 2 * super().forward(x, h)

    with pytest.raises(ValueError, match="module: expected Doubled to do what its layers do"):
        gw.load(Doubled(3, 4))


@pytest.mark.usefixtures("rng")
def test_one_layer_and_its_last_step():
    model = gw.load(Own(lambda y: y[-1], nn.GRU(3, 4)))
    assert [type(layer).__name__ for layer in model] == ["GRU", "Last"]


@pytest.mark.usefixtures("rng")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_messages_are_one_line():
    """Also of modules whose own description has many."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.forget, self.input = nn.Linear(13, 8), nn.Linear(13, 8)

    def wrong(x):
        raise RuntimeError("several\nlines\x1b[1m")

    modules = {
        "TransformerEncoderLayer": nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16)),
        "ModuleList": nn.Sequential(nn.LSTM(2, 3), nn.ModuleList([nn.Conv2d(1, 2, 3)])),
        r"several lines\\x1b\[1m": Own(wrong, nn.GRU(3, 4)),
        "LSTM in TorchScript": torch.jit.script(nn.LSTM(3, 4)),
    }
    for words, module in modules.items():
        with pytest.raises(ValueError, match=words) as caught:
            gw.load(module)
        assert str(caught.value).isprintable()
    recurrent = Own(None, nn.GRU(3, 4))
    recurrent.forward = lambda x, h: recurrent.layers[0](x, h)
    with pytest.raises(
        ValueError, match=r"expected a forward that takes one argument, got Own\.forward\(x, h\); states"
    ):
        gw.load(recurrent)
    with pytest.raises(
        ValueError,
        match=r"got Cell of Dense, Dense without a recurrent layer: layers\[1\]: expected a layer of 8 input units",
    ):
        gw.load(Cell())


@pytest.mark.usefixtures("rng")
def test_a_module_stays_as_it_was():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    module[1].eval()
    gw.load(module)
    assert [submodule.training for submodule in module.modules()] == [True, True, False, True]


@pytest.mark.usefixtures("rng")
def test_small_outputs_tell_models_apart():
    """With many classes the probability of each is tiny."""
    model, other = (
        gw.Sequential([cell(4, 8, seed=1), gw.Dense(8, 20000, activation="softmax", seed=2)])
        for cell in (gw.LSTM, gw.GRU)
    )
    assert not gw.verify(model, other).passed
    module = Chain(nn.LSTM(4, 8, batch_first=True, bidirectional=True), "last", nn.Linear(16, 20000), nn.Softmax(-1))
    model = gw.load(module)
    tokens = np.random.default_rng(0).integers(0, 20, (3, 8))
    with torch.no_grad():
        np.testing.assert_allclose(model(tokens), module(torch.from_numpy(tokens)).numpy(), rtol=1e-4)
