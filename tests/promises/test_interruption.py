"""Signals during a long call: handlers run meanwhile, and one that raises ends the call, which leaves no trace."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import gatewise as gw
import numpy as np
import pytest
from gatewise import _core

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")

HIDDEN = 320
THIRD = 3  # a handler that runs so often has run during the call: signals that wait are one to Python


class StopError(Exception):
    """What the handler raises."""


class Alarms:
    """A signal 5 ms after the last one was handled; the third handler raises, unless told not to.

    The handler itself asks for the next signal: one that came while it runs would be handled within it.
    """

    def __init__(self, raises=True):
        self.raises = raises
        self.count = 0
        self.modes = set()

    def handle(self, number, frame):
        self.count += 1
        self.modes.add(_core.floating_point_mode())
        if self.raises and self.count == THIRD:
            raise StopError
        signal.setitimer(signal.ITIMER_REAL, 0.005)

    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, self.handle)
        signal.setitimer(signal.ITIMER_REAL, 0.005)
        return self

    def __exit__(self, *error):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"], autouse=True)
def threads(request):
    before = gw.get_num_threads()
    gw.set_num_threads(request.param)
    yield request.param
    gw.set_num_threads(before)


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def zeros(*shape):
    """Input that takes no memory, whatever the number of steps."""
    return np.broadcast_to(np.float32(0), shape)


def layer_of(layers=1, hidden=HIDDEN, **options):
    return gw.LSTM(8, hidden, layers, seed=1, **options)


def equal(a, b):
    if isinstance(a, tuple):
        return len(a) == len(b) and all(equal(*pair) for pair in zip(a, b, strict=True))
    return np.array_equal(a, b)


def layer_call():
    layer = layer_of()
    return lambda: layer(zeros(40_000, 4, 8)), lambda: layer(random(5, 4, 8))


def bidirectional_call():
    layer = layer_of(2, bidirectional=True)
    return lambda: layer(zeros(20_000, 4, 8)), lambda: layer(random(5, 4, 8))


def call_with_lengths_and_resets():
    layer = layer_of()
    lengths, resets = np.array([20_000, 40_000, 3, 39_000]), np.zeros((40_000, 4), bool)
    resets[7] = True
    return lambda: layer(zeros(40_000, 4, 8), lengths=lengths, resets=resets), lambda: layer(random(5, 4, 8))


def rows_alone():
    """So many rows that threads do not meet."""
    layer = layer_of(hidden=64)
    return lambda: layer(zeros(20_000, 64, 8)), lambda: layer(random(5, 64, 8))


def record():
    layer = layer_of(2, dropout=0.5)
    return lambda: layer.record(zeros(10_000, 4, 8)), lambda: (layer.call_count, layer(random(5, 4, 8)))


def backward():
    tape = layer_of().record(zeros(8_000, 4, 8))
    return lambda: tape.backward(tape.output), lambda: tape.nbytes


def backward_with_checkpoints():
    tape = layer_of(2, dropout=0.5).record(zeros(6_000, 4, 8), checkpoint_every=80)
    return lambda: tape.backward(tape.output), lambda: tape.nbytes


def stream_run():
    stream = layer_of(2).stream(4)
    stream.run(random(6, 4, 8))
    return lambda: stream.run(zeros(20_000, 4, 8)), lambda: (stream.state, stream.copy().run(random(5, 4, 8)))


def model_run():
    layers = [gw.Conv1D(8, 16, 5, seed=1), gw.GRU(16, HIDDEN, seed=2), gw.Dense(HIDDEN, 9, seed=3)]
    stream = gw.Sequential(layers).stream(4)
    stream.run(random(6, 4, 8))
    return lambda: stream.run(zeros(40_000, 4, 8)), lambda: (stream.state, stream.copy().run(random(5, 4, 8)))


def model_call():
    model = gw.Sequential([layer_of(), gw.Dense(HIDDEN, 300, activation="softmax", seed=3), gw.Last()])
    return lambda: model(zeros(30_000, 4, 8)), lambda: model(random(5, 4, 8))


def dense_call():
    model = gw.Sequential([gw.Dense(500, 2000, seed=3), gw.Last()])
    return lambda: model(zeros(2_000, 40, 500)), lambda: model(random(5, 4, 500))


def table_of_sums():
    """What the first stream of an embedding and a layer multiplies once."""
    model = gw.Sequential([gw.Embedding(8_000, 3_000, seed=1), gw.LSTM(3_000, 512, seed=2)])
    return model.stream, lambda: 0


def window_step():
    stream = layer_of().stream(4, window=12_000)
    stream.state = random(12_000, 4, 8), np.full(4, 12_000)
    x = random(4, 8)
    return lambda: stream.step(x), lambda: (stream.state, stream.copy().state)


def window_step_with_resets():
    stream = layer_of().stream(4, window=12_000)
    stream.state = random(12_000, 4, 8), np.full(4, 12_000)
    x, resets = random(4, 8), np.array([True, False, False, False])
    return lambda: stream.step(x, resets=resets), lambda: stream.state


def looked_up():
    """Nothing but copies of rows."""
    model = gw.Sequential([gw.Embedding(2_000, 1_000, seed=1), gw.Last()])
    tokens = np.zeros((150_000, 4), np.int64)
    return lambda: model(tokens), lambda: model(tokens[:5])


def masked():
    model = gw.Sequential([gw.Masking(0.0), gw.LSTM(8, HIDDEN, seed=1)])
    x = np.ones((30_000, 4, 8), np.float32)
    x[7] = 0
    return lambda: model(x), lambda: model(random(5, 4, 8))


def window_run():
    """More steps than the window has."""
    stream = layer_of().stream(4, window=30)
    stream.run(random(33, 4, 8))
    return lambda: stream.run(zeros(1_500, 4, 8)), lambda: (stream.state, stream.copy().run(random(4, 4, 8)))


def pool_step():
    pool = layer_of(12).pool(700)
    slots = [pool.open() for _ in range(700)]
    pool.step(random(700, 8), slots)
    x = random(700, 8)
    return lambda: [pool.step(x, slots) for _ in range(20)], lambda: pool.state(699)


CALLS = [
    layer_call, bidirectional_call, call_with_lengths_and_resets, rows_alone, record, backward,
    backward_with_checkpoints, stream_run, model_run, model_call, dense_call, table_of_sums, window_step, window_run,
    window_step_with_resets, looked_up, masked,
]  # fmt: skip


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_a_handler_ends_the_call(make):
    """It leaves everything as it was: the states are unchanged, and another call gives the same bits."""
    call, look = make()
    before, mode = look(), _core.floating_point_mode()
    with Alarms() as alarms, pytest.raises(StopError):
        call()
    assert alarms.modes == {mode}  # Python runs in the caller's floating-point mode
    assert _core.floating_point_mode() == mode
    assert equal(look(), before)


def test_a_tape_goes_on_after_it():
    layer, x = layer_of(), random(2_000, 4, 8)
    tape = layer.record(x)
    with Alarms(), pytest.raises(StopError):
        [tape.backward(tape.output, keep=True) for _ in range(1_000)]
    expected = layer.record(x)
    assert np.array_equal(tape.backward(tape.output).input, expected.backward(expected.output).input)


def test_a_pool_keeps_its_states():
    call, look = pool_step()
    before = look()
    with Alarms(), pytest.raises(StopError):
        call()
    # Some steps were done before the one that was interrupted, of which there is nothing.
    assert equal(look(), before) or all(np.isfinite(part).all() for part in look())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_handler_that_forks(threads):
    """Its child goes on with a call of one thread; where others take part, which it does not have, it ends at once."""
    layer = layer_of()
    expected = layer(zeros(4_000, 4, 8))[0]
    children = []

    def handle(number, frame):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fork in a process that has threads
            child = os.fork()
        if child:
            children.append(child)
        else:
            signal.alarm(60)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    parent, before = os.getpid(), signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        y = layer(zeros(4_000, 4, 8))[0]
    finally:
        signal.signal(signal.SIGALRM, before)
        if os.getpid() != parent:
            os._exit(0 if np.array_equal(y, expected) else 1)
    assert np.array_equal(y, expected)
    (status,) = (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert status == (0 if threads == 1 else -signal.SIGABRT)


def test_handlers_that_return_change_nothing():
    layer = layer_of()
    expected = layer(zeros(4_000, 4, 8))[0]
    with Alarms(raises=False) as alarms:
        y, _ = layer(zeros(4_000, 4, 8))
    assert np.array_equal(y, expected)
    assert alarms.count > 0


def test_a_handler_may_compute_and_finds_the_stream_in_use():
    layer, stream = layer_of(), layer_of().stream(4)
    expected, said = layer(random(5, 4, 8))[0], []

    def handle(number, frame):
        said.append(np.array_equal(layer(random(5, 4, 8))[0], expected))
        try:
            stream.step(random(4, 8))
        except RuntimeError as error:
            said.append(str(error))

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        stream.run(zeros(20_000, 4, 8))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert said == [True, "this stream is in use by another thread; give each thread a stream.copy()"]


def test_other_threads_are_left_alone():
    """Python handles signals on its main thread; a call on another one goes on to its end."""
    layer, results = layer_of(), []
    thread = threading.Thread(target=lambda: results.append(layer(zeros(4_000, 4, 8))[0]))
    with Alarms(), pytest.raises(StopError):
        [thread.start(), time.sleep(60)]
    thread.join()
    assert np.array_equal(results[0], layer(zeros(4_000, 4, 8))[0])


CTRL_C = """
import sys, time
import gatewise as gw, numpy as np
gw.set_num_threads({threads})
layer = gw.LSTM(8, 320, seed=1)
expected = layer(np.ones((5, 4, 8), "f4"))[0]
out = np.zeros((400_000, 1, 320), "f4")
print("ready", flush=True)
try:
    layer(np.broadcast_to(np.float32(0), (400_000, 1, 8)), out=out)
    print("no interrupt")
except KeyboardInterrupt:
    print("interrupted", "early" if not out[-1].any() else "at the end")
try:
    time.sleep(0.5)
except KeyboardInterrupt:
    print("once more")
print(np.array_equal(layer(np.ones((5, 4, 8), "f4"))[0], expected), flush=True)
"""


@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c(threads, count):
    """A KeyboardInterrupt long before the end; a second one, wherever it comes, does no harm."""
    program = CTRL_C.format(threads=threads)
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        for _ in range(count):
            time.sleep(0.2)
            child.send_signal(signal.SIGINT)
        lines = child.communicate(timeout=300)[0].splitlines()
    finally:
        child.kill()
        child.wait()
    assert lines[0] == "interrupted early"
    assert lines[-1] == "True"
    assert child.returncode == 0
