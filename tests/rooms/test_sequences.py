"""Sequences as they come: rows of different lengths, restarts in the middle, checkpoints, truncated BPTT, padding."""

import gatewise as gw
import numpy as np
import pytest
from conftest import (
    CELLS,
    DTYPES,
    Data,
    assert_results_close,
    assert_same_bits,
    by_name,
    make_data,
    make_layer,
    map_state,
    random,
    run_core,
    run_reference,
)
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("backend")

STACKS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 3, "bias": False},
        {"num_layers": 2, "bidirectional": True, "proj_size": 9},
    ],
    ids=str,
)
LENGTHS = [
    [11, 11, 11],
    [0, 11, 3, 7, 7, 1],
    [2, 5, 4],  # none has all steps
    [0, 0, 0, 0],
    [11] + [2] * 30,
    list(range(1, 12)) * 13,  # more rows than a block of gradients has
]


def of_cell(cell, options):
    """The options of a stack; only an LSTM has projections."""
    return {name: value for name, value in options.items() if cell == "lstm" or name != "proj_size"}


def make_resets(steps, batch, seed=9):
    """Some, and two in a row, and one at the first step."""
    resets = np.random.default_rng(seed).random((steps, batch)) < 0.2
    resets[3:5, batch // 2] = True
    resets[0, 0] = True
    return resets


def check(layer, data, **options):
    """Against the reference; and inference has the same bits as a recorded forward."""
    actual = run_core(layer, *data, **options)
    assert_results_close(actual, run_reference(layer, *data, **options))
    y, state = layer(data.x, data.state, **options)
    assert_same_bits(by_name(output=y, state=state), {name: actual[name] for name in by_name(output=y, state=state)})
    return actual


# -----------------------------------------------------------------------------------------------------------
# Lengths


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}rows{sum(lengths)}steps")
@STACKS
def test_lengths(cell, dtype, options, lengths):
    layer = make_layer(cell, 5, 17, dtype=dtype, **of_cell(cell, options))
    actual = check(layer, make_data(layer, 11, len(lengths)), lengths=lengths)
    padding = np.arange(11)[:, None] >= np.array(lengths)
    assert not actual["output"][padding].any()
    assert not actual["grad_input"][padding].any()


@pytest.mark.parametrize(("inputs", "hidden", "batch"), [(3, 1, 2), (40, 100, 7), (70, 200, 33)], ids=str)
def test_lengths_of_other_sizes(cell, dtype, inputs, hidden, batch):
    layer = make_layer(cell, inputs, hidden, dtype=dtype, bidirectional=True)
    lengths = np.random.default_rng(3).integers(0, 10, batch)
    check(layer, make_data(layer, 9, batch), lengths=lengths)


def alone(layer, data, lengths, row, **options):
    """One row, cut to its length."""
    steps, row_slice = lengths[row], slice(row, row + 1)
    row_data = Data(
        data.x[:steps, row_slice],
        map_state(lambda s: s[:, row_slice], data.state),
        data.grad_output[:steps, row_slice],
        map_state(lambda s: s[:, row_slice], data.grad_state),
    )
    return run_core(layer, *row_data, **options)


def assert_rows_as_alone(layer, data, lengths, resets=None, **options):
    batch_results = run_core(layer, *data, lengths=lengths, resets=resets, **options)
    for row in range(len(lengths)):
        row_resets = None if resets is None else resets[: lengths[row], row : row + 1]
        for name, value in alone(layer, data, lengths, row, resets=row_resets, **options).items():
            if name in ("output", "grad_input"):
                row_result, end = batch_results[name][:, row], lengths[row]
                assert_same_bits(row_result[:end], value[:, 0], name)
                assert_same_bits(row_result[end:], np.zeros_like(row_result[end:]))
            elif not name.startswith("grad "):
                assert_same_bits(batch_results[name][:, row], value[:, 0], name)


@STACKS
def test_rows_are_as_alone(cell, dtype, options):
    layer = make_layer(cell, 5, 33, dtype=dtype, **of_cell(cell, options))
    lengths = [4, 0, 13, 13, 1, 9, 2]
    data = make_data(layer, 13, len(lengths))
    assert_rows_as_alone(layer, data, lengths)
    assert_rows_as_alone(layer, data, lengths, make_resets(13, len(lengths)))


@given(
    cell=st.sampled_from(CELLS),
    dtype=st.sampled_from(DTYPES),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    hidden=st.integers(1, 40),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    more=st.integers(0, 3),
    every=st.none() | st.integers(1, 12),
    seed=st.none() | st.integers(0, 99),
)
def test_any_raggedness(cell, dtype, layers, bidirectional, hidden, lengths, more, every, seed):
    layer = make_layer(cell, 3, hidden, layers, bidirectional=bidirectional, dtype=dtype)
    steps = max(lengths) + more
    data = make_data(layer, steps, len(lengths))
    resets = None if seed is None else np.random.default_rng(seed).random((steps, len(lengths))) < 0.3
    assert_rows_as_alone(layer, data, lengths, resets, checkpoint_every=every)
    actual = run_core(layer, *data, lengths=lengths, resets=resets, checkpoint_every=every)
    assert_results_close(actual, run_reference(layer, *data, lengths=lengths, resets=resets))


@STACKS
def test_padding_does_not_matter(cell, dtype, options):
    """Neither what is in it nor how much there is, to any bit of any result."""
    layer = make_layer(cell, 5, 17, dtype=dtype, **of_cell(cell, options))
    lengths = np.array([4, 0, 9, 1, 9, 2])
    data = make_data(layer, 9, len(lengths))
    expected = run_core(layer, *data, lengths=lengths)
    for steps in (9, 12):
        padded = [np.full((steps, *array.shape[1:]), np.nan, dtype) for array in (data.x, data.grad_output)]
        for array, values in zip(padded, (data.x, data.grad_output), strict=True):
            for row, length in enumerate(lengths):
                array[:length, row] = values[:length, row]
        actual = run_core(layer, padded[0], data.state, padded[1], data.grad_state, lengths=lengths)
        for name in ("output", "grad_input"):
            assert not actual[name][9:].any()
            actual[name] = actual[name][:9]
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("batch", [3, 100, 140])
def test_empty_rows_do_not_matter(cell, batch):
    """Adding empty rows to a batch changes nothing, not even the parameters' gradients, whose sums are cut by rows."""
    layer = make_layer(cell, 5, 17, bidirectional=True)
    lengths = np.random.default_rng(3).integers(1, 10, batch)
    data = make_data(layer, 9, batch)
    filled = Data(
        *(map_state(lambda s: np.concatenate([s[:, :1], s, *[s[:, :1]] * 130], axis=1), member) for member in data)
    )
    expected = run_core(layer, *data, lengths=lengths)
    actual = run_core(layer, *filled, lengths=[0, *lengths, *[0] * 130])
    for name, value in expected.items():
        assert_same_bits(actual[name] if name.startswith("grad ") else actual[name][:, 1 : 1 + batch], value, name)


def test_state_ends_where_the_row_ends(cell):
    layer = make_layer(cell, 5, 17)
    data, lengths = make_data(layer, 9, 3), [9, 0, 4]
    _, state = layer(data.x, data.state, lengths=lengths)
    for row, length in enumerate(lengths):
        _, row_state = layer(data.x[:length, row : row + 1], map_state(lambda s, r=row: s[:, r : r + 1], data.state))
        assert_same_bits(map_state(lambda s, r=row: s[:, r : r + 1], state), row_state)


@pytest.mark.parametrize("kind", [list, tuple, np.uint8, np.int32, np.int64, ">i4"], ids=str)
def test_kinds_of_lengths(kind):
    layer = make_layer("lstm", 5, 7)
    x, lengths = random((6, 3, 5), "float32"), [2, 6, 0]
    argument = kind(lengths) if kind in (list, tuple) else np.array(lengths, kind)
    assert_same_bits(layer(x, lengths=argument), layer(x, lengths=lengths))
    assert_same_bits(layer(x, lengths=[6, 6, 6]), layer(x))


@pytest.mark.parametrize("option", ["lengths", "resets"])
def test_axes(cell, option):
    """batch_first and unbatched, and `out`."""
    layer, turned = (make_layer(cell, 5, 17, bidirectional=True, batch_first=first) for first in (False, True))
    data = make_data(layer, 6, 3)
    value = np.array([4, 0, 6]) if option == "lengths" else make_resets(6, 3)
    y, state = layer(data.x, data.state, **{option: value})
    out = np.full((3, 6, 34), np.nan, "float32")
    _, again = turned(data.x.swapaxes(0, 1).copy(), data.state, **{option: value.T}, out=out)
    assert_same_bits((out.swapaxes(0, 1), again), (y, state))
    row = layer(data.x[:, 0], map_state(lambda s: s[:, 0], data.state), **{option: value[..., 0]})
    assert_same_bits(row, (y[:, 0], map_state(lambda s: s[:, 0], state)))
    expected = run_core(layer, *data, **{option: value})
    actual = run_core(
        turned, data.x.swapaxes(0, 1), data.state, data.grad_output.swapaxes(0, 1), data.grad_state, **{option: value.T}
    )
    for name in ("output", "grad_input"):
        actual[name] = actual[name].swapaxes(0, 1)
    assert_same_bits(actual, expected)


def test_no_rows(cell):
    layer = make_layer(cell, 5, 7)
    for lengths in ([], np.empty(0, int)):
        y, _ = layer(np.empty((4, 0, 5), "float32"), lengths=lengths, resets=np.empty((4, 0), bool))
        assert y.shape == (4, 0, 7)


# -----------------------------------------------------------------------------------------------------------
# Resets


@STACKS
def test_resets(cell, dtype, options):
    layer = make_layer(cell, 5, 17, dtype=dtype, **of_cell(cell, options))
    for batch in (1, 6):
        check(layer, make_data(layer, 9, batch), resets=make_resets(9, batch))


@STACKS
def test_lengths_and_resets(cell, dtype, options):
    layer = make_layer(cell, 5, 17, dtype=dtype, **of_cell(cell, options))
    check(layer, make_data(layer, 9, 5), lengths=[3, 9, 0, 9, 5], resets=make_resets(9, 5))


def test_a_reset_is_a_new_sequence(cell, dtype):
    """The bits of two calls, and no gradient across."""
    layer = make_layer(cell, 5, 33, dtype=dtype)
    data = make_data(layer, 11, 2)
    resets = np.zeros((11, 2))
    resets[4] = 1
    y, state = layer(data.x, data.state, resets=resets)
    first, second = layer(data.x[:4], data.state), layer(data.x[4:])
    assert_same_bits((y, state), (np.concatenate([first[0], second[0]]), second[1]))
    grad_output = data.grad_output.copy()
    grad_output[:4] = 0
    grads = layer.record(data.x, data.state, resets=resets).backward(grad_output, data.grad_state)
    assert not grads.input[:4].any()
    assert not any(part.any() for part in (grads.state if isinstance(grads.state, tuple) else (grads.state,)))


def test_a_reset_removes_nan(cell):
    """The state is set to zero, not multiplied by it."""
    layer = make_layer(cell, 5, 17)
    data, resets = make_data(layer, 6, 3), np.zeros((6, 3), bool)
    resets[3, 1] = True
    dirty = data.x.copy()
    dirty[2, 1] = np.nan
    y, _ = layer(dirty, data.state, resets=resets)
    assert np.isnan(y[2, 1]).all()
    assert_same_bits(y[3:], layer(data.x, data.state, resets=resets)[0][3:])
    tape = layer.record(dirty, data.state, resets=resets)
    grad_output = data.grad_output.copy()
    grad_output[:3, 1] = 0
    assert np.isfinite(tape.backward(grad_output).input[3:]).all()


@pytest.mark.parametrize(
    "kind", [bool, np.uint8, np.int64, np.float32, np.float64, list], ids=lambda kind: kind.__name__
)
def test_kinds_of_resets(kind):
    layer = make_layer("gru", 5, 7)
    x, resets = random((6, 3, 5), "float32"), make_resets(6, 3)
    argument = resets.tolist() if kind is list else resets.astype(kind)
    assert_same_bits(layer(x, resets=argument), layer(x, resets=resets))
    assert_same_bits(layer(x, resets=np.zeros((6, 3))), layer(x))
    assert_same_bits(layer(x, resets=np.asfortranarray(resets)), layer(x, resets=resets))


@pytest.mark.parametrize("batch", [None, 1, 5], ids="B{}".format)
def test_streams_start_anew(cell, dtype, batch):
    layer = make_layer(cell, 5, 17, 2, dtype=dtype)
    x, resets = random((9, batch or 1, 5), dtype), make_resets(9, batch or 1)
    expected, state = layer(x, resets=resets)
    if batch is None:
        x, resets, expected, state = x[:, 0], resets[:, 0], expected[:, 0], map_state(lambda s: s[:, 0], state)

    def by_steps(stream):
        return np.stack([stream.step(row, resets=flags) for row, flags in zip(x, resets.tolist(), strict=True)])

    def by_steps_out(stream):
        out = np.empty_like(expected)
        for row, place, flags in zip(x, out, resets, strict=True):
            assert stream.step(row, place, resets=np.array(flags)) is place
        return out

    def by_runs(stream):
        return np.concatenate([stream.run(x[:4], resets=resets[:4]), stream.run(x[4:], resets=resets[4:] * 1.0)])

    def by_reset(stream):
        def one(row, flags):
            if batch is None and flags:
                stream.reset()
            elif batch is not None:
                stream.reset(flags)
            return stream.step(row, resets=None)

        return np.stack([one(row, flags) for row, flags in zip(x, resets, strict=True)])

    for way in (by_steps, by_steps_out, by_runs, by_reset):
        stream = layer.stream(batch)
        assert_same_bits(way(stream), expected, way.__name__)
        assert_same_bits(stream.state, state, way.__name__)


@pytest.mark.parametrize("rows", [2, -1, [2], [0, 2], np.array([True, False, True]), [], np.uint8(1)], ids=str)
def test_reset_some_rows(rows):
    stream = make_layer("lstm", 5, 7, 2).stream(3)
    stream.step(random((3, 5), "float32"))
    expected = stream.state
    for part in expected:
        part[:, rows] = 0
    stream.reset(rows)
    assert_same_bits(stream.state, expected)


# -----------------------------------------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize("threads", [2, 3, 5])
@STACKS
def test_threads(cell, dtype, options, threads, use_threads):
    layer = make_layer(cell, 40, 70, dtype=dtype, **of_cell(cell, options))
    lengths = np.random.default_rng(3).integers(0, 14, 40)
    data, resets = make_data(layer, 13, 40), make_resets(13, 40)
    for case in ({"lengths": lengths}, {"resets": resets}, {"lengths": lengths, "resets": resets}):
        for every in (None, 4):
            use_threads(1)
            expected, y = run_core(layer, *data, **case), layer(data.x, data.state, **case)
            use_threads(threads)
            assert_same_bits(run_core(layer, *data, **case, checkpoint_every=every), expected)
            assert_same_bits(layer(data.x, data.state, **case), y)


# -----------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("every", [1, 2, 5, 10, 19, 20, 1000])
@STACKS
def test_checkpoints(cell, dtype, options, every):
    """The gradients have the same bits as without, and the tape can be used again."""
    layer = make_layer(cell, 5, 17, dtype=dtype, dropout=0.3, **of_cell(cell, options))
    data = make_data(layer, 20, 9)
    expected = run_core(layer, *data)
    layer.call_count = 0
    tape = layer.record(data.x, data.state, checkpoint_every=every)
    for keep in (True, False):
        grads = tape.backward(data.grad_output, data.grad_state, keep=keep)
        results = by_name(grad_input=grads.input, grad_state=grads.state, grad=grads.parameters)
        assert_same_bits(results, {name: expected[name] for name in results})
    assert_same_bits(tape.output, expected["output"])


@pytest.mark.parametrize(("inputs", "hidden", "batch"), [(3, 1, 1), (130, 100, 3), (5, 40, 150)], ids=str)
def test_checkpoints_of_other_sizes(cell, dtype, inputs, hidden, batch):
    layer = make_layer(cell, inputs, hidden, dtype=dtype)
    data = make_data(layer, 50, batch)
    for every in (3, 16):
        assert_same_bits(run_core(layer, *data, checkpoint_every=every), run_core(layer, *data))


def test_checkpoints_save_memory(cell):
    layer = make_layer(cell, 5, 32)
    x = random((100, 4, 5), "float32")
    complete, some, few = (layer.record(x, checkpoint_every=every) for every in (None, 4, 10))
    values_of_unit = {"lstm": 5, "gru": 5}.get(cell, 1)
    assert complete.nbytes >= 100 * 4 * 32 * 4 * values_of_unit
    assert few.nbytes <= some.nbytes <= complete.nbytes / 4 / values_of_unit + 4096
    some.backward(None)
    assert some.nbytes == 0


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
def test_a_ragged_tape_keeps_what_there_is(cell, bidirectional):
    layer = make_layer(cell, 5, 64, bidirectional=bidirectional)
    x, lengths = random((100, 8, 5), "float32"), [100] + [10] * 7
    for every in (None, 1, 5):
        complete, ragged = (
            layer.record(x, checkpoint_every=every),
            layer.record(x, lengths=lengths, checkpoint_every=every),
        )
        assert ragged.nbytes < 0.25 * complete.nbytes + 128


def test_a_tape_keeps_no_dropped_outputs(cell):
    x = random((100, 4, 5), "float32")
    with_dropout, without = (make_layer(cell, 5, 32, 3, dropout=p).record(x).nbytes for p in (0.5, 0.0))
    assert with_dropout == without


# -----------------------------------------------------------------------------------------------------------
# Truncated BPTT


def test_truncated_bptt(cell):
    """The state carried, the gradient cut: each piece has the gradients of a sequence that starts from a constant."""
    layer = make_layer(cell, 5, 17, dtype="float64")
    data = make_data(layer, 12, 3)
    pieces = zip(np.split(data.x, 3), np.split(data.grad_output, 3), strict=True)
    state, outputs, inputs, total = data.state, [], [], dict.fromkeys(layer.parameters, 0.0)
    for x, grad_output in pieces:
        tape = layer.record(x, state)
        state = tape.state
        grads = tape.backward(grad_output)
        outputs.append(tape.output)
        inputs.append(grads.input)
        total = {name: value + grads.parameters[name] for name, value in total.items()}
    expected, after = layer(data.x, data.state)
    assert_same_bits((np.concatenate(outputs), state), (expected, after))
    # The same from full backward passes: what the loss of a piece gives the steps of that piece, and nothing before.
    wanted_inputs, expected_gradients = [], dict.fromkeys(layer.parameters, 0.0)
    for piece in range(3):
        start, end = 4 * piece, 4 * piece + 4
        _, before = layer(data.x[:start], data.state)
        episode = run_reference(layer, data.x[start:end], before, data.grad_output[start:end])
        full = layer.record(data.x[:end], data.state).backward(
            np.concatenate([np.zeros_like(data.grad_output[:start]), data.grad_output[start:end]])
        )
        wanted_inputs.append(full.input[start:])
        expected_gradients = {name: value + episode[f"grad {name}"] for name, value in expected_gradients.items()}
    assert_same_bits(np.concatenate(inputs), np.concatenate(wanted_inputs))
    assert_results_close(by_name(grad=total), by_name(grad=expected_gradients))


# -----------------------------------------------------------------------------------------------------------
# pad and unpad


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)], ids=str)
def test_pad_and_unpad(shape, batch_first, dtype):
    sequences = [random((length, *shape), dtype, length) for length in (3, 0, 5, 1)]
    x, lengths = gw.pad(sequences, batch_first=batch_first)
    assert x.shape == ((4, 5) if batch_first else (5, 4)) + shape
    assert (lengths.dtype, lengths.tolist()) == (np.int64, [3, 0, 5, 1])
    again = gw.unpad(x, lengths, batch_first=batch_first)
    for array, other in zip(again, sequences, strict=True):
        assert_same_bits(array, other)
        assert array.base is None
    padding = np.arange(5)[:, None] >= lengths
    assert not (x.swapaxes(0, 1) if batch_first else x)[padding].any()


def test_pad_is_what_a_layer_takes():
    layer = make_layer("lstm", 3, 7, bidirectional=True)
    sequences = [random((length, 3), "float32", length) for length in (3, 0, 5, 1)]
    x, lengths = gw.pad(iter(sequences))
    y, _ = layer(x, lengths=lengths)
    for row, sequence in zip(gw.unpad(y, lengths), sequences, strict=True):
        assert_same_bits(row, layer(sequence)[0])
