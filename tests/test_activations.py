"""exp, sigmoid and tanh of the core: units in the last place over dense sweeps, and special values."""

import numpy as np
import pytest
from gatewise import _core
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("backend")

NAMES = pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
WIDER = {"float32": np.float64, "float64": np.longdouble}
LONG_DOUBLE_IS_LONGER = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant


def truth(name, x):
    """The function in a wider type than that of x; infinity for what is beyond even that."""
    with np.errstate(over="ignore", under="ignore"):
        if name == "exp":
            return np.exp(x)
        if name == "tanh":
            return np.tanh(x)
        small = np.exp(-np.abs(x))
        return np.where(x < 0, small, 1) / (1 + small)


def sweep(dtype):
    """Every exponent alike, and the ranges where something happens densely."""
    if dtype == "float32":
        bits = np.arange(0, 2**32, 1999, dtype=np.uint64).astype(np.uint32)
    else:
        bits = np.arange(0, 2**64 - 2**48, 2**44 + 0x123456789AB, dtype=np.uint64)
    everything = bits.view(dtype)
    ranges = [(-1, 1), (-10, 10), (-110, 110), (-760, 760), (-1e-3, 1e-3)]
    parts = [np.linspace(low, high, 200_003, dtype=dtype) for low, high in ranges]
    return np.concatenate([everything[np.isfinite(everything)], *parts])


@NAMES
def test_accuracy(name, dtype):
    if dtype == "float64" and not LONG_DOUBLE_IS_LONGER:
        pytest.skip("long double is no longer than double here: no truth to compare with")
    x = sweep(dtype)
    actual = _core.evaluate(name, x)
    assert actual.dtype == x.dtype
    assert_close(actual, truth(name, x.astype(WIDER[dtype])), "activation", name)


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("exp", np.inf, np.inf),
        ("exp", -np.inf, 0.0),
        ("exp", 0.0, 1.0),
        ("exp", -0.0, 1.0),
        ("exp", 1e30, np.inf),
        ("exp", -1e30, 0.0),
        ("sigmoid", np.inf, 1.0),
        ("sigmoid", -np.inf, 0.0),
        ("sigmoid", 0.0, 0.5),
        ("sigmoid", -0.0, 0.5),
        ("sigmoid", 1e30, 1.0),
        ("sigmoid", -1e30, 0.0),
        ("tanh", np.inf, 1.0),
        ("tanh", -np.inf, -1.0),
        ("tanh", 0.0, 0.0),
        ("tanh", -0.0, -0.0),
        ("tanh", 1e30, 1.0),
        ("tanh", -1e30, -1.0),
    ],
)
def test_special_values(dtype, name, x, expected):
    result = _core.evaluate(name, np.full(9, x, dtype))
    assert (result == expected).all()
    assert (np.signbit(result) == np.signbit(expected)).all()


@NAMES
def test_nan_and_tails(name, dtype):
    """A NaN gives NaN at its place alone, wherever in a register or its tail."""
    for size in range(35):
        x = np.linspace(-3, 3, size, dtype=dtype)
        clean = _core.evaluate(name, x)
        assert clean.shape == x.shape
        for place in range(size):
            dirty = x.copy()
            dirty[place] = np.nan
            result = _core.evaluate(name, dirty)
            assert np.array_equal(np.isnan(result), np.arange(size) == place)
            assert np.array_equal(np.delete(result, place), np.delete(clean, place))


@pytest.mark.parametrize(("name", "least"), [("sigmoid", 0), ("tanh", -1)])
def test_bounded(dtype, name, least):
    result = _core.evaluate(name, sweep(dtype))
    assert (result.min(), result.max()) == (least, 1)
