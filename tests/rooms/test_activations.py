"""The activations of the core: units in the last place over dense sweeps, special values, and the reference's."""

import numpy as np
import pytest
from gatewise import _core, reference
from gatewise.weights.functions import NUMBERS
from tolerances import TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("backend")

ELEMENTWISE = sorted(set(reference.ACTIVATIONS) - {"softmax"})
NAMES = pytest.mark.parametrize("name", ELEMENTWISE)
WIDER = {"float32": np.float64, "float64": np.longdouble}
LONG_DOUBLE_IS_LONGER = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant


def evaluate(name, x):
    """Evaluate the activation at x with its default numbers."""
    return _core.evaluate(name, x, *NUMBERS.get(name, ()))


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


SELU = "1.0507009873554804934193349852946", "1.6732632423543772848170429916717"


def wide(digits, x):
    return np.longdouble(digits).astype(x.dtype)


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
            "leaky_relu": lambda: np.where(x > 0, x, x * np.array(0.01, dtype).astype(x.dtype)),
            "thresholded_relu": lambda: np.where(x > 1, x, 0),
            "affine": lambda: x,
            "scaled_tanh": lambda: np.tanh(x),
            "softsign": lambda: x / (1 + np.abs(x)),
            "silu": lambda: x * np.where(x < 0, small, 1) / (1 + small),
            "selu": lambda: wide(SELU[0], x) * np.where(x > 0, x, wide(SELU[1], x) * np.expm1(np.minimum(x, 0))),
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
    if name == "selu":  # of a denormal argument, which is zero to the core, it would be a number
        x = x[(x == 0) | (np.abs(x) >= np.finfo(dtype).tiny)]
    actual = evaluate(name, x)
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
    assert_close(evaluate("gelu", np.array([x], dtype)), expected, "gelu")
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
        ("thresholded_relu", np.inf, np.inf),
        ("thresholded_relu", -np.inf, 0.0),
        ("thresholded_relu", 1.0, 0.0),
        ("softsign", np.inf, 1.0),
        ("softsign", -np.inf, -1.0),
        ("softsign", 1e30, 1.0),
        ("softsign", -1e30, -1.0),
        ("softsign", -0.0, -0.0),
        ("silu", np.inf, np.inf),
        ("silu", -np.inf, -0.0),
        ("silu", 1e30, 1e30),
        ("silu", -1e30, -0.0),
        ("silu", -0.0, -0.0),
        ("selu", np.inf, np.inf),
        ("selu", -0.0, -0.0),
        ("scaled_tanh", -np.inf, -1.0),
        ("affine", -np.inf, -np.inf),
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
    result = evaluate(name, np.full(9, x, dtype))
    assert (result == np.array(expected, dtype)).all()
    assert (np.signbit(result) == np.signbit(expected)).all()


@NAMES
def test_nan_and_tails(name, dtype):
    """A NaN gives NaN only in its place, wherever that is in a register or its tail."""
    for size in range(35):
        x = np.linspace(-3, 3, size, dtype=dtype)
        clean = evaluate(name, x)
        assert clean.shape == x.shape
        for place in range(size):
            dirty = x.copy()
            dirty[place] = np.nan
            result = evaluate(name, dirty)
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
    result = evaluate(name, np.append(sweep(dtype), [np.inf, -np.inf]).astype(dtype))
    assert result.max() == most
    assert result.min() == pytest.approx(least, abs=0 if name != "gelu" else 1e-4)


@pytest.mark.parametrize("name", ["linear", "affine", "relu", "hard_sigmoid", "leaky_relu", "thresholded_relu"])
def test_never_falls(name, dtype):
    """What only rounds keeps the order of its arguments exactly."""
    assert (np.diff(evaluate(name, np.sort(sweep(dtype)))) >= 0).all()


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh", "elu", "selu", "softplus", "softsign"])
def test_rises(name, dtype):
    """Over steps larger than the tolerance."""
    assert (np.diff(evaluate(name, np.linspace(-80, 8, 20_001, dtype=dtype))) >= 0).all()


@pytest.mark.parametrize("name", ["exp", "sigmoid", "elu", "selu", "gelu", "silu", "softplus", "softsign"])
def test_results_are_never_denormal(name, dtype):
    """Where the function leaves the normal numbers, and from arguments that are just normal."""
    tiny = np.finfo(dtype).tiny
    far_values = [np.linspace(-760, -700, 100_003), np.linspace(-110, -80, 100_003), np.linspace(-40, -10, 100_003)]
    least = np.linspace(1, 4, 1001) * tiny
    x = np.concatenate([*far_values, least, -least]).astype(dtype)
    result = np.abs(evaluate(name, x))
    assert ((result == 0) | (result >= tiny)).all()


@NAMES
def test_reference_agrees(name, dtype):
    x = np.linspace(-80, 20, 4001, dtype=dtype)
    before = x.copy()
    with np.errstate(all="raise"):
        expected = reference.ACTIVATIONS[name](x)
    assert expected.dtype == x.dtype
    assert_close(evaluate(name, x), expected, dtype, name)
    assert np.array_equal(x, before)


@NAMES
def test_reference_at_the_ends(name, dtype):
    x = np.array([-np.inf, -0.0, 0.0, np.inf, np.nan], dtype)
    with np.errstate(all="raise"):
        expected = reference.ACTIVATIONS[name](x)
    assert np.array_equal(evaluate(name, x), expected, equal_nan=True)


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
        ("softsign", (), "softsign", {}),
        ("silu", (), "silu", {}),
        ("selu", (), "selu", {}),
        ("thresholded_relu", (0.3,), "threshold", {"threshold": 0.3, "value": 0.0}),
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
    with pytest.raises(ValueError, match="an unknown activation, swish"):
        _core.evaluate("swish", np.zeros(3))


@pytest.mark.parametrize("numbers", [(0.2, 0.5), (1.7, -0.3), (0.0, 0.25)], ids=str)
@pytest.mark.parametrize("name", sorted(name for name, numbers in NUMBERS.items() if numbers))
def test_numbers(name, dtype, numbers):
    x = np.linspace(-9, 9, 1001, dtype=dtype)
    numbers = numbers[: len(NUMBERS[name])]
    expected = reference.ACTIVATIONS[name](x.astype(np.float64), *numbers)
    assert_close(_core.evaluate(name, x, *numbers), expected, dtype)
