"""ONNX files: what PyTorch and others write gives the same numbers here, and what is written runs in ONNX Runtime."""

import importlib
import os
import random as chance
import warnings
from pathlib import Path

import gatewise as gw
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from children import assert_refused, load_in_child
from conftest import make_layer
from conftest import random as random_of
from gatewise.formats import onnx as formats
from onnx import helper, numpy_helper
from tolerances import assert_close, error

KINDS = ["LSTM", "GRU", "RNN"]
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


def run(path, **inputs):
    """ONNX Runtime's outputs by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def random(shape, dtype="float32", seed=0):
    return random_of(tuple(shape), dtype, seed)


# ---- files of torch.onnx.export


def export(module, arguments, path, dynamic=True, names=("x", "h", "c"), opset=None):
    """A file as torch.onnx.export writes it, with the axes of sequence and rows left open or not."""
    given = [names[0]] + [names[i] for i in range(1, 1 + sum(torch.is_tensor(a) for a in flat(arguments[1:])))]
    axes = {name: {0: f"{name}_0", 1: f"{name}_1"} if name == "x" else {1: "batch"} for name in given}
    with warnings.catch_warnings():
        # The exporter speaks of its successor, and of sizes that it takes as they are.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            arguments,
            os.fspath(path),
            dynamo=False,
            input_names=given,
            dynamic_axes=axes if dynamic else None,
            opset_version=opset,
        )


def flat(arguments):
    for one in arguments:
        if isinstance(one, tuple):
            yield from one
        else:
            yield one


class Network(torch.nn.Module):
    """What stands around a recurrent layer in most networks."""

    def __init__(self, kind, layers=1, two=False, batch_first=False, embedding=False, end="all", bias=True):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 5) if embedding else None
        options = {"batch_first": batch_first, "bidirectional": two, "bias": bias}
        self.recurrent = getattr(torch.nn, kind)(5, 6, layers, **options)
        self.dense = torch.nn.Linear(12 if two else 6, 4)
        self.end, self.batch_first = end, batch_first

    def forward(self, x, state=None):
        if self.embedding is not None:
            x = self.embedding(x)
        y, after = self.recurrent(x, state)
        if self.end == "last":
            y = y[:, -1] if self.batch_first else y[-1]
        if self.end == "last kept":
            y = y[:, -1:, :].squeeze(1) if self.batch_first else y[-1:].squeeze(0)
        if self.end == "state":
            h = after[0] if isinstance(after, tuple) else after
            y = torch.cat([h[-2], h[-1]], 1) if self.recurrent.bidirectional else h[-1]
        return torch.softmax(self.dense(y), -1), after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("end", ["all", "last", "last kept", "state"])
def test_pytorch(kind, layers, two, batch_first, end, path):
    torch.manual_seed(layers)
    dynamic = end != "last"
    embedding = end in ("all", "state")
    module = Network(kind, layers, two, batch_first, embedding, end, bias=end != "all").eval()
    x = torch.randint(20, (4, 7)) if embedding else torch.randn(4, 7, 5)
    export(module, (x,), path, dynamic)
    model = formats.load(path)
    assert model.batch_first == batch_first
    other = x if not dynamic else (torch.randint(20, (3, 9)) if embedding else torch.randn(3, 9, 5))
    with torch.no_grad():
        expected = module(other)[0].numpy()
    assert_close(model(other.numpy()), expected, "torch_float32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("two", [False, True])
def test_states_of_pytorch(kind, two, path):
    """First states that are inputs are what a call takes; layers that share one are layers of one."""
    module = Network(kind, 2, two).eval()
    x = torch.randn(7, 3, 5)
    first = tuple(torch.randn(4 if two else 2, 3, 6) for _ in range(2 if kind == "LSTM" else 1))
    state = first if kind == "LSTM" else first[0]
    export(module, (x, state), path)
    model = formats.load(path)
    assert [type(layer).__name__ for layer in model] == [kind, "Dense"]
    assert model[0].num_layers == 2
    y, after = model(x.numpy(), (tuple(one.numpy() for one in first) if kind == "LSTM" else first[0].numpy(),),
                     return_state=True)  # fmt: skip
    with torch.no_grad():
        expected, expected_after = module(x, state)
    assert_close(y, expected.numpy(), "torch_float32")
    expected_after = expected_after if kind == "LSTM" else (expected_after,)
    after = after[0] if kind == "LSTM" else after
    assert_close(tuple(after), tuple(one.numpy() for one in expected_after), "torch_float32")


@pytest.mark.parametrize("batch_first", [False, True])
def test_layer_alone_of_pytorch(batch_first, path):
    module = torch.nn.GRU(5, 6, batch_first=batch_first, bidirectional=True).eval()
    x = torch.randn(3, 4, 5)
    export(module, (x,), path)
    layer = formats.load(path)
    assert isinstance(layer, gw.GRU)
    assert layer.batch_first == batch_first
    with torch.no_grad():
        assert_close(layer(x.numpy())[0], module(x)[0].numpy(), "torch_float32")


@pytest.mark.parametrize(
    "function",
    [
        torch.nn.functional.relu, torch.nn.functional.gelu, torch.nn.functional.elu, torch.nn.functional.leaky_relu,
        torch.nn.functional.softplus, torch.nn.functional.hardsigmoid, torch.tanh, torch.sigmoid,
    ],
)  # fmt: skip
def test_other_layers_of_pytorch(function, path):
    """Convolutions, normalisations and activations."""

    class Many(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Conv1d(5, 6, 3, padding="same")
            self.two = torch.nn.Conv1d(6, 8, 3, padding=0, dilation=2)
            self.batch = torch.nn.BatchNorm1d(8)
            self.recurrent = torch.nn.LSTM(8, 6, batch_first=True)
            self.norm = torch.nn.LayerNorm(6)
            self.dense = torch.nn.Linear(6, 4)

        def forward(self, x):
            x = torch.relu(self.one(x.transpose(1, 2)))
            x = self.batch(torch.tanh(self.two(torch.nn.functional.pad(x, (4, 0)))))
            x, _ = self.recurrent(x.transpose(1, 2))
            x = self.dense(torch.nn.functional.dropout(self.norm(x), training=False))
            return function(x * 3.0 - 0.2) * 0.5

    module = Many()
    with torch.no_grad():
        for name, value in module.named_buffers():
            if "running" in name:
                value.uniform_(0.5, 1.5)
    module.eval()
    x = torch.randn(3, 9, 5)
    export(module, (x,), path)
    model = formats.load(path)
    with torch.no_grad():
        expected = module(x).numpy()
    assert np.ptp(expected) > 0.01  # no function is so flat that it would hide what comes before
    assert_close(model(x.numpy()), expected, "torch_float32")


# ---- files of the exporter with dynamo, PyTorch's default


def export_anew(module, x, path, dynamic=None, opset=None):
    """A file as PyTorch's other exporter writes it, which takes some seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, such as of what it uses of PyTorch
        torch.onnx.export(
            module, (x,), os.fspath(path), dynamo=True, dynamic_shapes=dynamic and (dynamic,), opset_version=opset,
            external_data=False, verbose=False,
        )  # fmt: skip


class Many(torch.nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Conv1d(5, 6, 3, padding="same"), torch.nn.Conv1d(6, 8, 3, dilation=2)
        self.batch, self.norm = torch.nn.BatchNorm1d(8), torch.nn.LayerNorm(12)
        self.batch.running_mean.uniform_(0.5, 1.5)
        self.batch.running_var.uniform_(0.5, 1.5)
        self.recurrent = torch.nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.dense = torch.nn.ModuleList(torch.nn.Linear(n, m) for n, m in ((12, 5), (5, 4), (4, 4), (4, 4), (4, 3)))
        self.functions = torch.nn.GELU(), torch.nn.SiLU(), torch.nn.ELU(), torch.nn.Softplus(), torch.nn.Hardsigmoid()

    def forward(self, x):
        x = torch.relu(self.one(x.transpose(1, 2)))
        x = self.batch(torch.tanh(self.two(torch.nn.functional.pad(x, (4, 0)))))
        x = self.norm(self.recurrent(x.transpose(1, 2))[0])
        for dense, function in zip(self.dense, self.functions, strict=True):
            x = function(dense(x) * 2)
        return x


@pytest.mark.parametrize("fixed", [True, False])
def test_many_layers_of_dynamo(fixed, path):
    torch.manual_seed(0)
    module = Many().eval()
    x = torch.randn(3, 9, 5)
    sizes = None if fixed else {0: torch.export.Dim("rows"), 1: torch.export.Dim("steps")}
    export_anew(module, x, path, sizes, opset=None if fixed else 22)
    model = formats.load(path)
    with torch.no_grad():
        expected = module(x).numpy()
    assert np.ptp(expected) > 0.01
    assert_close(model(x.numpy()), expected, "torch_float32")


@pytest.mark.parametrize(
    ("kind", "options", "end", "opset"),
    [
        ("LSTM", {"two": True, "batch_first": True, "layers": 2, "embedding": True, "bias": False}, "state", 18),
        ("GRU", {"two": True, "batch_first": True}, "last", 20),
        ("LSTM", {}, "all", None),
    ],
)
def test_recurrent_layers_of_dynamo(kind, options, end, opset, path):
    """With open sizes, of which the exporter fixes the first one behind a layer all the same."""
    torch.manual_seed(0)
    module = Only(Network(kind, end=end, **options).eval())
    x = torch.randint(20, (4, 7)) if "embedding" in options else torch.randn(4, 7, 5)
    export_anew(module, x, path, {0: torch.export.Dim("one"), 1: torch.export.Dim("other")}, opset)
    model = formats.load(path)
    assert model.batch_first == options.get("batch_first", False)
    other = torch.randint(20, (3, 9)) if "embedding" in options else torch.randn(3, 9, 5)
    for given in (x, other):
        with torch.no_grad():
            assert_close(model(given.numpy()), module(given).numpy(), "torch_float32")


class Only(torch.nn.Module):
    """What a network gives besides its last states."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[0]


# ---- graphs by hand


def weights(op, directions=1, dtype=np.float32, bias=True, inputs=5, units=6):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    shapes = {"W": (directions, gates * units, inputs), "R": (directions, gates * units, units)}
    if bias:
        shapes["B"] = (directions, 2 * gates * units)
    return {name: random(shape, dtype, seed) / 2 for seed, (name, shape) in enumerate(shapes.items(), 1)}


def written(path, nodes, inputs, outputs, arrays, opset=17):
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 21 else 10)
    path.write_bytes(model.SerializeToString())
    return path


def one_node(
    path, op, directions=1, layout=0, lens=False, opset=17, peepholes=False, state=True, scale=1, **attributes
):
    """A graph of one node with its states as inputs, unless they are zero."""
    arrays = weights(op, directions) | ({"P": random((directions, 18), seed=9)} if peepholes else {})
    arrays = {name: (array * scale).astype(array.dtype) for name, array in arrays.items()}
    sequence = ["B", "T", 5] if layout else ["T", "B", 5]
    shape = ["B", directions, 6] if layout else [directions, "B", 6]
    inputs = {"x": (1, sequence)} | ({"lens": (6, ["B"])} if lens else {})
    if state:
        inputs |= dict.fromkeys(("h", "c") if op == "LSTM" else ("h",), (1, shape))
    if layout:
        attributes["layout"] = 1
    if directions == 2:
        attributes["direction"] = "bidirectional"
    names = [name if name in {**inputs, **arrays} else "" for name in ("x", "W", "R", "B", "lens", "h", "c", "P")]
    while not names[-1]:
        names.pop()
    outputs = ["y", "h_out", *(["c_out"] if op == "LSTM" else [])]
    node = helper.make_node(op, names, outputs, name="node", hidden_size=6, **attributes)
    return written(path, [node], inputs, dict.fromkeys(outputs, (1, None)), arrays, opset)


@pytest.mark.parametrize("op", KINDS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("lens", [False, True])
@pytest.mark.parametrize("opset", [7, 13, 14, 17, 22])
def test_one_node(op, directions, lens, opset, path):
    for reset_after in (0, 1) if op == "GRU" else (None,):
        options = {} if reset_after is None else {"linear_before_reset": reset_after}
        one_node(path, op, directions, 0, lens, opset, **options)
        layer = formats.load(path)
        assert isinstance(layer, getattr(gw, op))
        x, h, c = random((7, 3, 5)), random((directions, 3, 6)), random((directions, 3, 6), seed=5)
        lengths = np.array([7, 2, 4], np.int32)
        given = {"x": x, "h": h} | ({"c": c} if op == "LSTM" else {}) | ({"lens": lengths} if lens else {})
        expected = run(path, **given)
        y, after = layer(x, (h, c) if op == "LSTM" else h, lengths=lengths if lens else None)
        assert_close(y, expected["y"].transpose(0, 2, 1, 3).reshape(7, 3, -1), "torch_float32")
        after = after if op == "LSTM" else (after,)
        assert_close(after, tuple(expected[name] for name in ("h_out", "c_out")[: len(after)]), "torch_float32")


@pytest.mark.parametrize("op", KINDS)
@pytest.mark.parametrize("directions", [1, 2])
def test_batch_first_node(op, directions, path, tmp_path):
    """ONNX Runtime does not know layout=1; the same node with time first says what it should give."""
    options = {"linear_before_reset": 1} if op == "GRU" else {}
    one_node(path, op, directions, 1, **options)
    layer = formats.load(path)
    assert layer.batch_first
    other = one_node(tmp_path / "other.onnx", op, directions, 0, **options)
    x, h, c = random((7, 3, 5)), random((directions, 3, 6)), random((directions, 3, 6), seed=5)
    expected = run(other, x=x, h=h, **({"c": c} if op == "LSTM" else {}))
    y, _ = layer(x.swapaxes(0, 1), (h, c) if op == "LSTM" else h)
    assert_close(y.swapaxes(0, 1), expected["y"].transpose(0, 2, 1, 3).reshape(7, 3, -1), "torch_float32")


def outcome(model, x, state=None, **options):
    """What a layer gives, or a model around it."""
    if isinstance(model, gw.Sequential):
        y, (after,) = model(x, None if state is None else (state,), return_state=True, **options)
        return y, after
    return model(x, state, **options)


NUMBERS = {  # how many each function takes
    "Relu": 0, "Tanh": 0, "Sigmoid": 0, "Softsign": 0, "Softplus": 0, "LeakyRelu": 1, "Elu": 1, "ThresholdedRelu": 1,
    "Affine": 2, "ScaledTanh": 2, "HardSigmoid": 2,
}  # fmt: skip
NEEDED = {"ThresholdedRelu", "Affine", "ScaledTanh"}  # of which a file must say the numbers


def drawn_functions(draw, op, directions):
    """Attributes with some functions, as many of whose numbers as can be are left out at the end."""
    names = [draw.choice([*NUMBERS]) for _ in range({"LSTM": 3, "GRU": 2, "RNN": 1}[op])] * directions
    which = "activation_alpha", "activation_beta"
    owners = [[name for name in names if NUMBERS[name] > i] for i in range(2)]
    options = {"activations": names}
    for attribute, owner in zip(which, owners, strict=True):
        given = [round(draw.uniform(0.1, 0.6), 2) for _ in owner[: len(owner) // directions]] * directions
        while directions == 1 and given and owner[len(given) - 1] not in NEEDED and draw.random() < 0.5:
            given.pop()
        options |= {attribute: given} if given else {}
    return options


@pytest.mark.parametrize("op", KINDS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("seed", range(10))
def test_options_of_nodes(op, direction, layout, seed, path, tmp_path):
    """Whatever a node may say besides its weights. ONNX Runtime has time first alone."""
    draw = chance.Random(f"{op} {direction} {seed}")
    directions = 2 if direction == "bidirectional" else 1
    options = {"direction": direction, "lens": draw.random() < 0.5, "state": draw.random() < 0.5}
    if draw.random() < 0.5:
        options["clip"] = round(draw.uniform(0.3, 2), 1)
    if draw.random() < 0.7:
        options |= drawn_functions(draw, op, directions) | {"scale": 0.4}  # gates without bounds let a state grow
    if op == "GRU":
        options["linear_before_reset"] = draw.randrange(2)
    if op == "LSTM":
        options["peepholes"] = draw.random() < 0.6
        options["input_forget"] = int("activations" not in options and draw.random() < 0.6)
    other = one_node(tmp_path / "other.onnx", op, directions, **options)
    if "activations" in options:  # ONNX Runtime takes them in any case, but for an RNN's
        options["activations"] = [draw.choice([name, name.lower(), name.upper()]) for name in options["activations"]]
    model = formats.load(one_node(path, op, directions, layout, **options))
    assert isinstance(model, gw.Sequential) == (direction == "reverse")
    inside = model[1] if direction == "reverse" else model
    assert inside.clip == options.get("clip")
    assert getattr(inside, "peepholes", False) == options.get("peepholes", False)
    assert model.batch_first == bool(layout)
    x, h, c = random((7, 3, 5)), random((directions, 3, 6)), random((directions, 3, 6), seed=5)
    lengths = np.array([7, 2, 4], np.int32) if options["lens"] else None
    state = None if not options["state"] else (h, c) if op == "LSTM" else h
    given = {"x": x, "lens": lengths, "h": h, "c": c if op == "LSTM" else None}
    if state is None:
        given |= {"h": None, "c": None}
    expected = run(other, **{name: value for name, value in given.items() if value is not None})
    assert np.isfinite(expected["y"]).all()
    y, after = outcome(model, x.swapaxes(0, 1) if layout else x, state, lengths=lengths)
    y = y.swapaxes(0, 1) if layout else y
    assert_close(y, expected["y"].transpose(0, 2, 1, 3).reshape(7, 3, -1), "torch_float32")
    after = after if op == "LSTM" else (after,)
    assert_close(tuple(after), tuple(expected[name] for name in ("h_out", "c_out")[: len(after)]), "torch_float32")
    alone = formats.load(path, node="node")
    np.testing.assert_array_equal(outcome(alone, x.swapaxes(0, 1) if layout else x, state, lengths=lengths)[0],
                                  y.swapaxes(0, 1) if layout else y)  # fmt: skip


@pytest.mark.parametrize("alpha", [1 / 6, 0.2, 0.4])
@pytest.mark.parametrize("peepholes", [False, True])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_coupled_gates(alpha, peepholes, clip, path):
    """f = 1 - i, with hard gates, too."""
    options = {"activations": ["HardSigmoid", "Tanh", "Relu"], "activation_alpha": [alpha], "activation_beta": [0.5]}
    options |= {"peepholes": peepholes, "input_forget": 1} | ({"clip": clip} if clip else {})
    layer = formats.load(one_node(path, "LSTM", **options))
    assert layer.recurrent_activation == "hard_sigmoid" or layer.recurrent_activation.alpha == alpha
    x, h, c = random((7, 3, 5)), random((1, 3, 6)), random((1, 3, 6), seed=5)
    expected = run(path, x=x, h=h, c=c)
    y, after = layer(x, (h, c))
    assert_close((y, *after), (expected["y"][:, 0], expected["h_out"], expected["c_out"]), "torch_float32")


@pytest.mark.parametrize(
    ("op", "options", "name"),
    [
        ("LSTM", {"direction": "sideways"}, "direction"),
        ("LSTM", {"input_forget": 1, "activations": ["Tanh", "Tanh", "Tanh"]}, "input_forget"),
        (
            "LSTM",
            {"input_forget": 1, "activations": ["HardSigmoid", "Tanh", "Tanh"], "activation_beta": [0.4]},
            "input_forget",
        ),
        ("GRU", {"input_forget": 1}, "input_forget"),
        ("GRU", {"clip": 0.0}, "clip"),
        ("GRU", {"clip": float("nan")}, "clip"),
        ("GRU", {"activations": ["Softmax", "Tanh"]}, "activations"),
        ("GRU", {"activations": ["Sigmoid"]}, "activations"),
        ("GRU", {"directions": 2, "activations": ["Sigmoid", "Tanh", "Sigmoid", "Relu"]}, "activations"),
        ("RNN", {"activation_alpha": [0.5]}, "activation_alpha"),
        ("RNN", {"activations": ["Affine"]}, "activation_alpha"),
        ("RNN", {"activations": ["ThresholdedRelu"], "activation_beta": [1.0]}, "activation_alpha"),
        ("RNN", {"activations": ["ScaledTanh"], "activation_alpha": [1.0]}, "activation_beta"),
        ("RNN", {"activations": ["Elu"], "activation_alpha": [float("inf")]}, "activation_alpha"),
        ("RNN", {"something": 1}, "something"),
    ],
)
def test_refused_attributes(op, options, name, path):
    one_node(path, op, **options)
    with pytest.raises(gw.FormatError, match=rf"model.onnx: node 'node' \({op}\): {name}: .*node=.*'node'"):
        formats.load(path)
    with pytest.raises(gw.FormatError, match=rf"node 'node' \({op}\): {name}: "):
        formats.load(path, node="node")


ENDS = {"first": np.array([-1]), "end": np.array([-(2**63)]), "zero": np.array([0]), "step": np.array([-1])}
node = helper.make_node


def recurrent(op, x, given=(), outputs=("all",), **attributes):
    """A node whose input has 6 units."""
    return node(op, [x, "W", "R", "B", *given], outputs, hidden_size=6, **attributes)


BACKWARDS = {
    "two": (
        [recurrent("GRU", "x", direction="reverse"), node("Squeeze", ["all", "one"], ["flat"]),
         recurrent("GRU", "flat", outputs=["more"], direction="reverse"), node("Squeeze", ["more", "one"], ["y"])],
        "Reverse GRU GRU Reverse",
    ),
    "two and what lies between": (
        [recurrent("LSTM", "x", direction="reverse"), node("Squeeze", ["all", "one"], ["flat"]),
         node("Relu", ["flat"], ["relu"]), recurrent("LSTM", "relu", outputs=["more"]),
         node("Squeeze", ["more", "one"], ["y"])],
        "Reverse LSTM Reverse Activation LSTM",
    ),
    "last state": (
        [recurrent("LSTM", "x", outputs=["", "h"], direction="reverse"), node("Squeeze", ["h", "zero"], ["last"]),
         node("MatMul", ["last", "M"], ["y"])],
        "Reverse LSTM Last Dense",
    ),
    "last read": (
        [recurrent("RNN", "x", direction="reverse"), node("Squeeze", ["all", "one"], ["flat"]),
         node("Gather", ["flat", "nought"], ["last"]), node("MatMul", ["last", "M"], ["y"])],
        "Reverse RNN Last Dense",
    ),
    "first read": (
        [recurrent("RNN", "x", direction="reverse"), node("Squeeze", ["all", "one"], ["flat"]),
         node("Gather", ["flat", "minus"], ["y"])],
        "Reverse RNN Reverse Last",
    ),
    "turned by a slice": (
        [node("Slice", ["x", *ENDS], ["turned"]), recurrent("GRU", "turned"), node("Squeeze", ["all", "one"], ["flat"]),
         node("Slice", ["flat", *ENDS], ["y"])],
        "Reverse GRU Reverse",
    ),
    "turned twice": (
        [node("Slice", ["x", *ENDS], ["turned"]), recurrent("GRU", "turned", direction="reverse"),
         node("Squeeze", ["all", "one"], ["y"])],
        "GRU Reverse",
    ),
    "last of both after a slice": (
        [recurrent("GRU", "x", outputs=["both"], direction="bidirectional"),
         node("Transpose", ["both"], ["moved"], perm=[0, 2, 1, 3]), node("Reshape", ["moved", "wide"], ["flat"]),
         node("Slice", ["flat", *ENDS], ["turned"]), node("Gather", ["turned", "nought"], ["y"])],
        "GRU Activation Last",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKWARDS)
def test_backwards(name, path):
    """Paths whose order of time changes."""
    nodes, layers = BACKWARDS[name]
    (op,) = {one.op_type for one in nodes if one.op_type in KINDS}
    arrays = weights(op, 2 if "both" in name else 1, inputs=6) | ENDS | {"one": np.array([1]), "M": random((6, 3))}
    arrays |= {"nought": np.array(0), "minus": np.array(-1), "wide": np.array([0, 0, -1])}
    written(path, nodes, {"x": (1, ["T", "B", 6])}, {"y": (1, None)}, arrays)
    model = formats.load(path)
    assert " ".join(type(layer).__name__ for layer in model) == layers
    x = random((7, 3, 6))
    assert_close(model(x), run(path, x=x)["y"], "torch_float32")


@pytest.mark.parametrize("op", KINDS)
def test_backwards_within_lengths(op, path):
    """Each row is read from its own end; one layer reads backwards by its direction, another since its input is."""
    arrays = weights(op, inputs=6) | {"one": np.array([1])}
    nodes = [
        node("Cast", ["lens"], ["ends"], to=7),
        recurrent(op, "x", ["lens"], direction="reverse"), node("Squeeze", ["all", "one"], ["flat"]),
        node("ReverseSequence", ["flat", "ends"], ["turned"]), recurrent(op, "turned", ["lens"], ["more"]),
        node("Squeeze", ["more", "one"], ["after"]), node("ReverseSequence", ["after", "ends"], ["y"]),
    ]  # fmt: skip
    written(path, nodes, {"x": (1, ["T", "B", 6]), "lens": (6, ["B"])}, {"y": (1, None)}, arrays)
    model = formats.load(path)
    assert [type(layer).__name__ for layer in model] == ["Reverse", op, op, "Reverse"]
    x, lengths = random((7, 3, 6)), np.array([7, 2, 4])
    assert_close(model(x, lengths=lengths), run(path, x=x, lens=lengths.astype(np.int32))["y"], "torch_float32")


def test_backwards_refused(path):
    """Where it is not each row that is turned, or not time, or not all of it."""

    def refused(nodes, reason, **arrays):
        inputs = {"x": (1, ["T", "B", 6]), "lens": (6, ["B"])}
        written(
            path, nodes, inputs, {"y": (1, None)}, weights("GRU", inputs=6) | ENDS | {"one": np.array([1])} | arrays
        )
        with pytest.raises(gw.FormatError, match=reason):
            formats.load(path)

    turn, layer = node("Slice", ["x", *ENDS], ["turned"], name="turn"), recurrent("GRU", "turned", ["lens"], ["y"])
    refused([turn, layer], "sequence_lens: ")
    refused([turn, layer], "time and batch: ", zero=np.array([1]))
    refused([turn, layer], r"node 'turn' \(Slice\): steps: ", step=np.array([-2]))
    refused([turn, layer], r"node 'turn' \(Slice\): starts, ends: ", end=np.array([-3]))
    refused([turn, layer], r"node 'turn' \(Slice\): starts, ends: ", first=np.array([-2]))


def test_backwards_of_pytorch(path):
    """Two layers with one first state, read backwards, batch first."""

    class Backwards(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = torch.nn.GRU(5, 6, 2, batch_first=True)

        def forward(self, x, state):
            y, after = self.recurrent(x.flip(1), state)
            return y.flip(1), after

    module, x, state = Backwards().eval(), torch.randn(3, 7, 5), torch.randn(2, 3, 6)
    export(module, (x, state), path)
    model = formats.load(path)
    assert [type(layer).__name__ for layer in model] == ["Reverse", "GRU", "Reverse"]
    assert model.batch_first
    assert model[1].num_layers == 2
    y, (after,) = model(x.numpy(), (state.numpy(),), return_state=True)
    with torch.no_grad():
        expected = module(x, state)
    assert_close((y, after), tuple(one.numpy() for one in expected), "torch_float32")


def function_node(op, **attributes):
    return node(op, ["sums"], ["y"], name="function", **attributes)


@pytest.mark.parametrize(
    ("nodes", "activation"),
    [
        ([function_node("HardSigmoid")], ("hard_sigmoid", 0.2, 0.5)),
        ([function_node("HardSigmoid", alpha=1 / 6)], ("hard_sigmoid",)),
        ([function_node("HardSigmoid", alpha=0.3, beta=0.4)], ("hard_sigmoid", 0.3, 0.4)),
        ([function_node("ThresholdedRelu")], ("thresholded_relu",)),
        ([function_node("ThresholdedRelu", alpha=0.4)], ("thresholded_relu", 0.4)),
        ([function_node("Softsign")], ("softsign",)),
        ([function_node("Selu")], ("selu",)),
        ([node("Sigmoid", ["sums"], ["gate"]), node("Mul", ["gate", "sums"], ["y"])], ("silu",)),
        ([node("Sigmoid", ["sums"], ["gate"]), node("Mul", ["sums", "gate"], ["y"])], ("silu",)),
        ([node("Softplus", ["sums"], ["soft"]), node("Greater", ["sums", "much"], ["large"]),
          node("Where", ["large", "sums", "soft"], ["y"])], ("softplus",)),
    ],
)  # fmt: skip
def test_functions(nodes, activation, path):
    arrays = weights("GRU", inputs=5) | {"one": np.array([1]), "M": random((6, 3)) * 4, "much": np.float32(20)}
    begin = [recurrent("GRU", "x"), node("Squeeze", ["all", "one"], ["flat"]), node("MatMul", ["flat", "M"], ["sums"])]
    written(path, [*begin, *nodes], {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, arrays)
    model = formats.load(path)
    assert repr(model[1].activation) == repr(gw.Activation(*activation))
    x = random((7, 3, 5))
    assert_close(model(x), run(path, x=x)["y"], "torch_float32")


def bounds(*nodes, **arrays):
    """Nodes behind a GRU with constants, of which "least" and "most" are bounds."""
    numbers = {"least": 0.0, "most": 1.0, "slope": 0.3, "offset": 0.4} | arrays
    arrays = weights("GRU") | {name: np.float32(number) * 1 for name, number in numbers.items()}
    begin = [recurrent("GRU", "x"), node("Squeeze", ["all", "axis"], ["h"]), node("Mul", ["h", "slope"], ["scaled"])]
    return [*begin, *nodes], arrays | {"axis": np.array([1])}


LINE = node("Add", ["scaled", "offset"], ["sums"])


@pytest.mark.parametrize(
    ("nodes", "arrays", "names"),
    [
        ([LINE, node("Clip", ["sums", "least", "most"], ["y"])], {"slope": 4}, ["hard_sigmoid"]),
        ([LINE, node("Min", ["sums", "most"], ["cut"]), node("Max", ["least", "cut"], ["y"])], {"slope": 4},
         ["hard_sigmoid"]),
        ([LINE, node("Max", ["sums", "least"], ["cut"]), node("Min", ["cut", "most"], ["y"])], {"slope": 4},
         ["hard_sigmoid"]),
        ([node("Clip", ["scaled", "least", "most"], ["y"])], {"least": -0.1, "most": 0.2, "slope": 1},
         ["affine", "hard_sigmoid", "affine"]),
        ([node("Clip", ["scaled", "", "most"], ["cut"]), node("Clip", ["cut", "least"], ["y"])], {}, None),
        ([node("Clip", ["scaled", "least"], ["y"])], {}, ["affine", "relu"]),
        ([node("Max", ["scaled", "least"], ["y"])], {}, ["affine", "relu"]),
        ([node("Max", ["scaled", "least"], ["y"])], {"least": 0.1}, None),
        ([node("Min", ["scaled", "most"], ["y"])], {}, None),
        ([node("Clip", ["scaled", "least", "most"], ["y"])], {"least": -1e4, "most": 1e4}, None),
        ([node("Clip", ["scaled", "least", "most"], ["y"])], {"least": 1.0}, None),
        ([node("Greater", ["scaled", "least"], ["y"])], {}, None),
        ([node("Softplus", ["scaled"], ["soft"]), node("Greater", ["scaled", "most"], ["large"]),
          node("Where", ["large", "scaled", "soft"], ["y"])], {"most": 5.0}, None),
    ],
)  # fmt: skip
def test_bounds(nodes, arrays, names, path):
    nodes, arrays = bounds(*nodes, **arrays)
    written(path, nodes, {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, arrays)
    if names is None:
        with pytest.raises(gw.FormatError, match=r"cut off|bounds|that of softplus"):
            formats.load(path)
        return
    model = formats.load(path)
    assert [layer.name for layer in [*model][1:]] == names
    x = random((7, 3, 5))
    assert_close(model(x), run(path, x=x)["y"], "torch_float32")


def test_swish(path):
    """An operator of ONNX 24, which ONNX Runtime need not have."""
    for alpha in (1.0, 1.5):
        nodes = [recurrent("GRU", "x", outputs=["sums"]), function_node("Swish", alpha=alpha)]
        written(path, nodes, {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, weights("GRU"), 24)
        if alpha == 1:
            assert repr(formats.load(path)[1]) == repr(gw.Activation("silu"))
            continue
        with pytest.raises(gw.FormatError, match=r"node 'function' \(Swish\): alpha: "):
            formats.load(path)


def test_inputs_that_were_changed(path):
    """Tokens and lengths that are not those of the input, but computed from them."""
    two = {"two": np.array([2]), "table": random((9, 5))}
    nodes = [
        node("Mul", ["x", "two"], ["other"]), node("Gather", ["table", "other"], ["rows"]),
        recurrent("GRU", "rows", outputs=["y"]),
    ]  # fmt: skip
    written(path, nodes, {"x": (7, ["T", "B"])}, {"y": (1, None)}, weights("GRU") | two)
    with pytest.raises(gw.FormatError):
        formats.load(path)
    for change in (node("Mul", ["lens", "half"], ["ends"]), node("ReduceMean", ["lens"], ["ends"], axes=[-1])):
        nodes = [change, recurrent("GRU", "x", ["ends"], ["y"])]
        inputs = {"x": (1, ["T", "B", 5]), "lens": (6, ["B"])}
        written(path, nodes, inputs, {"y": (1, None)}, weights("GRU") | {"half": np.array([2], np.int32)}, 13)
        with pytest.raises(gw.FormatError, match="sequence_lens"):
            formats.load(path)


@pytest.mark.parametrize(
    ("nodes", "name"),
    [
        ([function_node("Selu", alpha=1.5)], "alpha"),
        ([function_node("Selu", gamma=1.5)], "gamma"),
        ([function_node("HardSigmoid", alpha=float("nan"))], "alpha"),
        ([node("Tanh", ["sums"], ["gate"]), node("Mul", ["sums", "gate"], ["y"], name="function")], "two tensors"),
        ([node("Sigmoid", ["flat"], ["gate"]), node("Mul", ["flat", "gate"], ["other"]),
          node("Add", ["sums", "gate"], ["y"], name="function")], "two tensors"),
        ([node("Sigmoid", ["flat"], ["gate"]), node("Mul", ["sums", "gate"], ["y"], name="function")], "two tensors"),
    ],
)  # fmt: skip
def test_refused_functions(nodes, name, path):
    arrays = weights("GRU", inputs=5) | {"one": np.array([1]), "M": random((6, 6))}
    begin = [recurrent("GRU", "x"), node("Squeeze", ["all", "one"], ["flat"]), node("MatMul", ["flat", "M"], ["sums"])]
    written(path, [*begin, *nodes], {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, arrays)
    with pytest.raises(gw.FormatError, match=rf"node 'function' \(\w+\): {name}"):
        formats.load(path)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("opset", [13, 17])
def test_layer_normalisation(affine, first, opset, path):
    """Below operator set 17 it is taken apart."""

    class Normalised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(5, eps=1e-3, elementwise_affine=affine)
            self.recurrent = torch.nn.GRU(5, 5, batch_first=True)

        def forward(self, x):
            return self.recurrent(self.norm(x))[0] if first else self.norm(self.recurrent(x)[0])

    module, x = Normalised().eval(), torch.randn(3, 7, 5)
    with torch.no_grad():
        for value in module.norm.parameters():
            value.uniform_(0.5, 1.5)
    export(module, (x,), path, opset=opset)
    operators = {one.op_type for one in onnx.load(path).graph.node}
    assert ("LayerNormalization" in operators) == (opset == 17)
    model = formats.load(path)
    assert [type(layer).__name__ for layer in model] == (["LayerNorm", "GRU"] if first else ["GRU", "LayerNorm"])
    assert model[0 if first else 1].eps == 1e-3
    with torch.no_grad():
        assert_close(model(x.numpy()), module(x).numpy(), "torch_float32")


def normalisation(mean=-1, power=2.0, root="Sqrt", other="off", keepdims=1, end="normed"):
    """The parts of one, with a layer behind, and their numbers."""
    nodes = [
        node("ReduceMean", ["x"], ["mean"], axes=[mean], keepdims=keepdims), node("Sub", ["x", "mean"], ["off"]),
        node("Pow", ["off", "power"], ["square"]), node("ReduceMean", ["square"], ["variance"], axes=[-1]),
        node("Add", ["variance", "eps"], ["more"]), node(root, ["more"], ["root"]),
        node("Div", [other, "root"], ["normed"]), recurrent("GRU", end, outputs=["y"]),
    ]  # fmt: skip
    return nodes, weights("GRU") | {"power": np.float32(power), "eps": np.float32(1e-5)}


def test_no_layer_normalisation(path):
    """What is almost one, and what is one with a part of it as an output."""
    for change in (
        {}, {"mean": 0}, {"power": 3.0}, {"root": "Reciprocal"}, {"other": "x"}, {"keepdims": 0}, {"end": "mean"},
        {"end": "off"}, {"end": "square"}, {"end": "variance"}, {"end": "root"},
    ):  # fmt: skip
        nodes, arrays = normalisation(**change)
        written(path, nodes, {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, arrays, 13)
        if not change:
            assert isinstance(formats.load(path)[0], gw.LayerNorm)
            continue
        with pytest.raises(gw.FormatError):
            formats.load(path)
    nodes, arrays = normalisation()
    for part in ("mean", "off", "square", "variance", "root"):
        outputs = {"y": (1, None), part: (1, None)}
        written(path, nodes, {"x": (1, ["T", "B", 5])}, outputs, arrays, 13)
        with pytest.raises(gw.FormatError):
            formats.load(path)


def moments(count=5, scale=1.0, shift=0.0, other=None, eps="eps"):
    """A normalisation as tf2onnx writes the fused one, and behind it the one that is not fused, with their numbers."""
    nodes = [
        node("Reshape", ["x", "wide"], ["rows"]), node("ReduceMean", ["rows"], ["mean"], axes=[0, 2, 3]),
        node("Sub", ["rows", "mean"], ["off"]), node("Squeeze", ["mean", "axes"], ["flat"]),
        node("ReduceSumSquare", ["off"], ["sum"], axes=[0, 2, 3], keepdims=0), node("Div", ["sum", "count"], ["mean2"]),
        node("Shape", ["x"], ["shape"]), node("Slice", ["shape", "zero", "two"], ["some"]),
        node("ReduceProd", ["some"], ["product"]), node("Expand", ["scale", "product"], ["scales"]),
        node("Expand", ["shift", "product"], ["shifts"]),
        node("BatchNormalization", ["rows", "scales", "shifts", "flat", "mean2"], ["normed"], epsilon=0.25),
        node("Reshape", ["normed", "shape"], ["one"]), node("GlobalAveragePool", ["one"], ["middle"]),
        node("Sub", ["one", "middle"], ["apart"]), node("Mul", ["apart", "apart"], ["square"]),
        node("GlobalAveragePool", ["square"], ["variance"]), node("Add", ["variance", eps], ["more"]),
        node("Sqrt", ["more"], ["root"]), node("Reciprocal", ["root"], ["inverse"]),
        node("Mul", ["inverse", "weight"], ["weighted"]), node("Mul", ["one", "weighted"], ["large"]),
        node("Mul", ["inverse", "other"], ["otherwise"]),
        node("Mul", ["middle", other or "weighted"], ["offset"]), node("Sub", ["bias", "offset"], ["rest"]),
        node("Add", ["large", "rest"], ["two_of_them"]), recurrent("GRU", "two_of_them"),
        node("Squeeze", ["all", "first"], ["y"]),
    ]  # fmt: skip
    arrays = weights("GRU") | {
        "wide": np.array([1, -1, 5, 1]), "axes": np.array([0, 2, 3]), "count": np.float32(count),
        "zero": np.array([0]), "first": np.array([1]),
        "two": np.array([2]), "scale": np.float32([scale]), "shift": np.float32([shift]),
        "eps": np.float32(0.5), "weight": random((5,), seed=6), "other": random((5,), seed=7),
        "bias": random((5,), seed=8),
    }  # fmt: skip
    return nodes, arrays


def test_layer_normalisation_of_moments(path):
    for change in (
        {}, {"count": 4}, {"scale": 2.0}, {"shift": 0.5}, {"other": "inverse"}, {"other": "otherwise"},
        {"other": "root"}, {"eps": "weight"},
    ):  # fmt: skip
        nodes, arrays = moments(**change)
        written(path, nodes, {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, arrays, 13)
        if change:
            with pytest.raises(gw.FormatError, match=r"normalisation|each row"):
                formats.load(path)
            continue
        model = formats.load(path)
        assert [getattr(layer, "eps", None) for layer in model] == [0.25, 0.5, None]
        x = random((7, 3, 5))
        assert_close(model(x), run(path, x=x)["y"], "torch_float32")


def test_ends_of_directions(path):
    """The last step of the forward half and the first of the other one are the last of each direction."""
    usual = {"one": (-1, 2**31 - 1), "other": (0, 1), "joined": ["forward", "backward"], "lens": False}
    changes = ({"one": (0, 1)}, {"other": (-1, 2**31 - 1)}, {"joined": ["backward", "forward"]}, {"lens": True})
    for change in ({}, {"op": "Add"}, {"op": "Mul"}, *changes):
        of = {**usual, "op": "Concat", **change}
        arrays = weights("LSTM", 2) | {"zero": np.array([0]), "one": np.array([1])}
        nodes = [
            recurrent("LSTM", "x", ["lens"] if of["lens"] else [], direction="bidirectional"),
            node("Split", ["all"], ["half", "half2"], axis=1),
        ]  # fmt: skip
        for half, name, (first, end) in (("half", "forward", of["one"]), ("half2", "backward", of["other"])):
            arrays |= {f"first_{name}": np.array([first]), f"end_{name}": np.array([end])}
            nodes += [
                node("Squeeze", [half, "one"], [f"flat_{name}"]),
                node("Slice", [f"flat_{name}", f"first_{name}", f"end_{name}", "zero"], [f"kept_{name}"]),
                node("Squeeze", [f"kept_{name}", "zero"], [name]),
            ]
        nodes.append(node(of["op"], of["joined"], ["y"], **({"axis": 1} if of["op"] == "Concat" else {})))
        inputs = {"x": (1, ["T", "B", 5])} | ({"lens": (6, ["B"])} if of["lens"] else {})
        written(path, nodes, inputs, {"y": (1, None)}, arrays)
        if change in changes:
            with pytest.raises(gw.FormatError, match=r"directions|sequence_lens"):
                formats.load(path)
            continue
        model = formats.load(path)
        kind = gw.LSTM if of["op"] == "Concat" else gw.Bidirectional
        assert [type(layer) for layer in model] == [kind, gw.Last]
        x = random((7, 3, 5))
        assert_close(model(x), run(path, x=x)["y"], "torch_float32")


def test_steps_in_front_of_turned_axes(path):
    """Zeros in front belong to their axis, wherever it stands later."""
    for at, fits in ((1, True), (2, False)):
        pads = np.zeros(6, np.int64)
        pads[at] = 2
        nodes = [
            node("Pad", ["x", "pads"], ["padded"]), node("Unsqueeze", ["padded", "one"], ["wide"]),
            node("Transpose", ["wide"], ["turned"], perm=[0, 3, 1, 2]), node("Conv", ["turned", "kernel"], ["c"]),
            node("Squeeze", ["c", "two"], ["flat"]), node("Add", ["flat", "bias"], ["channels"]),
            node("Transpose", ["channels"], ["z"], perm=[2, 0, 1]), recurrent("GRU", "z"),
            node("Squeeze", ["all", "one"], ["later"]), node("Transpose", ["later"], ["y"], perm=[1, 0, 2]),
        ]  # fmt: skip
        arrays = weights("GRU", inputs=6) | {
            "pads": pads, "one": np.array([1]), "two": np.array([2]), "kernel": random((6, 5, 1, 3)),
            "bias": random((6, 1)),
        }  # fmt: skip
        written(path, nodes, {"x": (1, ["B", "T", 5])}, {"y": (1, None)}, arrays)
        if not fits:
            with pytest.raises(gw.FormatError, match=r"\(Conv\): steps joined in front"):
                formats.load(path)
            continue
        model = formats.load(path)
        assert [type(layer).__name__ for layer in model] == ["Conv1D", "GRU"]
        x = random((3, 7, 5))
        assert_close(model(x), run(path, x=x)["y"], "torch_float32")


def test_one_kind_of_padding(path):
    for options in ({"auto_pad": "SAME_UPPER"}, {"pads": [1, 1]}, {"auto_pad": "SAME_UPPER", "pads": [1, 1]}):
        nodes = [
            node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]), node("Conv", ["turned", "kernel"], ["c"], **options),
            node("Transpose", ["c"], ["z"], perm=[2, 0, 1]), recurrent("GRU", "z"),
            node("Squeeze", ["all", "one"], ["later"]), node("Transpose", ["later"], ["y"], perm=[1, 0, 2]),
        ]  # fmt: skip
        arrays = weights("GRU", inputs=6) | {"one": np.array([1]), "kernel": random((6, 5, 3))}
        written(path, nodes, {"x": (1, ["B", "T", 5])}, {"y": (1, None)}, arrays)
        if len(options) > 1:  # ONNX Runtime refuses it, too
            with pytest.raises(gw.FormatError, match="auto_pad, pads: expected one of them"):
                formats.load(path)
            continue
        x = random((3, 7, 5))
        assert_close(formats.load(path)(x), run(path, x=x)["y"], "torch_float32")


@pytest.mark.parametrize("masked", [False, True])
def test_loops(masked, path):
    """The loop is named, and not what happens in it; but if it needs a mask, that is."""
    state = helper.make_tensor_value_info("state", 1, None)
    body = helper.make_graph(
        [node("Identity", ["go"], ["going"]),
         node("Where", ["mask" if masked else "go", "state", "state"], ["inside"], name="inside")],
        "body", [helper.make_tensor_value_info("i", 7, []), helper.make_tensor_value_info("go", 9, []), state],
        [helper.make_tensor_value_info("going", 9, []), helper.make_tensor_value_info("inside", 1, None)],
    )  # fmt: skip
    nodes = [
        node("Cast", ["x"], ["numbers"], to=1), node("Equal", ["numbers", "none"], ["mask"], name="mask"),
        node("Less", ["none", "one"], ["go"]), node("Gather", ["table", "x"], ["rows"]),
        node("Loop", ["count", "go", "rows"], ["y"], name="while_loop", body=body),
    ]  # fmt: skip
    arrays = {"none": np.float32(0), "one": np.float32(1), "count": np.array(3), "table": random((20, 5))}
    written(path, nodes, {"x": (7, ["B", "T"])}, {"y": (1, None)}, arrays)
    reason = r"node 'mask' \(Equal\): a mask" if masked else r"node 'while_loop' \(Loop\): a loop"
    with pytest.raises(gw.FormatError, match=reason):
        formats.load(path)


@pytest.mark.parametrize("name", ["ends", "tokens", "around", "chain"])
def test_files_of_tf2onnx(name):
    """What Keras 2.15 gave; tests/data/make_tf2onnx.py says how."""
    path = DATA / f"tf2onnx_{name}.onnx"
    model = formats.load(path)
    assert model.batch_first
    with np.load(DATA / f"tf2onnx_{name}.npz") as found:
        assert_close(model(found["x"]), found["y"], "keras_float32")
        x = found["x"].astype("int32" if name == "tokens" else "float32")
    assert_close(model(x), next(iter(run(path, x=x).values())), "torch_float32")


def test_merged_directions(path):
    """Two directions that are taken apart and added."""
    arrays = weights("GRU", 2) | {"axes": np.array([1])}
    nodes = [
        helper.make_node("GRU", ["x", "W", "R", "B"], ["all"], hidden_size=6, direction="bidirectional"),
        helper.make_node("Split", ["all"], ["one", "two"], axis=1),
        helper.make_node("Squeeze", ["one", "axes"], ["first"]),
        helper.make_node("Squeeze", ["two", "axes"], ["second"]),
    ]
    x = random((7, 3, 5))
    for last, mode in ((("Add", {}), "sum"), (("Mul", {}), "mul"), (("Concat", {"axis": 2}), None)):
        op, options = last
        end = helper.make_node(op, ["first", "second"], ["y"], **options)
        written(path, [*nodes, end], {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, arrays)
        model = formats.load(path)
        if mode:
            assert model[0].merge_mode == mode
        y = model(x) if mode else model(x)[0]
        assert_close(y, run(path, x=x)["y"], "torch_float32")
    swapped = helper.make_node("Concat", ["second", "first"], ["y"], axis=2)
    written(path, [*nodes, swapped], {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, arrays)
    with pytest.raises(gw.FormatError, match="Concat"):
        formats.load(path)


def test_parts_of_the_input(path):
    """A layer that sees a part of the input only is not one that sees all of it."""
    cuts = {"axis": np.array([2]), "first": np.array([0]), "end": np.array([5])}
    for axis in (0, 1, 2):
        arrays = weights("GRU") | cuts | {"axis": np.array([axis])}
        nodes = [
            helper.make_node("Slice", ["x", "first", "end", "axis"], ["part"]),
            helper.make_node("GRU", ["part", "W", "R", "B"], ["y"], hidden_size=6),
        ]
        written(path, nodes, {"x": (1, [9, 9, 9])}, {"y": (1, None)}, arrays)
        with pytest.raises(gw.FormatError):
            formats.load(path)


def test_outputs_beside_the_path(path):
    """A second path is refused, even if nothing but its last state is an output; so is what comes in between."""
    arrays = weights("GRU")
    one = helper.make_node("GRU", ["x", "W", "R", "B"], ["y", "h"], name="one", hidden_size=6)
    two = helper.make_node("GRU", ["x", "W", "R", "B"], ["", "other"], name="two", hidden_size=6)
    end = helper.make_node("Relu", ["y"], ["z"])
    for nodes, outputs in (([one, two], ("y", "other")), ([one, end], ("y", "z"))):
        written(path, nodes, {"x": (1, ["T", "B", 5])}, dict.fromkeys(outputs, (1, None)), arrays)
        with pytest.raises(gw.FormatError, match="outputs"):
            formats.load(path)
    written(path, [one, two], {"x": (1, ["T", "B", 5])}, {"y": (1, None), "h": (1, None)}, arrays)
    assert isinstance(formats.load(path), gw.GRU)


@pytest.mark.parametrize("two", [False, True])
def test_keras_through_tf2onnx(two, path):
    """Its patterns: batch first, zeros of the batch's size, all steps as lengths, the last state as the output."""
    directions = 2 if two else 1
    arrays = weights("LSTM", directions) | {
        "none": np.array(0), "zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "six": np.array([6]),
        "directions": np.array([directions]), "kernel": random((6 * directions, 3)), "bias": random((3,)),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["shape64"]),
        node("Cast", ["shape64"], ["shape"], to=6),
        node("Slice", ["shape64", "zero", "one", "zero"], ["batch"]),
        node("Slice", ["shape", "one", "two", "zero"], ["time"]),
        node("Expand", ["time", "batch"], ["lengths"]),
        node("Concat", ["directions", "batch", "six"], ["state_shape"], axis=0),
        node("ConstantOfShape", ["state_shape"], ["zeros"]),
        node("Transpose", ["x"], ["turned"], perm=[1, 0, 2]),
        node("LSTM", ["turned", "W", "R", "B", "lengths", "zeros", "zeros"], ["", "h"], hidden_size=6,
             direction="bidirectional" if two else "forward"),
    ]  # fmt: skip
    if two:
        nodes += [
            node("Split", ["h"], ["h_one", "h_two"], axis=0),
            node("Squeeze", ["h_one", "zero"], ["forward"]),
            node("Squeeze", ["h_two", "zero"], ["backward"]),
            node("Concat", ["forward", "backward"], ["last"], axis=-1),
        ]
    else:
        nodes.append(node("Squeeze", ["h", "zero"], ["last"]))
    nodes += [
        node("MatMul", ["last", "kernel"], ["product"]),
        node("Add", ["product", "bias"], ["sums"]),
        node("Softmax", ["sums"], ["y"], axis=-1),
    ]
    written(path, nodes, {"x": (1, ["B", "T", 5])}, {"y": (1, None)}, arrays)
    model = formats.load(path)
    assert model.batch_first
    assert [type(layer).__name__ for layer in model] == ["LSTM", "Last", "Dense"]
    x = random((3, 7, 5))
    assert_close(model(x), run(path, x=x)["y"], "torch_float32")


def graph_that_branches(arrays):
    """A sum of two paths, which is no chain, with a node inside a branch."""
    inside = helper.make_graph(
        [
            helper.make_node("Transpose", ["Wt"], ["W2"], perm=[0, 2, 1]),
            helper.make_node("LSTM", ["x", "W2", "R", "B"], ["inner"], name="deep", hidden_size=6),
        ],
        "inside", [], [helper.make_tensor_value_info("inner", 1, None)],
    )  # fmt: skip
    other = helper.make_graph([helper.make_node("Identity", ["flat"], ["outer"])], "other", [],
                              [helper.make_tensor_value_info("outer", 1, None)])  # fmt: skip
    return [
        helper.make_node("Concat", ["W_a", "W_b"], ["W"], axis=1),
        helper.make_node("LSTM", ["x", "W", "R", "B"], ["flat"], name="outside", hidden_size=6),
        helper.make_node("If", ["which"], ["y"], then_branch=inside, else_branch=other),
    ]


def test_node_alone(path):
    arrays = weights("LSTM")
    expected = gw.LSTM(5, 6)
    order = np.r_[0:6, 12:18, 18:24, 6:12]
    expected.load_state_dict({
        "weight_ih_l0": arrays["W"][0][order], "weight_hh_l0": arrays["R"][0][order],
        "bias_ih_l0": arrays["B"][0][:24][order], "bias_hh_l0": arrays["B"][0][24:][order],
    })  # fmt: skip
    stored = {"W_a": arrays["W"][:, :10], "W_b": arrays["W"][:, 10:], "Wt": arrays["W"].transpose(0, 2, 1)}
    stored |= {"R": arrays["R"], "B": arrays["B"]}
    inputs = {"x": (1, ["T", "B", 5]), "which": (9, [])}
    written(path, graph_that_branches(arrays), inputs, {"y": (1, None)}, stored)
    x = random((4, 2, 5))
    for name in ("outside", "deep", "flat", "inner"):
        layer = formats.load(path, node=name)
        np.testing.assert_array_equal(layer(x)[0], expected(x)[0])
    with pytest.raises(gw.FormatError, match=r"'y' \(If\).*takes one of its recurrent nodes alone: 'outside', 'deep'"):
        formats.load(path)
    with pytest.raises(gw.FormatError, match="node: expected one of 'outside', 'deep'"):
        formats.load(path, node="elsewhere")
    with pytest.raises(TypeError, match="node: "):
        formats.load(path, node=3)


# ---- the tests of the onnx package itself


def backend_cases():
    """The tests of LSTM, GRU and RNN of the onnx package, with their weights as inputs."""
    from onnx.backend.test.case import node

    for name in ("lstm", "gru", "rnn"):  # all of them take ten seconds
        importlib.import_module(f"{node.__name__}.{name}")
    return {case.name: case for case in node._NodeTestCases if case.model.graph.node[0].op_type in KINDS}


PASSED = {
    "test_lstm_batchwise", "test_lstm_bidirectional", "test_lstm_defaults", "test_lstm_reverse",
    "test_lstm_with_initial_bias", "test_lstm_with_peepholes", "test_gru_batchwise", "test_gru_bidirectional",
    "test_gru_defaults", "test_gru_reverse", "test_gru_seq_length", "test_gru_with_initial_bias",
    "test_rnn_seq_length", "test_simple_rnn_batchwise", "test_simple_rnn_bidirectional", "test_simple_rnn_defaults",
    "test_simple_rnn_reverse", "test_simple_rnn_with_initial_bias",
}  # fmt: skip


def test_backend_cases(path):
    passed = set()
    for name, case in backend_cases().items():
        model = case.model
        (node,) = model.graph.node
        ((inputs, outputs),) = case.data_sets
        given = {entry.name: one for entry, one in zip(model.graph.input, inputs, strict=True)}
        expected = {entry.name: one for entry, one in zip(model.graph.output, outputs, strict=True)}
        fixed = [one for i, one in enumerate(node.input) if i in (1, 2, 3, 5, 6, 7) and one]
        for entry in [entry for entry in model.graph.input if entry.name in fixed]:
            model.graph.input.remove(entry)
            model.graph.initializer.append(numpy_helper.from_array(given[entry.name], entry.name))
        path.write_bytes(model.SerializeToString())
        model = formats.load(path)
        lens = given.get(node.input[4]) if len(node.input) > 4 else None
        y, after = outcome(model, given[node.input[0]], lengths=lens)
        h, c = after if node.op_type == "LSTM" else (after, None)
        for output, value in expected.items():
            if output == node.output[0]:
                directions = value.shape[2 if model.batch_first else 1]
                actual = y.reshape(*y.shape[:2], directions, -1)
                actual = actual if model.batch_first else actual.swapaxes(1, 2)
            else:
                actual = h if output == node.output[1] else c
                actual = actual.swapaxes(0, 1) if model.batch_first else actual
            assert error(actual, value) < 1e-6, (name, output)
        passed.add(name)
    assert passed == PASSED


# ---- saving


def first_states(path, rows):
    model = onnx.load(path)
    states = [entry for entry in model.graph.input if entry.name.endswith("_in")]
    shapes = {entry.name: [d.dim_value or rows for d in entry.type.tensor_type.shape.dim] for entry in states}
    return {name: random(shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items(), 1)}


def compare_with_runtime(model, path, x):
    """The model, its file in ONNX Runtime and the one that is read again give the same."""
    formats.save(model, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    rows = x.shape[0] if model.batch_first else x.shape[1]
    given = first_states(path, rows)
    chain = model._chain
    parts = [given[f"{kind}{i}_in"] if f"{kind}{i}_in" in given else np.zeros((0, rows, chain.parts[0][1]))
             for i, one in enumerate(chain.states)
             for kind in (("x",) if hasattr(one, "steps") else "hc"[: len(one.parts())])]  # fmt: skip
    state = chain.state_out(parts)
    if isinstance(model, gw.Sequential):
        y, after = model(x, state, return_state=True)
    else:
        y, after = model(x, state)
        after = (after,)
    found = run(path, x=x, **given)
    assert_close(y, found.pop("y"), "torch_float32")
    flat_after = [part for one in after for part in (one if isinstance(one, tuple) else (one,))]
    flat_after = [part for part in flat_after if part.size]
    assert_close(tuple(flat_after), tuple(found.values()), "torch_float32")
    again = formats.load(path)
    result = again(x, state, return_state=True)[0] if isinstance(again, gw.Sequential) else again(x, state)[0]
    assert_close(result, y, "float32")
    return again


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("layers", "two", "bias"), [(1, False, True), (2, False, False), (2, True, True)])
def test_saved_layers(cell, batch_first, layers, two, bias, path):
    options = {"num_layers": layers, "bidirectional": two, "bias": bias, "batch_first": batch_first}
    if cell == "gru_reset_before":
        layer = gw.GRU(5, 6, reset_after=False, seed=1, **options)
    else:
        layer = make_layer(cell, 5, 6, **options)
    again = compare_with_runtime(layer, path, random((4, 3, 5)))
    assert repr(again) == repr(layer)
    for name, value in layer.parameters.items():
        np.testing.assert_array_equal(again.parameters[name], value)


FORMULAS = {
    "gates": {"recurrent_activation": gw.Activation("hard_sigmoid", 0.2, 0.5), "clip": 0.75},
    "names": {"activation": "softsign", "recurrent_activation": "hard_sigmoid"},
    "numbers": {"activation": gw.Activation("scaled_tanh", 1.7159, 0.6667),
                "recurrent_activation": gw.Activation("affine", 0.25, 0.5)},
    "without bounds": {"activation": gw.Activation("leaky_relu", 0.3), "recurrent_activation": "sigmoid"},
    "a threshold": {"activation": gw.Activation("thresholded_relu", 0.125), "clip": 2.0},
    "nothing else": {"clip": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("cell", KINDS)
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("layers", "two"), [(1, False), (2, True)])
def test_saved_formulas(cell, name, layers, two, path):
    """Functions, clip and peepholes of cells."""
    options = dict(FORMULAS[name])
    if cell == "LSTM":
        options |= {"peepholes": name != "names", "output_activation": gw.Activation("elu", 0.5) if two else None}
    if cell == "RNN":
        options["nonlinearity"] = options.pop("activation", "relu")
        options.pop("recurrent_activation", None)
    layer = getattr(gw, cell)(5, 6, layers, bidirectional=two, seed=1, **options)
    again = compare_with_runtime(layer, path, random((4, 3, 5)))
    assert repr(again) == repr(layer)
    for parameter, value in layer.parameters.items():
        np.testing.assert_array_equal(again.parameters[parameter], value)


NETWORKS = {
    "tokens": lambda **o: [gw.Embedding(9, 5), gw.Dropout(), gw.LSTM(5, 6, 2, **o), gw.Last(), gw.Dense(6, 3)],
    "two directions": lambda **o: [gw.LSTM(5, 6, bidirectional=True, **o), gw.Dropout(), gw.Last(), gw.Dense(12, 3)],
    "last of all": lambda **o: [gw.GRU(5, 6, bidirectional=True, **o), gw.Activation("linear"), gw.Last()],
    "sum": lambda **o: [gw.Bidirectional(gw.LSTM(5, 6, bidirectional=True, **o), "sum"), gw.Dense(6, 3)],
    "product": lambda **o: [gw.Bidirectional(gw.LSTM(5, 6, bidirectional=True, **o), "mul"), gw.Last()],
    "average": lambda **o: [gw.Bidirectional(gw.LSTM(5, 6, bidirectional=True, **o), "ave"), gw.Last()],
    "convolutions": lambda **o: [
        gw.Conv1D(5, 6, 3, dilation=2, activation="relu"), gw.Conv1D(6, 4, 4, padding="same"), gw.GRU(4, 6, **o),
        gw.Conv1D(6, 3, 2, bias=False),
    ],
    "normalisations": lambda **o: [
        gw.Normalization(5), gw.LSTM(5, 6, **o), gw.LayerNorm(6), gw.BatchNorm(6), gw.LayerNorm(6, bias=False),
        gw.TimeDistributed(gw.Dense(6, 3, bias=False)), gw.BatchNorm(3, affine=False),
    ],
    "functions": lambda **o: [
        gw.RNN(5, 6, **o),
        *(gw.Dense(6, 6, activation=gw.Activation(name)) for name in ("relu", "tanh", "sigmoid", "softmax", "gelu")),
        gw.Activation("hard_sigmoid"), gw.Activation("elu", 0.3), gw.Activation("leaky_relu", 0.2),
        gw.Activation("softplus"), gw.Activation("gelu"), gw.Activation("softmax"),
    ],
    "other functions": lambda **o: [
        gw.RNN(5, 6, **o),
        *(gw.Dense(6, 6, activation=gw.Activation(name)) for name in ("silu", "selu", "softsign", "thresholded_relu")),
        gw.Activation("silu"), gw.Activation("thresholded_relu", 0.125), gw.Activation("affine", 1.5, 0.25),
        gw.Activation("hard_sigmoid", 0.2, 0.4), gw.Activation("scaled_tanh", 1.7, 0.6),
    ],
    "a function first": lambda **o: [gw.Activation("softmax"), gw.LSTM(5, 6, **o)],
    "a normalisation first": lambda **o: [gw.LayerNorm(5), gw.Activation("silu"), gw.GRU(5, 6, **o)],
    "backwards": lambda **o: [
        gw.Dense(5, 5), gw.Reverse(), gw.LSTM(5, 6, 2, **o), gw.Reverse(), gw.GRU(6, 4, **o), gw.Reverse(), gw.Last(),
    ],
    "backwards from a function on": lambda **o: [gw.Activation("softmax"), gw.Reverse(), gw.Dense(5, 3), gw.Reverse()],
    "backwards alone": lambda **o: [gw.Reverse(), gw.LSTM(5, 6, **o), gw.Last(), gw.Dense(6, 3, activation="silu")],
    "turned round": lambda **o: [gw.Reverse(), gw.Dense(5, 3)],
    "tokens backwards": lambda **o: [gw.Embedding(9, 5), gw.Reverse(), gw.GRU(5, 6, bidirectional=True, **o)],
}  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_saved_networks(name, batch_first, path):
    model = gw.Sequential(NETWORKS[name](batch_first=batch_first), batch_first=batch_first)
    model.load_state_dict({name: np.abs(random(value.shape)) / 4 + 0.1 if "var" in name else random(value.shape) / 3
                           for name, value in model.parameters.items()})  # fmt: skip
    x = np.random.default_rng(0).integers(0, 9, (4, 3)) if "tokens" in name else random((4, 3, 5))
    compare_with_runtime(model, path, x)


def test_saved_float64(path):
    from onnx.reference import ReferenceEvaluator

    layer = gw.GRU(5, 6, dtype="float64")
    formats.save(layer, path)
    x = random((4, 3, 5), "float64")
    y = ReferenceEvaluator(os.fspath(path)).run(["y"], {"x": x, "h0_in": np.zeros((1, 3, 6))})[0]
    assert_close(layer(x)[0], y, "float64")
    np.testing.assert_array_equal(formats.load(path)(x)[0], layer(x)[0])


def test_what_cannot_be_saved(path):
    with pytest.raises(ValueError, match="proj_size"):
        formats.save(gw.LSTM(5, 6, proj_size=3), path)
    for name in ("silu", "gelu", "selu"):
        for layer in (gw.LSTM(5, 6, activation=name), gw.GRU(5, 6, activation=name), gw.RNN(5, 6, nonlinearity=name)):
            with pytest.raises(ValueError, match=rf"layers\[1\]: .*{name}.* got {type(layer).__name__}\(5, 6"):
                formats.save(gw.Sequential([gw.Dense(5, 5), layer]), path)
    with pytest.raises(ValueError, match=r"layers\[0\]: .* got Masking\("):
        formats.save(gw.Sequential([gw.Masking(), gw.LSTM(5, 6)]), path)
    with pytest.raises(ValueError, match=r"layers\[0\]: .* got Embedding\(.*mask_zero=True"):
        formats.save(gw.Sequential([gw.Embedding(9, 5, mask_zero=True), gw.LSTM(5, 6)]), path)
    with pytest.raises(TypeError, match="model: expected Sequential or a layer, got int"):
        formats.save(3, path)
    assert not path.exists()
    formats.save(gw.LSTM(5, 6), path)
    assert os.listdir(path.parent) == [path.name]


# ---- files of bad intent


def test_external_data(path, tmp_path):
    one_node(path, "GRU")
    expected = formats.load(path)
    model = onnx.load(path)
    (tmp_path / "inside").mkdir()
    inside = tmp_path / "inside" / "model.onnx"
    onnx.save_model(model, inside, save_as_external_data=True, location="numbers", size_threshold=0)
    (tmp_path / "numbers").write_bytes((tmp_path / "inside" / "numbers").read_bytes())
    layer = formats.load(inside)
    for name, value in expected.parameters.items():
        np.testing.assert_array_equal(layer.parameters[name], value)
    outside = os.fspath(tmp_path / "numbers")
    (tmp_path / "inside" / "link").symlink_to(outside)
    (tmp_path / "inside" / "folder").mkdir()
    written = onnx.load(inside, load_external_data=False)

    def change(key, value):
        for tensor in written.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == key).value = value
        inside.write_bytes(written.SerializeToString())

    for location in ("../numbers", outside, "link", "folder", "", "..", "./numbers", "missing", "a\0b", "C:numbers"):
        change("location", location)
        with pytest.raises(gw.FormatError, match="external data"):
            formats.load(inside)
    change("location", "numbers")
    for key, value in (("offset", "-8"), ("offset", "9" * 30), ("length", str(2**60)), ("offset", "x")):
        before = written.SerializeToString()
        change(key, value)
        with pytest.raises(gw.FormatError):
            formats.load(inside)
        written.ParseFromString(before)


def test_external_data_beside_the_numbers(path, tmp_path):
    """A place or a length outside of the file, a pipe that nobody writes to, a file that is none."""
    one_node(path, "GRU")
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="numbers", size_threshold=0)
    os.mkfifo(tmp_path / "pipe")
    size = (tmp_path / "numbers").stat().st_size
    for key, value in (
        ("location", "pipe"), ("location", "\n"), ("location", "a" * 5000), ("offset", str(size - 3)),
        ("offset", "1e3"), ("offset", " 0"), ("offset", "1_0"), ("offset", "9" * 5000),
        ("length", "0"), ("length", "-1"),
    ):  # fmt: skip
        model = onnx.load(path, load_external_data=False)
        entries = {entry.key: entry for entry in model.graph.initializer[0].external_data}
        entries.get(key, model.graph.initializer[0].external_data.add(key=key)).value = value
        (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(gw.FormatError, match="external data"):
            formats.load(tmp_path / "changed.onnx")


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_sizes_that_are_not_there(size, path):
    """Numbers that nobody wrote take no memory."""
    arrays = weights("GRU") | {
        "one": np.array([size]),
        "many": np.array([1, size, 6]),
        "zero": np.zeros((1, 1, 1), "f"),
    }
    base = [helper.make_node("GRU", ["x", "W", "R", "B", "", "h"], ["y"], hidden_size=6)]
    for node in (
        helper.make_node("ConstantOfShape", ["many"], ["h"], value=numpy_helper.from_array(np.ones(1, "f"))),
        helper.make_node("Expand", ["W", "one"], ["h"]),
        helper.make_node("Tile", ["W", "many"], ["h"]),
    ):
        written(path, [node, *base], {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, arrays)
        with pytest.raises(gw.FormatError):
            formats.load(path)
    fine = helper.make_node("Expand", ["zero", "many"], ["h"])
    written(path, [fine, *base], {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, arrays)
    assert isinstance(formats.load(path), gw.GRU)
    doubled = [helper.make_node("Concat", [f"d{i}", f"d{i}"], [f"d{i + 1}"], axis=0) for i in range(60)]
    written(path, [*doubled, helper.make_node("Identity", ["d60"], ["h"]), *base], {"x": (1, ["T", "B", 5])},
            {"y": (1, None)}, arrays | {"d0": np.ones(64, "f")})  # fmt: skip
    with pytest.raises(gw.FormatError, match="memory"):
        formats.load(path)


def test_axes_that_are_named_twice(path):
    for axes in ([0, 0], [0, 1, 0], [0, -5]):
        nodes = [
            helper.make_node("Unsqueeze", ["x", "axes"], ["u"]),
            helper.make_node("RNN", ["u", "W", "R"], ["y"], hidden_size=6),
        ]
        written(path, nodes, {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, weights("RNN") | {"axes": np.array(axes)})
        with pytest.raises(gw.FormatError, match=r"Unsqueeze.*axes: expected each of them once"):
            formats.load(path)


def test_many_layers(path):
    """What `save` writes, `load` takes: of many layers, also with more states than a network ever had."""
    for layers in (
        [*(gw.Dense(3, 3, seed=i) for i in range(1250)), gw.RNN(3, 3, seed=0)],
        [*(gw.LSTM(2, 2, seed=i) for i in range(300)), gw.Dense(2, 3, seed=0)],
        [gw.RNN(3, 3, seed=0), *(gw.Activation("tanh") for _ in range(3000))],
    ):
        model = gw.Sequential(layers)
        formats.save(model, path)
        x = random((4, 2, model[0]._stage.input_size))
        again = formats.load(path)
        assert len(again) == len(model)
        assert_close(again(x), model(x), "float32")


def test_time_and_memory_grow_with_the_file(tmp_path):
    """Of nodes that use the same numbers again and again, and of those that make some out of nothing."""
    one_node(tmp_path / "small.onnx", "GRU")
    N, count = helper.make_node, 4000
    large = np.ones((1000, 500), "float32")  # 2 MB
    arrays = {"large": large, "shape": np.array([1000, 500]), "long": np.zeros(250_000, "int64")}
    arrays |= {"W": np.ones((1, 1000, 1000), "float32"), "end": np.array(4000), "zero": np.array(0), "one": np.array(1)}
    arrays |= {"infinite": np.float32(np.inf), "wide": np.ones((1, 200_000), "float32"), "few": np.array([4096])}
    ranges = [N("Range", ["zero", "end", "one"], [f"r{i}"]) for i in range(count * 5)]
    chains = {
        "copies": [N("Transpose", ["large"], ["t"]), *(N("Reshape", ["t", "shape"], [f"r{i}"]) for i in range(count))],
        "sums": [N("Add", ["large", "large"], [f"r{i}"]) for i in range(count)],
        "shapes": [N("Reshape", ["x", "long"], [f"r{i}"]) for i in range(count)],
        "ranges": ranges,
        "filled": [N("ConstantOfShape", ["few"], [f"r{i}"]) for i in range(count * 5)],
        "layers": [N("MatMul", [f"v{i}" if i else "x", "W"], [f"v{i + 1}"]) for i in range(count)],
        "recurrent": [N("RNN", [f"v{i}" if i else "x", "W", "W"], [f"v{i + 1}"]) for i in range(count)],
        "norms": [
            N("MatMul", ["x", "wide"], ["v0"]),
            *(N(op, [f"{name}{i}", *more], [f"{after}{i + step}"])
              for i in range(count)
              for op, more, name, after, step in (("Add", ["infinite"], "v", "u", 0), ("Tanh", [], "u", "v", 1))),
        ],
    }  # fmt: skip
    paths = []
    for name, nodes in chains.items():
        paths.append(tmp_path / f"{name}.onnx")
        end = N("Identity", [nodes[-1].output[0]], ["y"])
        units = 1 if name == "norms" else 1000
        own = arrays | ({"W": arrays["W"][0]} if name == "layers" else {})
        used = {key: array for key, array in own.items() if any(key in node.input for node in nodes)}
        written(paths[-1], [*nodes, end], {"x": (1, ["T", "B", units])}, {"y": (1, None)}, used)
    assert_refused(paths, factor=30, spare=80 << 20, warm_up=tmp_path / "small.onnx")


def test_many_names_and_nodes(tmp_path):
    """Each is looked up once: files of a few MB are refused or taken in seconds."""
    one_node(tmp_path / "small.onnx", "GRU")
    N = helper.make_node
    names = [f"n{i}" for i in range(200_000)]
    unknown = [N("Concat", names, ["y"], axis=0), N("Sum", names, names[1:])]
    bodies = helper.make_graph([N("RNN", ["a"], ["b"]) for _ in range(20_000)], "body", [], [])
    several = [N("Loop", [], [f"l{i}"], body=bodies) for i in range(5)]
    lines = [N("RNN", ["x", "no" * 400, "no"], [f"y{i}"]) for i in range(5000)]
    line = [N("Identity", ["x"], ["v0"])]
    line += [N("Transpose", [f"v{i}"], [f"v{i + 1}"], perm=[0, 1, 2]) for i in range(20_000)]
    split = [N("Split", ["x"], names, axis=0)]
    paths = []
    for i, nodes in enumerate((unknown, several, lines, line, split)):
        paths.append(tmp_path / f"{i}.onnx")
        outputs = {f"out{i}": (1, None) for i in range(2000)} | {"y": (1, None)}
        written(paths[-1], nodes, {"x": (1, [200_000, "B", 5])}, outputs, {})
    assert_refused(paths, factor=30, spare=80 << 20, warm_up=tmp_path / "small.onnx", seconds=40)


def test_many_outputs_of_the_same_states(path, tmp_path):
    N = helper.make_node
    nodes = [N("RNN", ["x", "W", "R"], ["y", "h"]), N("Concat", ["h"] * 20_000, ["states"], axis=0)]
    outputs = {"y": (1, None), "states": (1, None)}
    written(path, nodes, {"x": (1, ["T", "B", 5])}, outputs, weights("RNN", bias=False))
    model = onnx.load(path)
    model.graph.output.extend([model.graph.output[1]] * 20_000)
    path.write_bytes(model.SerializeToString())
    (outcome,) = load_in_child([path], warm_up=one_node(tmp_path / "small.onnx", "GRU"), seconds=30)
    assert (outcome.kind, outcome.peak < 100 << 20) == ("RNN", True)


def test_sizes_that_are_squared(path):
    """Whole numbers of Python would have 2^60 digits in the end."""
    nodes = [helper.make_node("Shape", ["W"], ["s0"])]
    nodes += [helper.make_node("Mul", [f"s{i}", f"s{i}"], [f"s{i + 1}"]) for i in range(60)]
    nodes += [helper.make_node("ConstantOfShape", ["s60"], ["h"])]
    nodes += [helper.make_node("RNN", ["x", "W", "R", "", "", "h"], ["y"], hidden_size=6)]
    written(path, nodes, {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, weights("RNN"))
    with pytest.raises(gw.FormatError, match=r"Mul.*expected sizes of 64 bits"):
        formats.load(path)


def test_branches_inside_branches(path):
    tensor = [helper.make_tensor_value_info("b", 1, None)]
    body = helper.make_graph([helper.make_node("Tanh", ["x"], ["b"])], "b", [], tensor)
    other = helper.make_graph([], "other", [], [])
    for _ in range(20):
        node = helper.make_node("If", ["yes"], ["b"], then_branch=body, else_branch=other)
        body = helper.make_graph([node], "b", [], tensor)
    nodes = [*body.node, helper.make_node("RNN", ["b", "W", "R"], ["y"], hidden_size=6)]
    written(path, nodes, {"x": (1, ["T", "B", 5])}, {"y": (1, None)}, weights("RNN") | {"yes": np.array(True)})
    assert [type(layer) for layer in formats.load(path)] == [gw.Activation, gw.RNN]


def test_files_of_another_kind(path, tmp_path):
    for data in (b"", b"\0" * 100, b"not a model", bytes(range(256))):
        path.write_bytes(data)
        with pytest.raises(gw.FormatError, match=r"model\.onnx: expected an ONNX file"):
            formats.load(path)
    with pytest.raises(gw.FormatError, match="expected a file"):
        formats.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        formats.load(tmp_path / "nothing")
    one_node(path, "GRU", opset=6)
    with pytest.raises(gw.FormatError, match="opset_import"):
        formats.load(path)
    one_node(path, "GRU", opset=1000)
    with pytest.raises(gw.FormatError, match="opset_import"):
        formats.load(path)


def test_mutated_files(path, tmp_path):
    """Whatever happens to a file, there is a model or a FormatError."""
    sources = []
    for two in (False, True):
        export(Network("LSTM", 2, two, True, True, "last").eval(), (torch.randint(20, (2, 3)),), path)
        sources.append(path.read_bytes())
    formats.save(gw.Sequential(NETWORKS["convolutions"]()), path)
    sources.append(path.read_bytes())
    for name in ("functions", "other functions", "backwards"):
        formats.save(gw.Sequential(NETWORKS[name]()), path)
        sources.append(path.read_bytes())
    formats.save(gw.LSTM(5, 6, peepholes=True, bidirectional=True, **FORMULAS["numbers"]), path)
    sources.append(path.read_bytes())
    export(torch.nn.Sequential(torch.nn.LayerNorm(5), torch.nn.SiLU()), (torch.randn(2, 3, 5),), path, opset=13)
    sources.append(path.read_bytes())
    one_node(path, "LSTM", 2, peepholes=True, input_forget=1, clip=0.5, lens=True)
    sources.append(path.read_bytes())
    sources += [(DATA / f"tf2onnx_{name}.onnx").read_bytes() for name in ("ends", "around", "chain")]
    generator = chance.Random(0)
    refused = 0
    for _ in range(2000):
        data = bytearray(generator.choice(sources))
        # The names and numbers of the graph stand in front of the weights.
        for _change in range(generator.randint(1, 6)):
            place = generator.randrange(len(data))
            what = generator.randrange(4)
            if what == 0:
                data[place] = generator.randrange(256)
            elif what == 1:
                data[place] ^= 1 << generator.randrange(8)
            elif what == 2:
                del data[place : place + generator.randint(1, 9)]
            else:
                other = generator.randrange(len(data))
                data[place : place + 16] = data[other : other + 16]
        path.write_bytes(data)
        try:
            formats.load(path, node=generator.choice([None, None, None, "GRU_1", "/recurrent/LSTM", "node"]))
        except gw.FormatError:
            refused += 1
    assert refused > 500


# ---- what is almost what a layer does


def lstm_nodes(directions=1):
    """An LSTM of 4 inputs and 3 units, Y, h and c, with Y as y [5, 3, 3] where it has one direction."""
    generator = np.random.default_rng(0)
    shapes = {"W": (directions, 12, 4), "R": (directions, 12, 3), "B": (directions, 24)}
    arrays = {name: generator.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    direction = "forward" if directions == 1 else "bidirectional"
    nodes = [helper.make_node("LSTM", [*"xWRB"], ["Y", "h", "c"], hidden_size=3, direction=direction)]
    if directions == 1:
        nodes.append(helper.make_node("Squeeze", ["Y", "one"], ["y"]))
    return nodes, arrays | {"one": np.array([1]), "zero": np.array([0]), "two": np.array([2])}


def write_graph(path, nodes, arrays, outputs, opset=13):
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [5, 3, 4])]
    named = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, named, held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


N = helper.make_node
ALMOST = {
    "another order of axes": ([N("Transpose", ["y"], ["o"], perm=[1, 0, 2])], ["o"]),
    "another order of units": ([N("Transpose", ["y"], ["o"], perm=[0, 2, 1])], ["o"]),
    "the data as the first state": (
        [N("Slice", ["x", "zero", "one", "zero"], ["s"]),
         N("LSTM", ["x", "W4", "W4", "", "", "s"], ["o"], hidden_size=4)], ["o"],
    ),
    "numbers cut off": (
        [N("Cast", ["x"], ["i"], to=7), N("Cast", ["i"], ["f"], to=1),
         N("LSTM", ["f", "W", "R", "B"], ["o"], hidden_size=3)], ["o"],
    ),
    "a bias along the batch": (
        [N("Squeeze", ["h", "zero"], ["k"]), N("Gemm", ["k", "square", "column"], ["o"])], ["o"],
    ),
    "a factor and then a bound": (
        [N("Min", ["y", "half"], ["m"]), N("Mul", ["m", "half"], ["n"]), N("Max", ["n", "null"], ["o"])], ["o"],
    ),
    "a state that something was made of": ([N("Mul", ["h", "half"], ["o"])], ["o", "y"]),
    "what is not understood in front": ([N("Concat", ["h", "c"], ["o"], axis=2)], ["o", "y"]),
    "the input in front": ([N("Transpose", ["x"], ["o"], perm=[1, 0, 2])], ["o", "y"]),
    "a number that repeats the data": (
        [N("ConstantOfShape", ["shape"], ["k"]), N("Add", ["h", "k"], ["o"])], ["o"],
    ),
    "an order of axes and nothing else": ([N("Transpose", ["x"], ["o"], perm=[1, 0, 2])], ["o"]),
    "two turns and nothing else": (
        [N("Slice", ["x", "last", "least", "zero", "last"], ["r"]), N("Slice", ["r", "last", "least", "zero", "last"],
         ["o"])], ["o"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALMOST)
def test_what_is_almost_a_layer(name, tmp_path):
    """It is refused."""
    more, outputs = ALMOST[name]
    nodes, arrays = lstm_nodes()
    arrays |= {
        "half": np.float32(0.5), "null": np.float32(0), "square": np.eye(3, dtype="float32"), "last": np.array([-1]),
        "column": np.arange(3, dtype="float32")[:, None], "least": np.array([-(2**62)]),
        "shape": np.array([7, 3, 3]), "W4": np.eye(16, 4, dtype="float32")[None],
    }  # fmt: skip
    with pytest.raises(gw.FormatError):
        gw.load(write_graph(tmp_path / "m.onnx", [*nodes, *more], arrays, outputs))


def test_directions_are_not_mixed(tmp_path):
    """Y with the directions where the units belong, and each of them half as large before they are multiplied."""
    nodes, arrays = lstm_nodes(2)
    wide = N("Reshape", ["Y", "shape"], ["o"])
    halves = [N("Mul", ["Y", "half"], ["a"]), N("ReduceProd", ["a"], ["o"], axes=[1], keepdims=0)]
    arrays |= {"shape": np.array([5, 3, 6]), "half": np.float32(0.5)}
    for more in ([wide], halves):
        with pytest.raises(gw.FormatError):
            gw.load(write_graph(tmp_path / "m.onnx", [*nodes, *more], arrays, ["o"]))


def test_norms_that_train(tmp_path):
    """Before version 14 more than one output says so."""
    nodes, arrays = lstm_nodes()
    of = ["y", *(f"n{i}" for i in range(4))]
    arrays |= {name: np.ones(3, "float32") for name in of[1:]}
    nodes = [nodes[0], N("Squeeze", ["Y"], ["y"], axes=[1])]
    norm = N("BatchNormalization", of, ["o", "a", "b", "c1", "d"])
    with pytest.raises(gw.FormatError, match="training_mode"):
        gw.load(write_graph(tmp_path / "m.onnx", [*nodes, norm], arrays, ["o"], opset=9))


def test_reasons_do_not_grow(tmp_path):
    """Of nodes with long names behind one that is not known."""
    nodes, arrays = lstm_nodes()
    chain = [N("Det", ["x"], ["v0"], name="n" * 1000)]
    chain += [N("LSTM", [f"v{i}", "W", "R", "B"], [f"v{i + 1}"], name="n" * 1000, hidden_size=3) for i in range(50)]
    with pytest.raises(gw.FormatError) as caught:
        gw.load(write_graph(tmp_path / "m.onnx", [*nodes, *chain], arrays, ["v50"]))
    assert len(str(caught.value)) < 25_000
