"""Properties that hold for any sizes and values, searched by Hypothesis; and input in any memory layout."""

import numpy as np
import pytest
from conftest import (
    CELLS,
    DTYPES,
    assert_results_close,
    assert_same_bits,
    by_name,
    make_data,
    make_layer,
    map_state,
    random,
    run_core,
    take_rows,
)
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("backend")

CASES = st.fixed_dictionaries(
    {
        "cell": st.sampled_from(CELLS),
        "input_size": st.integers(1, 20),
        "hidden_size": st.integers(1, 40),
        "num_layers": st.integers(1, 3),
        "bias": st.booleans(),
        "dtype": st.sampled_from(DTYPES),
    }
)
STEPS = st.integers(1, 8)
BATCHES = st.integers(1, 10)


@given(case=CASES, batch=BATCHES, before=st.integers(0, 6), after=st.integers(0, 6))
def test_split_in_time(case, batch, before, after):
    layer = make_layer(**case)
    data = make_data(layer, before + after, batch)
    first, state = layer(data.x[:before], data.state)
    second, state = layer(data.x[before:], state)
    assert_same_bits((np.concatenate([first, second]), state), layer(data.x, data.state))


@given(case=CASES, steps=STEPS, order=BATCHES.flatmap(lambda batch: st.permutations(range(batch))))
def test_permute_the_batch(case, steps, order):
    layer = make_layer(**case)
    data = make_data(layer, steps, len(order))
    results, permuted = run_core(layer, *data), run_core(layer, *take_rows(data, order))
    for name, value in results.items():
        if name.startswith("grad "):
            assert_results_close({name: permuted[name]}, {name: value})
        else:
            assert_same_bits(permuted[name], value[:, order], name)


@given(case=CASES, bidirectional=st.booleans(), steps=STEPS, batch=BATCHES, factor=st.floats(-4, 4, width=32))
def test_backward_is_linear(case, bidirectional, steps, batch, factor):
    """The gradients of a sum are the sum of the gradients."""
    layer = make_layer(**case, bidirectional=bidirectional)
    data = make_data(layer, steps, batch)
    tape = layer.record(data.x, data.state)

    def gradients(grad_output, grad_state):
        grads = tape.backward(grad_output, grad_state, keep=True)
        return by_name(grad_input=grads.input, grad_state=grads.state, grad=dict(grads.parameters))

    def combined(first, second):
        return first + layer.dtype.type(factor) * second

    other = make_data(layer, steps, batch, seed=11)
    state = data.grad_state, other.grad_state
    state = tuple(map(combined, *state)) if isinstance(data.grad_state, tuple) else combined(*state)
    ones, twos = (gradients(loss.grad_output, loss.grad_state) for loss in (data, other))
    sums = gradients(combined(data.grad_output, other.grad_output), state)
    assert_results_close(sums, {name: combined(ones[name], twos[name]) for name in ones})


@given(case=CASES, steps=STEPS, batch=st.integers(2, 10), data=st.data())
def test_nan_stays_in_its_row(case, steps, batch, data):
    """Forward from x or the state, and backward from the gradient."""
    layer = make_layer(**case)
    clean = make_data(layer, steps, batch)
    row, step = data.draw(st.integers(0, batch - 1), "row"), data.draw(st.integers(0, steps - 1), "step")
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]), "bad")
    place = data.draw(st.sampled_from(["x", "state", "grad_output", "grad_state"]), "place")
    dirty = clean._replace(**{place: map_state(np.copy, getattr(clean, place))})
    spoilt = getattr(dirty, place)
    for array in spoilt if isinstance(spoilt, tuple) else (spoilt,):
        array[step if place in ("x", "grad_output") else 0, row, 0] = bad
    others = [index for index in range(batch) if index != row]
    expected, actual = run_core(layer, *clean), run_core(layer, *dirty)
    for name, value in expected.items():
        if not name.startswith("grad "):
            assert_same_bits(actual[name][:, others], value[:, others], name)
    y, _ = layer(dirty.x, dirty.state)
    assert_same_bits(y[:, others], layer(clean.x, clean.state)[0][:, others])
    if place == "x" and np.isnan(bad):
        assert np.isnan(y[step, row]).any()


# -----------------------------------------------------------------------------------------------------------
# Layout and dtype of what is given: converted, and nothing of the caller's is written to


def strided(array):
    wide = np.full((*array.shape[:-1], 3 * array.shape[-1]), np.nan, array.dtype)
    wide[..., ::3] = array
    return wide[..., ::3]


def reversed_strides(array):
    backwards = (slice(None, None, -1),) * array.ndim
    return array[backwards].copy()[backwards]


def transposed(array):
    return array.T.copy().T


def byte_swapped(array):
    return array.astype(array.dtype.newbyteorder())


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def every_other_step(array):
    return np.repeat(array, 2, axis=0)[::2]


LAYOUTS = pytest.mark.parametrize(
    "layout",
    [
        strided,
        reversed_strides,
        np.asfortranarray,
        transposed,
        byte_swapped,
        read_only,
        unaligned,
        every_other_step,
    ],
    ids=lambda function: function.__name__,
)


@LAYOUTS
def test_layouts(cell, dtype, layout):
    layer = make_layer(cell, 5, 17, 2, dtype=dtype)
    data = make_data(layer, 4, 3)
    changed = type(data)(*(map_state(layout, member) for member in data))
    assert_same_bits(run_core(layer, *changed), run_core(layer, *data))
    assert_same_bits(layer(changed.x, changed.state), layer(data.x, data.state))
    assert_same_bits(changed.x.astype(dtype), data.x)


@LAYOUTS
def test_layouts_of_streams(cell, dtype, layout):
    layer = make_layer(cell, 5, 17, dtype=dtype)
    data = make_data(layer, 4, 3)
    expected, state = layer(data.x, data.state)
    stream = layer.stream(3)
    stream.state = map_state(layout, data.state)
    assert_same_bits(np.stack([stream.step(layout(x)) for x in data.x]), expected)
    assert_same_bits(stream.state, state)
    stream.state = data.state
    assert_same_bits(stream.run(layout(data.x)), expected)


@LAYOUTS
def test_layouts_of_parameters(cell, dtype, layout):
    layer, other = make_layer(cell, 5, 17, 2, dtype=dtype), make_layer(cell, 5, 17, 2, dtype=dtype, bias=True)
    for name in list(other.parameters):
        other.parameters[name] = np.zeros(other.parameters[name].shape)
        other.parameters[name] = layout(layer.parameters[name])
    assert_same_bits(other.state_dict(), layer.state_dict())
    data = make_data(layer, 3, 2)
    assert_same_bits(run_core(other, *data), run_core(layer, *data))


@pytest.mark.parametrize("input_dtype", ["float16", "float32", "float64", "longdouble", ">f4", "<f8"])
def test_floating_dtypes(cell, dtype, input_dtype):
    layer = make_layer(cell, 5, 17, dtype=dtype)
    data = make_data(layer, 4, 3)
    data = type(data)(*(map_state(lambda v: v.astype(input_dtype), member) for member in data))
    native = type(data)(*(map_state(lambda v: v.astype(dtype), member) for member in data))
    assert_same_bits(run_core(layer, *data), run_core(layer, *native))
    stream = layer.stream(3)
    stream.state = data.state
    assert_same_bits(stream.run(data.x), layer(native.x, native.state)[0])


def test_broadcast_input():
    """Strides of zero, as np.broadcast_to makes them."""
    layer = make_layer("lstm", 5, 17)
    x = np.broadcast_to(random((1, 1, 5), "float32"), (4, 3, 5))
    assert_same_bits(layer(x), layer(x.copy()))


def test_arguments_are_not_kept():
    """A tape copies what it needs: changing x or the state afterwards changes nothing."""
    layer = make_layer("lstm", 5, 17)
    data = make_data(layer, 4, 3)
    expected = run_core(layer, *data)
    x, state = data.x.copy(), map_state(np.copy, data.state)
    tape = layer.record(x, state)
    x[:] = np.nan
    for array in state:
        array[:] = np.nan
    grads = tape.backward(data.grad_output, data.grad_state)
    assert_same_bits(grads.input, expected["grad_input"])
    assert_same_bits(grads.parameters["weight_ih_l0"], expected["grad weight_ih_l0"])
    assert_same_bits(grads.parameters["weight_hh_l0"], expected["grad weight_hh_l0"])
