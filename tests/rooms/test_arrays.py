"""What the outside hands over: arrays that hide numbers or are none, and pickles whose memory belongs to others."""

import copy
import itertools
import pickle

import gatewise as gw
import numpy as np
import pytest
from conftest import assert_same_bits, random

MODELS = {
    "LSTM": lambda: gw.LSTM(3, 5, num_layers=2, seed=1),
    "projection": lambda: gw.LSTM(3, 5, proj_size=2, seed=2),
    "peepholes": lambda: gw.LSTM(3, 5, peepholes=True, seed=3),
    "GRU": lambda: gw.GRU(3, 5, dtype="float64", seed=4),
    "RNN": lambda: gw.RNN(3, 5, seed=5),
    "Dense": lambda: gw.Sequential([gw.Dense(3, 5, seed=6)]),
    "Conv1D": lambda: gw.Sequential([gw.Conv1D(3, 5, 2, seed=7)]),
    "norms": lambda: gw.Sequential([gw.BatchNorm(3), gw.LayerNorm(3), gw.Normalization(3)]),
    "Embedding": lambda: gw.Sequential([gw.Embedding(9, 3, seed=8), gw.GRU(3, 5, seed=9), gw.Dense(5, 2, seed=10)]),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def input_of(model):
    if getattr(model, "layers", None) and isinstance(model[0], gw.Embedding):
        return np.random.default_rng(0).integers(0, 9, (6, 2))
    return random((6, 2, 3), model.dtype)


def pickled(model):
    """A pickle, and the bytes that travel beside it."""
    buffers = []
    text = pickle.dumps(model, 5, buffer_callback=buffers.append)
    return text, [bytes(buffer.raw()) for buffer in buffers]


# -----------------------------------------------------------------------------------------------------------
# Pickles


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("name", MODELS)
def test_unpickled_at_any_address(name, offset):
    """Frames are cut out of one message, where they begin anywhere."""
    model = MODELS[name]()
    text, frames = pickled(model)
    buffers = []
    for frame in frames:
        memory = bytearray(len(frame) + 64)
        begin = -np.frombuffer(memory, np.uint8).ctypes.data % 32 + offset
        memory[begin : begin + len(frame)] = frame
        buffers.append(memoryview(memory)[begin : begin + len(frame)])
    made, x = pickle.loads(text, buffers=buffers), input_of(model)
    assert_same_bits(first(made(x)), first(model(x)))
    assert_same_bits(made.stream(2).run(x), model.stream(2).run(x))
    assert_same_bits(made.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["model", "stream", "copies"])
@pytest.mark.parametrize("name", MODELS)
def test_unpickled_weights_are_nobody_elses(name, kind, tmp_path):
    """The message's memory is used again, or the file that was mapped is written to: nothing changes."""
    model = MODELS[name]()
    x = input_of(model)
    objects = {"model": model, "stream": model.stream(2), "copies": [model, copy.deepcopy(model)]}[kind]
    text, frames = pickled(objects)
    path = tmp_path / "buffers"
    path.write_bytes(b"".join(frames))
    mapped, offsets = np.memmap(path, np.uint8, "r+"), np.cumsum([0, *map(len, frames)])
    made = pickle.loads(text, buffers=[mapped[begin:end] for begin, end in itertools.pairwise(offsets)])
    mapped[:] = 255
    mapped.flush()
    if kind == "stream":
        made.reset()
        assert_same_bits(made.run(x), model.stream(2).run(x))
        return
    for loaded in made if kind == "copies" else [made]:
        assert_same_bits(first(loaded(x)), first(model(x)))
        assert_same_bits(first(copy.deepcopy(loaded)(x)), first(model(x)))
        assert_same_bits(loaded.state_dict(), model.state_dict())
        assert not any(np.shares_memory(array, mapped) for array in loaded.parameters.values())
        assert not any(array.flags.writeable for array in loaded.parameters.values())


# -----------------------------------------------------------------------------------------------------------
# Arrays that are not what they seem


def test_masked_arrays():
    """Their mask is no mask here: what is masked would be computed with."""
    layer, x, tokens = gw.GRU(3, 4, seed=1), random((6, 2, 3), "float32"), np.array([[1, 2], [0, 3]])
    network, pool = gw.Sequential([gw.Embedding(5, 3, seed=0), layer]), layer.pool(4)
    slots = [pool.open() for _ in range(2)]
    hidden = np.ma.masked_array(x, np.zeros(x.shape, bool))
    assert_same_bits(layer(hidden)[0], layer(x)[0])  # nothing is masked
    hidden[2, 1] = np.ma.masked
    state = np.ma.masked_less(random((1, 2, 4), "float32"), 0)
    bias = np.ma.masked_equal(np.zeros(12, np.float32), 0)
    calls = {
        "x": [
            lambda: layer(hidden), lambda: layer(list(hidden)), lambda: layer(hidden, out=np.empty((6, 2, 4), "f4")),
            lambda: layer.record(hidden), lambda: layer.trace(hidden), lambda: layer.stream(2).step(hidden[2]),
            lambda: layer.stream(2).run(hidden), lambda: pool.step(hidden[2], slots),
            lambda: network(np.ma.masked_equal(tokens, 0)),
        ],
        "out": [lambda: layer(x, out=np.ma.masked_equal(np.zeros((6, 2, 4), "f4"), 0))],
        "state": [lambda: layer(x, state)],
        "bias_ih_l0": [
            lambda: layer.parameters.update({"bias_ih_l0": bias}),
            lambda: layer.load_state_dict(layer.state_dict() | {"bias_ih_l0": bias}),
        ],
        "lengths": [lambda: layer(x, lengths=np.ma.masked_equal([0, 6], 0))],
        "resets": [lambda: layer(x, resets=np.ma.masked_equal(np.zeros((6, 2)), 0))],
        "grad_output": [lambda: layer.record(x).backward(np.ma.masked_less(random((6, 2, 4), "float32"), 0))],
        r"sequences\[1\]": [lambda: gw.pad([x[:, 0], hidden[:, 1]])],
    }  # fmt: skip
    for name, ways in calls.items():
        for call in ways:
            with pytest.raises(TypeError, match=rf"^{name}: expected an array without a mask, got a masked array"):
                call()


@pytest.mark.parametrize(
    "value",
    [None, {1.0}, object(), "text", b"bytes", {"x": 1}, (i for i in range(3))],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_array_is_named(value):
    name = type(value).__name__
    with pytest.raises(TypeError, match=rf"^x: expected .*, got ({name}|<U4|\|S5)$"):
        gw.GRU(3, 4)(value)


def test_parameters_of_pytorch():
    """Tensors that need gradients, and those of bfloat16, are weights; as input they would lose the gradient."""
    torch = pytest.importorskip("torch")
    module, layer = torch.nn.LSTM(3, 4), gw.LSTM(3, 4)
    layer.load_state_dict(dict(module.named_parameters()))
    expected = {name: value.numpy() for name, value in module.state_dict().items()}
    assert_same_bits(layer.state_dict(), expected)
    network = gw.Sequential([gw.LSTM(3, 4)])
    network.parameters.update({f"0.{name}": value for name, value in module.named_parameters()})
    assert_same_bits(network[0].state_dict(), expected)
    half = torch.nn.Parameter(module.weight_ih_l0.bfloat16())
    layer.parameters["weight_ih_l0"] = half
    assert_same_bits(layer.parameters["weight_ih_l0"], half.detach().float().numpy())
    with torch.no_grad():
        half += 1  # a copy was taken
    assert layer.parameters["weight_ih_l0"].max() < 1
    with pytest.raises(TypeError, match=r"x: expected an array, got Tensor .*requires grad"):
        layer(torch.zeros(2, 1, 3, requires_grad=True))
