"""Streams, and what layers, streams and tapes keep of the weights: snapshots, copies, pickles, edits."""

import copy
import functools
import mmap
import pickle
import threading
from pathlib import Path

import gatewise as gw
import numpy as np
import pytest
from conftest import (
    BACKENDS,
    assert_same_bits,
    make_data,
    make_layer,
    make_state,
    map_state,
    output_width,
    random,
    run_core,
)

T, I = 6, 5  # noqa: E741


@pytest.fixture
def layer(cell):
    return make_layer(cell, I, 17, 2)


@pytest.fixture(params=[None, 1, 3], ids="B{}".format)
def batch(request):
    return request.param


def block(batch, seed=0, steps=T):
    return random((steps, I) if batch is None else (steps, batch, I), "float32", seed)


def change(layer):
    """Other weights."""
    layer.parameters.update({name: value * 1.5 for name, value in layer.parameters.items()})


# -----------------------------------------------------------------------------------------------------------
# Streams


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 3}, {"bias": False}, {"dropout": 0.5, "num_layers": 2}], ids=str
)
def test_step_and_run(cell, dtype, batch, options):
    """A stream gives what the layer gives; dropout is for training."""
    layer = make_layer(cell, I, 17, dtype=dtype, **options)
    x = block(batch).astype(dtype)
    y, state = layer(x)
    by_steps, by_run = layer.stream(batch), layer.stream(batch_size=batch)
    assert by_steps.batch_size == batch
    assert_same_bits(np.stack([by_steps.step(row) for row in x]), y)
    assert_same_bits(by_run.run(x), y)
    assert_same_bits(by_steps.state, state)
    assert_same_bits(by_run.state, state)


def test_projection(dtype, batch):
    layer = make_layer("lstm", I, 17, 2, proj_size=4, dtype=dtype)
    x = block(batch).astype(dtype)
    stream = layer.stream(batch)
    assert_same_bits(np.stack([stream.step(row) for row in x]), layer(x)[0])
    assert [s.shape[-1] for s in stream.state] == [4, 17]


def test_batch_first(cell):
    layer = make_layer(cell, I, 17, batch_first=True)
    x = block(3).swapaxes(0, 1)
    y, _ = layer(x)
    stream = layer.stream(3)
    assert_same_bits(stream.run(x), y)
    stream.reset()
    assert_same_bits(np.stack([stream.step(x[:, t]) for t in range(T)], axis=1), y)
    stream.reset()
    out = np.empty_like(y)
    assert stream.run(x, out) is out
    assert_same_bits(out, y)


def test_out(layer, batch):
    stream, other = layer.stream(batch), layer.stream(batch)
    x = block(batch)
    expected = other.run(x)
    out = np.full_like(expected, np.nan)
    assert stream.step(x[0], out[0]) is not None
    result = stream.run(x[1:], out[1:])
    assert np.shares_memory(result, out)
    assert_same_bits(out, expected)
    assert_same_bits(stream.state, other.state)


def test_results_are_new_arrays(layer, batch):
    stream = layer.stream(batch)
    x = block(batch)
    first = stream.step(x[0])
    snapshot = first.copy()
    second = stream.step(x[1])
    assert not np.shares_memory(first, second)
    assert_same_bits(first, snapshot)
    first[...] = np.nan
    assert np.isfinite(stream.run(x)).all()


def test_state(layer, batch):
    """Zeros at first; copied out, copied in."""
    stream = layer.stream(batch)
    assert_same_bits(stream.state, map_state(np.zeros_like, make_state(layer, batch)))
    stream.run(block(batch))
    before = stream.state
    snapshot = map_state(np.copy, before)
    stream.run(block(batch))
    assert_same_bits(before, snapshot)
    for array in before if isinstance(before, tuple) else (before,):
        array[...] = np.nan
    assert np.isfinite(stream.run(block(batch))).all()
    argument = map_state(np.copy, snapshot)
    stream.state = argument
    for array in argument if isinstance(argument, tuple) else (argument,):
        array[...] = np.nan
    assert_same_bits(stream.state, snapshot)
    assert_same_bits(stream.run(block(batch)), layer(block(batch), snapshot)[0])


def test_reset(layer, batch):
    stream = layer.stream(batch)
    first = stream.run(block(batch))
    stream.reset()
    assert_same_bits(stream.state, map_state(np.zeros_like, stream.state))
    assert_same_bits(stream.run(block(batch)), first)


def test_no_steps(layer, batch):
    stream = layer.stream(batch)
    stream.run(block(batch))
    before = stream.state
    assert stream.run(block(batch)[:0]).shape[0] == 0
    assert_same_bits(stream.state, before)


def pickled(value, protocol=pickle.DEFAULT_PROTOCOL):
    return pickle.loads(pickle.dumps(value, protocol))


WAYS = {
    "copy": lambda stream: stream.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_copies_of_streams(layer, batch, way):
    """The same weights and state, and from there on its own."""
    stream = layer.stream(batch)
    stream.run(block(batch))
    before = stream.state
    change(layer)  # the copy keeps the snapshot of the stream, not the layer's present weights
    twin = way(stream)
    assert twin.batch_size == stream.batch_size
    assert_same_bits(twin.state, before)
    expected = twin.run(block(batch, 1))
    assert_same_bits(stream.state, before)
    assert_same_bits(stream.run(block(batch, 1)), expected)
    after = stream.state
    twin.reset()
    assert_same_bits(stream.state, after)


def test_refresh_of_a_copy(layer):
    """A copy made in Python belongs to the same layer."""
    twin = layer.stream().copy()
    change(layer)
    twin.refresh()
    assert_same_bits(twin.run(block(None)), layer(block(None))[0])


# -----------------------------------------------------------------------------------------------------------
# Snapshots


def test_a_stream_keeps_its_weights(layer, batch):
    """Until refresh(), which keeps the state."""
    old = copy.deepcopy(layer)
    stream = layer.stream(batch)
    x = block(batch)
    stream.step(x[0])
    change(layer)
    with layer.edit() as parameters:
        parameters["weight_ih_l0"] += 1
    stream.run(x[1:3])
    _, state = old(x[:3])
    assert_same_bits(stream.state, state)
    stream.refresh()
    assert_same_bits(stream.state, state)
    expected, after = layer(x[3:], state)
    assert_same_bits(stream.run(x[3:]), expected)
    assert_same_bits(stream.state, after)
    assert not np.array_equal(old(x[3:], state)[0], expected)


def test_a_stream_outlives_its_layer(cell):
    layer = make_layer(cell, I, 17)
    stream, (expected, _) = layer.stream(), layer(block(None))
    del layer
    assert_same_bits(stream.run(block(None)), expected)


def test_a_tape_keeps_its_weights(layer):
    data = make_data(layer, T, 3)
    expected = run_core(layer, *data)
    tape = layer.record(data.x, data.state)
    change(layer)
    grads = tape.backward(data.grad_output, data.grad_state)
    assert_same_bits(grads.input, expected["grad_input"])
    for name, value in grads.parameters.items():
        assert_same_bits(value, expected[f"grad {name}"], name)


def test_a_tape_outlives_its_layer(cell):
    layer = make_layer(cell, I, 17)
    data = make_data(layer, T, 3)
    expected = run_core(layer, *data)
    tape = layer.record(data.x, data.state)
    del layer
    assert_same_bits(tape.backward(data.grad_output, data.grad_state).input, expected["grad_input"])


def test_results_of_a_tape_outlive_it(layer):
    data = make_data(layer, T, 3)
    expected = run_core(layer, *data)
    tape = layer.record(data.x, data.state)
    output = tape.output
    grads = tape.backward(data.grad_output, data.grad_state)
    del tape
    for _ in range(5):
        run_core(layer, *data)  # which recycles memory
    assert_same_bits(output, expected["output"])
    assert_same_bits(grads.input, expected["grad_input"])


def test_large_results_keep_their_memory(cell):
    """Large buffers are used again, but not before the last array in them, or view of it, is gone."""
    layer = make_layer(cell, 64, 64)
    data, other = make_data(layer, 100, 64), make_data(layer, 100, 64, seed=11)  # 1.6 MB each
    results = run_core(layer, *data)
    results = {name: value[1:] for name, value in results.items()}
    results["inference"] = layer(data.x, data.state)[0][1:]
    copies = {name: value.copy() for name, value in results.items()}
    for _ in range(3):
        run_core(layer, *other)
        layer(other.x, other.state)
    assert_same_bits(results, copies)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="one backend")
def test_streams_and_tapes_keep_their_backend(cell):
    """Each carries the backend that packed it."""
    before = gw.backend()
    try:
        for first, second in [BACKENDS[:2], BACKENDS[1::-1]]:
            gw.use_backend(first)
            layer = make_layer(cell, I, 17, 2)
            data = make_data(layer, T, 3)
            expected, stream, tape = run_core(layer, *data), layer.stream(3), layer.record(data.x, data.state)
            stream.state = data.state
            gw.use_backend(second)
            assert_same_bits(stream.run(data.x), expected["output"])
            assert_same_bits(tape.backward(data.grad_output, data.grad_state).input, expected["grad_input"])
    finally:
        gw.use_backend(before)


# -----------------------------------------------------------------------------------------------------------
# Parameters and edits


def test_parameters_are_a_mapping(layer):
    parameters = layer.parameters
    assert list(parameters) == list(parameters.keys()) == [name for name, _ in parameters.items()]
    assert len(parameters) == len(list(parameters.values())) == 8
    assert "weight_ih_l0" in parameters
    assert parameters.get("nothing") is None
    assert parameters["weight_hh_l1"].shape[1] == 17


def test_assigning_copies(layer):
    value = layer.parameters["weight_ih_l0"] + 1
    copied = value.copy()
    before = layer.parameters["weight_ih_l0"]
    unchanged = before.copy()
    layer.parameters["weight_ih_l0"] = value
    value[...] = np.nan
    assert_same_bits(layer.parameters["weight_ih_l0"], copied)
    assert_same_bits(before, unchanged)  # an array handed out does not change


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l1", "weight_ih_l1"])
def test_every_parameter_counts(layer, cell, name):
    """A change of each reaches inference, training and new streams; the one way is as good as the other."""
    before = layer(block(3))[0]
    layer.parameters[name] = layer.parameters[name] + 1
    after = layer(block(3))[0]
    assert not np.array_equal(after, before)
    assert_same_bits(layer.record(block(3)).output, after)
    assert_same_bits(layer.stream(3).run(block(3)), after)
    other = make_layer(cell, I, 17, 2)
    with other.edit() as parameters:
        parameters[name] += 1
    assert_same_bits(other(block(3))[0], after)


def test_edit(layer):
    old = layer.state_dict()
    with layer.edit() as parameters:
        assert list(parameters) == list(old)
        for name in parameters:
            parameters[name] *= 2
        assert_same_bits(layer.state_dict(), old)  # until the end
    assert_same_bits(layer.state_dict(), {name: 2 * value for name, value in old.items()})
    with layer.edit() as parameters:
        parameters["bias_ih_l0"] = np.zeros_like(old["bias_ih_l0"])
        parameters["weight_hh_l0"][0, 0] = 7
    assert not layer.parameters["bias_ih_l0"].any()
    assert layer.parameters["weight_hh_l0"][0, 0] == 7


def test_edit_undone_by_an_exception(layer):
    old, y = layer.state_dict(), layer(block(3))[0]

    def edit():
        with layer.edit() as parameters:
            parameters["weight_ih_l0"][...] = 7
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        edit()
    assert_same_bits(layer.state_dict(), old)
    assert_same_bits(layer(block(3))[0], y)


def test_edit_keeps_nothing(layer):
    """Arrays kept from an edit are no longer the layer's."""
    with layer.edit() as parameters:
        weight = parameters["weight_ih_l0"]
        weight += 1
    old, y = layer.state_dict(), layer(block(3))[0]
    weight[...] = np.nan
    assert_same_bits(layer.state_dict(), old)
    assert_same_bits(layer(block(3))[0], y)


def test_state_dict(layer, cell):
    """Copies out, copies in."""
    weights = layer.state_dict()
    other = make_layer(cell, I, 17, 2)
    change(other)
    other.load_state_dict(weights)
    expected = layer(block(3))[0]
    assert_same_bits(other(block(3))[0], expected)
    for value in weights.values():
        value[...] = np.nan
    assert_same_bits(layer(block(3))[0], expected)
    assert_same_bits(other(block(3))[0], expected)


# -----------------------------------------------------------------------------------------------------------
# Copies and pickles of layers

OPTIONS = [
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "dtype",
    "seed",
]
PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize(
    "way",
    [copy.copy, copy.deepcopy, *(functools.partial(pickled, protocol=protocol) for protocol in PROTOCOLS)],
    ids=["copy", "deepcopy", *map("pickle{}".format, PROTOCOLS)],
)
def test_copies_of_layers(cell, dtype, way):
    """Weights, options, seed and count of calls, hence the next masks too; and from there on its own."""
    layer = make_layer(cell, I, 17, 2, dtype=dtype, dropout=0.5, bidirectional=True, batch_first=True, seed=None)
    layer.call_count = 3
    twin = way(layer)
    assert type(twin) is type(layer)
    names = [*OPTIONS, "call_count", *(["proj_size"] if cell == "lstm" else [])]
    assert [getattr(twin, name) for name in names] == [getattr(layer, name) for name in names]
    assert_same_bits(twin.state_dict(), layer.state_dict())
    x = random((3, T, I), dtype)
    assert_same_bits(twin(x), layer(x))
    assert_same_bits(twin.record(x).output, layer.record(x).output)
    before, y = layer.state_dict(), layer(x)[0]
    change(twin)
    twin.call_count = 11
    assert_same_bits(layer.state_dict(), before)
    assert_same_bits(layer(x)[0], y)
    assert layer.call_count == 4
    assert not np.array_equal(twin(x)[0], y)


def test_pickle_of_options():
    lstm = pickled(make_layer("lstm", I, 17, proj_size=4, bias=False))
    assert (lstm.proj_size, lstm.bias, output_width(lstm)) == (4, False, 4)
    rnn = pickled(make_layer("rnn_relu", I, 17))
    assert rnn.nonlinearity == "relu"
    assert rnn(block(3))[0].min() == 0


# -----------------------------------------------------------------------------------------------------------
# Two threads at once


USES = {
    "step": lambda stream, x: stream.step(x[0]),
    "step into out": lambda stream, x: stream.step(x[0], np.empty(100, "float32")),
    "run": lambda stream, x: stream.run(x[:2]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_two_threads_at_once(cell, use):
    """A long run in one thread, the other is refused until it ends; afterwards the stream works as ever."""
    stream = make_layer(cell, I, 100, 2).stream()
    x = block(None, steps=2000)
    stop, refused = threading.Event(), []

    def run():
        while not stop.is_set():
            try:
                stream.run(x)
            except RuntimeError as error:  # when the other was faster
                refused.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(100_000):
        try:
            use(stream, x)
        except RuntimeError as error:
            refused.append(error)
        if refused:
            break
    stop.set()
    thread.join()
    assert refused
    assert "stream" in str(refused[0])
    stream.reset()
    assert_same_bits(stream.run(x), make_layer(cell, I, 100, 2)(x)[0])


def test_everything_at_once():
    """Whatever two threads do with a stream, each call works or is refused, and nothing crashes."""
    layer = make_layer("lstm", I, 100)
    stream = layer.stream()
    x, state = block(None, steps=500), layer.stream().state
    uses = [
        lambda: stream.run(x),
        lambda: stream.step(x[0]),
        lambda: stream.state,
        lambda: setattr(stream, "state", state),
        stream.reset,
        stream.copy,
        stream.refresh,
        lambda: pickle.dumps(stream),
        lambda: change(layer),
    ]
    errors = []

    def work(order):
        for index in order:
            try:
                uses[index]()
            except RuntimeError:
                pass
            except Exception as error:
                errors.append(error)

    orders = np.random.default_rng(0).integers(0, len(uses), (3, 150))
    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    layer.load_state_dict(make_layer("lstm", I, 100).state_dict())
    stream.refresh()
    stream.reset()
    assert_same_bits(stream.run(x), layer(x)[0])


def test_copied_together():
    """A layer and its stream, copied or pickled together, stay together: refresh finds the copied layer's weights."""
    layer = make_layer("gru", 3, 5)
    pair = (layer, layer.stream())
    for twin in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        other, stream = twin(pair)
        other.parameters["bias_hh_l0"] = np.ones(15, "float32")
        stream.refresh()
        x = np.ones(3, "float32")
        assert_same_bits(stream.step(x), other(x[None])[0][0])
        assert not np.array_equal(layer.parameters["bias_hh_l0"], other.parameters["bias_hh_l0"])


def test_conversion_that_uses_the_layer():
    """The user's code, which a conversion may run, can use layers: nothing waits for itself."""
    layer = make_layer("lstm", 3, 4)

    class Lazy:
        def __array__(self, dtype=None, copy=None):
            layer.record(np.ones((2, 3), "float32"))
            layer.parameters["bias_hh_l0"] = np.full(16, 2.0)
            return np.ones(16)

    layer.parameters["bias_ih_l0"] = Lazy()
    assert layer.parameters["bias_ih_l0"][0] == 1
    assert layer.parameters["bias_hh_l0"][0] == 2


def test_snapshots_cannot_be_made_writable():
    layer = make_layer("lstm", 3, 4)
    tape = layer.record(np.ones((2, 3), "float32"))
    for array in (layer.parameters["bias_ih_l0"], tape.output, tape.state[0]):
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


def test_edit_is_complete():
    layer = make_layer("lstm", 3, 4)
    with pytest.raises(ValueError, match="missing bias_ih_l0"), layer.edit() as weights:
        del weights["bias_ih_l0"]


# -----------------------------------------------------------------------------------------------------------
# Arrays that are more than arrays


def test_masked_arrays_are_refused_by_the_c_methods():
    layer = gw.GRU(3, 4, seed=1)
    stream, pool, out = layer.stream(), layer.pool(2), np.zeros(4, np.float32)
    slots, x = np.array([pool.open()]), np.ma.masked_array(np.ones(3, np.float32), [0, 1, 0])
    masked_out, flag = np.ma.masked_array(out, True), np.ma.masked_array(np.array(True), True)
    for method, arguments, options in (
        (stream.step, (x, out), {}), (stream.step, (x.data, masked_out), {}),
        (stream.step, (x.data, out), {"resets": flag}), (stream.run, (x[None], out[None]), {}),
        (stream.run, (x.data[None], masked_out[None]), {}),
        (stream.run, (x.data[None], out[None]), {"resets": flag[None]}),
        (pool.step, (x[None], slots, out[None]), {}), (pool.step, (x.data[None], slots, masked_out[None]), {}),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="expected an array without a mask"):
            method(*arguments, **options)


def test_a_long_run_of_tokens_leaves_nothing_behind():
    """A stream keeps what short blocks need, and no copy of the tokens and resets of a long one."""
    stream, batch = gw.Sequential([gw.Embedding(5, 1, seed=1), gw.RNN(1, 1, seed=2)]).stream(64), 64
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("Linux only")

    def measure():
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE

    tokens, out = np.zeros((100_000, batch), np.int64), np.ones((100_000, batch, 1), np.float32)
    stream.run(tokens[:10], out[:10])
    gw.release_memory()
    before = measure()
    stream.run(tokens, out, resets=np.ones(tokens.shape, bool))
    gw.release_memory()
    assert measure() - before < tokens.nbytes // 2


def test_arrays_in_files_are_arrays(tmp_path):
    stream, out = gw.GRU(3, 4, seed=1).stream(), np.zeros((2, 4), np.float32)
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 3))
    x[:] = 1
    expected = stream.copy().run(np.array(x))
    assert np.array_equal(stream.run(x, out), expected)
