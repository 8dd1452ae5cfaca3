"""The core against the NumPy reference on every backend, forward and backward, at all kinds of shapes."""

import pathlib

import gatewise as gw
import gatewise._core as _core
import numpy as np
import pytest
from conftest import (
    Data,
    assert_results_close,
    assert_same_bits,
    make_data,
    make_layer,
    make_state,
    map_state,
    random,
    run_core,
    run_reference,
)
from gatewise import reference
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("backend")

HIDDEN_SIZES = (1, 3, 15, 16, 17, 31, 33, 64, 100)  # around the registers' 4, 8 and 16 lanes
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 24, 25)  # around the micro-kernel's rows


def check(layer, steps, batch):
    """Forward from a given state, and backward for the input, the state and every parameter."""
    data = make_data(layer, steps, batch)
    actual = run_core(layer, *data)
    assert_results_close(actual, run_reference(layer, *data))
    y, state = layer(data.x, data.state)
    assert_same_bits(y, actual["output"])  # inference and training are the same forward
    assert_same_bits(state, state_of(actual))
    assert {value.dtype for value in actual.values()} == {layer.dtype}


def state_of(results):
    return results["state"] if "state" in results else (results["state h"], results["state c"])


@pytest.mark.parametrize("batch", BATCHES, ids="B{}".format)
@pytest.mark.parametrize("hidden", HIDDEN_SIZES, ids="H{}".format)
def test_sizes(cell, dtype, hidden, batch):
    inputs = HIDDEN_SIZES[(HIDDEN_SIZES.index(hidden) + batch) % len(HIDDEN_SIZES)]
    check(make_layer(cell, inputs, hidden, dtype=dtype), 3, batch)


@pytest.mark.parametrize("inputs", [1, 2, 5, 7, 16, 100, 257, 1500], ids="I{}".format)
def test_input_sizes(cell, dtype, inputs):
    check(make_layer(cell, inputs, 17, dtype=dtype), 3, 4)


@pytest.mark.parametrize(
    ("steps", "batch", "inputs", "hidden"),
    [(16, 24, 9, 100), (90, 3, 5, 16), (3, 130, 10, 33), (2, 2, 3000, 9), (6, 16, 130, 130), (300, 1, 2, 3)],
    ids=str,
)
def test_blocks(cell, dtype, steps, batch, inputs, hidden):
    """Sizes that exceed a block: of time, of rows, of inputs, of hidden units."""
    check(make_layer(cell, inputs, hidden, dtype=dtype), steps, batch)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("layers", [1, 2, 3], ids="L{}".format)
@pytest.mark.parametrize(("hidden", "batch"), [(3, 1), (17, 9), (33, 5)], ids=str)
def test_layers_and_directions(cell, dtype, layers, bidirectional, bias, hidden, batch):
    layer = make_layer(cell, 5, hidden, layers, bidirectional=bidirectional, bias=bias, dtype=dtype)
    assert any("bias" in name for name in layer.parameters) == bias
    check(layer, 4, batch)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("layers", [1, 2], ids="L{}".format)
@pytest.mark.parametrize(("hidden", "projected"), [(2, 1), (16, 15), (17, 16), (33, 3), (100, 64)], ids=str)
@pytest.mark.parametrize("batch", [1, 6, 13], ids="B{}".format)
def test_projection(dtype, hidden, projected, layers, bidirectional, batch):
    layer = make_layer("lstm", 5, hidden, layers, proj_size=projected, bidirectional=bidirectional, dtype=dtype)
    check(layer, 4, batch)


def test_no_state_is_zeros(cell, dtype):
    layer = make_layer(cell, 4, 17, 2, dtype=dtype)
    data = make_data(layer, 3, 5)
    zeros = map_state(np.zeros_like, data.state)
    assert_same_bits(layer(data.x), layer(data.x, zeros))
    assert_same_bits(run_core(layer, data.x, None, data.grad_output), run_core(layer, data.x, zeros, data.grad_output))


@pytest.mark.parametrize("parts", ["grad_output", "grad_state", "h", "c"])
def test_missing_gradients_are_zero(dtype, parts):
    layer = make_layer("lstm", 4, 17, 2, dtype=dtype)
    x, state, grad_output, (grad_h, grad_c) = make_data(layer, 3, 5)
    grads = {
        "grad_output": (grad_output, None),
        "grad_state": (None, (grad_h, grad_c)),
        "h": (None, (grad_h, None)),
        "c": (grad_output, (None, grad_c)),
    }[parts]
    assert_results_close(run_core(layer, x, state, *grads), run_reference(layer, x, state, *grads))


def test_no_gradient_at_all(cell):
    layer = make_layer(cell, 4, 5)
    data = make_data(layer, 3, 2)
    grads = layer.record(data.x, data.state).backward(None)
    assert not any(value.any() for value in (grads.input, *grads.parameters.values()))


# -----------------------------------------------------------------------------------------------------------
# Shapes of the arguments


def test_batch_first(cell, dtype):
    layer = make_layer(cell, 4, 17, 2, bidirectional=True, dtype=dtype)
    turned = make_layer(cell, 4, 17, 2, bidirectional=True, dtype=dtype, batch_first=True)
    data = make_data(layer, 5, 3)
    expected = run_core(layer, *data)
    actual = run_core(turned, data.x.swapaxes(0, 1), data.state, data.grad_output.swapaxes(0, 1), data.grad_state)
    for name in ("output", "grad_input"):
        actual[name] = actual[name].swapaxes(0, 1)
    assert_same_bits(actual, expected)
    y, state = turned(data.x.swapaxes(0, 1), data.state)
    assert_same_bits((y.swapaxes(0, 1), state), layer(data.x, data.state))
    assert y.flags.c_contiguous


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_unbatched(cell, dtype, batch_first):
    layer = make_layer(cell, 4, 17, 2, bidirectional=True, dtype=dtype, batch_first=batch_first)
    data = make_data(layer, 5, 1)
    row = Data(
        data.x[:, 0],
        map_state(lambda s: s[:, 0], data.state),
        data.grad_output[:, 0],
        map_state(lambda s: s[:, 0], data.grad_state),
    )
    actual = run_core(layer, *row)
    time_first = make_layer(cell, 4, 17, 2, bidirectional=True, dtype=dtype)
    expected = run_core(time_first, *data)
    for name, value in expected.items():
        assert_same_bits(actual[name], value if name.startswith("grad ") else value[:, 0], name)
    y, state = layer(row.x, row.state)
    assert y.shape == (5, 34)
    assert_same_bits(y, actual["output"])
    assert_same_bits(state, state_of(actual))


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
def test_empty(cell, dtype, bidirectional, steps, batch):
    layer = make_layer(cell, 4, 5, 2, bidirectional=bidirectional, dtype=dtype)
    data = make_data(layer, steps, batch)
    actual = run_core(layer, *data)
    assert actual["output"].shape == (steps, batch, 5 * (1 + bidirectional))
    assert actual["grad_input"].shape == data.x.shape
    assert_same_bits(state_of(actual), data.state)
    assert_same_bits(layer(data.x, data.state)[1], data.state)
    for name, value in layer.parameters.items():
        assert actual[f"grad {name}"].shape == value.shape
        assert not actual[f"grad {name}"].any()
    gradients = [actual[name] for name in actual if name.startswith("grad_state")]
    expected = data.grad_state if isinstance(data.grad_state, tuple) else (data.grad_state,)
    assert_same_bits(tuple(gradients), tuple(expected))


def test_empty_unbatched(cell):
    layer = make_layer(cell, 4, 5)
    state = make_state(layer, None)
    y, after = layer(np.empty((0, 4), "float32"), state)
    assert y.shape == (0, 5)
    assert_same_bits(after, state)


def test_out(cell, dtype):
    layer = make_layer(cell, 4, 17, 2, bidirectional=True, dtype=dtype)
    data = make_data(layer, 3, 5)
    out = np.full_like(data.grad_output, np.nan)
    y, state = layer(data.x, data.state, out=out)
    assert y is out
    assert_same_bits((y, state), layer(data.x, data.state))


@pytest.mark.parametrize("offset", range(9))
def test_any_alignment(cell, dtype, offset):
    """Arrays that begin at any element of a register; x and out touch without overlapping."""
    layer = make_layer(cell, 17, 17, dtype=dtype)
    x = random((2, 3, 17), dtype)
    memory = np.zeros(2 * x.size + offset, dtype)
    shifted, out = (part.reshape(x.shape) for part in np.split(memory[offset:], 2))
    shifted[:] = x
    layer(shifted, out=out)
    assert_same_bits(out, layer(x)[0])
    assert_same_bits(shifted, x)
    assert not memory[:offset].any()


# -----------------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0], ids="p{}".format)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
def test_dropout(cell, dtype, p, bidirectional):
    layer = make_layer(cell, 5, 17, 3, dropout=p, bidirectional=bidirectional, dtype=dtype, seed=2**40 + 3)
    data = make_data(layer, 6, 4)
    for call_count in (0, 1, 2**33):
        layer.call_count = call_count
        expected = run_reference(layer, *data, call_count=call_count)
        assert_results_close(run_core(layer, *data), expected)
        assert layer.call_count == call_count + 1


def test_dropout_of_a_projection(dtype):
    layer = make_layer("lstm", 5, 17, 2, dropout=0.5, proj_size=3, bidirectional=True, dtype=dtype)
    data = make_data(layer, 6, 4)
    assert_results_close(run_core(layer, *data), run_reference(layer, *data))


def test_dropout_draws_new_masks(cell):
    layer = make_layer(cell, 5, 17, 2, dropout=0.5)
    x = make_data(layer, 6, 4).x
    first, second = layer.record(x), layer.record(x)
    assert (first.call_count, second.call_count, layer.call_count) == (0, 1, 2)
    assert not np.array_equal(first.output, second.output)
    layer.call_count = first.call_count
    assert_same_bits(layer.record(x).output, first.output)
    other = make_layer(cell, 5, 17, 2, dropout=0.5, seed=6)
    assert not np.array_equal(other.record(x).output, first.output)


def test_dropout_is_for_training_only(cell):
    layer, without = make_layer(cell, 5, 17, 2, dropout=0.5), make_layer(cell, 5, 17, 2)
    x = make_data(layer, 6, 4).x
    assert_same_bits(layer(x), without(x))
    assert layer.call_count == 0


def test_dropout_spares_the_last_layer(cell):
    single = make_layer(cell, 5, 17, 1, dropout=0.5)
    x = make_data(single, 6, 4).x
    assert_same_bits(single.record(x).output, single(x)[0])


def test_dropped_elements_are_set_to_zero():
    """Not multiplied: what is dropped is gone, even an infinity."""
    layer = make_layer("rnn_relu", 1, 17, 2, dropout=1.0)
    layer.parameters.update({"weight_ih_l0": np.full((17, 1), np.inf), "bias_ih_l0": np.full(17, np.inf)})
    quiet = make_layer("rnn_relu", 1, 17, 2, dropout=1.0)
    x = np.ones((2, 1, 1), "float32")
    assert not np.isfinite(layer(x)[0]).all()
    assert_same_bits(layer.record(x).output, quiet.record(x).output)


# -----------------------------------------------------------------------------------------------------------
# What the core says of itself


def test_cells(cell):
    """The core's numbers against the shapes of weights and states, and against what a trace shows."""
    layer = make_layer(cell, 4, 5)
    numbers = _core.cells()[cell]
    assert layer.parameters["weight_hh_l0"].shape == (5 * numbers["gates"], 5)
    assert isinstance(layer(random((1, 1, 4), layer.dtype))[1], tuple) == numbers["has_cell_state"]
    assert numbers["trains"]
    tape = _core.tape_bytes(cell, layer.dtype, 4, 64, 0, 1, 1, 10, 6)
    assert tape == 4 * 64 * 10 * 6 * (numbers["kept"] + numbers["carried"])


def test_cells_that_do_not_train():
    assert {name for name, numbers in _core.cells().items() if not numbers["trains"]} == {"gru_reset_before"}
    with pytest.raises(ValueError, match="a cell that does not train"):
        _core.tape_bytes("gru_reset_before", np.dtype("float32"), 4, 5, 0, 1, 1, 10, 6)


@pytest.mark.parametrize("every", [0, 1, 3, 10], ids="every{}".format)
@pytest.mark.parametrize(("layers", "projection"), [(1, 0), (3, 0), (2, 7)], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
def test_tape_bytes(cell, dtype, bidirectional, layers, projection, every):
    options = {"proj_size": projection} if projection and cell == "lstm" else {}
    layer = make_layer(cell, 4, 17, layers, dtype=dtype, bidirectional=bidirectional, **options)
    sizes = layer.input_size, layer.hidden_size, options.get("proj_size", 0), layers, 1 + bidirectional
    packed = layer._architecture.pack(layer.state_dict())
    foreign = _core.Foreign(packed, 10, 6, None, every, 0.0, 0, 1)
    assert _core.tape_bytes(cell, layer.dtype, *sizes, 10, 6, every) == foreign.tape_bytes
    assert _core.tape_bytes(cell, layer.dtype, *sizes, 10, 0, every) == 0


@pytest.mark.parametrize("sizes", [(2**40, 2**40), (2**62, 1), (1, 2**62)], ids=str)
def test_tape_of_more_bytes_than_there_are(sizes):
    with pytest.raises(MemoryError):
        _core.tape_bytes("lstm", np.dtype("float32"), 4, 5, 0, 1, 1, *sizes)


def test_version():
    text = (pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{_core.configuration()["version"]}"\n' in text


# -----------------------------------------------------------------------------------------------------------
# The golden worked example, and the initial weights


def test_worked_example(dtype):
    """Pre-activations given, C before (0.2, 0.8): the figures are from the issue, to six decimals."""
    sums = np.array([0, 1, 1, -1, 0.5, -0.5, 1, 1])  # i, f, c~, o, two units each
    layer = gw.LSTM(2, 2, dtype=dtype)
    layer.parameters.update({name: np.zeros_like(value) for name, value in layer.parameters.items()})
    layer.parameters["weight_ih_l0"] = np.stack([sums / 2, np.zeros(8)], axis=1)
    layer.parameters["bias_hh_l0"] = sums / 2
    x, before = np.array([[1, 0]], dtype), (np.zeros((1, 2), dtype), np.array([[0.2, 0.8]], dtype))
    y, (h, c) = layer(x, before)
    assert_close(c[0], np.array([0.377270, -0.122682]), "six_digits")
    assert_close(h[0], np.array([0.263426, -0.089240]), "six_digits")
    stream = layer.stream()
    stream.state = before
    assert_same_bits(stream.step(x[0]), y[0])


def test_initial_weights(cell, dtype):
    kind = {"lstm": gw.LSTM, "gru": gw.GRU}.get(cell, gw.RNN)
    first, again, other = (kind(30, 100, 2, dtype=dtype, seed=seed).state_dict() for seed in (3, 3, 4))
    assert_same_bits(first, again)
    assert not np.array_equal(first["weight_hh_l1"], other["weight_hh_l1"])
    for value in first.values():
        assert np.abs(value).max() <= 0.1  # 1 / sqrt(H)
        assert np.abs(value).max() > 0.09
        assert (value < 0).any()
        assert (value > 0).any()


def test_a_seed_is_drawn_and_kept():
    first, other = gw.GRU(2, 3), gw.GRU(2, 3)
    assert isinstance(first.seed, int)
    assert first.seed != other.seed
    assert_same_bits(gw.GRU(2, 3, seed=first.seed).state_dict(), first.state_dict())


def test_reference_is_part_of_the_package():
    assert gw.reference is reference
