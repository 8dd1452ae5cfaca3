"""Every layer, option and activation in every format: what comes back computes the same, or the format lacks it.

Which of them a format lacks is told here once more, so that nothing is refused that could be saved.
"""

import gatewise as gw
import numpy as np
import pytest
from conftest import random
from gatewise.activations import NUMBERS
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
