"""Promise 2, the same bits always: whatever the batch, the place in it, the threads, steps or sequences."""

import numpy as np
import pytest
from conftest import (
    Data,
    assert_results_close,
    assert_same_bits,
    by_name,
    make_data,
    make_layer,
    map_state,
    run_core,
    take_rows,
)
from gatewise import _core

pytestmark = pytest.mark.usefixtures("backend")

SIZES = pytest.mark.parametrize(
    ("inputs", "hidden", "options"),
    [
        (3, 1, {}),
        (16, 16, {}),
        (5, 33, {"num_layers": 2}),
        (40, 100, {}),
        (5, 200, {}),  # two chains, and panels in both directions
        (1500, 17, {"bias": False}),
    ],
    ids=str,
)


def rows_of(results, rows):
    """The results that belong to rows of the batch: all but the gradients of the parameters."""
    return {name: value[:, rows] for name, value in results.items() if not name.startswith("grad ")}


def of_parameters(results):
    return {name: value for name, value in results.items() if name.startswith("grad ")}


def with_projection(cell, options):
    """The LSTM of two layers also has a projection, so that this road is under test everywhere."""
    return options | {"proj_size": 9} if cell == "lstm" and options.get("num_layers") else options


# -----------------------------------------------------------------------------------------------------------
# Time: step by step, in chunks, all at once


def in_steps(stream, x):
    return np.stack([stream.step(row) for row in x])


def in_steps_out(stream, x):
    width = stream.step(x[0]).shape
    stream.reset()
    out = np.full((len(x), *width), np.nan, x.dtype)
    for row, place in zip(x, out, strict=True):
        assert stream.step(row, place) is place
    return out


def in_runs(stream, x):
    return np.concatenate([stream.run(x[:1]), stream.run(x[1:7]), stream.run(x[7:7]), stream.run(x[7:])])


def in_steps_and_runs(stream, x):
    return np.concatenate([stream.run(x[:5]), stream.step(x[5])[None], stream.run(x[6:])])


WAYS = [in_steps, in_steps_out, in_runs, in_steps_and_runs]


@pytest.mark.parametrize("batch", [None, 1, 2, 7, 13], ids="B{}".format)
@SIZES
def test_streams_and_sequences(cell, dtype, inputs, hidden, options, batch):
    layer = make_layer(cell, inputs, hidden, dtype=dtype, **with_projection(cell, options))
    x = make_data(layer, 23, batch or 1).x
    x = x[:, 0] if batch is None else x
    expected, state = layer(x)
    for way in WAYS:
        stream = layer.stream(batch)
        assert_same_bits(way(stream, x), expected, way.__name__)
        assert_same_bits(stream.state, state, way.__name__)


@pytest.mark.parametrize("cuts", [[1], [9], [1, 2, 3], [7, 7, 20], [22]], ids=str)
@SIZES
def test_chunks_forward(cell, dtype, inputs, hidden, options, cuts):
    layer = make_layer(cell, inputs, hidden, dtype=dtype, **with_projection(cell, options))
    data = make_data(layer, 23, 4)
    outputs, state = [], data.state
    for chunk in np.split(data.x, cuts):
        y, state = layer(chunk, state)
        outputs.append(y)
    expected, last = layer(data.x, data.state)
    assert_same_bits(np.concatenate(outputs), expected)
    assert_same_bits(state, last)


@pytest.mark.parametrize("cuts", [[1], [9], [7, 7, 20]], ids=str)
@SIZES
def test_chunks_backward(cell, dtype, inputs, hidden, options, cuts):
    """The gradient of the state carried back from chunk to chunk gives the bits of the whole."""
    layer = make_layer(cell, inputs, hidden, dtype=dtype, **with_projection(cell, options))
    data = make_data(layer, 23, 4)
    tapes, state = [], data.state
    for chunk in np.split(data.x, cuts):
        tapes.append(layer.record(chunk, state))
        state = tapes[-1].state
    grad_inputs, grad_state = [], data.grad_state
    for tape, grad_output in reversed(list(zip(tapes, np.split(data.grad_output, cuts), strict=True))):
        grads = tape.backward(grad_output, grad_state)
        grad_inputs.insert(0, grads.input)
        grad_state = grads.state
    gradients = layer.record(data.x, data.state).backward(data.grad_output, data.grad_state)
    assert_same_bits(np.concatenate(grad_inputs), gradients.input)
    assert_same_bits(grad_state, gradients.state)


@pytest.mark.parametrize("power", [0.5, 0.9, 0.98, 1.0], ids="tiny**{}".format)
def test_denormals_are_flushed_alike(cell, dtype, power):
    """Values around the least normal ones: steps flush what sequences flush, whatever the batch."""
    layer = make_layer(cell, 17, 33, dtype=dtype, bias=False)
    scale = np.finfo(dtype).tiny ** layer.dtype.type(power)
    data = Data(*(map_state(lambda v: v * scale, member) for member in make_data(layer, 9, 7)))
    y, state = layer(data.x)
    stream = layer.stream(7)
    assert_same_bits(in_steps(stream, data.x), y)
    assert_same_bits(stream.state, state)
    row = slice(2, 3)
    batch_results, part = run_core(layer, *data), run_core(layer, *take_rows(data, row))
    assert_same_bits(rows_of(part, slice(None)), rows_of(batch_results, row))


# -----------------------------------------------------------------------------------------------------------
# The batch


@SIZES
def test_any_batch_and_place(cell, dtype, inputs, hidden, options):
    """Rows taken out of a batch of 25 give what they gave inside."""
    options = with_projection(cell, options) | {"bidirectional": True}
    layer = make_layer(cell, inputs, hidden, dtype=dtype, **options)
    data = make_data(layer, 5, 25)
    batch_results = run_core(layer, *data)
    for batch in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 24):
        for start in (0, 1, (25 - batch) // 2, 25 - batch):
            rows = slice(start, start + batch)
            part = run_core(layer, *take_rows(data, rows))
            assert_same_bits(rows_of(part, slice(None)), rows_of(batch_results, rows))


@SIZES
def test_permuted_batch(cell, dtype, inputs, hidden, options):
    layer = make_layer(cell, inputs, hidden, dtype=dtype, **with_projection(cell, options))
    data = make_data(layer, 5, 25)
    order = np.random.default_rng(3).permutation(25)
    batch_results, permuted = run_core(layer, *data), run_core(layer, *take_rows(data, order))
    assert_same_bits(rows_of(permuted, slice(None)), rows_of(batch_results, order))
    assert_results_close(of_parameters(permuted), of_parameters(batch_results))


@pytest.mark.parametrize("batch", [1, 2, 5], ids="B{}".format)
def test_rows_of_a_stream(cell, dtype, batch):
    layer = make_layer(cell, 5, 100, dtype=dtype)
    x = make_data(layer, 6, 13).x
    stream_results = in_steps(layer.stream(13), x)
    for start in range(0, 13 - batch, 3):
        rows = slice(start, start + batch)
        assert_same_bits(in_steps(layer.stream(batch), x[:, rows]), stream_results[:, rows])
    assert_same_bits(in_steps(layer.stream(), x[:, 3]), stream_results[:, 3])


# -----------------------------------------------------------------------------------------------------------
# Threads


THREADS = (2, 3, 4, 5)


@pytest.mark.parametrize("batch", [1, 9, 25], ids="B{}".format)
@SIZES
def test_any_number_of_threads(cell, dtype, inputs, hidden, options, batch, use_threads):
    """Everything there is, with dropout and both directions; the gradients of the parameters too."""
    options = with_projection(cell, options) | {"bidirectional": True, "dropout": 0.3}
    layer = make_layer(cell, inputs, hidden, dtype=dtype, **options)
    data = make_data(layer, 5, batch)

    def results():
        layer.call_count = 4
        y, state = layer(data.x, data.state)
        return run_core(layer, *data) | by_name(y=y, after=state)

    use_threads(1)
    expected = results()
    for threads in THREADS:
        use_threads(threads)
        assert_same_bits(results(), expected)


@pytest.mark.parametrize("batch", [None, 5], ids="B{}".format)
@pytest.mark.parametrize("hidden", [17, 100], ids="H{}".format)
def test_streams_with_threads(cell, dtype, hidden, batch, use_threads):
    layer = make_layer(cell, 5, hidden, 2, dtype=dtype)
    x = make_data(layer, 8, batch or 1).x
    x = x[:, 0] if batch is None else x
    use_threads(1)
    expected = in_steps(layer.stream(batch), x)
    for threads in THREADS:
        use_threads(threads)
        for way in WAYS:
            assert_same_bits(way(layer.stream(batch), x), expected, way.__name__)


def test_again_and_again(cell, dtype, use_threads):
    """A race would show in some of many runs."""
    layer = make_layer(cell, 7, 65, 2, bidirectional=True, dtype=dtype)
    data = make_data(layer, 4, 3)
    use_threads(3)
    expected = run_core(layer, *data)
    for _ in range(20):
        assert_same_bits(run_core(layer, *data), expected)


# -----------------------------------------------------------------------------------------------------------
# The comparison itself


def test_comparison_sees_one_bit():
    x = np.zeros(3, "float32")
    assert_same_bits({"x": x}, {"x": x.copy()})
    with pytest.raises(AssertionError):
        assert_same_bits({"x": x}, {"x": -x})
    with pytest.raises(AssertionError):
        assert_same_bits((x,), (np.nextafter(x, 1),))
    with pytest.raises(AssertionError):
        assert_same_bits(x, x[:2])


@pytest.mark.parametrize(("steps", "batch", "hidden"), [(30, 20, 41), (7, 150, 33), (140, 1, 17)], ids=str)
def test_blocks_of_backward_with_threads(cell, dtype, steps, batch, hidden, use_threads):
    """Longer than the block of steps that backward collects, and with more rows than a chain has terms."""
    layer = make_layer(cell, 5, hidden, dtype=dtype, **with_projection(cell, {"bidirectional": True}))
    data = make_data(layer, steps, batch)
    use_threads(1)
    expected = run_core(layer, *data)
    for threads in THREADS:
        use_threads(threads)
        assert_same_bits(run_core(layer, *data), expected)


@pytest.mark.skipif(_core.floating_point_mode() == 0, reason="floating-point mode unknown here")
def test_packed_in_another_mode(cell, dtype):
    """The mode in which the caller happens to be when weights are packed changes nothing."""
    layer = make_layer(cell, 5, 17, dtype=dtype)
    data = make_data(layer, 5, 3)
    expected = run_core(layer, *data)
    layer.load_state_dict(layer.state_dict())
    before = _core.floating_point_mode()
    _core.set_floating_point_mode(before | 0x6000)  # rounds towards zero
    try:
        layer(data.x)
    finally:
        _core.set_floating_point_mode(before)
    assert_same_bits(run_core(layer, *data), expected)
