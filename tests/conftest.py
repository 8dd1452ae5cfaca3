"""What all tests share: header of the report, fixtures, seeded layers and data, running and comparing."""

import os
import platform
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import gatewise as gw
import hypothesis
import numpy as np
import pytest
from gatewise import _core, reference
from tolerances import assert_close

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = ("float32", "float64")
FORCED = os.environ.get("GATEWISE_BACKEND")
BACKENDS = (FORCED,) if FORCED else tuple(gw.backends())

hypothesis.settings.register_profile(
    "gatewise",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("gatewise")


# -----------------------------------------------------------------------------------------------------------
# Report and fixtures


# Tests of files and of programs: on another backend they would only repeat what the tests of layers say of it.
NOT_OF_THE_CORE = {"cli", "formats", "project"}


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--only-default-backend",
        action="store_true",
        help="with a forced backend: only tests of the core that did not go through all backends before",
    )


def pytest_collection_modifyitems(config, items) -> None:
    if not config.getoption("only_default_backend"):
        return
    selected, left_out = [], []
    for item in items:
        was_run = "backend" in getattr(item, "fixturenames", ()) or item.path.parent.name in NOT_OF_THE_CORE
        (left_out if was_run else selected).append(item)
    items[:] = selected
    config.hook.pytest_deselected(items=left_out)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} missing"


def pytest_report_header() -> list[str]:
    versions = ", ".join(version(package) for package in ("numpy", "torch", "hypothesis"))
    backends = ", ".join(gw.backends())
    threads = f"{gw.get_num_threads()} of {os.cpu_count()} processors"
    return [
        f"gatewise {gw.__version__} ({Path(gw.__file__).parent}), {versions}",
        f"backends: {backends}; tested: {', '.join(BACKENDS)}; threads: {threads}; CPU: {cpu_name()}",
    ]


def global_state() -> dict[str, Any]:
    threshold = _core.set_threading_threshold(0)
    _core.set_threading_threshold(threshold)
    return {
        "backend": gw.backend(),
        "threads": gw.get_num_threads(),
        "threading threshold": threshold,
        "floating-point mode": _core.floating_point_mode() & ~0x3F,  # without the flags of what has happened
    }


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No test leaves the library, or the thread it ran in, otherwise than it found it."""
    before = global_state()
    yield
    assert global_state() == before


@pytest.fixture(params=BACKENDS)
def backend(request):
    before = gw.backend()
    gw.use_backend(request.param)
    yield request.param
    gw.use_backend(before)


@pytest.fixture
def one_thread_in_torch():
    """The shapes are small: threads would only wait for each other."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=CELLS)
def cell(request):
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture
def use_threads():
    """Threads for every step however small; the fixture is `gw.set_num_threads`."""
    threads, threshold = gw.get_num_threads(), _core.set_threading_threshold(0)
    yield gw.set_num_threads
    gw.set_num_threads(threads)
    _core.set_threading_threshold(threshold)


# -----------------------------------------------------------------------------------------------------------
# Layers and data


class Data(NamedTuple):
    """What goes into a forward and a backward, in the layer's dtype and time-major."""

    x: np.ndarray  # (T, B, I)
    state: Any  # (h, c) or h: (L*D, B, H or P)
    grad_output: np.ndarray  # (T, B, D*H or D*P)
    grad_state: Any  # as state


def random(shape, dtype, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make_layer(cell, input_size, hidden_size, num_layers=1, **options):
    """A layer with the same random weights and biases each time, whatever the initialisation does."""
    options = {"seed": 5, **options}
    if cell.startswith("rnn_"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    kind = {"lstm": gw.LSTM, "gru": gw.GRU}.get(cell, gw.RNN)
    layer = kind(input_size, hidden_size, num_layers, **options)
    rng = np.random.default_rng(7)
    layer.parameters.update(
        {name: rng.uniform(-1, 1, value.shape) / np.sqrt(value.shape[-1]) for name, value in layer.parameters.items()}
    )
    return layer


def cell_of(layer) -> str:
    if isinstance(layer, gw.GRU):
        return "gru" if layer.reset_after else "gru_reset_before"
    return "lstm" if isinstance(layer, gw.LSTM) else "rnn_relu" if layer.nonlinearity == "relu" else "rnn_tanh"


def functions_of(layer):
    """Those of the reference that a layer has in place of its cell's own, or None."""
    formula = layer._architecture.formula
    if formula is None:
        return None
    activations = (partial(reference.ACTIVATIONS[name], **dict(zip(("alpha", "beta"), numbers, strict=False)))
           for name, numbers in ((f.name, f.numbers) for f in formula[:3]))  # fmt: skip
    return reference.Functions(*activations, formula.clip)


def output_width(layer) -> int:
    """Features of one direction's output: H, or P with a projection."""
    return getattr(layer, "proj_size", 0) or layer.hidden_size


def make_state(layer, batch, seed=2):
    """A random state (L*D, B, H or P); batch None: unbatched (L*D, H or P)."""
    rows = (layer.num_layers * (1 + layer.bidirectional),) + (() if batch is None else (batch,))
    hidden = random((*rows, output_width(layer)), layer.dtype, seed)
    if not isinstance(layer, gw.LSTM):
        return hidden
    return hidden, random((*rows, layer.hidden_size), layer.dtype, seed + 1)


def make_data(layer, steps, batch, seed=1) -> Data:
    return Data(
        random((steps, batch, layer.input_size), layer.dtype, seed),
        make_state(layer, batch, seed + 1),
        random((steps, batch, output_width(layer) * (1 + layer.bidirectional)), layer.dtype, seed + 3),
        make_state(layer, batch, seed + 4),
    )


def map_state(function, state):
    """The function applied to h, or to h and c."""
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def take_rows(data: Data, rows) -> Data:
    """The rows of a batch, given by a slice or a list."""
    return Data(
        data.x[:, rows],
        map_state(lambda s: s[:, rows], data.state),
        data.grad_output[:, rows],
        map_state(lambda s: s[:, rows], data.grad_state),
    )


# -----------------------------------------------------------------------------------------------------------
# Running and comparing


def by_name(**values) -> dict[str, np.ndarray]:
    """Arrays, states and dictionaries of arrays as one flat dictionary."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            value = dict(zip("hc", value, strict=True))
        if isinstance(value, dict):
            flat.update({f"{name} {key}": member for key, member in value.items()})
        else:
            flat[name] = value
    return flat


def run_core(layer, x, state=None, grad_output=None, grad_state=None, **options) -> dict[str, np.ndarray]:
    """A recorded forward and its backward: every result there is, by name."""
    tape = layer.record(x, state, **options)
    grads = tape.backward(grad_output, grad_state)
    return by_name(
        output=tape.output,
        state=tape.state,
        grad_input=grads.input,
        grad_state=grads.state,
        grad=dict(grads.parameters),
    )


def run_reference(layer, x, state=None, grad_output=None, grad_state=None, *, call_count=0, **options):
    """The same by the reference in float64, with the layer's weights and the masks of call_count"""

    def double(value):
        return map_state(lambda v: None if v is None else v.astype(np.float64), value)

    output, after, tape = reference.forward(
        cell_of(layer),
        double(x),
        double(state),
        {name: double(value) for name, value in layer.parameters.items()},
        num_layers=layer.num_layers,
        bidirectional=layer.bidirectional,
        dropout=layer.dropout,
        seed=layer.seed,
        call_count=call_count,
        **options,
    )
    grads = reference.backward(tape, double(grad_output), double(grad_state))
    return by_name(output=output, state=after, grad_input=grads[0], grad_state=grads[1], grad=dict(grads[2]))


def assert_results_close(actual, expected, prefix="") -> None:
    """As close as tolerances.py has it for the dtype, gradients and the rest by their own row."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        kind = f"{prefix}{value.dtype.name}" + ("_gradient" if name.startswith("grad") else "")
        assert_close(value, expected[name], kind, name)


def assert_same_bits(actual, expected, name="") -> None:
    """Equal down to the sign of zero; dictionaries and states member by member."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same_bits(actual[key], expected[key], key)
    elif isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for member, (first, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(first, other, f"{name}[{member}]")
    else:
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
        bits = {4: np.uint32, 8: np.uint64}[expected.dtype.itemsize]
        first, other = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
        np.testing.assert_array_equal(first.view(bits), other.view(bits), err_msg=name)
