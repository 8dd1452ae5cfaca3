"""Whether a model is what it was made from: both run on the same random input."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from gatewise.arrays import Array, whole_number
from gatewise.blocks import Block
from gatewise.layers import Layer
from gatewise.sequential import Sequential

# As shares of the largest output: some hundred roundings of either side, through whatever comes behind them.
TOLERANCES = {"float32": 1e-4, "float64": 1e-10}
MASKED = 0.2  # of the steps, where a model leaves some out
LEAST = 1e-6  # of the largest output: of outputs that all but vanish the roundings are compared with this


class Verification(NamedTuple):
    """The largest differences between a model and its original, as shares of the original's largest output.

    sequences : over whole sequences
    windows : of a stream's steps on the last few inputs and the original on these; None where the original takes
        sequences of one length alone
    tolerance : up to which they are taken for roundings
    """

    sequences: float
    windows: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.largest <= self.tolerance

    @property
    def largest(self) -> float:
        return max(self.sequences, self.windows or 0.0)


def verify(model: Any, original: Any, *, steps: int = 20, batch: int = 3, seed: int = 0) -> Verification:
    """Run random input through a model and through what it was made from.

    Parameters
    ----------
    model : Sequential or a layer
    original : torch.nn.Module, a model of Keras or of gatewise, a function, or a path
        What takes an array as the model does and gives one, or a tuple whose first member is one. A file is run by the
        framework that it is of, `.onnx` by ONNX Runtime and `.keras` and `.h5` by Keras.
    steps, batch : int
        Of the sequences, (T, B, I) or (B, T, I) as the model has it.
    seed : int
        Of the input, from a standard normal distribution or of all tokens, and of the steps that are masked, where the
        model leaves some out; the outputs of these are not compared.

    Returns
    -------
    Verification
    """
    whole = model if isinstance(model, Sequential) else Sequential([_layer(model)])
    run, fixed = _runner(original)
    wanted = whole_number("steps", steps, 1, 2**20), whole_number("batch", batch, 1, 2**20)
    shape = tuple(own or size for own, size in zip(fixed, wanted[::-1] if whole.batch_first else wanted, strict=True))
    of, generator = whole._chain, np.random.default_rng(whole_number("seed", seed, 0, 2**64 - 1))
    if of.vocabulary is not None:
        x = generator.integers(0, of.vocabulary, shape)
    else:
        x = generator.standard_normal((*shape, *of.units)).astype(of.dtype)
    if of.masked is not None:
        x[generator.random(shape) < MASKED] = of.masked
    compared = np.s_[:] if of.ends_at_last else ~of.masked_steps(x)
    sequences = _difference(whole(x), run(x), compared)
    time = shape[whole.batch_first]
    windows = None if fixed[whole.batch_first] else _windows(whole, run, x, (time + 1) // 2)
    return Verification(sequences, windows, TOLERANCES[of.dtype.name])


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


def _difference(actual: Array, expected: Array, compared: Any) -> float:
    """Of the steps that are compared: of those that are masked the output is zero here, and anything elsewhere."""
    if actual.shape != expected.shape:
        raise ValueError(f"original: expected an output of shape {actual.shape}, got {expected.shape}")
    wide = expected[compared].astype(np.float64)
    scale = max(LEAST, float(np.abs(wide).max(initial=0)))
    largest = float(np.abs(actual[compared] - wide).max(initial=0)) / scale
    return largest if largest == largest else math.inf  # NaN is no agreement


class _Runner(NamedTuple):
    run: Callable[[Array], Array]
    fixed: tuple[int | None, int | None] = (None, None)  # the first two sizes of its input, where it takes one alone


def _runner(original: Any) -> _Runner:
    """The original as a function of arrays."""
    if isinstance(original, (str, bytes, os.PathLike)):
        return _file_runner(os.fsdecode(original))
    if any(base.__module__.startswith("torch.nn") for base in type(original).__mro__):
        return _Runner(_torch_runner(original))
    if not callable(original):
        raise TypeError(f"original: expected what can be called, or a path, got {type(original).__name__}")
    return _Runner(lambda x: np.asarray(_first(original(x))))


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


def _file_runner(path: str) -> _Runner:
    """By the framework that the file is of; by gatewise, what it wrote itself."""
    ending = os.path.splitext(path)[1].lower()
    makers = {".onnx": _onnx_runner, ".keras": _keras_runner, ".h5": _keras_runner, ".hdf5": _keras_runner}
    if ending not in makers:
        return _runner(import_module("gatewise.formats").load(path))
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for a writer
        raise ValueError(f"original: {path}: expected a file")
    made: _Runner = _named(path, makers[ending])(path)
    return made._replace(run=_named(path, made.run))


def _named(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with the framework's own errors, of whatever kind, as one that names the file."""

    def run(argument: Any) -> Any:
        try:
            return function(argument)
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(f"original: {path}: {type(error).__name__}: {error}") from None

    return run


def _keras_runner(path: str) -> _Runner:
    model = import_module("keras").models.load_model(path, compile=False)
    return _Runner(lambda x: np.asarray(_first(model(x))))


def _onnx_runner(path: str) -> _Runner:
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
