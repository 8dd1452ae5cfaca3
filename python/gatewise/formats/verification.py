"""Whether a model does the same as its original: both run on the same input, random and special."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator
from copy import copy
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from gatewise.arguments.arrays import Array, flag, whole_number
from gatewise.formats.errors import printable
from gatewise.formats.files import is_regular
from gatewise.layers.block import Block
from gatewise.layers.layer import Layer
from gatewise.layers.sequential import Sequential

# Relative to the largest output: room for several hundred rounding errors on each side, carried through later layers.
TOLERANCES = {"float32": 1e-4, "float64": 1e-10}
MASKED = 0.2  # share of the steps that are masked, where a model leaves some out
MIN_SCALE = 1e-6  # outputs smaller than this are compared with it, since almost nothing but roundings is left of them
PADDINGS = {"end": "rows that end in {}", "middle": "rows with {} in their middle", "all": "rows of only {}"}
LONG = 300  # steps, enough for programs that cut sequences off
CHANGE = 8  # roundings by which weights are changed, to see how far roundings move an output
FACTOR = 50  # how much farther than these changes the roundings of a long computation may move it
NAN = "NaN"


class Verification(NamedTuple):
    """The largest differences between a model and its original, as shares of the original's largest output.

    sequences : over whole sequences
    windows : of a stream's steps on the last few inputs and the original on the same inputs; None where the original
        takes only sequences of one length
    tolerance : the largest difference that counts as roundings
    input : a description of the first sequences on which the two differ by more than this, or else by most
    """

    sequences: float
    windows: float | None
    tolerance: float
    input: str = "random input"

    @property
    def passed(self) -> bool:
        return self.largest <= self.tolerance

    @property
    def largest(self) -> float:
        return max(self.sequences, self.windows or 0.0)


def verify(
    model: Any, original: Any, *, steps: int = 20, batch: int = 3, seed: int = 0, safe_mode: bool = True
) -> Verification:
    """Run a model and its original on the same input: random, and special.

    Special input is what programs may treat differently: rows that end in zeros or in a token for padding, have them in
    their middle or are nothing else; sequences of 300 steps; numbers of up to some thousands; for a module also NaN.
    What an original does only with other values or lengths, no comparison shows. Differences that may be roundings,
    amplified by the model, are left out.

    Parameters
    ----------
    model : Sequential or a layer
    original : torch.nn.Module, a model of Keras or of gatewise, a function, or a path
        It takes an array as the model does, and returns one, or a tuple whose first member is one. A file is run by its
        framework: `.onnx` by ONNX Runtime, `.keras` and `.h5` by Keras.
    steps, batch : int
        Sizes of the random sequences, (T, B, I), or (B, T, I) if the model has batch_first.
    seed : int
        Of the input, which is drawn from a standard normal distribution or from all tokens, and of the steps that are
        masked, where the model leaves some out. The outputs of masked steps are not compared.
    safe_mode : bool
        Whether a file of Keras must be one that `load` takes, which has no program in it. With False Keras takes what
        it can, and executes the programs in Lambda layers and in layers of other packages.

    Returns
    -------
    Verification
    """
    sequential = model if isinstance(model, Sequential) else Sequential([_layer(model)])
    runner = _runner(original, flag("safe_mode", safe_mode))
    generator = np.random.default_rng(whole_number("seed", seed, 0, 2**64 - 1))
    inputs = _Inputs(sequential, runner.fixed_sizes, generator)
    steps, batch = whole_number("steps", steps, 1, 2**20), whole_number("batch", batch, 1, 2**20)
    x, tolerance = inputs.random(steps, batch), TOLERANCES[sequential.dtype.name]
    differences = {"random input": _difference(sequential(x), runner.run(x), inputs.compared(x))}
    is_fixed = runner.fixed_sizes[sequential.batch_first]
    window = (x.shape[sequential.batch_first] + 1) // 2
    windows = None if is_fixed else _window_difference(sequential, runner.run, x, window)
    if differences["random input"] <= tolerance:
        differences |= _special_differences(sequential, runner, inputs, steps, batch)
    largest = max(differences.values())
    first = next(name for name, difference in differences.items() if difference > tolerance or difference == largest)
    return Verification(largest, windows, tolerance, first)


def _layer(model: Any) -> Layer | Block:
    if not isinstance(model, (Layer, Block)):
        raise TypeError(f"model: expected a Sequential or a layer, got {type(model).__name__}")
    return model


# ---- input


class _Inputs:
    """Draws the input of a comparison."""

    def __init__(
        self, model: Sequential, fixed_sizes: tuple[int | None, int | None], generator: np.random.Generator
    ) -> None:
        self.model, self.fixed_sizes, self.generator = model, fixed_sizes, generator
        self.chain = model._chain

    def random(self, steps: int, batch: int, *, is_large: bool = False) -> Array:
        sizes = (batch, steps) if self.model.batch_first else (steps, batch)
        shape = tuple(fixed or size for fixed, size in zip(self.fixed_sizes, sizes, strict=True))
        if self.chain.vocabulary is not None:
            x = self.generator.integers(0, self.chain.vocabulary, shape)
        else:
            x = self.generator.standard_normal((*shape, *self.chain.units)).astype(self.chain.dtype)
            if is_large:
                x *= 10 ** self.generator.uniform(1, 3, shape)[..., None].astype(x.dtype)
        if self.chain.masked is not None:
            x[self.generator.random(shape) < MASKED] = self.chain.masked
        return x

    def compared(self, x: Array) -> Any:
        """The steps and rows whose outputs are compared: not those that the model leaves out."""
        return np.True_ if self.chain.ends_at_last else ~self.chain.masked_steps(x)

    def special(self, steps: int, batch: int, runner: _Runner) -> Iterator[tuple[str, Array]]:
        """Input that programs may treat differently, each with a description."""
        steps, batch = min(max(steps, 12), 32), min(max(batch, 2), 4)
        yield from self._padded(steps, batch, runner.padding_tokens)
        if not self.fixed_sizes[self.model.batch_first]:
            yield f"{LONG} steps", self.random(LONG, 2)
        if self.chain.vocabulary is not None:
            return
        yield "large numbers", self.random(steps, batch, is_large=True)
        if runner.takes_nan:
            x = self.random(steps, batch)
            for i, row in enumerate(self._rows(x)):
                row[len(row) // 2 + i :, i % 2 :] = np.nan
            yield NAN, x

    def _padded(self, steps: int, batch: int, padding_tokens: Collection[int]) -> Iterator[tuple[str, Array]]:
        words = self.chain.vocabulary
        values: set[float] = {0.0, -1.0}
        if words is not None:
            values = {0, words - 1, *(token for token in padding_tokens if token < words)}
        if self.chain.masked is not None:
            values.add(self.chain.masked)
        for value in sorted(values):
            shown = f"{value:g}" if words is None else f"token {value:.0f}"
            for where, description in PADDINGS.items():
                x = self.random(steps, batch)
                for i, row in enumerate(self._rows(x)):
                    row[_padded_steps(where, len(row), i)] = value
                # Programs disagree about rows all of whose steps are masked.
                if where != "all" or self.chain.masked is None:
                    yield description.format(shown), x

    def _rows(self, x: Array) -> Iterator[Array]:
        """Views of each row, (T, I), or (T,) of tokens."""
        return iter(x if self.model.batch_first else x.swapaxes(0, 1))


def _padded_steps(where: str, steps: int, row: int) -> slice:
    """The steps of a row that hold padding. Each row has a different number of them."""
    if where == "end":
        return slice(max(1, steps // 2 - row), steps)
    if where == "middle":
        return slice(max(1, steps // 3 - row), max(1, steps // 2 - row))
    return slice(0, steps)


# ---- differences


def _difference(actual: Array, expected: Array, compared: Any, *, nan_agrees: bool = False) -> float:
    """The largest difference at the steps and rows that are compared, as a share of the largest expected output.

    The outputs of masked steps are zero in gatewise and anything elsewhere, so `compared` leaves them out.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"original: expected an output of shape {actual.shape}, got {expected.shape}")
    y, y_expected = np.asarray(actual[compared], np.float64), np.asarray(expected[compared], np.float64)
    agree = (y == y_expected) | (nan_agrees & np.isnan(y) & np.isnan(y_expected))
    scale = max(MIN_SCALE, float(np.abs(y_expected[np.isfinite(y_expected)]).max(initial=0)))
    with np.errstate(all="ignore"):
        largest = float(np.abs(np.where(agree, 0, y - y_expected)).max(initial=0)) / scale
    return largest if largest == largest else math.inf  # NaN does not agree with a number


def _special_differences(
    model: Sequential, runner: _Runner, inputs: _Inputs, steps: int, batch: int
) -> dict[str, float]:
    """The difference on each special input that the original takes."""
    differences = {}
    for name, x in inputs.special(steps, batch, runner):
        try:
            expected = runner.run(x)
        except (ImportError, MemoryError):
            raise
        except Exception:  # an original that refuses such input gives no numbers to differ from
            continue
        differences[name] = _special_difference(model, x, expected, inputs.compared(x), name)
    return differences


def _special_difference(model: Sequential, x: Array, expected: Array, compared: Any, name: str) -> float:
    """The difference on special input, without the outputs that roundings decide."""
    y = model(x)
    if y.shape != expected.shape:
        return math.inf
    difference = _difference(y, expected, compared, nan_agrees=name == NAN)
    if difference <= TOLERANCES[model.dtype.name]:
        return difference
    return _difference(y, expected, compared & ~_may_be_roundings(model, x, y, expected), nan_agrees=name == NAN)


def _may_be_roundings(model: Sequential, x: Array, y: Array, expected: Array) -> Array:
    """At which steps and rows roundings may explain the difference, as in networks that amplify them at each step.

    Weights that are changed by a few roundings move an output about as far as roundings do. An output that grows beyond
    all numbers may do so a step earlier on one side.
    """
    changed, change = copy(model), CHANGE * float(np.finfo(model.dtype).eps)
    weights = model.state_dict()
    for array in weights.values():
        flat = array.reshape(-1)
        flat[::2] *= 1 + change
        flat[1::2] *= 1 - change
    changed.load_state_dict(weights)
    with np.errstate(all="ignore"):
        moved = np.abs(changed(x) - y).max(axis=-1)
        is_small = np.abs(y - expected).max(axis=-1) <= FACTOR * moved
        is_huge = ~(np.abs(expected).max(axis=-1) < float(np.finfo(model.dtype).max) ** 0.5)
    may_be_roundings: Array = is_small | (is_huge & ~np.isfinite(moved))
    return may_be_roundings


def _window_difference(model: Sequential, run: Callable[[Array], Array], x: Array, window: int) -> float:
    """The difference between a stream's steps over a window and the original on the last `window` inputs."""
    time = 1 if model.batch_first else 0
    steps, batch = x.shape[time], x.shape[1 - time]
    chain, stream, largest = model._chain, model.stream(batch, window=window), 0.0
    for t in range(steps):
        y = stream.step(np.ascontiguousarray(x.take(t, time)))
        if t in (0, window - 1, steps - 1):  # only a few steps, since the original may be slow
            inputs = x.take(range(max(0, t - window + 1), t + 1), time)
            expected = run(np.ascontiguousarray(inputs))
            last_step = expected if chain.ends_at_last else expected.take(-1, time)
            compared = np.s_[:] if chain.ends_at_last else ~chain.masked_steps(x.take(t, time))
            largest = max(largest, _difference(y, last_step, compared))
    return largest


# ---- originals as functions of arrays


class _Runner(NamedTuple):
    """An original as a function of an array."""

    run: Callable[[Array], Array]
    fixed_sizes: tuple[int | None, int | None] = (
        None,
        None,
    )  # the first two of its input; None: any
    padding_tokens: Collection[int] = ()
    takes_nan: bool = False  # whether it treats NaN as arithmetic does, which some functions of other runtimes do not


def _runner(original: Any, safe_mode: bool) -> _Runner:
    if isinstance(original, (str, bytes, os.PathLike)):
        return _file_runner(os.fsdecode(original), safe_mode)
    if any(base.__module__.startswith("torch.nn") for base in type(original).__mro__):
        tokens = {module.padding_idx for module in original.modules() if hasattr(module, "padding_idx")} - {None}
        return _Runner(_torch_runner(original), padding_tokens=tokens, takes_nan=True)
    if not callable(original):
        raise TypeError(f"original: expected a function, a model or a path, got {type(original).__name__}")
    is_gatewise = isinstance(original, (Sequential, Layer, Block))
    return _Runner(lambda x: np.asarray(_first(original(x))), takes_nan=is_gatewise)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _torch_runner(module: Any) -> Callable[[Array], Array]:
    torch = import_module("torch")

    def run(x: Array) -> Array:
        modes = [(submodule, submodule.training) for submodule in module.modules()]
        module.eval()
        try:
            with torch.no_grad():
                output = _first(module(torch.from_numpy(np.ascontiguousarray(x))))
        finally:
            for submodule, training in modes:
                submodule.training = training
        result: Array = output.numpy()
        return result

    return run


def _file_runner(path: str, safe_mode: bool) -> _Runner:
    """Run a file by its framework; a file that gatewise wrote, by gatewise."""
    ending = os.path.splitext(path)[1].lower()
    runners = {".onnx": _onnx_runner} | dict.fromkeys((".keras", ".h5", ".hdf5"), _keras_runner)
    if ending not in runners:
        return _runner(import_module("gatewise.formats").load(path), safe_mode)
    if not is_regular(path):
        raise ValueError(f"original: {path}: expected a file")
    if runners[ending] is _keras_runner and safe_mode:
        _check_safe(path)
    runner: _Runner = _naming(path, lambda path: runners[ending](path, safe_mode))(path)
    return runner._replace(run=_naming(path, runner.run))


def _naming(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, but errors of the framework, of any kind, become ValueErrors that name the file."""

    def run(argument: Any) -> Any:
        try:
            return function(argument)
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(f"original: {path}: {type(error).__name__}: {printable(str(error))}") from None

    return run


def _check_safe(path: str) -> None:
    """Refuse a file that gatewise's own reader does not take: it is damaged, or may have a program in it."""
    try:
        import_module("gatewise.formats.keras").load(path)
    except ValueError as error:
        raise ValueError(
            f"original: {error}; with safe_mode=False Keras reads it, and executes the programs in it"
        ) from None


def _keras_runner(path: str, safe_mode: bool) -> _Runner:
    keras = import_module("keras")
    model = keras.models.load_model(path, compile=False, safe_mode=safe_mode)
    # Keras 3 converts the tensors of any backend; Keras 2 has only TensorFlow's.
    convert = getattr(getattr(keras, "ops", None), "convert_to_numpy", np.asarray)
    return _Runner(lambda x: np.asarray(convert(_first(model(x)))))


def _onnx_runner(path: str, _: bool) -> _Runner:
    """Run a file by ONNX Runtime, with x as its first input; the other inputs are states, and get zeros."""
    runtime = import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    first, *states = session.get_inputs()

    def run(x: Array) -> Array:
        feeds = {first.name: x}
        # The batch is the open axis that x and the states have in common, by its name in the file.
        open_axes = {size: x.shape[i] for i, size in enumerate(first.shape) if isinstance(size, str)}
        for state in states:
            sizes = [size if isinstance(size, int) else open_axes.get(size, 1) for size in state.shape]
            feeds[state.name] = np.zeros(sizes, np.float64 if state.type == "tensor(double)" else np.float32)
        return np.asarray(session.run(None, feeds)[0])

    sizes = [size if isinstance(size, int) else None for size in first.shape[:2]]
    return _Runner(run, (sizes[0], sizes[1]) if len(sizes) == 2 else (None, None))
