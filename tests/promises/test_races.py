"""Many Python threads in the same objects at once, while weights, backend and number of threads change: every result is
one of those that a single thread gets. A few rounds here; `.ci/sanitize thread` does more and looks for data races."""

import os
import signal
import threading
import time
from collections.abc import Callable

import gatewise as gw
import numpy as np
import pytest
from conftest import make_layer, random

ROUNDS = int(os.environ.get("GATEWISE_RACE_ROUNDS", "2"))
STEPS, BATCH, INPUT, HIDDEN = 12, 9, 8, 40


@pytest.fixture(autouse=True)
def settings(use_threads):
    """Teams of two threads for every call, and everything as before afterwards."""
    backend = gw.backend()
    use_threads(2)
    yield
    gw.use_backend(backend)


def change_settings() -> None:
    """What changes below running calls in all tests here."""
    for count, backend in enumerate(gw.backends()):
        gw.use_backend(backend)
        gw.set_num_threads(1 + count % 3)
        gw.release_memory()
    gw.set_num_threads(2)


def together(*works: Callable[[], object], on_main_thread: Callable[[], object] = change_settings) -> None:
    """Each work in two threads, all at the same time; what one of them raises, the test raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(2 * len(works) + 1)

    def repeat(work):
        start.wait()
        try:
            for _ in range(ROUNDS):
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works for _ in range(2)]
    for thread in threads:
        thread.start()
    start.wait()
    try:
        while any(thread.is_alive() for thread in threads):
            on_main_thread()
            time.sleep(0.001)
    finally:
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def refused(work, *arguments) -> None:
    """Calls it; that another thread uses the object is no failure."""
    try:
        work(*arguments)
    except RuntimeError as error:
        if "in use by another thread" not in str(error):
            raise


def two_weights(model):
    """Two sets of weights for a layer or model, to be swapped under running calls."""
    weights = model.state_dict()
    return [weights, {name: 2 * value for name, value in weights.items()}]


def assert_one_of(result, allowed) -> None:
    assert any(np.allclose(result, candidate, rtol=1e-4, atol=1e-5) for candidate in allowed)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["plain", "bidirectional"])
def test_a_layer(cell, options):
    layer, x = make_layer(cell, INPUT, HIDDEN, 2, **options), random((STEPS, BATCH, INPUT), "float32")
    weights, outputs, gradients = two_weights(layer), [], []

    def train():
        tape = layer.record(x, checkpoint_every=5)
        return tape.backward(np.ones_like(tape.output)).input

    for values in weights:
        layer.load_state_dict(values)
        outputs.append(layer(x)[0])
        gradients.append(train())
    swaps = iter(range(10**9))
    together(
        lambda: assert_one_of(layer(x)[0], outputs),
        lambda: assert_one_of(layer(x, lengths=np.full(BATCH, STEPS))[0], outputs),
        lambda: assert_one_of(train(), gradients),
        lambda: assert_one_of(layer.record(x).output, outputs),
        lambda: layer.load_state_dict(weights[next(swaps) % 2]),
    )


@pytest.mark.parametrize("checkpoint_every", [None, 5])
def test_a_tape(checkpoint_every):
    """Several threads go back over the same recorded call, which stays as it is."""
    layer, x = make_layer("lstm", INPUT, HIDDEN, 2, dropout=0.5), random((STEPS, BATCH, INPUT), "float32")
    tape = layer.record(x, checkpoint_every=checkpoint_every)
    expected = tape.backward(tape.output, keep=True)

    def go_back():
        assert_one_of(tape.backward(tape.output, keep=True).input, [expected.input])

    together(go_back, go_back, lambda: layer.load_state_dict(layer.state_dict()))


def model_of():
    return gw.Sequential(
        [
            gw.Conv1D(INPUT, HIDDEN, 3, activation="gelu", seed=1),
            gw.LSTM(HIDDEN, HIDDEN, seed=2),
            gw.LayerNorm(HIDDEN),
            gw.GRU(HIDDEN, HIDDEN, seed=3),
            gw.Dense(HIDDEN, 5, activation="softmax", seed=4),
        ]
    )


def test_a_model():
    model, x = model_of(), random((STEPS, BATCH, INPUT), "float32")
    weights, outputs = two_weights(model), []
    for values in weights:
        model.load_state_dict(values)
        outputs.append(model(x))
    swaps = iter(range(10**9))
    together(
        lambda: assert_one_of(model(x), outputs),
        lambda: assert_one_of(model.stream(BATCH).run(x), outputs),
        lambda: model.pool(3).open(),
        lambda: model.load_state_dict(weights[next(swaps) % 2]),
    )


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("make", [lambda: make_layer("lstm", INPUT, HIDDEN, 2), model_of], ids=["layer", "model"])
def test_a_stream(make, window):
    """It refuses all but one of the threads, or does what it should."""
    model = make()
    stream, x = model.stream(BATCH, window=window), random((STEPS, BATCH, INPUT), "float32")
    state = model.stream(BATCH, window=window).state
    together(
        lambda: refused(stream.run, x),
        lambda: refused(stream.step, x[0]),
        lambda: refused(lambda: stream.copy().run(x)),
        lambda: refused(stream.reset, [0, 3]),
        lambda: refused(setattr, stream, "state", state),
        lambda: refused(lambda: stream.state),
        lambda: refused(stream.refresh),
        lambda: model.load_state_dict(model.state_dict()),
    )
    stream.reset()
    assert_one_of(stream.run(x), [model.stream(BATCH, window=window).run(x)])


def test_a_pool():
    layer, x = make_layer("gru", INPUT, HIDDEN), random((3, INPUT), "float32")
    pool = layer.pool(8)
    slots = np.array([pool.open() for _ in range(3)])

    def open_and_close():
        slot = pool.open()
        pool.step(x[:1], [slot])
        pool.close(slot)

    together(
        lambda: refused(pool.step, x, slots),
        lambda: refused(pool.step, x, slots, np.empty((3, HIDDEN), "float32")),
        lambda: refused(pool.reset, slots),
        lambda: refused(pool.state, int(slots[1])),
        lambda: refused(pool.grow, 1),
        lambda: refused(pool.refresh),
        lambda: refused(open_and_close),
        lambda: layer.load_state_dict(layer.state_dict()),
    )
    pool.reset(slots)
    assert_one_of(pool.step(x, slots), [layer(x[None])[0][0]])


def test_memory_that_is_used_again():
    """Blocks of the store go from thread to thread: outputs, and what a call needs between two layers."""
    layer, sizes = gw.RNN(4, 64, 2, seed=1), iter(range(10**9))
    results = []

    def compute():
        y, _ = layer(np.ones((600 + 200 * (next(sizes) % 3), 8, 4), "float32"))
        results.append(y)  # freed by whichever thread takes it out
        if len(results) > 4:
            first = results.pop(0)
            assert np.array_equal(first[-1, 0], first[-1, 1])

    together(compute, compute, gw.release_memory)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_signals():
    """A handler that returns, on the main thread's call, while other threads compute."""
    layer, x = make_layer("lstm", INPUT, HIDDEN, 2), random((400, BATCH, INPUT), "float32")
    expected, handled = layer(x)[0], []

    def handle(number, frame):
        handled.append(np.allclose(layer(x[:5])[0], expected[:5]))

    def signalled():
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        assert_one_of(layer(x)[0], [expected])

    before = signal.signal(signal.SIGALRM, handle)
    try:
        together(lambda: assert_one_of(layer(x)[0], [expected]), on_main_thread=signalled)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled
    assert all(handled)


def test_calls_that_are_interrupted():
    """A handler that raises ends the call on the main thread, and no other."""

    class StopError(Exception):
        pass

    def handle(number, frame):
        raise StopError

    layer, x = make_layer("gru", INPUT, HIDDEN), random((400, BATCH, INPUT), "float32")
    expected, stopped = layer(x)[0], []
    long = np.broadcast_to(np.float32(0), (20_000, BATCH, INPUT))

    def interrupted():
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        try:
            layer(long)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except StopError:
            stopped.append(1)

    before = signal.signal(signal.SIGALRM, handle)
    try:
        together(lambda: assert_one_of(layer(x)[0], [expected]), on_main_thread=interrupted)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell"])
def test_a_module_of_pytorch(kind):
    """Packed weights of a module are looked for, made and forgotten by several threads."""
    torch = pytest.importorskip("torch")
    gt = pytest.importorskip("gatewise.torch")
    module = getattr(gt, kind)(INPUT, HIDDEN).eval()
    is_cell = kind.endswith("Cell")
    x = torch.randn(BATCH, INPUT) if is_cell else torch.randn(STEPS, BATCH, INPUT)
    name = "weight_hh" if is_cell else "weight_hh_l0"
    weights = [getattr(module, name).detach().clone(), 2 * getattr(module, name).detach().clone()]

    def call():
        with torch.no_grad():
            return module(x)[0].numpy()

    outputs = []
    for value in weights:
        setattr(module, name, torch.nn.Parameter(value.clone()))
        outputs.append(call())
    swaps = iter(range(10**9))

    def replace():
        setattr(module, name, torch.nn.Parameter(weights[next(swaps) % 2].clone()))

    def train():
        leaf = x.clone().requires_grad_()
        module(leaf)[0].sum().backward(inputs=[leaf])

    together(
        lambda: assert_one_of(call(), outputs),
        lambda: assert_one_of(call(), outputs),
        train,
        replace,
        lambda: gt.repack(module),
        lambda: call_a_new_one(gt, torch, kind, x),
    )


def call_a_new_one(gt, torch, kind, x) -> None:
    """A module that comes, is cached and goes."""
    with torch.no_grad():
        getattr(gt, kind)(INPUT, HIDDEN).eval()(x)
