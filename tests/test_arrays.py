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


@pytest.mark.parametrize("of", ["model", "stream", "copies"])
@pytest.mark.parametrize("name", MODELS)
def test_unpickled_weights_are_nobody_elses(name, of, tmp_path):
    """The message's memory is used again, or the file that was mapped is written to: nothing changes."""
    model = MODELS[name]()
    x = input_of(model)
    whole = {"model": model, "stream": model.stream(2), "copies": [model, copy.deepcopy(model)]}[of]
    text, frames = pickled(whole)
    path = tmp_path / "buffers"
    path.write_bytes(b"".join(frames))
    mapped, ends = np.memmap(path, np.uint8, "r+"), np.cumsum([0, *map(len, frames)])
    made = pickle.loads(text, buffers=[mapped[begin:end] for begin, end in itertools.pairwise(ends)])
    mapped[:] = 255
    mapped.flush()
    if of == "stream":
        made.reset()
        assert_same_bits(made.run(x), model.stream(2).run(x))
        return
    for one in made if of == "copies" else [made]:
        assert_same_bits(first(one(x)), first(model(x)))
        assert_same_bits(first(copy.deepcopy(one)(x)), first(model(x)))
        assert_same_bits(one.state_dict(), model.state_dict())
        assert not any(np.shares_memory(array, mapped) for array in one.parameters.values())
        assert not any(array.flags.writeable for array in one.parameters.values())
