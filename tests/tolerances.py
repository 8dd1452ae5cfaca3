"""How close is close: the only tolerances of the tests, each with its reason, and the one way to compare.

Two measures:

scaled  max |actual - expected| / max(1, max |expected|) over an array. Not element by element: an element is
        a sum, its rounding error is in proportion to the terms of the sum, and where they cancel no relative
        error of that single element is too large. The largest element stands for the size of the terms. Tests
        use data of order one (weights, inputs, incoming gradients), so that the terms are of order one even
        where every result happens to be small; hence the floor of 1.
ulp     max |actual - expected| in units in the last place of the expected value in the dtype of actual, for
        functions of one element. Where the value is below the smallest normal number zero is right as well:
        the core flushes denormals.

Either way shapes must be equal, infinities and NaNs in the same places, and differences are taken in the
widest float of the machine, so that measuring adds no error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    limit: float
    measure: str = "scaled"


TOLERANCES = {
    # The core against the reference in float64, by the name of the dtype, so that f"{dtype}" and
    # f"{dtype}_gradient" name a row.
    #
    # What is promised. Another order of summing differs by 1e-15 or so, a wrong digit in an equation by more.
    "float64": Tolerance(1e-12),
    "float64_gradient": Tolerance(1e-12),
    # NumPy's own float32 errs by up to 1e-6 (rnn_tanh, H = 256, T = 20, normal inputs);
    # activations of 2.5 ULP cost a few times that.
    "float32": Tolerance(1e-5),
    # The gradients of parameters are sums of T*B terms, often thousands. A relu unit whose sum is
    # within rounding of zero may take the other side and differ by far more: no tolerance covers that, choose
    # data without it.
    "float32_gradient": Tolerance(5e-5),
    # The reference in half precision against itself in float64, forward: a few of float16's 1e-3.
    "float16": Tolerance(5e-3),
    # Central differences of step 1e-5 in float64: truncation, step**2 / 6 times a third derivative, and
    # rounding, 1e-16 / step times a loss of order ten, are both about 1e-10.
    "finite_difference": Tolerance(1e-8),
    # A worked example printed with six digits, the last perhaps cut and not rounded.
    "six_digits": Tolerance(1e-6),
    # Against PyTorch both sides err, each within the rows above.
    "torch_float64": Tolerance(1e-12),
    "torch_float64_gradient": Tolerance(1e-12),
    "torch_float32": Tolerance(2e-5),
    "torch_float32_gradient": Tolerance(1e-4),
    # Models of a few layers against Keras: float32 of two kinds, each within the rows above; 1e-6 is found.
    "keras_float32": Tolerance(1e-5),
    "keras_float64": Tolerance(1e-12),
    # The core's activations against the value in a wider type. What is promised, over all inputs.
    "activation": Tolerance(2.5, "ulp"),
    # The quotient in its logarithm is a rounding more; 2.8 are found.
    "softplus": Tolerance(3, "ulp"),
    # A quotient of polynomials of up to ten terms, times an exponential: half a dozen roundings, each of up to one
    # unit, and some more without fused multiply-adds. 6.0 are found in float32, 7.6 in float64.
    "gelu": Tolerance(8, "ulp"),
}

# How many times PyTorch's float32 error, root mean square, ours may be on the same weights and data, and that of
# float64 rounded. Both are of the same kind and size (0.3 to 1.7 times, T 50, B 16, H 100); in small arrays they
# are a few roundings that fall one way or the other.
TIMES_PYTORCH_ERROR = 3


def mean_error(actual: Any, expected: Any) -> float:
    """Root mean square error of one array, scaled as in `error`."""
    difference = np.asarray(actual, np.float64) - expected
    return float(np.sqrt(np.mean(difference**2)) / np.abs(expected).max(initial=1)) if difference.size else 0.0


def error(actual: Any, expected: Any, measure: str = "scaled") -> float:
    """Error of one array, infinite where shapes or the places of infinities and NaNs differ."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        return np.inf
    with np.errstate(over="ignore"):  # above the range of actual, its infinity is expected
        rounded = expected.astype(actual.dtype) if measure == "ulp" else expected
    finite = np.isfinite(rounded)
    if not np.array_equal(actual[~finite], rounded[~finite], equal_nan=True):
        return np.inf
    actual, expected, rounded = actual[finite], expected[finite], rounded[finite]
    if not np.isfinite(actual).all():
        return np.inf
    difference = np.abs(actual.astype(np.longdouble) - expected.astype(np.longdouble))
    if measure == "scaled":
        return float(difference.max(initial=0) / np.abs(expected).max(initial=1))
    flushed = (actual == 0) & (np.abs(rounded) <= np.finfo(actual.dtype).tiny)
    units = difference / np.spacing(np.abs(rounded)).astype(np.longdouble)
    return float(units[~flushed].max(initial=0))


def assert_close(actual: Any, expected: Any, kind: str, name: str = "value") -> None:
    """Assert that arrays, or tuples or mappings of arrays, agree within the tolerance that `kind` names."""
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), f"{name}: {len(actual)} members instead of {len(expected)}"
        for index, (first, other) in enumerate(zip(actual, expected, strict=True)):
            assert_close(first, other, kind, f"{name}[{index}]")
    elif hasattr(expected, "keys"):
        assert set(actual) == set(expected), f"{name}: names {sorted(actual)} instead of {sorted(expected)}"
        for key in expected:
            assert_close(actual[key], expected[key], kind, f"{name}[{key!r}]")
    else:
        limit, measure = TOLERANCES[kind]
        distance = error(actual, expected, measure)
        assert distance <= limit, (
            f"{name}: {measure} error {distance:.3g} above {limit:g} ({kind}), "
            f"shapes {np.shape(actual)} and {np.shape(expected)}"
        )
