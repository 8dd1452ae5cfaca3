"""What concerns the whole process, each test in one of its own: environment, floating-point mode, forks,
allocations, threads, and sizes that no memory holds."""

import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap

import gatewise as gw
import numpy as np
import pytest
from gatewise import _core

LINUX = sys.platform.startswith("linux")
TIMEOUT = 300  # seconds; what hangs fails

PREAMBLE = """
import json, os, sys, threading
import numpy as np
import gatewise as gw
from gatewise import _core

def layer_of(cell, *args, seed=1, **kwargs):
    kinds = {"lstm": gw.LSTM, "gru": gw.GRU, "rnn": gw.RNN}
    return kinds[cell](*args, seed=seed, **kwargs)

def random(*shape, dtype="float32"):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)

def train(layer, x):
    tape = layer.record(x)
    return tape.backward(np.ones_like(tape.output))
"""


def python(code, **environment):
    """Run the code after the preamble in a new interpreter."""
    environment = {name: value for name, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


def run(code, **environment):
    """The same; it must succeed. Returns what it printed, as JSON where it printed any."""
    result = python(code, **environment)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return json.loads(result.stdout) if result.stdout.strip() else None


@pytest.fixture
def environment(backend):
    return {"GATEWISE_BACKEND": backend}


needs_threads = pytest.mark.skipif(not _core.configuration()["openmp"], reason="built without OpenMP")
needs_linux = pytest.mark.skipif(not LINUX, reason="Linux only")
needs_mode = pytest.mark.skipif(_core.floating_point_mode() == 0, reason="floating-point mode unknown here")


# -----------------------------------------------------------------------------------------------------------
# Environment


def test_backend_from_the_environment(backend):
    assert run("print(json.dumps(gw.backend()))", GATEWISE_BACKEND=backend) == backend


def test_best_backend_by_default():
    assert run("print(json.dumps(gw.backend()))", GATEWISE_BACKEND=None) == gw.backends()[-1]


def test_unknown_backend_in_the_environment():
    """An error on import that names the variable, what came and what there is; not a crash."""
    result = python("", GATEWISE_BACKEND="no-such-backend")
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    for part in ("GATEWISE_BACKEND", "no-such-backend", *gw.backends()):
        assert part in message


def test_show_config_tells_the_backend(backend):
    result = python("gw.show_config()", GATEWISE_BACKEND=backend)
    assert result.returncode == 0
    assert backend in result.stdout
    assert gw.__version__ in result.stdout


@pytest.mark.parametrize("variable", ["GATEWISE_NUM_THREADS", "OMP_NUM_THREADS"])
def test_one_thread_from_the_environment(variable):
    assert run("print(gw.get_num_threads())", **{variable: "1"}) == 1


@needs_linux
def test_threads_by_default():
    """The least of what there is: never more than the processors we may use, however many are asked for."""
    code = "print(json.dumps([gw.get_num_threads(), len(os.sched_getaffinity(0))]))"
    threads, processors = run(code, GATEWISE_NUM_THREADS="1000", OMP_NUM_THREADS=None)
    assert 1 <= threads <= processors


@needs_linux
def test_threads_follow_the_affinity():
    processor = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{processor}}})\n{PREAMBLE}\nprint(gw.get_num_threads())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert int(result.stdout) == 1


@pytest.mark.parametrize("value", ["many", "0", "-3", "", "1.5"])
def test_nonsense_as_number_of_threads(value):
    """Passed over, or an error that names the variable."""
    result = python("assert gw.get_num_threads() >= 1", GATEWISE_NUM_THREADS=value)
    assert result.returncode == 0 or (result.returncode == 1 and "GATEWISE_NUM_THREADS" in result.stderr)


# -----------------------------------------------------------------------------------------------------------
# Threads


COUNT_TASKS = """
def tasks():
    return len(os.listdir("/proc/self/task"))
"""


@needs_linux
@needs_threads
def test_threads_are_really_used(environment):
    """Else the tests of bits on many threads would test nothing."""
    code = """
    gw.set_num_threads(3)
    _core.set_threading_threshold(0)
    layer, x = layer_of("lstm", 8, 100), random(5, 2, 8)
    before = tasks()
    layer(x)
    assert tasks() == before + 2, (before, tasks())
    """
    run(COUNT_TASKS + textwrap.dedent(code), **environment)


@needs_linux
def test_small_calls_start_no_thread(environment):
    code = """
    gw.set_num_threads(4)
    for cell in ("lstm", "gru", "rnn"):
        layer, x = layer_of(cell, 8, 16), random(10, 2, 8)
        before = tasks()
        layer(x), train(layer, x), layer.stream(2).run(x), layer.stream(2).step(x[0])
        assert tasks() == before
    """
    run(COUNT_TASKS + textwrap.dedent(code), **environment)


@pytest.mark.parametrize("threads", [1, 3], ids="threads{}".format)
def test_python_threads_share_a_layer(environment, threads):
    """Inference, training, streams from many Python threads: the same bits, each call count once."""
    code = f"""
    gw.set_num_threads({threads})
    _core.set_threading_threshold(0)
    layer = layer_of("lstm", 8, 65, 2, dropout=0.5)
    x = random(50, 3, 8)
    expected, counts, wrong = layer(x)[0].tobytes(), [], []
    trained = {{}}
    for count in range(4 * 10):
        layer.call_count = count
        trained[count] = train(layer, x).input.tobytes()
    layer.call_count = 0

    def work():
        for _ in range(10):
            tape = layer.record(x)
            counts.append(tape.call_count)
            grads = tape.backward(np.ones_like(tape.output))
            if grads.input.tobytes() != trained[tape.call_count]:
                wrong.append("train")
            if layer(x)[0].tobytes() != expected:
                wrong.append("layer")
            if layer.stream(3).run(x).tobytes() != expected:
                wrong.append("stream")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong
    assert sorted(counts) == list(range(40)), sorted(counts)
    """
    run(code, **environment)


def test_weights_change_under_running_calls(environment):
    """A call under way is not disturbed: each result is of the one or the other weights, never mixed."""
    code = """
    layer = layer_of("gru", 8, 65, 2)
    x = random(100, 3, 8)
    weights = [layer.state_dict(), {name: 2 * value for name, value in layer.state_dict().items()}]
    allowed, wrong, stop = set(), [], threading.Event()
    for values in weights:
        layer.load_state_dict(values)
        allowed.add(layer(x)[0].tobytes())
    assert len(allowed) == 2

    def work():
        while not stop.is_set():
            if layer(x)[0].tobytes() not in allowed or layer.record(x).output.tobytes() not in allowed:
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for turn in range(100):
        layer.load_state_dict(weights[turn % 2])
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong
    """
    run(code, **environment)


# -----------------------------------------------------------------------------------------------------------
# Forks


FORK = """
def in_child(function, seconds=60):
    # The exit status of a forked child that runs the function; it is killed when it hangs.
    import signal, time, traceback, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process that has threads
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("asks", [False, True], ids=["as-inherited", "asks-for-threads"])
def test_fork_after_a_threaded_call(environment, asks):
    """The child computes the same bits, and its own child too; none hangs; the parent goes on."""
    code = f"""
    gw.set_num_threads(2)
    _core.set_threading_threshold(0)
    layer, x = layer_of("lstm", 8, 65, 2), random(20, 3, 8)
    stream = layer.stream(3)

    def results():
        stream.reset()
        return [layer(x)[0].tobytes(), train(layer, x).input.tobytes(), stream.run(x).tobytes()]

    expected = results()

    def child():
        if {asks}:
            gw.set_num_threads(2)
        assert results() == expected
        assert results() == expected

    def child_with_child():
        child()
        assert in_child(child) == 0

    for _ in range(3):
        assert in_child(child_with_child) == 0
        assert results() == expected
    """
    run(FORK + textwrap.dedent(code), **environment)


LEFT_BEHIND = """
import time

def in_children(busy, work):
    # Forks while another thread is in `busy`, until one child has found that it was left behind there.
    found, stop = [], threading.Event()

    def loop():
        while not stop.is_set():
            busy()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        for attempt in range(200):
            time.sleep(0.011)
            status = in_child(lambda: sys.exit(7) if work() else None)
            assert status in (0, 1), status
            found.append(status)
            if sum(found) >= 3:
                return
        raise AssertionError("no fork came during a call")
    finally:
        stop.set()
        thread.join()

def refuses(call, *args):
    try:
        call(*args)
    except RuntimeError as error:
        assert "when the process forked; reset()" in str(error), error
        return True
    return False
"""


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@needs_fork
@pytest.mark.parametrize("window", [None, 40])
def test_a_stream_left_behind_by_a_fork(environment, window):
    """The child must reset it, as a whole; it then has the bits of a fresh one."""
    code = f"""
    layer = layer_of("lstm", 32, 96)
    x = random(300, 24, 32)
    stream, expected = layer.stream(24, window={window}), layer.stream(24, window={window}).run(x[:20])
    state = layer.stream(24, window={window}).state

    def work():
        left = refuses(stream.step, x[0])
        if left:
            assert refuses(stream.run, x[:2]) and refuses(lambda: stream.state) and refuses(stream.copy)
            assert refuses(stream.reset, [0, 3]) and refuses(stream.refresh)
        stream.reset()
        assert np.array_equal(stream.run(x[:20]), expected)
        stream.refresh()
        stream.state = state
        assert np.array_equal(stream.run(x[:20]), expected)
        return left

    in_children(lambda: stream.run(x), work)
    """
    run(FORK + LEFT_BEHIND + textwrap.dedent(code), **environment)


@needs_fork
def test_setting_the_state_of_a_stream_left_behind_by_a_fork(environment):
    code = """
    layer = layer_of("gru", 32, 96)
    x = random(300, 24, 32)
    stream, fresh = layer.stream(24), layer.stream(24)
    fresh.run(x[:5])
    state, expected = fresh.state, fresh.run(x[5:20])

    def work():
        left = refuses(stream.step, x[0])
        stream.state = state
        assert np.array_equal(stream.run(x[5:20]), expected)
        return left

    in_children(lambda: stream.run(x), work)
    """
    run(FORK + LEFT_BEHIND + textwrap.dedent(code), **environment)


@needs_fork
def test_a_pool_left_behind_by_a_fork(environment):
    """In the child, every slot of the interrupted step must be reset; all other slots keep their states."""
    code = """
    layer = layer_of("lstm", 32, 160)
    pool, x = layer.pool(64), random(60, 32)
    slots = [pool.open() for _ in range(60)]
    other = pool.open()
    pool.step(x[:1], [other])
    kept, expected = pool.state(other), layer(x[None])[0][0]

    def work():
        left = refuses(pool.step, x, slots)
        if left:
            assert refuses(pool.reset, slots[:-1]) and refuses(pool.state, other)
            assert refuses(pool.reset, [*slots, 63]) and refuses(pool.step, x, slots)
        pool.reset(slots)
        assert np.array_equal(pool.step(x, slots), expected)
        assert all(map(np.array_equal, pool.state(other), kept))
        return left

    in_children(lambda: pool.step(x, slots), work)
    """
    run(FORK + LEFT_BEHIND + textwrap.dedent(code), **environment)


# -----------------------------------------------------------------------------------------------------------
# The end of the interpreter, and other interpreters


AT_THE_END = {
    "call": "l(x)",
    "record and backward": "t = l.record(x); t.backward(t.output)",
    "run of a stream": "s = l.stream(9)\n        for _ in range(99): s.run(x)",
    "step of a stream": "s = w.stream(24)\n        for _ in range(99): s.step(np.zeros((24, 192), 'f4'))",
    "step of a window": "s = l.stream(window=24)\n        for _ in range(99): s.step(x[0, 0])",
    "step of a pool": "p = w.pool(90); o = [p.open() for _ in range(90)]\n"
    "        for _ in range(99): p.step(np.zeros((90, 192), 'f4'), o)",
    "network": "m(x)",
    "packing": "gw.LSTM(192, 192).stream()",
    "table of sums": "gw.Sequential([gw.Embedding(500, 90), gw.LSTM(90, 96)]).stream()",
    "measuring": "_core.multiply_add(np.dtype('f4'), 10_000_000)",
}


@pytest.mark.parametrize("body", AT_THE_END.values(), ids=AT_THE_END)
def test_the_interpreter_ends_while_other_threads_compute(body):
    """Its exit code is its own, and everything was printed, whatever daemon threads were in the middle of."""
    code = f"""
    import time
    l, w, x = gw.LSTM(48, 96), gw.LSTM(192, 192), np.zeros((40, 9, 48), "f4")
    m = gw.Sequential([gw.LSTM(48, 96), gw.Dense(96, 7)])
    def loop():
        while True:
            {textwrap.dedent(body)}
    for _ in range(3):
        threading.Thread(target=loop, daemon=True).start()
    time.sleep(DELAY)
    print("true")
    sys.exit(7)
    """
    for delay in ("0.5", "0.5171"):
        result = python(textwrap.indent(textwrap.dedent(code), "").replace("DELAY", delay))
        assert (result.returncode, result.stdout) == (7, "true\n"), result.stderr


def test_a_subinterpreter_is_refused():
    """With an ImportError: it neither hangs nor ends the process."""
    code = """
    try:
        import _xxsubinterpreters as interpreters
    except ImportError:
        import _interpreters as interpreters
    try:
        said = interpreters.run_string(interpreters.create(), "import gatewise._core")
    except Exception as error:
        said = error
    assert "ImportError" in str(getattr(said, "formatted", said)), said
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr


# -----------------------------------------------------------------------------------------------------------
# Threads and memory that the system does not give


@needs_linux
@needs_threads
@pytest.mark.parametrize("before", ["", "gw.set_num_threads(2); compute(); gw.set_num_threads(4)"], ids=["none", "two"])
def test_no_more_threads_to_be_had(environment, before):
    """A call computes on the threads that there are, to the same bits."""
    code = f"""
    import resource
    _core.set_threading_threshold(0)
    gw.set_num_threads(1)
    layer, x = layer_of("lstm", 48, 112, 2), random(60, 28, 48)
    model, wide = gw.Sequential([layer, gw.Dense(112, 5, seed=4)]), layer_of("gru", 48, 320)
    pool = wide.pool(28)
    slots = [pool.open() for _ in range(28)]

    def compute():
        pool.reset(slots)
        results = [layer(x)[0], train(layer, x).input, model(x), layer.stream(28).run(x), pool.step(x[0], slots)]
        return [result.tobytes() for result in results]

    expected = compute()
    gw.set_num_threads(4)
    {before}
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    if os.geteuid() == 0:  # whom the limit does not bind
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    try:
        threading.Thread(target=print).start()
        print('"no limit"')
    except RuntimeError:
        assert compute() == expected
        print('"computed"')
    """
    if run(code, **environment) == "no limit":
        pytest.skip("the number of threads cannot be limited here")


@needs_linux
@pytest.mark.parametrize("sizes", [[200], [15, 17, 19, 21, 23, 25, 27, 29, 31, 35]], ids=["one-block", "many-blocks"])
def test_held_memory_is_returned_where_it_is_short(environment, sizes):
    """A new output fits, because gatewise gives up the memory it was keeping for later calls."""
    code = f"""
    import gc, resource
    gw.set_num_threads(1)
    layer = gw.RNN(8, 256, seed=1)
    def inputs(megabytes):
        return np.zeros((megabytes * 2**20 // (4 * 256 * 16), 16, 8), "f4")
    for megabytes in {sizes}:
        layer(inputs(megabytes))
    x = inputs(110)
    expected = layer(x[:40])[0]
    pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + (60 << 20), resource.RLIM_INFINITY))
    assert np.array_equal(layer(x)[0][:40], expected)
    """
    run(code, **environment)


def test_release_memory():
    layer = gw.LSTM(8, 64)
    gw.release_memory()
    layer(np.zeros((20_000, 4, 8), "f4"))
    assert gw.release_memory() >= 20_000 * 4 * 64 * 4
    assert gw.release_memory() == 0


# -----------------------------------------------------------------------------------------------------------
# Floating-point mode


SETUPS = {
    "one thread": "gw.set_num_threads(1)",
    "threads": "gw.set_num_threads(3); _core.set_threading_threshold(0)",
}
setups = pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)


@needs_mode
@setups
def test_floating_point_mode_is_restored(environment, setup):
    """After calls of every kind, refused ones too; whether the caller flushes, rounds down, or not."""
    code = f"""
    {setup}

    def control(mode):
        return mode & ~0x3F  # without the flags of what has happened

    plain = control(_core.floating_point_mode())
    flush_to_zero, denormals_are_zero, round_down = 0x8000, 0x0040, 0x2000

    def calls():
        for cell in ("lstm", "gru", "rnn"):
            layer, x = layer_of(cell, 8, 33, 2), random(7, 3, 8)
            stream = layer.stream(3)
            out = np.empty((3, 33), "float32")
            yield lambda: layer(x)
            yield lambda: layer.record(x)
            yield lambda: train(layer, x)
            yield lambda: stream.run(x)
            yield lambda: stream.step(x[0])
            yield lambda: stream.step(x[0], out)
            for function in (layer, layer.record, stream.run, stream.step):
                yield lambda: refused(function)

    def refused(function):
        try:
            function(np.zeros((7, 3, 9), "float32"))
        except ValueError:
            return
        raise AssertionError("not refused")

    for mode in (plain, plain | flush_to_zero, plain | denormals_are_zero, plain | round_down):
        for call in calls():
            _core.set_floating_point_mode(mode)
            assert control(_core.floating_point_mode()) == mode
            call()
            after = _core.floating_point_mode()
            _core.set_floating_point_mode(plain)
            assert control(after) == mode, (hex(mode), hex(after))
    """
    run(code, **environment)


@needs_mode
@setups
@pytest.mark.parametrize(("dtype", "tiny"), [("float32", 1e-40), ("float64", 1e-310)])
def test_denormals_are_flushed_inside_only(environment, setup, dtype, tiny):
    """A relu network that passes its input on: a denormal comes out as zero, in every thread and way."""
    code = f"""
    {setup}
    layer = gw.RNN(1, 100, nonlinearity="relu", bias=False, dtype="{dtype}", seed=1)
    layer.parameters.update({{"weight_ih_l0": np.ones((100, 1)), "weight_hh_l0": np.zeros((100, 100))}})

    def check():
        x = np.full((3, 2, 1), {tiny}, "{dtype}")
        assert (x * x.dtype.type(0.5) != 0).all(), "denormals flushed outside"
        out = np.full((2, 100), 7, "{dtype}")
        layer.stream(2).step(x[0], out)
        tape = layer.record(x)
        results = [layer(x)[0], tape.output, layer.stream(2).run(x), layer.stream(2).step(x[0]), out]
        ones = layer.record(np.ones((3, 2, 1), "{dtype}"))
        assert (ones.output == 1).all()
        results.append(ones.backward(np.full_like(ones.output, {tiny})).input)
        for index, result in enumerate(results):
            assert not result.any(), (index, result[result != 0])
        assert (x * x.dtype.type(0.5) != 0).all(), "denormals flushed outside afterwards"

    for _ in range(3):
        check()
    worker = threading.Thread(target=check)
    worker.start()
    worker.join()
    """
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    assert "AssertionError" not in result.stderr, result.stderr


@pytest.mark.parametrize("where", ["main", "fresh"])
def test_import_leaves_denormals_alone(where):
    """No start-up code of a fast-math library slips in."""
    code = """
    import warnings
    warnings.simplefilter("error")

    def check():
        for dtype in (np.float32, np.float64):
            assert np.finfo(dtype).smallest_subnormal > 0
            assert (np.array([np.finfo(dtype).tiny]) / dtype(4) > 0).all()
        print("true")

    thread = threading.Thread(target=check)
    thread.start() if "WHERE" == "fresh" else check()
    """
    assert run(code.replace("WHERE", where)) is True


# -----------------------------------------------------------------------------------------------------------
# Allocations


SHIM = """
#include <errno.h>
#include <stddef.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

long gatewise_allocations = 0;
#define COUNT __atomic_fetch_add(&gatewise_allocations, 1, __ATOMIC_RELAXED)

void *malloc(size_t n) { COUNT; return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { COUNT; return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { COUNT; return __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { COUNT; return __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { COUNT; return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
    COUNT;
    *p = __libc_memalign(a, n);
    return *p ? 0 : ENOMEM;
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """A library that counts what the heap is asked for, to be loaded before all others."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not LINUX or platform.libc_ver()[0] != "glibc":
        pytest.skip("the counting malloc is written for Linux with glibc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", "shim.so", "shim.c"], cwd=folder, check=True)
    return str(folder / "shim.so")


def test_step_and_run_into_out_allocate_nothing(environment, shim):
    """Neither the core nor Python, which shares the heap here; step(x) shows that the counter counts."""
    code = """
    import ctypes, itertools
    counter = ctypes.c_long.in_dll(ctypes.CDLL(None), "gatewise_allocations")

    def allocations(step, arguments, times):
        before = counter.value
        for _ in itertools.repeat(None, times):
            step(*arguments)
        return counter.value - before

    def allocations_a_thousand(step, *arguments):
        for times in (10, 0, 1000, 0):  # until the interpreter has settled
            allocations(step, arguments, times)
        return allocations(step, arguments, 1000) - allocations(step, arguments, 0)

    def with_resets(stream, flags, way="step"):
        method = getattr(stream, way)
        def step(x, out):
            method(x, out, resets=flags)
        return step

    nothing, something = {}, {}
    for cell in ("lstm", "gru", "rnn"):
        for dtype in ("float32", "float64"):
            for layers in (1, 3):
                for hidden in (1, 16, 65):
                    for batch in (None, 1, 7):
                        layer = layer_of(cell, 9, hidden, layers, dtype=dtype)
                        rows = () if batch is None else (batch,)
                        x, out = random(*rows, 9, dtype=dtype), random(*rows, hidden, dtype=dtype)
                        name = f"{cell} {dtype} layers {layers} hidden {hidden} batch {batch}"
                        stream = layer.stream(batch)
                        nothing[name] = allocations_a_thousand(stream.step, x, out)
                        something[name] = allocations_a_thousand(stream.step, x)
                        flags = [np.ones(rows, bool)] + ([True, np.True_] if batch is None else [])
                        for flag in flags:
                            kind = f"{name} resets {type(flag).__name__}"
                            nothing[kind] = allocations_a_thousand(with_resets(stream, flag), x, out)
                    block, outputs = random(5, *rows, 9, dtype=dtype), random(5, *rows, hidden, dtype=dtype)
                    nothing[f"{name} run"] = allocations_a_thousand(stream.run, block, outputs)
                    flags = np.arange(5 * (batch or 1)).reshape(5, *rows) % 3 == 0
                    nothing[f"{name} run resets"] = allocations_a_thousand(
                        with_resets(stream, flags, "run"), block, outputs)
                    pool = layer.pool(9)
                    slots = np.array([pool.open() for _ in range(7)])[::-1].copy()
                    rows, results = random(7, 9, dtype=dtype), random(7, hidden, dtype=dtype)
                    nothing[f"{name} pool"] = allocations_a_thousand(pool.step, rows, slots, results)
                    nothing[f"{name} pool, some"] = allocations_a_thousand(pool.step, rows[:3], slots[2:5], results[:3])
    layer = gw.LSTM(9, 16, proj_size=5, seed=1)
    nothing["projection"] = allocations_a_thousand(layer.stream().step, random(9), random(5))
    model = gw.Sequential([
        gw.Embedding(300, 9), gw.LSTM(9, 16, 2), gw.Conv1D(16, 12, 3, dilation=2, activation="gelu"), gw.LayerNorm(12),
        gw.GRU(12, 9), gw.BatchNorm(9), gw.Last(), gw.Dense(9, 5, activation="softmax"),
    ])
    front = gw.Sequential([gw.Conv1D(9, 7, 3), gw.LSTM(7, 16, 2), gw.Dense(16, 4, activation="tanh")])
    reader = gw.Sequential([gw.Embedding(300, 9), gw.GRU(9, 9)])
    both = gw.Sequential([gw.Dense(9, 7), gw.Bidirectional(gw.GRU(7, 9, bidirectional=True), "sum"), gw.Last()])
    token, out = np.array([299]), random(1, 5)
    nothing["model"] = allocations_a_thousand(model.stream(1).step, token, out)
    nothing["model, a token"] = allocations_a_thousand(model.stream().step, token[0], out[0])
    something["model"] = allocations_a_thousand(model.stream(1).step, token)
    pool = model.pool(3)
    slots = np.array([pool.open(), pool.open()])
    nothing["model pool"] = allocations_a_thousand(pool.step, np.array([5, 299]), slots, random(2, 5))
    nothing["window"] = allocations_a_thousand(both.stream(window=5).step, random(9), random(9))
    nothing["window of tokens"] = allocations_a_thousand(model.stream(window=5).step, token[0], out[0])
    stream = both.stream(2, window=4)
    nothing["model run"] = allocations_a_thousand(front.stream(2).run, random(3, 2, 9), random(3, 2, 4))
    tokens = np.array([[299, 3], [5, 7], [0, 1]])
    nothing["tokens run"] = allocations_a_thousand(reader.stream(2).run, tokens, random(3, 2, 9))
    nothing["window run"] = allocations_a_thousand(both.stream(window=5).run, random(3, 9), random(3, 9))
    nothing["window, rows uneven"] = allocations_a_thousand(
        with_resets(stream, np.array([True, False])), random(2, 9), random(2, 9))
    print(json.dumps([nothing, something]))
    """
    preload = ":".join(filter(None, [shim, os.environ.get("LD_PRELOAD")]))
    nothing, something = run(code, LD_PRELOAD=preload, PYTHONMALLOC="malloc", **environment)
    assert {name: count for name, count in nothing.items() if count} == {}
    assert {name: count for name, count in something.items() if count < 1000} == {}


# -----------------------------------------------------------------------------------------------------------
# No input crashes


LIMITED = """
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # so that no machine is brought to its knees
except (ImportError, ValueError):
    pass

def refused(function, *args, name="", **kwargs):
    try:
        function(*args, **kwargs)
    except (ValueError, MemoryError) as error:
        assert str(error).startswith(name), error
    else:
        raise AssertionError(f"accepted: {args} {kwargs}")
"""


@needs_linux
def test_huge_sequences_of_a_small_output():
    """A view of one number as more steps than there is memory for: only the last step's output would fit."""
    code = """
    x = np.broadcast_to(np.float32(0), (2**58, 1))
    for layers in ([gw.Dense(1, 64)], [gw.LSTM(1, 64)], [gw.Conv1D(1, 64, 3)], [gw.GRU(1, 9, 2, bidirectional=True)]):
        for steps in (2**58, 2**50, 2**40):
            refused(gw.Sequential([*layers, gw.Last()]), x[:steps])
    refused(gw.LSTM(1, 4).stream, 2**31 - 1, window=2**20, name="window: ")
    refused(gw.Sequential([gw.Conv1D(1, 1, 2**20, dilation=2**15)]).stream, 2**20)
    """
    run(LIMITED + textwrap.dedent(code))


@needs_linux
@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers"])
@pytest.mark.parametrize("size", ["2**33", "2**40", "2**62", "2**63 - 1", "2**63", "2**64", "2**100"])
def test_huge_layers(name, size):
    code = f"""
    for kind in (gw.LSTM, gw.GRU, gw.RNN):
        refused(kind, **({{"input_size": 3, "hidden_size": 4}} | {{"{name}": {size}}}), name="{name}: ")
    """
    run(LIMITED + textwrap.dedent(code))


@needs_linux
def test_huge_sizes_together():
    """Each would do, their product overflows."""
    code = """
    for sizes in [(2**31, 2**31), (2**20, 2**30), (2**32, 2**30), (2**30, 2**20)]:
        refused(gw.LSTM, *sizes)
        refused(gw.LSTM, *sizes, 2**10)
    """
    run(LIMITED + textwrap.dedent(code))


@needs_linux
def test_huge_input():
    code = """
    layer = gw.LSTM(3, 4, 2, seed=1)
    expected = layer(random(3, 2, 3))[0].tobytes()
    for steps in (2**33, 2**40, 2**58):
        for shape in [(steps, 1, 3), (1, steps, 3), (steps, 3)]:
            x = np.broadcast_to(np.float32(0), shape)
            refused(layer, x)
            refused(layer.record, x)
            if shape[1] == 3:
                refused(layer.stream().run, x)
    for batch in (2**33, 2**40, 2**62, 2**63, 2**64, 2**100):
        refused(layer.stream, batch, name="batch_size: ")
    assert layer(random(3, 2, 3))[0].tobytes() == expected
    """
    run(LIMITED + textwrap.dedent(code))


def test_many_steps_of_no_rows():
    """Nothing to do, and no time spent on it."""
    code = """
    for cell in ("lstm", "gru", "rnn"):
        layer = layer_of(cell, 3, 4, 2, bidirectional=True)
        x = np.empty((2**40, 0, 3), "float32")
        assert layer(x)[0].shape == (2**40, 0, 8)
        tape = layer.record(x)
        assert not tape.backward(tape.output).parameters["weight_hh_l1"].any()
    """
    run(code)


def test_objects_that_were_never_initialised():
    """Made by __new__ without __init__: an error of Python, not a crash."""
    code = """
    layer = layer_of("lstm", 3, 4)
    stream, tape = layer.stream(), layer.record(random(2, 3))
    x, out = random(3), random(4)
    uses = {
        type(layer): ["__call__", "record", "stream", "state_dict", "parameters", "edit", "call_count"],
        type(stream): ["step", "run", "state", "reset", "copy", "refresh", "batch_size"],
        type(tape): ["backward", "output", "state"],
    }
    arguments = [(), (x,), (x, out), (random(2, 3),), (random(2, 4),)]
    for kind, names in uses.items():
        for name in [*names, "__repr__"]:
            for given in arguments:
                try:
                    getattr(kind.__new__(kind), name)(*given)
                except Exception:
                    pass
    assert np.isfinite(layer(random(2, 3))[0]).all()
    """
    run(code)


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(_core).values() if isinstance(kind, type)], ids=lambda kind: kind.__name__
)
def test_an_instance_of_the_core_that_was_never_initialised(kind):
    """Each method and property raises: pybind11 would hand memory to it that nobody has written."""
    code = f"""
    kind = _core.{kind.__name__}
    for name in [name for name in vars(kind) if name not in ("__init__", "__module__", "__doc__", "__new__")]:
        for count in range(12):
            try:
                value = getattr(kind.__new__(kind), name)
                value(*[random(3)] * count) if callable(value) else None
            except Exception:
                continue
            assert callable(value), (name, value)
            assert name.startswith("__") or name == "_pybind11_conduit_v1_", (name, count)
    """
    run(code)


@pytest.mark.parametrize(
    "call",
    [
        "_core.Stream(None, 1, True)", "_core.Stream(network, 0, False)", "_core.Stream(network, 2, True)",
        "_core.Pool(None, 3)", "_core.Pool(network, 0)", "_core.Pool(network, 2**62)",
        "layer.stream()._use(None)", "layer.pool(2)._use(None)",
        "_core.Sums(None, _core.Table(np.zeros((5, 3), 'f4')))", "_core.Sums(packed, None)",
        "_core.Network(f4, [('recurrent', None)], None)", "_core.Network(f4, [('lookup', None)], None)",
        "_core.Network(f4, [('rows', None)], None)", "_core.Network(f4, [], None)",
        "_core.Tape(None, x, None, None, x, x, None, None, 0, 0.0, 1, 0)",
        "_core.Foreign(None, 2, 1, None, 0, 0.0, 0, 1).tape_bytes",
        "_core.Packed('lstm', f4, 3, 4, 0, 2**40, 1, [])",
        "_core.Packed('lstm', f4, 2**40, 2**40, 0, 1, 1, [[None] * 6])",
        "_core.empty([3], np.dtype(object))", "_core.empty([2**62, 2**62], f4)", "_core.empty([-1], f4)",
        "_core.evaluate('tanh', np.zeros(3, object))",
    ],
)  # fmt: skip
def test_private_functions_refuse_what_would_harm_memory(call):
    """None stands for no object, and sizes may be any number: an error of Python each time."""
    code = f"""
    layer, f4, x = layer_of("lstm", 3, 4), np.dtype("f4"), random(2, 1, 3)
    packed = layer._slot.weights.packed()
    network = layer.stream()._chain.network(layer.stream()._weights, "steps")
    try:
        {call}
    except (TypeError, ValueError, MemoryError):
        print("true")
    """
    assert run(code) is True


@needs_mode
def test_no_mode_of_floating_point_raises_a_signal():
    code = """
    for mode in (2**32 - 1, 0, 0x10000):
        _core.set_floating_point_mode(mode)
        assert not np.isfinite(np.divide(np.ones(3, "f4"), np.zeros(3, "f4"))).any()
    """
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_functions_take_numbers_of_the_other_byte_order():
    x = np.linspace(-2, 2, 9, dtype=np.float32)
    assert np.array_equal(_core.evaluate("tanh", x.astype(">f4")), _core.evaluate("tanh", x))


def test_a_class_cannot_be_a_stream_and_a_pool():
    for bases in ((gw.Pool, gw.Stream), (gw.Stream, gw.Pool), (gw.Stream, _core.Pool), (gw.Pool, _core.Stream)):
        with pytest.raises(TypeError, match="Both: expected a class that inherits from Stream or from Pool"):
            type("Both", bases, {})


def test_two_kinds_of_the_core_in_one_class():
    """Where no class of ours forbids it, the C methods must not take one for the other."""
    code = """
    layer = layer_of("lstm", 3, 4)
    class Both(_core.Pool, _core.Stream):
        def __init__(self):
            network = layer.stream()._chain.network(layer.stream()._weights, "steps")
            _core.Pool.__init__(self, network, 5)
            _core.Stream.__init__(self, network, 1, True)
    both, x, out = Both(), random(3), random(4)
    for method, arguments in ((_core.Stream.step, (x, out)), (_core.Stream.run, (x[None], out[None])),
                              (_core.Pool.step, (x[None], np.array([0]), out[None]))):
        try:
            method(both, *arguments)
        except TypeError as error:
            assert "not initialised" in str(error)
        else:
            raise AssertionError(method)
    """
    run(code)


def test_the_helper_sees_failure():
    with pytest.raises(AssertionError, match="exit status 1"):
        run("assert False")


@pytest.mark.skipif(not LINUX, reason="Linux only")
def test_large_memory_is_used_again(environment):
    """Also after many other sizes: a call like the one before faults in next to no new pages."""
    first, again = run(
        """
        import resource

        gw.set_num_threads(1)
        layer = gw.LSTM(32, 128, seed=1)
        def call(steps):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            layer.record(np.zeros((steps, 32, 32), "float32"))
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        for steps in range(60, 220, 7):
            call(steps)
        first, again = call(400), min(call(400) for _ in range(3))
        print(json.dumps([first, again]))
        """,
        **environment,
    )
    assert first > 4 * again


def test_import_brings_what_a_layer_needs():
    """The rest, as files and their formats, when it is asked for."""
    code = """
    later = ("layers.products", "layers.sequential", "formats", "reference", "cli", "plot", "torch", "jax")
    before = [name for name in later if f"gatewise.{name}" in sys.modules]
    assert all(hasattr(gw, name) for name in gw.__all__), gw.__all__
    try:
        gw.nothing
    except AttributeError as error:
        print(json.dumps([before, str(error), "Dense" in dir(gw)]))
    """
    assert run(code) == [[], "module 'gatewise' has no attribute 'nothing'", True]
