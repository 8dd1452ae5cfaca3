"""Sequential: against the reference layer by layer and against PyTorch; its streams, windows and pools bit by bit."""

import copy
import pickle
import sys
import threading

import gatewise as gw
import numpy as np
import pytest
import torch
from conftest import assert_same_bits, cell_of, functions_of, make_layer, make_state, random
from gatewise import reference
from gatewise.running import network as networks
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

NORMS = (gw.LayerNorm, gw.BatchNorm, gw.Normalization)
RECURRENT = (gw.LSTM, gw.GRU, gw.RNN)
NO_SIZES = (gw.Activation, gw.Dropout, gw.Last, gw.Masking, gw.Reverse)  # of as many units as come in
ACTIVATIONS = [name for name in reference.ACTIVATIONS if name != "exp"]


# -----------------------------------------------------------------------------------------------------------
# The reference of a model


def fill(model):
    """Weights of a size at which nothing saturates, and variances that are positive."""
    rng = np.random.default_rng(3)
    for name, value in model.parameters.items():
        drawn = rng.uniform(-1, 1, value.shape) / np.sqrt(value.shape[1] if value.ndim > 1 else 1)
        model.parameters[name] = np.abs(drawn) + 0.1 if "var" in name else drawn
    return model


def inner(layer):
    return layer.layer if isinstance(layer, (gw.TimeDistributed, gw.Bidirectional)) else layer


def activated(activation, x):
    return reference.ACTIVATIONS[activation.name](x, *activation.function.numbers)


def run_reference(model, x, states=None, lengths=None, resets=None):
    """The output and the states of each layer that has one, in float64; x (T, B, I) or tokens (T, B)."""
    states = list(states or [])
    after, ended, masked = [], False, None
    directions, mode = None, "concat"  # the outputs of two directions before they are merged, for a Last after them
    for layer in model.layers:
        recurrent = inner(layer)
        weights = {name: value.astype(np.float64) for name, value in recurrent.parameters.items()}
        weight, bias = weights.get("weight"), weights.get("bias")
        if isinstance(recurrent, gw.Masking) or getattr(recurrent, "mask_zero", False):
            masked = x == 0 if isinstance(recurrent, gw.Embedding) else (x == recurrent.mask_value).all(-1)
            if lengths is not None:
                masked |= np.arange(len(x))[:, None] >= np.asarray(lengths)
            rows = x[..., None] if isinstance(recurrent, gw.Embedding) else x
            rows, lengths = reference.leave_out(rows, masked)
            x = rows[..., 0] if isinstance(recurrent, gw.Embedding) else rows
        if isinstance(recurrent, RECURRENT):
            before = states.pop(0) if states else None
            x, state, _ = reference.forward(
                cell_of(recurrent),
                x,
                before,
                weights,
                num_layers=recurrent.num_layers,
                bidirectional=recurrent.bidirectional,
                lengths=lengths,
                resets=resets,
                functions=functions_of(recurrent),
            )
            after.append(state)
            directions = None
            if recurrent.bidirectional:
                directions, mode = x, getattr(layer, "merge_mode", "concat")
                x = reference.merge(x, mode)
        elif isinstance(recurrent, gw.Last):
            if directions is None:
                x = reference.last(x, lengths)
            else:
                x = reference.merge(reference.last(directions, lengths, both_ends=True), mode)
            ended = True
        elif isinstance(recurrent, (gw.Dropout, gw.Masking)):
            continue
        elif isinstance(recurrent, gw.Reverse):
            x, directions = reference.reverse(x, lengths), None
        else:
            directions = None
            if isinstance(recurrent, gw.Embedding):
                x = weight[x]
            elif isinstance(recurrent, gw.Dense):
                x = activated(recurrent.activation, reference.dense(x, weight, bias))
            elif isinstance(recurrent, gw.Activation):
                x = activated(recurrent, x)
            elif isinstance(recurrent, gw.Conv1D):
                reach = (recurrent.kernel_size - 1) * recurrent.dilation
                causal = recurrent.padding == "causal" or reach == 0
                history = states.pop(0) if states and causal else None
                if causal:
                    after.append(np.zeros((reach, x.shape[1], x.shape[2])))
                x = reference.convolution(
                    x,
                    weight,
                    bias,
                    dilation=recurrent.dilation,
                    before=reach if causal else reach // 2,
                    history=history,
                    lengths=lengths,
                    resets=resets,
                )
                x = activated(recurrent.activation, x)
            elif isinstance(recurrent, gw.LayerNorm):
                x = reference.layer_norm(x, weight, bias, recurrent.eps)
            elif isinstance(recurrent, gw.BatchNorm):
                deviation = np.sqrt(weights["running_var"] + recurrent.eps)
                x = reference.normalize(x, weights["running_mean"], deviation, weight, bias)
            else:
                deviation = np.maximum(np.sqrt(weights["variance"]), 1e-7)
                x = reference.normalize(x, weights["mean"], deviation)
    if lengths is not None and not ended:
        x = np.where(np.arange(len(x))[:, None, None] < np.asarray(lengths)[:, None], x, 0)
        x = x if masked is None else reference.put_back(x, masked)
    return x, after


# -----------------------------------------------------------------------------------------------------------
# Random models


@st.composite
def formulas(draw, kind):
    """Options that make a recurrent layer another one than PyTorch's, or none."""
    if draw(st.booleans()):
        return {}
    names = st.sampled_from(sorted(set(ACTIVATIONS) - {"softmax", "linear"}))
    if kind is gw.RNN:
        options = {"nonlinearity": draw(st.sampled_from(["relu", "sigmoid", "softsign", "hard_sigmoid"]))}
    else:
        gate = draw(st.sampled_from(["sigmoid", "hard_sigmoid", gw.Activation("hard_sigmoid", 0.2, 0.5)]))
        options = {"activation": draw(names), "recurrent_activation": gate}
    if kind is gw.LSTM:
        options |= {"peepholes": draw(st.booleans()), "output_activation": draw(st.sampled_from([None, "tanh"]))}
    return options | {"clip": draw(st.sampled_from([None, 0.5, 3.0]))}


@st.composite
def models(draw, streams=False):
    """Layers of any kind and width; `streams`: none that looks ahead."""
    dtype = draw(st.sampled_from(["float32", "float64"]))
    size = st.integers(1, 21)
    layers, units, ended = [], draw(size), False
    if draw(st.booleans()):
        layers.append(gw.Embedding(draw(st.integers(1, 30)), units, mask_zero=draw(st.booleans()), dtype=dtype))
    elif draw(st.booleans()):
        layers.append(gw.Masking(draw(st.sampled_from([0.0, -1.5]))))
    kinds = ["dense", "activation", "layer_norm", "batch_norm", "normalization", "dropout"]
    timed = ["lstm", "gru", "rnn", "last", "convolution"] + ([] if streams else ["both", "same", "reverse"])
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(kinds if ended else kinds + timed * 2))
        wide = draw(size)
        activation = gw.Activation(draw(st.sampled_from(ACTIVATIONS)))
        if kind == "dense":
            layers.append(gw.Dense(units, wide, bias=draw(st.booleans()), activation=activation, dtype=dtype))
            if draw(st.booleans()):
                layers[-1] = gw.TimeDistributed(layers[-1])
            units = wide
        elif kind in ("lstm", "gru", "rnn"):
            cell = {"lstm": gw.LSTM, "gru": gw.GRU, "rnn": gw.RNN}[kind]
            options = {"reset_after": draw(st.booleans())} if kind == "gru" else {}
            options |= draw(formulas(cell))
            layers.append(cell(units, wide, draw(st.integers(1, 2)), bias=draw(st.booleans()), dtype=dtype, **options))
            units = wide
        elif kind == "both":
            cell = draw(st.sampled_from([gw.LSTM, gw.GRU, gw.RNN]))
            options = {"reset_after": draw(st.booleans())} if cell is gw.GRU else {}
            layer = cell(units, wide, draw(st.integers(1, 2)), bidirectional=True, dtype=dtype, **options)
            mode = draw(st.sampled_from([None, "concat", "sum", "mul", "ave"]))
            layers.append(layer if mode is None else gw.Bidirectional(layer, mode))
            units = 2 * wide if mode in (None, "concat") else wide
        elif kind in ("convolution", "same"):
            padding = "same" if kind == "same" else "causal"
            taps, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
            layers.append(
                gw.Conv1D(units, wide, taps, dilation=dilation, padding=padding, activation=activation, dtype=dtype)
            )
            units = wide
        elif kind == "activation":
            layers.append(activation)
        elif kind == "reverse":
            layers.append(gw.Reverse())
        elif kind == "dropout":
            layers.append(gw.Dropout(0.3))
        elif kind == "last":
            layers.append(gw.Last())
            ended = True
        elif kind == "layer_norm":
            affine = draw(st.booleans())
            layers.append(
                gw.LayerNorm(units, eps=0.1, elementwise_affine=affine, bias=draw(st.booleans()), dtype=dtype)
            )
        elif kind == "batch_norm":
            layers.append(gw.BatchNorm(units, affine=draw(st.booleans()), dtype=dtype))
        else:
            layers.append(gw.Normalization(units, dtype=dtype))
    if all(isinstance(layer, NO_SIZES) for layer in layers):
        layers.append(gw.Dense(units, 3, dtype=dtype))
    return fill(gw.Sequential(layers))


def input_of(model, steps, batch, seed=0):
    """(T, B, I) or tokens (T, B); batch None: without the B."""
    first = next(layer for layer in model.layers if not isinstance(layer, NO_SIZES))
    rows = (steps,) if batch is None else (steps, batch)
    if isinstance(first, gw.Embedding):
        tokens = np.random.default_rng(seed).integers(0, first.num_embeddings, rows)
        return np.where(np.random.default_rng(seed + 1).random(rows) < 0.2, 0, tokens)  # which may be masked
    recurrent = inner(first)
    names = ("input_size", "in_features", "in_channels", "normalized_shape", "num_features")
    units = next(getattr(recurrent, name) for name in names if hasattr(recurrent, name))
    x = random((*rows, units), model.dtype, seed)
    if isinstance(model[0], gw.Masking):
        x[np.random.default_rng(seed + 1).random(rows) < 0.3] = model[0].mask_value
    return x


def masks(model):
    return any(isinstance(layer, gw.Masking) or getattr(layer, "mask_zero", False) for layer in model)


def refuses_resets(model):
    return masks(model) or any(isinstance(layer, gw.Reverse) for layer in model)


def ends(model):
    return any(isinstance(layer, gw.Last) for layer in model.layers)


def flat(state):
    """All arrays of a model's state."""
    return [part for entry in state for part in (entry if isinstance(entry, tuple) else (entry,))]


def random_state(model, batch):
    """A state of the right shapes."""
    _, state = model(input_of(model, 1, batch), return_state=True)
    return tuple(
        tuple(random(part.shape, part.dtype, 5) for part in entry) if isinstance(entry, tuple)
        else random(entry.shape, entry.dtype, 6)
        for entry in state
    )  # fmt: skip


# -----------------------------------------------------------------------------------------------------------
# Against the reference, and against PyTorch


@pytest.mark.usefixtures("backend")
@settings(max_examples=60)
@given(model=models(), data=st.data())
def test_any_model_is_its_reference(model, data):
    steps, batch = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 5))
    x = input_of(model, steps, batch)
    options = {}
    if data.draw(st.booleans()):
        options["lengths"] = data.draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    if data.draw(st.booleans()) and not refuses_resets(model):
        options["resets"] = np.random.default_rng(1).random((steps, batch)) < 0.3
    state = random_state(model, batch) if data.draw(st.booleans()) else None
    y, after = model(x, state, return_state=True, **options)
    given_x = x if x.dtype.kind == "i" else x.astype(np.float64)
    expected, states = run_reference(model, given_x, state, **options)
    assert_close(y, expected, model.dtype.name)
    assert len(after) == len(states)
    for actual, other in zip(after, states, strict=True):
        if np.any(other):  # the reference of a convolution keeps no history: a stream shows whether it is right
            assert_close(actual, other, model.dtype.name)


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(40, 12)
        self.norm = torch.nn.LayerNorm(12)
        self.convolution = torch.nn.Conv1d(12, 16, 3, dilation=2)
        self.first = torch.nn.LSTM(16, 20, 2, bidirectional=True)
        self.batch_norm = torch.nn.BatchNorm1d(40)
        self.second = torch.nn.GRU(40, 9)
        self.dense = torch.nn.Linear(9, 7)

    def forward(self, tokens):
        x = self.norm(self.table(tokens))
        x = torch.nn.functional.pad(x.permute(1, 2, 0), (4, 0))
        x = torch.nn.functional.gelu(self.convolution(x)).permute(2, 0, 1)
        x = self.first(x)[0]
        x = self.batch_norm(x.permute(1, 2, 0)).permute(2, 0, 1)
        return torch.softmax(self.dense(self.second(x)[0]), -1)


@pytest.mark.usefixtures("backend")
def test_the_same_network_in_pytorch(dtype):
    torch.manual_seed(0)
    module = Tagger().to(getattr(torch, dtype)).eval()
    module.batch_norm.running_mean.normal_()
    module.batch_norm.running_var.uniform_(0.5, 2)
    model = gw.Sequential([
        gw.Embedding(40, 12, dtype=dtype), gw.LayerNorm(12, dtype=dtype),
        gw.Conv1D(12, 16, 3, dilation=2, activation="gelu", dtype=dtype),
        gw.LSTM(16, 20, 2, bidirectional=True, dtype=dtype), gw.BatchNorm(40, dtype=dtype), gw.Dropout(),
        gw.GRU(40, 9, dtype=dtype), gw.TimeDistributed(gw.Dense(9, 7, activation="softmax", dtype=dtype)),
    ])  # fmt: skip
    places = ["table", "norm", "convolution", "first", "batch_norm", None, "second", "dense"]
    model.load_state_dict({
        f"{places.index(name.split('.')[0])}.{name.split('.')[1]}": value
        for name, value in module.state_dict().items()
        if "num_batches" not in name
    })  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 40, (11, 3))
    with torch.no_grad():
        expected = module(torch.from_numpy(tokens)).numpy()
    assert_close(model(tokens), expected, f"torch_{dtype}")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_dense_layers(name, dtype):
    """As a layer and as part of one; widths on both sides of a panel's, rows of a block's."""
    for units in (1, 7, 8, 33):
        for batch in (1, 2, 7, 200):
            model = fill(gw.Sequential([gw.Dense(5, units, activation=name, dtype=dtype)]))
            x = 3 * random((2, batch, 5), dtype)
            y = model(x)
            assert_close(y, run_reference(model, x.astype(np.float64))[0], dtype)
            sums = fill(gw.Sequential([gw.Dense(5, units, dtype=dtype), gw.Activation(name)]))
            assert_same_bits(sums(x), y)


def test_softmax_of_extreme_rows(dtype):
    model = gw.Sequential([gw.Normalization(9, dtype=dtype), gw.Activation("softmax")])
    x = random((5, 9), dtype)
    x[0] += 1e4
    x[1] -= 1e4
    x[2, 3] = -np.inf
    x[3, 4] = np.nan
    x[4, 8] = np.inf
    y = model(x)
    assert_close(y[:3], reference.softmax(x[:3].astype(np.float64)), dtype)
    np.testing.assert_allclose(y[:3].sum(axis=1), 1, rtol=1e-5)
    assert np.isnan(y[3:]).all()


def test_alphas(dtype):
    x = random((4, 2, 6), dtype)
    for name in ("elu", "leaky_relu"):
        model = fill(gw.Sequential([gw.Dense(6, 5, activation=gw.Activation(name, 0.3), dtype=dtype)]))
        assert_close(model(x), run_reference(model, x.astype(np.float64))[0], dtype)


# -----------------------------------------------------------------------------------------------------------
# The same bits


@pytest.mark.usefixtures("backend")
@settings(max_examples=60)
@given(model=models(streams=True), data=st.data())
def test_streams_and_pools_have_the_bits_of_the_call(model, data):
    steps, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    x = input_of(model, steps, batch)
    resets = np.random.default_rng(1).random((steps, batch)) < 0.2

    def at(part):
        return None if refuses_resets(model) else resets[part]

    start = random_state(model, batch)
    stream = model.stream(batch)
    stream.state = start
    outputs = np.stack([stream.step(x[t], resets=at(t)) for t in range(steps)])
    for t in range(steps):
        y, after = model(x[: t + 1], start, resets=at(slice(t + 1)), return_state=True)
        if not (ends(model) and masks(model)):  # of a step that is left out the stream has no output
            assert_same_bits(outputs[t], y if ends(model) else y[-1])
    assert_same_bits(tuple(flat(stream.state)), tuple(flat(after)))
    block = model.stream(batch)
    block.state = start
    half = steps // 2
    first, second = block.run(x[:half], resets=at(slice(half))), block.run(x[half:], resets=at(slice(half, None)))
    assert_same_bits(np.concatenate([first, second]), outputs)
    for row in range(0 if ends(model) and masks(model) else batch):
        alone = model.stream()
        assert_same_bits(np.stack([alone.step(token) for token in x[:, row]]), model_steps(model, x[:, row]))
    pool = model.pool(2)
    slots = [pool.open(), pool.open()]
    streams = [model.stream(), model.stream()]
    for t in range(steps):
        named = [[0], [1], [1, 0]][t % 3]
        rows = np.stack([x[t, i % batch] for i in named])
        y = pool.step(rows, [slots[i] for i in named])
        for place, i in enumerate(named):
            assert_same_bits(y[place], streams[i].step(rows[place]))
    for slot, alone in zip(slots, streams, strict=True):
        assert_same_bits(tuple(flat(pool.state(slot))), tuple(flat(alone.state)))


def model_steps(model, x):
    """What an unbatched model gives at the end of each beginning of x."""
    outputs = [model(x[: t + 1]) for t in range(len(x))]
    return np.stack(outputs if ends(model) else [y[-1] for y in outputs])


@pytest.mark.usefixtures("backend")
@settings(max_examples=60)
@given(model=models(), data=st.data())
def test_rows_do_not_depend_on_their_batch(model, data):
    """Nor on the lengths of the others, what comes after their ends, or an order of axes."""
    steps, batch = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 6))
    lengths = np.array(data.draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch)))
    x = input_of(model, steps, batch)
    x[np.arange(steps)[:, None] >= lengths] = 10**9 if x.dtype.kind == "i" else np.nan
    y, after = model(x, lengths=lengths, return_state=True)
    for row in range(batch):
        alone, state = model(x[: lengths[row], row], return_state=True)
        assert_same_bits(y[row] if ends(model) else y[: lengths[row], row], alone)
        for batch_state, part in zip(flat(after), flat(state), strict=True):
            assert_same_bits(batch_state[:, row], part)
    if not ends(model):
        assert not y[np.arange(steps)[:, None] >= lengths].any()


@pytest.mark.usefixtures("backend")
@settings(max_examples=30)
@given(model=models(), data=st.data())
def test_windows_have_the_bits_of_the_call(model, data):
    steps, batch, window = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    x = input_of(model, steps, batch)
    resets = np.random.default_rng(2).random((steps, batch)) < 0.2
    stream, starts = model.stream(batch, window=window), np.zeros(batch, int)
    outputs = []
    for t in range(steps):
        outputs.append(stream.step(x[t], resets=resets[t]))
        starts[resets[t]] = t
        for row in range(batch):
            y = model(x[max(starts[row], t - window + 1) : t + 1, row])
            assert_same_bits(outputs[t][row], y if ends(model) else y[-1])
        inputs, lengths = stream.state
        assert (lengths == np.minimum(t - starts + 1, window)).all()
        for row in range(batch):
            np.testing.assert_array_equal(inputs[: lengths[row], row], x[t - lengths[row] + 1 : t + 1, row])
        if t == steps // 2:
            stream = pickle.loads(pickle.dumps(stream))
            stream.refresh()
    again = model.stream(batch, window=window)
    assert_same_bits(again.run(x, resets=resets), np.stack(outputs))


@pytest.mark.usefixtures("backend")
def test_windows_of_layers(cell, dtype):
    for options in ({}, {"bidirectional": True, "num_layers": 2}):
        layer = make_layer(cell, 5, 19, dtype=dtype, **options)
        x, stream = random((7, 5), dtype), layer.stream(window=3)
        for t in range(len(x)):
            assert_same_bits(stream.step(x[t]), layer(x[max(0, t - 2) : t + 1])[0][-1])
        layer.parameters["weight_ih_l0"] = layer.parameters["weight_ih_l0"] / 2
        stream.refresh()
        assert_same_bits(stream.step(x[0]), layer(np.stack([x[5], x[6], x[0]]))[0][-1])
        stream.reset()
        assert_same_bits(stream.step(x[0]), layer(x[:1])[0][-1])


@pytest.mark.usefixtures("backend")
def test_threads_change_no_bit(dtype, use_threads):
    layers = [
        gw.Conv1D(30, 70, 3, activation="relu", dtype=dtype), gw.LSTM(70, 40, bidirectional=True, dtype=dtype),
        gw.LayerNorm(40, dtype=dtype), gw.Dense(40, 130, activation="softmax", dtype=dtype),
    ]  # fmt: skip
    layers[1] = gw.Bidirectional(layers[1], "mul")
    model = fill(gw.Sequential(layers))
    results = []
    for threads in (1, 2, 3):
        use_threads(threads)
        results.append(model(random((50, 23, 30), dtype)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_looked_up_sums_are_the_products(cell, dtype, monkeypatch):
    """With a table of the products, and with the products: one-hot input, too."""
    for weight in (random((17, 12), dtype), np.eye(17, dtype=dtype)):
        layers = [gw.Embedding(17, weight.shape[1], dtype=dtype), make_layer(cell, weight.shape[1], 19, dtype=dtype)]
        model = gw.Sequential(layers)
        model.parameters["0.weight"] = weight
        x = np.random.default_rng(0).integers(0, 17, (6, 3))
        with_table = model.stream(3).run(x)
        with monkeypatch.context() as patch:
            patch.setattr(networks, "MAX_TABLE_BYTES", 0)
            without = gw.Sequential(layers).stream(3).run(x)
        assert_same_bits(with_table, without)
        np.testing.assert_array_equal(with_table, layers[1](weight[x])[0])


@pytest.mark.usefixtures("backend")
def test_a_gru_that_resets_before_the_product(dtype, use_threads):
    """Against the reference, whose equations are those of the paper; on several threads, in batches, step by step."""
    layer = gw.GRU(6, 37, 2, bidirectional=True, reset_after=False, dtype=dtype, seed=1)
    x, lengths = random((9, 11, 6), dtype), np.arange(11) % 10
    resets = np.random.default_rng(0).random((9, 11)) < 0.2
    results = []
    for threads in (1, 2):
        use_threads(threads)
        results.append(layer(x, lengths=lengths, resets=resets))
    weights = {name: value.astype(np.float64) for name, value in layer.parameters.items()}
    expected, state, _ = reference.forward(
        "gru_reset_before", x.astype(np.float64), None, weights, num_layers=2, bidirectional=True, lengths=lengths,
        resets=resets,
    )  # fmt: skip
    assert_close(results[0], (expected, state), dtype)
    assert_same_bits(results[1], results[0])
    layer = gw.GRU(6, 37, reset_after=False, dtype=dtype, seed=1)
    assert "reset_after=False" in repr(layer)
    assert_same_bits(layer.stream(11).run(x), layer(x)[0])
    assert_same_bits(layer(x[:, 3])[0], layer(x)[0][:, 3])
    for name, arguments in (("record", (x,)), ("trace", (x,)), ("input_gradient", (x, 3))):
        with pytest.raises(ValueError, match=f"{name}: expected reset_after=True"):
            getattr(layer, name)(*arguments)


# -----------------------------------------------------------------------------------------------------------
# What it is to its users


def small():
    return fill(gw.Sequential([gw.LSTM(4, 6), gw.GRU(6, 5), gw.Dense(5, 2)]))


def test_states_are_a_tuple_of_those_that_have_one():
    model = fill(gw.Sequential([gw.Conv1D(4, 6, 3), gw.LSTM(6, 7), gw.Dense(7, 5), gw.GRU(5, 3)]))
    y, state = model(random((5, 2, 4), "f"), return_state=True)
    assert y.shape == (5, 2, 3)
    assert [np.shape(part) for part in flat(state)] == [(2, 2, 4), (1, 2, 7), (1, 2, 7), (1, 2, 3)]
    assert isinstance(state[1], tuple)
    y, state = model(random((5, 4), "f"), return_state=True)
    assert [np.shape(part) for part in flat(state)] == [(2, 4), (1, 7), (1, 7), (1, 3)]


def test_batch_first():
    layers = [gw.LSTM(4, 6, batch_first=True), gw.Dense(6, 3)]
    model = fill(gw.Sequential(layers))
    assert model.batch_first
    x = random((2, 5, 4), "f")
    turned = gw.Sequential([gw.LSTM(4, 6), layers[1]])
    turned.load_state_dict(model.state_dict())
    lengths = [5, 3]
    assert_same_bits(model(x, lengths=lengths), turned(x.swapaxes(0, 1), lengths=lengths).swapaxes(0, 1).copy())
    assert_same_bits(model.stream(2).run(x), turned.stream(2).run(x.swapaxes(0, 1)).swapaxes(0, 1).copy())
    assert_same_bits(model.stream(2, window=2).run(x)[:, 1], turned(x[:, :2].swapaxes(0, 1))[-1])
    out = np.empty((2, 5, 3), np.float32)
    assert model(x, out=out) is out
    tokens = gw.Sequential([gw.Embedding(9, 4)], batch_first=True)
    assert tokens([[1, 2, 3], [4, 5, 6]]).shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"layers\[1\]: expected batch_first=True, as layers\[0\] has it"):
        gw.Sequential([gw.LSTM(4, 6, batch_first=True), gw.LSTM(6, 6)])


def test_weights_are_changed_as_a_whole():
    model = small()
    before = model.state_dict()
    names = list(before)
    assert names[0] == "0.weight_ih_l0"
    assert names[-1] == "2.bias"
    x = random((3, 4), "f")
    y = model(x)
    stream = model.stream()
    with pytest.raises(ValueError, match=r"2\.weight: expected shape \(2, 5\), got \(2, 6\)"):
        model.parameters.update({"0.bias_ih_l0": np.ones(24), "2.weight": np.ones((2, 6))})
    with pytest.raises(ValueError, match=r"3\.weight: expected one of 0\.weight_ih_l0, "):
        model.parameters["3.weight"] = np.ones(3)
    with pytest.raises(ValueError, match=r"missing 2\.bias"):
        model.load_state_dict({name: before[name] for name in names[:-1]})
    assert_same_bits(model.state_dict(), before)
    with model.edit() as weights:
        weights["2.bias"] += 1
    assert_same_bits(model.layers[2].parameters["bias"], before["2.bias"] + 1)
    np.testing.assert_allclose(model(x), y + 1, rtol=1e-5)
    assert_same_bits(stream.run(x), y)  # its own snapshot
    stream.refresh()
    stream.reset()
    assert_same_bits(stream.run(x), model(x))


def test_copies():
    model, x = small(), random((3, 4), "f")
    y = model(x)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(other(x), y)
        other.parameters["2.bias"] = np.ones(2)
        assert_same_bits(model(x), y)
        assert not np.array_equal(other(x), y)
        stream = other.stream()
        stream.step(x[0])
        for twin in (stream.copy(), pickle.loads(pickle.dumps(stream)), copy.deepcopy(stream)):
            assert_same_bits(twin.run(x), stream.copy().run(x))
    both, shared = copy.deepcopy((model, model.stream()))
    both.parameters["2.bias"] = np.ones(2)
    shared.refresh()
    assert_same_bits(shared.run(x), both(x))
    wrapped = gw.Bidirectional(gw.GRU(3, 4, bidirectional=True), "ave")
    twin = copy.copy(wrapped)
    twin.parameters["bias_ih_l0"] = np.ones(12)
    assert twin.layer.parameters["bias_ih_l0"].all()
    assert not np.array_equal(wrapped.parameters["bias_ih_l0"], np.ones(12))


def test_it_shows_itself():
    model = gw.Sequential([gw.Embedding(9, 4), gw.LSTM(4, 6), gw.Dense(6, 2, activation="softmax")])
    assert repr(model) == (
        "Sequential(\n  (0): Embedding(num_embeddings=9, embedding_dim=4, mask_zero=False, dtype='float32')\n"
        "  (1): LSTM(4, 6)\n"
        "  (2): Dense(in_features=6, out_features=2, bias=True, activation=Activation(name='softmax'), "
        "dtype='float32')\n)"
    )
    assert repr(model.stream()) == "Stream(model of 3 layers, 9 tokens to 2, float32, batch_size=None)"
    assert repr(small().pool(3)) == "Pool(model of 3 layers, 4 to 2, float32, capacity=3)"
    assert [type(layer).__name__ for layer in model] == ["Embedding", "LSTM", "Dense"]
    assert len(model) == 3
    assert model[1] is model.layers[1]
    assert model[1:].layers == model.layers[1:]


def test_tokens():
    model = fill(gw.Sequential([gw.Dropout(), gw.Embedding(9, 4), gw.LSTM(4, 6)]))
    tokens = np.array([3, 8, 0])
    y = model(tokens)
    for kind in ("i1", "u2", ">i4", "u8"):
        assert_same_bits(model(tokens.astype(kind)), y)
    out = np.empty(6, np.float32)
    for token in (3, np.int64(3), np.array(3), np.uint8(3)):
        stream = model.stream()
        assert stream.step(token, out) is out
        assert_same_bits(out, y[0])
        state = stream.state
        for wrong in (9, -1, 2**70, np.int64(9), np.array(9)):
            with pytest.raises(ValueError, match="x: expected numbers from 0 to 8, got"):
                stream.step(wrong, out)
        for wrong in (3.0, True, "3", None):
            with pytest.raises(TypeError, match="x: expected"):
                stream.step(wrong, out)
        assert_same_bits(tuple(flat(stream.state)), tuple(flat(state)))
    for wrong in ([1, 9], [-1, 2], np.array([2**64 - 1, 2], np.uint64)):
        with pytest.raises(ValueError, match="x: expected numbers from 0 to 8, got"):
            model(wrong)
    with pytest.raises(TypeError, match="x: expected whole numbers, got float64"):
        model([0.5])
    pool = model.pool(3)
    slots = [pool.open(), pool.open()]
    with pytest.raises(ValueError, match="x: expected numbers from 0 to 8, got 9"):
        pool.step(np.array([3, 9]), np.array(slots), np.empty((2, 6), np.float32))
    assert not np.any(pool.state(slots[0])[0])
    assert_same_bits(pool.step([3], slots[:1])[0], y[0])


def refused(cases):
    for kind, message, make in cases:
        with pytest.raises(kind, match=message):
            make()


def test_what_does_not_fit_together():
    lstm, dense, both = gw.LSTM(4, 6), gw.Dense(6, 2), gw.GRU(4, 6, bidirectional=True)
    model_of = gw.Sequential
    refused([
        (ValueError, "layers: expected at least one layer", lambda: model_of([])),
        (TypeError, "layers: expected several layers, got LSTM", lambda: model_of(lstm)),
        (TypeError, r"layers\[1\]: expected a layer, got int", lambda: model_of([lstm, 3])),
        (TypeError, r"layers\[0\]: expected a layer, got Sequential", lambda: model_of([model_of([lstm])])),
        (ValueError, r"layers\[1\]: expected a layer of 6 input units", lambda: model_of([lstm, gw.Dense(5, 2)])),
        (ValueError, r"layers\[1\]: expected float32, as", lambda: model_of([lstm, gw.Dense(6, 2, dtype="float64")])),
        (ValueError, r"layers\[2\]: expected no layer that needs", lambda: model_of([lstm, gw.Last(), gw.GRU(6, 2)])),
        (ValueError, r"layers\[1\]: expected an embedding only", lambda: model_of([lstm, gw.Embedding(9, 6)])),
        (ValueError, "layers: expected at least one layer that determines", lambda: model_of([gw.Activation("relu")])),
        (ValueError, r"layers\[2\]: expected another layer", lambda: model_of([both, lstm, both])),
        (ValueError, r"layers\[0\]: expected batch_first=True, as passed", lambda: model_of([lstm], batch_first=True)),
        (ValueError, "layer: expected a layer with bidirectional=True", lambda: gw.Bidirectional(lstm)),
        (TypeError, "layer: expected LSTM, GRU or RNN, got Dense", lambda: gw.Bidirectional(dense)),
        (ValueError, "merge_mode: expected 'concat', 'sum'", lambda: gw.Bidirectional(both, "max")),
        (TypeError, "layer: expected a layer of single steps, got LSTM", lambda: gw.TimeDistributed(lstm)),
        (TypeError, "layer: .* single steps, got Conv1D", lambda: gw.TimeDistributed(gw.Conv1D(2, 2, 2))),
        (ValueError, "activation: expected linear, affine", lambda: gw.Dense(2, 2, activation="swish")),
        (ValueError, "alpha: expected none, since relu has none", lambda: gw.Activation("relu", 0.3)),
        (ValueError, "padding: expected 'causal' or 'same'", lambda: gw.Conv1D(2, 2, 2, padding="valid")),
        (ValueError, "p: expected a number from 0 to 1", lambda: gw.Dropout(1.5)),
        (ValueError, r"mask_value: expected a number from -3\.40282e", lambda: gw.Masking(1e39)),
        (ValueError, r"mask_value: expected a number from -3\.40282e", lambda: gw.Masking(float("nan"))),
        (ValueError, r"layers\[1\]: expected a layer that leaves steps out", lambda: model_of([dense, gw.Masking()])),
        (ValueError, r"stream: layers\[0\]: expected no Reverse", lambda: model_of([gw.Reverse(), lstm]).stream()),
        (ValueError, r"resets: expected none, since layers\[0\] leaves steps out",
         lambda: model_of([gw.Masking(), lstm])(np.zeros((3, 1, 4)), resets=np.zeros((3, 1)))),
        (ValueError, "in_features: expected a number from 1", lambda: gw.Dense(0, 2)),
        (ValueError, "Dense: expected weights of at most", lambda: gw.Dense(2**31 - 1, 2**31 - 1)),
        (ValueError, "Embedding: expected weights of at most", lambda: gw.Embedding(2**31 - 1, 2**31 - 1)),
        (ValueError, "window: expected a number from 1", lambda: lstm.stream(window=0)),
        (ValueError, "window: expected a number from 1", lambda: lstm.stream(window=2**60)),
    ])  # fmt: skip
    for model in (model_of([both, gw.Dense(12, 2)]), model_of([gw.Conv1D(4, 6, 3, padding="same"), dense])):
        refused([
            (ValueError, r"stream: layers\[0\]: expected .*; stream\(window=k\) gives what", model.stream),
            (ValueError, r"pool: .*stream\(window=k\)", lambda model=model: model.pool(3)),
        ])  # fmt: skip
        model.stream(window=3)


def test_a_state_that_no_memory_holds(monkeypatch):
    monkeypatch.setattr(networks, "MAX_BYTES", 100)
    gw.Sequential([gw.Conv1D(1, 1, 26)])
    with pytest.raises(ValueError, match="layers: expected a state of at most 100 bytes a row, got 104"):
        gw.Sequential([gw.Conv1D(1, 1, 27)])


def test_bad_arguments_of_a_call():
    model, x, out = small(), random((5, 3, 4), "f"), np.empty((5, 3, 2), np.float32)
    _, state = model(x, return_state=True)
    stream = model.stream(window=3)
    zeros = np.zeros
    refused([
        (ValueError, r"x: expected shape \(T, B, 4\) or \(T, 4\), got \(5, 3, 3\)", lambda: model(x[..., :3])),
        (TypeError, "state: expected a tuple of 2, one entry for each layer that has", lambda: model(x, ())),
        (ValueError, r"state\[1\]: expected shape \(1, 3, 5\)", lambda: model(x, (state[0], zeros((1, 2, 5))))),
        (TypeError, r"state\[0\]: expected a pair \(h, c\)", lambda: model(x, (zeros((1, 3, 6)), state[1]))),
        (ValueError, r"out: expected shape \(5, 3, 2\)", lambda: model(x, out=out[..., :1])),
        (ValueError, "out: expected memory of its own", lambda: model(x, out=x.ravel()[:30].reshape(5, 3, 2))),
        (TypeError, r"state\[1\]: expected a state, got None", lambda: model(x, (state[0], None))),
        (ValueError, r"overlaps state\[1\]", lambda: model(x, (state[0], out.ravel()[:15].reshape(1, 3, 5)), out=out)),
        (TypeError, "x: expected exactly float32", lambda: model(x.astype("d"), out=out)),
        (TypeError, "return_state: expected True or False", lambda: model(x, return_state=1)),
        (ValueError, r"lengths: expected numbers from 0 to 5 \(T\)", lambda: model(x, lengths=[6, 1, 1])),
        (TypeError, r"state: expected a pair \(x, lengths\)", lambda: setattr(stream, "state", 3)),
        (ValueError, r"state\[1\]: expected numbers from 0 to 3", lambda: setattr(stream, "state", (x[:, 0], 4))),
    ])  # fmt: skip
    assert stream.state[0].shape == (0, 4)


def test_a_thread_sees_all_new_weights_or_none():
    """Two factors whose product is always one."""
    first, second = gw.Dense(1, 1, bias=False), gw.Dense(1, 1, bias=False)
    model, stop, seen = gw.Sequential([first, second]), threading.Event(), set()

    def change():
        factor = 1.0
        while not stop.is_set():
            model.parameters.update({"0.weight": [[factor]], "1.weight": [[1 / factor]]})
            factor = 3.0 - factor

    model.parameters.update({"0.weight": [[1.0]], "1.weight": [[1.0]]})
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(2000):
            seen.add(float(model(np.ones((1, 1), np.float32))[0, 0]))
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert seen == {1.0}


def test_lengths_do_not_hide_what_x_is():
    model = gw.Sequential([gw.Embedding(9, 4), gw.LSTM(4, 6)])
    with pytest.raises(ValueError, match="x: expected an array, got a sequence of uneven lengths"):
        model([[1, 2], [3]], lengths=[1, 2])


def test_a_window_takes_a_state():
    model = fill(gw.Sequential([gw.Embedding(9, 4), gw.LSTM(4, 6)], batch_first=False))
    x = np.random.default_rng(0).integers(0, 9, (6, 2))
    stream = model.stream(2, window=4)
    stream.state = x[:3], [3, 1]
    y = stream.step(x[5])
    assert_same_bits(y[0], model(np.array([*x[:3, 0], x[5, 0]]))[-1])
    assert_same_bits(y[1], model(np.array([x[0, 1], x[5, 1]]))[-1])


def test_empty_batches_and_sequences():
    model = small()
    assert model(np.zeros((5, 0, 4), "f")).shape == (5, 0, 2)
    assert model(np.zeros((0, 3, 4), "f")).shape == (0, 3, 2)
    ends_at_last = gw.Sequential([*model.layers[:2], gw.Last(), model.layers[2]])
    assert_same_bits(ends_at_last(np.zeros((0, 3, 4), "f")), np.tile(model.parameters["2.bias"], (3, 1)))
    assert make_state(model.layers[0], None)[0].shape == (1, 6)


@pytest.mark.usefixtures("backend")
def test_denormal_inputs_are_masked_as_zero(dtype):
    """Whatever the floating-point mode of the caller is: they are zero to the core."""
    model = gw.Sequential([gw.Masking(), gw.LSTM(3, 4, dtype=dtype, seed=0)])
    x = random((4, 3), dtype)
    x[1] = np.finfo(dtype).tiny / 8
    assert_same_bits(model(x)[[0, 2, 3]], model(x[[0, 2, 3]]))
    assert not model(x)[1].any()


@pytest.mark.parametrize("ends_with_last", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "numbers"])
def test_verified_where_nothing_is_masked(kind, ends_with_last):
    """Frameworks repeat the output of the step before where a step is masked: that does not count as a difference."""
    first = gw.Embedding(9, 3, mask_zero=True, seed=0) if kind == "tokens" else gw.Masking(-1.0)
    model = gw.Sequential([first, gw.LSTM(3, 4, seed=1), *([gw.Last()] if ends_with_last else [])])

    def original(x, wrong=0.0):
        y = model(x)
        masked = x == 0 if kind == "tokens" else (x == -1).all(-1)
        assert masked.any() or len(x) == 1
        if not ends_with_last:
            y[masked] = 7
        return y + wrong

    assert gw.verify(model, original).passed
    assert not gw.verify(model, lambda x: original(x, 0.1)).passed
