"""Cells with other functions than PyTorch's, clipped sums and peepholes, against the reference, on every backend."""

import copy
import pickle

import gatewise as gw
import numpy as np
import pytest
from conftest import assert_same_bits, cell_of, functions_of, make_layer, make_state, map_state, random
from gatewise import reference
from gatewise.running import network as networks
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("backend")

KERAS_1 = gw.Activation("hard_sigmoid", 0.2, 0.5)
FUNCTIONS = sorted(set(reference.ACTIVATIONS) - {"softmax", "exp"})
FORMULAS = [
    ("lstm", {"recurrent_activation": KERAS_1}),
    ("lstm", {"activation": "softsign", "output_activation": "relu"}),
    ("lstm", {"activation": "relu", "recurrent_activation": "hard_sigmoid"}),
    ("lstm", {"peepholes": True}),
    ("lstm", {"peepholes": True, "clip": 0.4, "recurrent_activation": gw.Activation("affine", 0.3, 0.5)}),
    ("lstm", {"peepholes": True, "proj_size": 3, "activation": gw.Activation("scaled_tanh", 1.7159, 2 / 3)}),
    ("gru", {"recurrent_activation": KERAS_1}),
    ("gru", {"activation": "silu", "clip": 0.4}),
    ("gru", {"recurrent_activation": KERAS_1, "reset_after": False}),
    ("gru", {"activation": "selu", "clip": 0.4, "reset_after": False}),
    ("rnn", {"nonlinearity": gw.Activation("leaky_relu", 0.2)}),
    ("rnn", {"nonlinearity": "tanh", "clip": 0.4}),
    ("rnn", {"nonlinearity": "relu", "clip": 0.4}),
]
EACH = pytest.mark.parametrize(("cell", "options"), FORMULAS, ids=str)


def run_reference(layer, x, state, **options):
    weights = {name: value.astype(np.float64) for name, value in layer.parameters.items()}
    output, after, _ = reference.forward(
        cell_of(layer), x.astype(np.float64), map_state(lambda part: part.astype(np.float64), state), weights,
        num_layers=layer.num_layers, bidirectional=layer.bidirectional, functions=functions_of(layer), **options,
    )  # fmt: skip
    return output, after


@EACH
@pytest.mark.parametrize(("hidden", "batch"), [(1, 1), (17, 3), (33, 14)], ids=str)
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)], ids=str)
def test_reference(cell, options, dtype, hidden, batch, layers, bidirectional):
    if hidden <= options.get("proj_size", 0):
        options = options | {"proj_size": 0}
    layer = make_layer(cell, 6, hidden, layers, bidirectional=bidirectional, dtype=dtype, **options)
    x, state = 2 * random((5, batch, 6), dtype), make_state(layer, batch)
    lengths = np.random.default_rng(1).integers(0, 6, batch)
    for options in ({}, {"lengths": lengths}, {"resets": random((5, batch), dtype) > 1}):
        y, after = layer(x, state, **options)
        expected, expected_after = run_reference(layer, x, state, **options)
        assert_close(y, expected, dtype)
        assert_close(after, expected_after, dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_in_a_cell(name, dtype):
    for layer in (
        make_layer("lstm", 4, 9, dtype=dtype, activation=name, output_activation="tanh", recurrent_activation=name),
        make_layer("gru", 4, 9, dtype=dtype, activation=name, recurrent_activation="hard_sigmoid"),
        make_layer("rnn", 4, 9, dtype=dtype, nonlinearity=name),
    ):
        x, state = random((3, 2, 4), dtype) / 2, make_state(layer, 2)
        assert_close(layer(x, state)[0], run_reference(layer, x, state)[0], dtype)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
def test_own_functions_have_their_bits(cell, dtype):
    """By the road of other functions, on which nothing else is other."""
    options = {"reset_after": False} if cell == "gru_reset_before" else {}
    kind = cell.removesuffix("_reset_before")
    plain = make_layer(kind, 5, 37, 2, bidirectional=True, dtype=dtype, **options)
    cut = make_layer(kind, 5, 37, 2, bidirectional=True, dtype=dtype, clip=1e30, **options)
    x, lengths = random((6, 5, 5), dtype), [6, 0, 3, 6, 1]
    assert_same_bits(cut(x, lengths=lengths), plain(x, lengths=lengths))
    if kind == "lstm":
        peeping = make_layer(kind, 5, 37, 2, bidirectional=True, dtype=dtype, peepholes=True)
        peeping.load_state_dict(
            {name: plain.parameters.get(name, np.zeros_like(value)) for name, value in peeping.parameters.items()}
        )
        assert_same_bits(peeping(x, lengths=lengths), plain(x, lengths=lengths))


@EACH
def test_the_same_bits(cell, options, dtype, use_threads):
    """In any batch, by any number of threads, step by step."""
    layer = make_layer(cell, 6, 37, 2, dtype=dtype, **options)
    x = random((7, 14, 6), dtype)
    y, state = layer(x)
    for threads in (1, 2, 3):
        use_threads(threads)
        assert_same_bits(layer(x), (y, state))
    assert_same_bits(layer(x[:, 5]), (y[:, 5], map_state(lambda part: part[:, 5], state)))
    stream = layer.stream(batch_size=14)
    assert_same_bits(np.stack([stream.step(row) for row in x]), y)
    window = layer.stream(window=3)
    for t in range(7):
        assert_same_bits(window.step(x[t, 0]), layer(x[max(0, t - 2) : t + 1, 0])[0][-1])


def test_nan_stays_in_its_row_and_its_past(dtype):
    layer = make_layer("lstm", 3, 9, dtype=dtype, peepholes=True, clip=2, recurrent_activation=KERAS_1)
    x = random((4, 3, 3), dtype)
    y, _ = layer(x)
    x[2, 1, 0] = np.nan
    spoilt, (_, c) = layer(x)
    assert np.isnan(spoilt[2:, 1]).all()
    assert np.isnan(c[:, 1]).all()
    y[2:, 1] = spoilt[2:, 1]
    assert np.array_equal(spoilt, y, equal_nan=True)


@EACH
def test_it_is_kept(cell, options, tmp_path):
    """By its options, pickled, copied and in files; and told by its repr."""
    layer = make_layer(cell, 3, 7, 2, bidirectional=True, **options)
    x = random((4, 3), "float32")
    gw.save(layer, tmp_path / "layer.safetensors")
    others = [
        pickle.loads(pickle.dumps(layer)), copy.copy(layer), copy.deepcopy(layer),
        gw.load(tmp_path / "layer.safetensors"), eval(repr(layer), vars(gw)),
    ]  # fmt: skip
    others[-1].load_state_dict(layer.state_dict())
    for other in others:
        assert repr(other) == repr(layer)
        for name, value in options.items():
            assert repr(getattr(other, name)) == repr(getattr(layer, name)), name
            assert repr(value) in (repr(getattr(layer, name)), f"{getattr(layer, name)!r}".removesuffix(".0"))
        assert_same_bits(other(x), layer(x))


@EACH
def test_it_does_not_train(cell, options):
    layer = make_layer(cell, 3, 7, **options)
    for name in ("record", "trace"):
        with pytest.raises(ValueError, match=f"^{name}: expected .* is for inference only$"):
            getattr(layer, name)(np.zeros((2, 1, 3)))
    with pytest.raises(ValueError, match=r"^input_gradient: expected"):
        layer.input_gradient(np.zeros((2, 1, 3)), 0)


def test_plain_options_train():
    """Names that say what is there anyway make no other cell."""
    layer = gw.LSTM(3, 4, activation="tanh", recurrent_activation="sigmoid", output_activation="tanh", peepholes=False)
    assert repr(layer) == "LSTM(3, 4)"
    layer.record(np.zeros((2, 1, 3))).backward(np.zeros((2, 1, 4)))
    gw.RNN(3, 4, nonlinearity="relu").record(np.zeros((2, 1, 3)))


def test_peepholes_are_parameters():
    layer = gw.LSTM(3, 4, 2, bidirectional=True, peepholes=True, seed=0)
    names = [name for name in layer.parameters if "weight_ch" in name]
    assert names == ["weight_ch_l0", "weight_ch_l0_reverse", "weight_ch_l1", "weight_ch_l1_reverse"]
    assert layer.parameters["weight_ch_l0"].shape == (12,)
    before = layer(np.ones((3, 1, 3)))[0]
    layer.parameters["weight_ch_l0"] = np.zeros(12)
    assert not np.array_equal(layer(np.ones((3, 1, 3)))[0], before)
    assert "weight_ch_l0" not in gw.LSTM(3, 4).parameters


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        (gw.LSTM, {"activation": "swish"}, "activation: expected linear, affine, .*, got 'swish'"),
        (gw.LSTM, {"activation": None}, "activation: expected a name or an Activation, got NoneType"),
        (gw.LSTM, {"recurrent_activation": "softmax"}, "recurrent_activation: expected a function of one element"),
        (gw.LSTM, {"output_activation": 3}, "output_activation: expected a name or an Activation, got int"),
        (gw.LSTM, {"clip": -1}, "clip: expected a number from 0, got -1"),
        (gw.LSTM, {"clip": np.nan}, "clip: expected a number from 0, got nan"),
        (gw.LSTM, {"peepholes": 1}, "peepholes: expected True or False, got 1"),
        (gw.GRU, {"activation": gw.Activation("softmax")}, "activation: expected a function of one element"),
        (gw.RNN, {"nonlinearity": "softmax"}, "nonlinearity: expected a function of one element"),
        (gw.RNN, {"nonlinearity": "sine"}, "nonlinearity: expected linear, .*, got 'sine'"),
    ],
    ids=str,
)
def test_wrong_options(kind, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        kind(3, 4, **options)


def test_masked_tokens_in_streams(monkeypatch):
    """With the table into which the embedding and the layer after it merge, and without it."""
    model = gw.Sequential([gw.Embedding(11, 4, mask_zero=True, seed=0), gw.LSTM(4, 5, seed=1)])
    tokens = np.array([3, 0, 4, 0, 0, 1])
    y = model(tokens)
    stream = model.stream()
    assert_same_bits(np.stack([stream.step(token) for token in tokens]), y)
    monkeypatch.setattr(networks, "MAX_TABLE_BYTES", 0)
    stream = copy.deepcopy(model).stream()
    assert_same_bits(np.stack([stream.step(token) for token in tokens]), y)
    assert not y[[1, 3, 4]].any()
    assert_same_bits(y[[0, 2, 5]], model(tokens[[0, 2, 5]]))
