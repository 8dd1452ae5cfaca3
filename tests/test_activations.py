"""The activations of the core: units in the last place over dense sweeps, special values, and the reference's."""

import numpy as np
import pytest
from gatewise import _core, reference
from tolerances import TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("backend")

ELEMENTWISE = sorted(set(reference.ACTIVATIONS) - {"softmax"})
NAMES = pytest.mark.parametrize("name", ELEMENTWISE)
SLOPE = 0.01  # of leaky_relu; alpha of elu is 1
WIDER = {"float32": np.float64, "float64": np.longdouble}
LONG_DOUBLE_IS_LONGER = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant


def normal_below(x):
    """The normal distribution below x, relatively right to the left too: a series near zero, a continued fraction
    further out. The square in the exponent is taken in two parts, as an error of it would be one of the value."""
    t = np.minimum(np.abs(x), 100)
    high = np.round(t * 2**20) / 2**20
    density = np.exp(-high * high / 2) * np.exp((high - t) * (high + t) / 2) / np.sqrt(8 * np.arctan(x.dtype.type(1)))
    series = term = near = np.minimum(t, 2.5)
    for k in range(3, 121, 2):
        term = term * near * near / k
        series = series + term
    fraction = far = np.maximum(t, 2.5)
    for k in range(80, 0, -1):
        fraction = far + k / fraction
    tail = np.where(t < 2.5, 0.5 - density * series, density / fraction)
    return np.where(x < 0, tail, 1 - tail)


def truth(name, x, dtype):
    """The function in the type of x, wider than `dtype`; infinity for what is beyond even that."""
    with np.errstate(over="ignore", under="ignore"):
        small = np.exp(-np.abs(x))
        return {
            "linear": lambda: x,
            "relu": lambda: np.maximum(x, 0),
            "tanh": lambda: np.tanh(x),
            "sigmoid": lambda: np.where(x < 0, small, 1) / (1 + small),
            "hard_sigmoid": lambda: np.clip(x + 3, 0, 6) / 6,
            "elu": lambda: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
            "leaky_relu": lambda: np.where(x > 0, x, x * np.array(SLOPE, dtype).astype(x.dtype)),
            "gelu": lambda: x * normal_below(x),
            "softplus": lambda: np.maximum(x, 0) + np.log1p(small),
            "exp": lambda: np.exp(x),
        }[name]()


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
    assert_close(actual, truth(name, x.astype(WIDER[dtype]), dtype), name if name in TOLERANCES else "activation", name)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (-12.5, "-4.665705373597141721532e-35"),
        (-2.5, "-0.01552416331444033791745"),
        (-0.25, "-0.1003234185792690689398"),
        (3, "2.99595030590510971642"),
    ],
)
def test_digits_of_gelu(dtype, x, expected):
    """By mpmath: the truth above is no function of a library."""
    expected = np.array([expected], np.longdouble)
    assert_close(_core.evaluate("gelu", np.array([x], dtype)), expected, "gelu")
    assert_close(truth("gelu", np.array([x]), dtype), expected, "gelu")


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
        ("linear", np.inf, np.inf),
        ("linear", -np.inf, -np.inf),
        ("linear", -0.0, -0.0),
        ("relu", np.inf, np.inf),
        ("relu", -np.inf, 0.0),
        ("relu", 0.0, 0.0),
        ("relu", 1e30, 1e30),
        ("hard_sigmoid", np.inf, 1.0),
        ("hard_sigmoid", -np.inf, 0.0),
        ("hard_sigmoid", -3.0, 0.0),
        ("hard_sigmoid", 0.0, 0.5),
        ("hard_sigmoid", 3.0, 1.0),
        ("elu", np.inf, np.inf),
        ("elu", -np.inf, -1.0),
        ("elu", 0.0, 0.0),
        ("elu", -0.0, -0.0),
        ("elu", 1e30, 1e30),
        ("elu", -1e30, -1.0),
        ("leaky_relu", np.inf, np.inf),
        ("leaky_relu", -np.inf, -np.inf),
        ("leaky_relu", 0.0, 0.0),
        ("leaky_relu", -0.0, -0.0),
        ("gelu", np.inf, np.inf),
        ("gelu", -np.inf, -0.0),
        ("gelu", 0.0, 0.0),
        ("gelu", -0.0, -0.0),
        ("gelu", 1e30, 1e30),
        ("gelu", -1e30, -0.0),
        ("softplus", np.inf, np.inf),
        ("softplus", -np.inf, 0.0),
        ("softplus", 1e30, 1e30),
        ("softplus", -1e30, 0.0),
    ],
)
def test_special_values(dtype, name, x, expected):
    result = _core.evaluate(name, np.full(9, x, dtype))
    assert (result == np.array(expected, dtype)).all()
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


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("sigmoid", 0, 1),
        ("tanh", -1, 1),
        ("hard_sigmoid", 0, 1),
        ("relu", 0, np.inf),
        ("elu", -1, np.inf),
        ("softplus", 0, np.inf),
        ("gelu", -0.17, np.inf),
    ],
)
def test_bounded(dtype, name, least, most):
    result = _core.evaluate(name, np.append(sweep(dtype), [np.inf, -np.inf]).astype(dtype))
    assert result.max() == most
    assert result.min() == pytest.approx(least, abs=0 if name != "gelu" else 1e-4)


@pytest.mark.parametrize("name", ["linear", "relu", "hard_sigmoid", "leaky_relu"])
def test_never_falls(name, dtype):
    """What only rounds keeps the order of its arguments exactly."""
    assert (np.diff(_core.evaluate(name, np.sort(sweep(dtype)))) >= 0).all()


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh", "elu", "softplus"])
def test_rises(name, dtype):
    """Over steps larger than the tolerance."""
    assert (np.diff(_core.evaluate(name, np.linspace(-80, 8, 20_001, dtype=dtype))) >= 0).all()


@pytest.mark.parametrize("name", ["exp", "sigmoid", "elu", "gelu", "softplus"])
def test_results_are_never_denormal(name, dtype):
    """Where the function leaves the normal numbers, and from arguments that are just normal."""
    tiny = np.finfo(dtype).tiny
    ends = [np.linspace(-760, -700, 100_003), np.linspace(-110, -80, 100_003), np.linspace(-40, -10, 100_003)]
    least = np.linspace(1, 4, 1001) * tiny
    x = np.concatenate([*ends, least, -least]).astype(dtype)
    result = np.abs(_core.evaluate(name, x))
    assert ((result == 0) | (result >= tiny)).all()


@NAMES
def test_reference_agrees(name, dtype):
    x = np.linspace(-80, 20, 4001, dtype=dtype)
    before = x.copy()
    with np.errstate(all="raise"):
        expected = reference.ACTIVATIONS[name](x)
    assert expected.dtype == x.dtype
    assert_close(_core.evaluate(name, x), expected, dtype, name)
    assert np.array_equal(x, before)


@NAMES
def test_reference_at_the_ends(name, dtype):
    x = np.array([-np.inf, -0.0, 0.0, np.inf, np.nan], dtype)
    with np.errstate(all="raise"):
        expected = reference.ACTIVATIONS[name](x)
    assert np.array_equal(_core.evaluate(name, x), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "alpha", "theirs", "options"),
    [
        ("relu", (), "relu", {}),
        ("softmax", (), "softmax", {"dim": -1}),
        ("hard_sigmoid", (), "hardsigmoid", {}),
        ("elu", (), "elu", {}),
        ("elu", (0.3,), "elu", {"alpha": 0.3}),
        ("leaky_relu", (), "leaky_relu", {}),
        ("leaky_relu", (0.3,), "leaky_relu", {"negative_slope": 0.3}),
        ("gelu", (), "gelu", {}),
        ("softplus", (), "softplus", {}),
    ],
)
def test_reference_is_pytorchs(name, alpha, theirs, options):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(3).normal(0, 4, (7, 11))
    expected = getattr(torch.nn.functional, theirs)(torch.from_numpy(x), **options).numpy()
    assert_close(reference.ACTIVATIONS[name](x, *alpha), expected, "torch_float64", name)


def test_names():
    with pytest.raises(ValueError, match="softmax is a function of rows"):
        _core.evaluate("softmax", np.zeros(3))
    with pytest.raises(ValueError, match=r"expected linear, .* or exp, got swish"):
        _core.evaluate("swish", np.zeros(3))
