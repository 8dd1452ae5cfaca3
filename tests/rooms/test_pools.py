"""Pools: each slot has the bits of a stream of its own, whoever shares the call; and a bad call advances nothing."""

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import gatewise as gw
import numpy as np
import pytest
from conftest import make_layer, make_state, random

OPTIONS = [{}, {"num_layers": 3, "bias": False}]


def members(state):
    return state if isinstance(state, tuple) else (state,)


def assert_same(actual, expected):
    for first, other in zip(members(actual), members(expected), strict=True):
        np.testing.assert_array_equal(first, other)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_slots_have_the_bits_of_streams(cell, dtype, options, threads, use_threads):
    """Any of them, in any order, at any time; with openings, resets, closings and growth in between."""
    use_threads(threads)
    layer = make_layer(cell, 5, 19, dtype=dtype, **options)
    pool, streams, rng = layer.pool(3), {}, np.random.default_rng(1)
    for tick in range(60):
        if len(streams) == pool.capacity:
            pool.grow(int(rng.integers(1, 9)))
        if tick % 2 == 0:
            slot = pool.open()
            assert slot not in streams
            streams[slot] = layer.stream()
        if tick % 7 == 6:
            slot = int(rng.choice(list(streams)))
            pool.close(slot)
            del streams[slot]
        if tick % 5 == 4:
            slots = rng.choice(list(streams), 2, replace=False)
            pool.reset(slots)
            for slot in slots:
                streams[slot].reset()
        slots = rng.permutation(list(streams))[: rng.integers(0, len(streams) + 1)]
        x = random((len(slots), 5), dtype, tick)
        y = pool.step(x, slots)
        assert y.shape == (len(slots), 19)
        for row, slot in enumerate(slots):
            assert_same(y[row], streams[slot].step(x[row]))
        assert pool.slots == sorted(streams)
        assert len(pool) == len(streams)
        for slot, stream in streams.items():
            assert_same(pool.state(slot), stream.state)


def test_a_projection(dtype):
    layer = make_layer("lstm", 5, 19, num_layers=2, proj_size=7, dtype=dtype)
    pool, stream = layer.pool(4), layer.stream()
    slots = [pool.open() for _ in range(4)]
    for tick in range(3):
        x = random((4, 5), dtype, tick)
        assert_same(pool.step(x, slots)[2], stream.step(x[2]))
    assert_same(pool.state(2), stream.state)


def test_many_rows_at_once(use_threads):
    """Enough for threads, of a capacity that is not all used; out, and slots of other kinds."""
    use_threads(2)
    layer = make_layer("lstm", 64, 64)
    pool = layer.pool(1000)
    slots = np.array([pool.open() for _ in range(1000)])[::3].copy()
    x, out = random((len(slots), 64), "float32"), np.empty((len(slots), 64), "float32")
    assert pool.step(x, slots, out) is out
    assert_same(out, layer(x[None])[0][0])
    second = layer.pool(1000)
    for _ in range(1000):
        second.open()
    for kind in (list, np.uint16, np.int32, np.longlong, ">i8", object):
        second.reset(slots)
        argument = list(map(int, slots)) if kind is list else slots.astype(kind)
        assert_same(second.step(x, slots=argument), out)
    second.reset(3)
    assert not members(second.state(3))[0].any()


def test_states_go_in_and_out(cell):
    layer = make_layer(cell, 5, 9, num_layers=2)
    pool, stream = layer.pool(2), layer.stream()
    first, second = pool.open(), pool.open()
    state = make_state(layer, None)
    pool.set_state(second, state)
    stream.state = state
    assert_same(pool.state(second), state)
    assert not members(pool.state(first))[0].any()
    x = random((1, 5), "float32")
    assert_same(pool.step(x, [second])[0], stream.step(x[0]))
    pool.close(second)
    assert pool.open() == second
    assert not members(pool.state(second))[0].any()


def test_refresh(cell):
    layer = make_layer(cell, 5, 9)
    pool = layer.pool(1)
    slot, x = pool.open(), random((1, 5), "float32")
    before = pool.step(x, [slot])
    with layer.edit() as weights:
        weights["weight_ih_l0"] += 1
    pool.reset(slot)
    assert_same(pool.step(x, [slot]), before)
    pool.refresh()
    pool.reset(slot)
    assert_same(pool.step(x, [slot]), layer(x[None])[0][0])


@pytest.mark.parametrize(
    ("slots", "match"),
    [
        ([0, 0], "got 0, which is named twice"),
        ([0, 2], "got 2, which is closed"),
        ([0, 4], "got 4, which is unknown"),
        ([-1, 0], "got -1, which is unknown"),
        ([0, 2**62], "got [0-9]+, which is unknown"),
        (np.array([0, 2**64 - 1], np.uint64), "got [0-9]+, which is unknown"),
    ],
    ids=str,
)
def test_a_bad_slot_advances_nothing(slots, match):
    layer = make_layer("lstm", 5, 9)
    pool = layer.pool(4)
    for _ in range(3):
        pool.open()
    pool.close(2)
    x, out = random((2, 5), "float32"), np.full((2, 9), 7, "float32")
    pool.step(x, [0, 1])
    before = [pool.state(slot) for slot in (0, 1)]
    for argument in (slots, np.asarray(slots)):
        with pytest.raises(ValueError, match=f"^slots: expected open slots, each once, {match}"):
            pool.step(x, argument, out)
    for slot in (0, 1):
        assert_same(pool.state(slot), before[slot])
    assert (out == 7).all()
    for call in (pool.close, pool.reset, pool.state, lambda slot: pool.set_state(slot, before[0])):
        with pytest.raises(ValueError, match="slot: expected an open slot, got 2, which is closed"):
            call(2)
        with pytest.raises(ValueError, match="slot: expected an open slot, got 4, which is unknown"):
            call(4)
    with pytest.raises(ValueError, match="slots: expected open slots, each once, got 9223372036854775808"):
        pool.reset(np.array([2**63], np.uint64))


def test_bad_arguments():
    layer = make_layer("lstm", 5, 9)
    pool = layer.pool(2)
    slots, x = [pool.open(), pool.open()], random((2, 5), "float32")
    all_slots, out = np.array(slots), np.empty((2, 9), "float32")

    def refused(error, match, *arguments, **named):
        with pytest.raises(error, match=match):
            pool.step(*arguments, **named)

    refused(TypeError, "step: expected", x)
    refused(TypeError, "step: expected", x, slots, None, 1)
    refused(TypeError, "step: expected", x, slots, outs=x)
    refused(TypeError, "slots: expected whole numbers, got float", x, [0.0, 1.0])
    refused(TypeError, "slots: expected whole numbers, got bool", x, [True, False])
    refused(ValueError, r"slots: expected shape \(n,\), got \(\)", x, 0)
    refused(ValueError, r"x: expected shape \(1, 5\), got \(2, 5\)", x, [0])
    refused(ValueError, r"x: expected shape \(2, 5\), got \(2, 6\)", random((2, 6), "float32"), slots)
    refused(TypeError, "x: expected exactly float32", x.astype("float64"), all_slots, out)
    refused(ValueError, r"out: expected shape \(2, 9\)", x, all_slots, np.empty((2, 8), "float32"))
    refused(TypeError, "out: expected exactly float32", x, all_slots, np.empty((2, 9)))
    refused(ValueError, "x: expected a C-contiguous, aligned array", x[:, ::-1], all_slots, out)
    memory = np.empty(64, "float32")
    refused(
        ValueError, "out: expected memory of its own", memory[:10].reshape(2, 5), all_slots, memory[5:23].reshape(2, 9)
    )
    out.flags.writeable = False
    refused(ValueError, "out: expected a writable array", x, all_slots, out)
    with pytest.raises(ValueError, match="open: expected a free slot, got 2 that are all open"):
        pool.open()
    for wrong in (0, -1, 2**31):
        with pytest.raises(ValueError, match="capacity: expected a number from 1"):
            layer.pool(wrong)
    for wrong in (1.5, True, None):
        with pytest.raises(TypeError, match="capacity: expected a whole number"):
            layer.pool(wrong)
    with pytest.raises(ValueError, match="capacity: expected a number from 1"):
        make_layer("lstm", 1, 5000).pool(2**31 - 1)
    with pytest.raises(ValueError, match="more: expected"):
        pool.grow(-1)
    with pytest.raises(ValueError, match="more: expected at most"):
        make_layer("lstm", 1, 5000).pool(1).grow(2**31 - 1)
    with pytest.raises(ValueError, match="pool: expected one direction"):
        make_layer("gru", 5, 9, bidirectional=True).pool(1)
    with pytest.raises(TypeError, match="state: expected a state, got None"):
        pool.set_state(0, None)
    with pytest.raises(ValueError, match=r"state\[0\]: expected shape \(1, 9\)"):
        pool.set_state(0, (np.zeros((1, 8)), np.zeros((1, 9))))
    for impossible in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="a pool cannot be pickled or copied"):
            impossible(pool)
    assert repr(pool) == "Pool(lstm (5, 9), layers=1, float32, capacity=2)"
    assert layer.pool(1)  # though no slot is open
    with pytest.raises(TypeError):
        gw.Pool.__new__(gw.Pool).step(x, slots)


def test_one_thread_at_a_time():
    layer = make_layer("lstm", 128, 128)
    pool = layer.pool(500)
    slots = np.array([pool.open() for _ in range(500)])
    x, out = random((500, 128), "float32"), np.empty((500, 128), "float32")
    refused, done = [], threading.Event()

    def other():
        while not done.is_set():
            try:
                pool.state(0)
            except RuntimeError as error:
                refused.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(200):
            try:
                pool.step(x, slots, out)
            except RuntimeError as error:
                refused.append(str(error))
    finally:
        done.set()
        thread.join()
    assert set(refused) <= {"this pool is in use by another thread"}


def test_slots_that_change_meanwhile():
    """What was checked is what is used, whatever another thread writes into the array."""
    pool = make_layer("lstm", 256, 256).pool(64)
    slots = np.array([pool.open() for _ in range(64)])
    x, out = random((64, 256), "float32"), np.empty((64, 256), "float32")
    done, messages = threading.Event(), set()

    def other():
        while not done.is_set():
            slots[5] = 10**9
            slots[5] = 5

    thread = threading.Thread(target=other)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(300):
            try:
                pool.step(x, slots, out)
            except ValueError as error:
                messages.add(str(error))
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert messages <= {"slots: expected open slots, each once, got 1000000000, which is unknown"}


def test_growth_from_several_threads():
    pool = make_layer("gru", 5, 9).pool(1)
    grown = []

    def grow():
        for _ in range(50):
            try:
                pool.grow(1)
                grown.append(1)
            except RuntimeError:
                pass

    threads = [threading.Thread(target=grow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.capacity == 1 + len(grown)


def test_the_example_of_a_service():
    example = Path(__file__).parents[2] / "examples" / "live_service.py"
    command = [sys.executable, example, "--clients", "30", "--seconds", "1", "--deadline", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "frames of 30 clients" in done.stdout
    assert "rows and" in done.stdout
