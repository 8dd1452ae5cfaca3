"""Whether a model is what it was made from: both run on the same input, random and special."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Collection, Iterator
from copy import copy
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from gatewise.arguments.arrays import Array, flag, whole_number
from gatewise.formats.errors import printable
from gatewise.layers.activation import Block
from gatewise.layers.recurrent import Layer
from gatewise.layers.sequential import Sequential

# As shares of the largest output: some hundred roundings of either side, through whatever comes behind them.
TOLERANCES = {"float32": 1e-4, "float64": 1e-10}
MASKED = 0.2  # of the steps, where a model leaves some out
LEAST = 1e-6  # of the largest output: of outputs that all but vanish the roundings are compared with this
PADDED = {"end": "rows that end in {}", "middle": "rows with {} in their middle", "all": "rows of {} alone"}
LONG = 300  # steps, where programs cut sequences off
OFF = 8  # roundings by which weights are changed, to see what roundings do to an output
FACTOR = 50  # how much more than these changes the roundings of a long computation may do
NAN = "NaN"


class Verification(NamedTuple):
    """The largest differences between a model and its original, as shares of the original's largest output.

    sequences : over whole sequences
    windows : of a stream's steps on the last few inputs and the original on these; None where the original takes
        sequences of one length alone
    tolerance : up to which they are taken for roundings
    input : what the first sequences were on which the two differ by more than this, or else those where by most
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
    """Run a model and what it was made from on the same input: random, and special.

    Special are what programs treat as something else: rows that end in zeros or in a token for padding, have them in
    their middle or are nothing else; sequences of 300 steps; numbers of up to some thousands; for a module also NaN.
    What an original does with other values or lengths alone, no comparison shows. Differences are left out that may be
    roundings which the model amplifies.

    Parameters
    ----------
    model : Sequential or a layer
    original : torch.nn.Module, a model of Keras or of gatewise, a function, or a path
        What takes an array as the model does and gives one, or a tuple whose first member is one. A file is run by the
        framework that it is of, `.onnx` by ONNX Runtime and `.keras` and `.h5` by Keras.
    steps, batch : int
        Of the random sequences, (T, B, I) or (B, T, I) as the model has it.
    seed : int
        Of the input, from a standard normal distribution or of all tokens, and of the steps that are masked, where the
        model leaves some out; the outputs of these are not compared.
    safe_mode : bool
        Whether a file of Keras must be one that `load` takes, which has no program in it. False: Keras takes what it
        can, and executes the programs of Lambda and of other people's layers.

    Returns
    -------
    Verification
    """
    whole = model if isinstance(model, Sequential) else Sequential([_layer(model)])
    run, fixed, paddings, takes_nan = _runner(original, flag("safe_mode", safe_mode))
    draw = _Draw(whole, fixed, np.random.default_rng(whole_number("seed", seed, 0, 2**64 - 1)))
    steps, batch = whole_number("steps", steps, 1, 2**20), whole_number("batch", batch, 1, 2**20)
    x, tolerance = draw.random(steps, batch), TOLERANCES[whole.dtype.name]
    differences = {"random input": _difference(whole(x), run(x), draw.compared(x))}
    time = x.shape[whole.batch_first]
    windows = None if fixed[whole.batch_first] else _windows(whole, run, x, (time + 1) // 2)
    if differences["random input"] <= tolerance:
        for name, special in draw.special(min(max(steps, 12), 32), min(max(batch, 2), 4), paddings, takes_nan):
            try:
                expected = run(special)
            except (ImportError, MemoryError):
                raise
            except Exception:  # an original that refuses such input gives no numbers to differ from
                continue
            differences[name] = _special_difference(whole, special, expected, draw.compared(special), name)
    largest = max(differences.values())
    first = next(name for name, one in differences.items() if one > tolerance or one == largest)
    return Verification(largest, windows, tolerance, first)


class _Draw:
    """The input of a comparison."""

    def __init__(self, model: Sequential, fixed: tuple[int | None, int | None], generator: np.random.Generator) -> None:
        self.model, self.fixed, self.generator = model, fixed, generator
        self.of = model._chain

    def random(self, steps: int, batch: int, *, is_large: bool = False) -> Array:
        sizes = (batch, steps) if self.model.batch_first else (steps, batch)
        shape = tuple(own or size for own, size in zip(self.fixed, sizes, strict=True))
        if self.of.vocabulary is not None:
            x = self.generator.integers(0, self.of.vocabulary, shape)
        else:
            x = self.generator.standard_normal((*shape, *self.of.units)).astype(self.of.dtype)
            if is_large:
                x *= 10 ** self.generator.uniform(1, 3, shape)[..., None].astype(x.dtype)
        if self.of.masked is not None:
            x[self.generator.random(shape) < MASKED] = self.of.masked
        return x

    def compared(self, x: Array) -> Any:
        """Of which steps and rows the outputs are compared: not of those that the model leaves out."""
        return np.True_ if self.of.ends_at_last else ~self.of.masked_steps(x)

    def special(
        self, steps: int, batch: int, paddings: Collection[int], takes_nan: bool
    ) -> Iterator[tuple[str, Array]]:
        """Input that programs treat as something else than numbers, and what it is."""
        words = self.of.vocabulary
        has_tokens = words is not None
        values: set[float] = {0.0, -1.0} if words is None else {0, words - 1, *(one for one in paddings if one < words)}
        for value in sorted(values if self.of.masked is None else {*values, self.of.masked}):
            what = f"token {value:.0f}" if has_tokens else f"{value:g}"
            for where, name in PADDED.items():
                x = self.random(steps, batch)
                for row, one in enumerate(self.rows(x)):
                    one[_padded(where, len(one), row)] = value
                if where != "all" or self.of.masked is None:  # of rows without steps everyone has another opinion
                    yield name.format(what), x
        if not self.fixed[self.model.batch_first]:
            yield f"{LONG} steps", self.random(LONG, 2)
        if not has_tokens:
            yield "large numbers", self.random(steps, batch, is_large=True)
        if not has_tokens and takes_nan:
            x = self.random(steps, batch)
            for row, one in enumerate(self.rows(x)):
                one[len(one) // 2 + row :, row % 2 :] = np.nan
            yield NAN, x

    def rows(self, x: Array) -> Iterator[Array]:
        """Each row, (T, I) or (T,), to be changed in place."""
        return iter(x if self.model.batch_first else x.swapaxes(0, 1))


def _padded(where: str, steps: int, row: int) -> slice:
    """The steps of a row that hold padding; rows differ in how many."""
    if where == "end":
        return slice(max(1, steps // 2 - row), steps)
    if where == "middle":
        return slice(max(1, steps // 3 - row), max(1, steps // 2 - row))
    return slice(0, steps)


def _special_difference(model: Sequential, x: Array, expected: Array, compared: Any, name: str) -> float:
    """Of the outputs on special input, where no roundings decide what they are."""
    y = model(x)
    if y.shape != expected.shape:
        return math.inf
    difference = _difference(y, expected, compared, nan_agrees=name == NAN)
    if difference <= TOLERANCES[model.dtype.name]:
        return difference
    return _difference(y, expected, compared & ~_is_rounding(model, x, y, expected), nan_agrees=name == NAN)


def _is_rounding(model: Sequential, x: Array, y: Array, expected: Array) -> Array:
    """At which steps and rows roundings may have made the difference, as in networks that amplify them at each step.

    Weights that are changed by a few roundings move an output about as far as roundings do. An output that grows beyond
    all numbers may do so a step earlier on one side.
    """
    twin, off = copy(model), OFF * float(np.finfo(model.dtype).eps)
    weights = model.state_dict()
    for array in weights.values():
        flat = array.reshape(-1)
        flat[::2] *= 1 + off
        flat[1::2] *= 1 - off
    twin.load_state_dict(weights)
    with np.errstate(all="ignore"):
        moved = np.abs(twin(x) - y).max(axis=-1)
        is_small = np.abs(y - expected).max(axis=-1) <= FACTOR * moved
        is_huge = ~(np.abs(expected).max(axis=-1) < float(np.finfo(model.dtype).max) ** 0.5)
    made: Array = is_small | (is_huge & ~np.isfinite(moved))
    return made


def _windows(model: Sequential, run: Callable[[Array], Array], x: Array, window: int) -> float:
    """Step by step, on the last `window` inputs, against the original on these."""
    time = 1 if model.batch_first else 0
    steps, batch = x.shape[time], x.shape[1 - time]
    stream, largest = model.stream(batch, window=window), 0.0
    for t in range(steps):
        y = stream.step(np.ascontiguousarray(x.take(t, time)))
        if t in (0, window - 1, steps - 1):  # the original takes its time
            inputs = x.take(range(max(0, t - window + 1), t + 1), time)
            expected = run(np.ascontiguousarray(inputs))
            of = model._chain
            at_end = expected if of.ends_at_last else expected.take(-1, time)
            compared = np.s_[:] if of.ends_at_last else ~of.masked_steps(x.take(t, time))
            largest = max(largest, _difference(y, at_end, compared))
    return largest


def _layer(model: Any) -> Layer | Block:
    if not isinstance(model, (Layer, Block)):
        raise TypeError(f"model: expected a Sequential or a layer, got {type(model).__name__}")
    return model


def _difference(actual: Array, expected: Array, compared: Any, *, nan_agrees: bool = False) -> float:
    """Of the steps that are compared: of those that are masked the output is zero here, and anything elsewhere."""
    if actual.shape != expected.shape:
        raise ValueError(f"original: expected an output of shape {actual.shape}, got {expected.shape}")
    ours, theirs = (np.asarray(one[compared], np.float64) for one in (actual, expected))
    agree = (ours == theirs) | (nan_agrees & np.isnan(ours) & np.isnan(theirs))
    scale = max(LEAST, float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0)))
    with np.errstate(all="ignore"):
        largest = float(np.abs(np.where(agree, 0, ours - theirs)).max(initial=0)) / scale
    return largest if largest == largest else math.inf  # NaN is no agreement


class _Runner(NamedTuple):
    run: Callable[[Array], Array]
    fixed: tuple[int | None, int | None] = (None, None)  # the first two sizes of its input, where it takes one alone
    paddings: Collection[int] = ()  # tokens that it calls padding
    takes_nan: bool = False  # it does with NaN what arithmetic does; of the functions of other runtimes not all do


def _runner(original: Any, safe_mode: bool) -> _Runner:
    """The original as a function of arrays."""
    if isinstance(original, (str, bytes, os.PathLike)):
        return _file_runner(os.fsdecode(original), safe_mode)
    if any(base.__module__.startswith("torch.nn") for base in type(original).__mro__):
        paddings = {getattr(module, "padding_idx", None) for module in original.modules()}
        return _Runner(_torch_runner(original), paddings={one for one in paddings if one is not None}, takes_nan=True)
    if not callable(original):
        raise TypeError(f"original: expected what can be called, or a path, got {type(original).__name__}")
    of_gatewise = isinstance(original, (Sequential, Layer, Block))
    return _Runner(lambda x: np.asarray(_first(original(x))), takes_nan=of_gatewise)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _torch_runner(module: Any) -> Callable[[Array], Array]:
    torch = import_module("torch")

    def run(x: Array) -> Array:
        training = [(one, one.training) for one in module.modules()]
        module.eval()
        try:
            with torch.no_grad():
                output = _first(module(torch.from_numpy(np.ascontiguousarray(x))))
        finally:
            for one, was in training:
                one.training = was
        result: Array = output.numpy()
        return result

    return run


def _file_runner(path: str, safe_mode: bool) -> _Runner:
    """By the framework that the file is of; by gatewise, what it wrote itself."""
    ending = os.path.splitext(path)[1].lower()
    makers = {".onnx": _onnx_runner} | dict.fromkeys((".keras", ".h5", ".hdf5"), _keras_runner)
    if ending not in makers:
        return _runner(import_module("gatewise.formats").load(path), safe_mode)
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
        raise ValueError(f"original: {path}: expected a file")
    if makers[ending] is _keras_runner and safe_mode:
        _check_safe(path)
    made: _Runner = _named(path, lambda path: makers[ending](path, safe_mode))(path)
    return made._replace(run=_named(path, made.run))


def _named(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with the framework's own errors, of whatever kind, as one that names the file."""

    def run(argument: Any) -> Any:
        try:
            return function(argument)
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(f"original: {path}: {type(error).__name__}: {printable(str(error))}") from None

    return run


def _check_safe(path: str) -> None:
    """Whether it is a file that gatewise's own reader takes: one without a program in it, and not damaged."""
    try:
        import_module("gatewise.formats.keras").load(path)
    except ValueError as error:
        raise ValueError(
            f"original: {error}; with safe_mode=False Keras reads it, and executes the programs in it"
        ) from None


def _keras_runner(path: str, safe_mode: bool) -> _Runner:
    keras = import_module("keras")
    model = keras.models.load_model(path, compile=False, safe_mode=safe_mode)
    convert = getattr(
        getattr(keras, "ops", None), "convert_to_numpy", np.asarray
    )  # of whatever backend; Keras 2 has one
    return _Runner(lambda x: np.asarray(convert(_first(model(x)))))


def _onnx_runner(path: str, _: bool) -> _Runner:
    """By ONNX Runtime, on the first input; the others are states, of zeros."""
    runtime = import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    first, *others = session.get_inputs()

    def run(x: Array) -> Array:
        feeds = {first.name: x}
        # Of the sizes of a state the one that is open is the batch: the one axis of x that is so in the file, too.
        open_axes = {size: x.shape[i] for i, size in enumerate(first.shape) if isinstance(size, str)}
        for one in others:
            sizes = [size if isinstance(size, int) else open_axes.get(size, 1) for size in one.shape]
            feeds[one.name] = np.zeros(sizes, np.float64 if one.type == "tensor(double)" else np.float32)
        return np.asarray(session.run(None, feeds)[0])

    sizes = [size if isinstance(size, int) else None for size in first.shape[:2]]
    return _Runner(run, (sizes[0], sizes[1]) if len(sizes) == 2 else (None, None))
