"""From PyTorch: modules, and files of their weights."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gatewise.arguments.arrays import Array, flag, floating, shaped
from gatewise.formats.errors import at, printable, reading
from gatewise.formats.pytorch.checkpoints import DTYPES, Checkpoint, described, size_of
from gatewise.formats.pytorch.pickles import Tensor
from gatewise.formats.safetensors import read_arrays
from gatewise.formats.verification import verify
from gatewise.layers import blocks
from gatewise.layers.activation import Activation
from gatewise.layers.recurrent import GRU, LSTM, RNN, Layer
from gatewise.layers.sequential import Sequential
from gatewise.weights.module import Module
from gatewise.weights.parameters import Packable

WEIGHT = re.compile(r"^(.*?)((?:weight|bias)_(?:ih|hh|hr))(_l(\d+)(_reverse)?)?$")
ROWS_A_UNIT = {4: "lstm", 3: "gru", 1: "rnn"}
RECURRENT: dict[str, type[Layer]] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
MOST_GROWTH = 8  # of weights out of a file: some are half as wide there, and some are used in two or three places
MOST_DEPTH = 4  # of dicts in each other that are looked into


# ---- files


def load(
    path: str | os.PathLike[str], *, prefix: str | None = None, nonlinearity: str | None = None,
    batch_first: bool = False,
) -> Layer:  # fmt: skip
    """Read a recurrent layer from a file of weights under PyTorch's names.

    Parameters
    ----------
    path : str or path-like
        What torch.save wrote of a state_dict, or of a dict that has one in it, read without PyTorch; or safetensors.
    prefix : str, optional
        What the layer's names begin with, "encoder.lstm."; None: it is the only layer there.
    nonlinearity : "tanh" or "relu", optional
        Of an RNN, whose weights do not tell.
    batch_first : bool
        Of the layer; weights do not tell.
    """
    flag("batch_first", batch_first)
    for name, value in (("prefix", prefix), ("nonlinearity", nonlinearity)):
        if not isinstance(value, str | None):
            raise TypeError(f"{name}: expected a text, got {value!r}")
    if nonlinearity not in (None, "tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    with reading(path):
        if os.fsdecode(path).lower().endswith(".safetensors"):
            arrays = read_arrays(path)
            weights = {own: arrays[name] for own, name in _picked(arrays, prefix).items()}
        else:
            with open(path, "rb") as file:
                weights = _read(Checkpoint(file), prefix)
        return _made(weights, nonlinearity, batch_first)


def _read(checkpoint: Checkpoint, prefix: str | None) -> dict[str, Array]:
    """The weights of one recurrent layer; no other numbers are read."""
    tensors = _state_dict(checkpoint.root, MOST_GROWTH * checkpoint.size)
    names = _picked(tensors, prefix)
    size = sum(size_of(tensors[name]) for name in names.values())
    if size > MOST_GROWTH * checkpoint.size:
        raise ValueError(
            f"expected weights of at most {MOST_GROWTH} times the file's size, got {size} bytes: views that repeat "
            "their numbers"
        )
    weights = {}
    for own, name in names.items():
        with at(name):
            weights[own] = checkpoint.numbers(tensors[name])
    return weights


def _state_dict(root: object, most: int) -> dict[str, Tensor]:
    """The tensors of what was saved: of the one dict in it that has a recurrent layer, or with several, of all.

    Training programs keep a state_dict beside other things, as "state_dict", "model_state_dict", "model" or "net". The
    names of several begin with their keys, and have at most so many letters together.
    """
    if not isinstance(root, dict):
        raise ValueError(
            f"expected a state_dict, got {described(root)}; torch.save(module.state_dict(), path) writes one"
        )
    whole = root["state_dict"] if isinstance(root.get("state_dict"), dict) else root
    found = {path: _tensors(inside) for path, inside in _dicts(whole)}
    with_layers = [path for path, tensors in found.items() if any(map(WEIGHT.match, tensors))]
    with_tensors = [path for path, tensors in found.items() if tensors]
    if not with_tensors:
        raise ValueError(f"expected a state_dict, got a dict without tensors of {', '.join(sorted(DTYPES))}")
    paths = with_layers or with_tensors
    if len(paths) == 1:
        return found[paths[0]]
    if sum(len(".".join(path)) * len(found[path]) for path in paths) > most:
        raise ValueError("expected a state_dict, got tensors in dicts of far longer names")
    return {".".join((*path, name)): found[path][name] for path in paths for name in found[path]}


def _tensors(inside: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of floating numbers, and those of other kinds that have the name of a weight."""
    return {
        name: value
        for name, value in inside.items()
        if isinstance(value, Tensor) and (value.kind in DTYPES or WEIGHT.match(name))
    }


def _dicts(root: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """A dict and those in it, each once, with the keys that lead there."""
    seen = {id(root)}
    level: list[tuple[tuple[str, ...], dict[str, Any]]] = [((), root)]
    for _ in range(MOST_DEPTH):
        deeper = []
        for path, inside in level:
            yield path, inside
            for key, value in inside.items():
                if isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    deeper.append(((*path, key), value))
        level = deeper


def _picked(names: Collection[str], prefix: str | None) -> dict[str, str]:
    """The names of the weights of one recurrent layer in a file, by the names that the layer has for them."""
    found = _grouped(names)
    if prefix is not None and prefix not in found:
        prefix = f"{prefix}." if f"{prefix}." in found else prefix
    if prefix is None and len(found) == 1 and len(next(iter(found.values()))) == len(names):
        (prefix,) = found
    if prefix is None or prefix not in found:
        expected = "the weights of one recurrent layer alone" if prefix is None else f"weights of prefix {prefix!r}"
        layers = ", ".join(map(repr, sorted(found))) or "none"
        others = len(names) - sum(map(len, found.values()))
        raise ValueError(
            f"expected {expected}, got layers of prefix {layers} and {others} other arrays; prefix= picks one"
        )
    return found[prefix]


def _grouped(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """By prefix, the names of the weights of each recurrent layer; those of a cell are a layer's ..._l0."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = WEIGHT.match(name)
        if match:
            found.setdefault(match[1], {})[match[2] + (match[3] or "_l0")] = name
    return found


def _made(weights: Mapping[str, Array], nonlinearity: str | None, batch_first: bool) -> Layer:
    first, second = weights.get("weight_ih_l0"), weights.get("weight_hh_l0")
    if first is None or second is None or first.ndim != 2 or second.ndim != 2 or 0 in (*first.shape, *second.shape):
        raise ValueError("expected weight_ih_l0 and weight_hh_l0 of two axes")
    projection = weights.get("weight_hr_l0")
    hidden = second.shape[1] if projection is None or projection.ndim != 2 else projection.shape[1]
    cell = ROWS_A_UNIT.get(second.shape[0] // hidden) if second.shape[0] % hidden == 0 else None
    if cell is None:
        raise ValueError(f"weight_hh_l0: expected 4, 3 or 1 times {hidden} rows, got {second.shape[0]}")
    options: dict[str, Any] = {
        "num_layers": sum(name.startswith("weight_ih_l") and not name.endswith("_reverse") for name in weights),
        "bias": "bias_ih_l0" in weights, "bidirectional": "weight_ih_l0_reverse" in weights,
        "batch_first": batch_first,
    }  # fmt: skip
    if cell == "rnn":
        if nonlinearity is None:
            raise ValueError("expected nonlinearity='tanh' or 'relu', which the weights of an RNN do not tell")
        options["nonlinearity"] = nonlinearity
    if cell == "lstm" and projection is not None:
        options["proj_size"] = projection.shape[0]
    layer: Layer = _with(RECURRENT[cell], weights, input_size=first.shape[1], hidden_size=hidden, **options)
    return layer


def _with(kind: type[Any], weights: Mapping[str, Array], **options: Any) -> Any:
    """A layer with just these weights."""

    def source(of: Packable[Any]) -> dict[str, Array]:
        shapes = of.shapes()
        if shapes.keys() != weights.keys():
            raise ValueError(f"expected {', '.join(sorted(shapes))}, got {', '.join(sorted(weights))}")
        return {name: np.array(shaped(name, floating(name, weights[name], of.dtype), shapes[name])) for name in shapes}

    dtypes = {array.dtype for array in weights.values()}
    if len(dtypes) != 1 or not dtypes <= {np.dtype(np.float32), np.dtype(np.float64)}:
        raise ValueError(f"expected weights of float32 or of float64, got {', '.join(sorted(map(str, dtypes)))}")
    return kind._from(source, {**options, "dtype": dtypes.pop().name})


# ---- modules


def load_module(module: Any, *, check: bool = True, **options: Any) -> Module | Sequential:
    """Make a model of a module of PyTorch that has layers one after the other.

    Parameters
    ----------
    module : torch.nn.LSTM, GRU, RNN, a cell, or a module whose children, in their order, are such layers and Linear,
        Embedding, LayerNorm, activations, Dropout or nn.Sequential of these
        On the CPU, in float32 or float64; also on gatewise.torch. Whether the last step alone goes on behind the last
        recurrent layer, what it returns tells.
    check : bool
        Whether to run both as `verify` does, and refuse what differs. Of a module of one's own, whose forward may do
        anything, nothing else tells that the model is right.

    Raises
    ------
    ValueError
        If a layer has no counterpart, named; or if none of the models gives what the module gives.
    """
    if options:
        raise TypeError(f"load: expected no {', '.join(options)} with a module")
    check = flag("check", check)
    candidates = _candidates(module, list(_layers(module)))
    if not check:
        return candidates[0]
    _check_arguments(module)
    return _passed(candidates, module)


def _candidates(module: Any, layers: list[Any]) -> list[Module | Sequential]:
    """The models that a module with these layers may be: all of them in their order, or with the last step alone."""
    recurrent = max((i for i, layer in enumerate(layers) if isinstance(layer, Layer)), default=None)
    try:
        whole = layers[0] if len(layers) == 1 else Sequential(layers)
    except ValueError as error:
        if recurrent is not None:
            raise ValueError(f"module: {error}") from None
        names = ", ".join(type(layer).__name__ for layer in layers[:8])
        raise ValueError(
            f"module: expected a recurrent layer, or layers that follow each other, got {type(module).__name__} of "
            f"{names} without a recurrent layer: {error}"
        ) from None
    if recurrent is None or _is_cell(module):
        return [whole]
    before, behind = layers[: recurrent + 1], layers[recurrent + 1 :]
    # The last step of the sequence, y[-1], is of the reverse direction its first: not what Last takes right behind.
    ends: list[list[Module]] = [[blocks.Last()]]
    if layers[recurrent].bidirectional:
        ends.append([Activation("linear"), blocks.Last()])
    return [whole, *(Sequential([*before, *end, *behind]) for end in ends)]


def _check_arguments(module: Any) -> None:
    """Whether a module can be called with one argument, the sequence."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(None)
    except TypeError:
        shown = printable(f"{type(module).__name__}.forward{signature}", 200)
        raise ValueError(
            f"module: expected a forward that takes one argument, got {shown}; states are arguments of a model's call"
        ) from None


def _passed(candidates: list[Module | Sequential], module: Any) -> Module | Sequential:
    """The one of some models that does what the module does."""
    passed, reasons, ends_rows = [], [], False
    original = _sequence_of(module) if _is_cell(module) else module
    for candidate in candidates:
        try:
            found = verify(candidate, original, steps=5, batch=2)
        except Exception as error:  # the module's own, of whatever kind
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if found.passed:
            passed.append(candidate)
        else:
            reasons.append(f"outputs that differ by {found.largest:.2g} on {found.input}")
            ends_rows = ends_rows or found.input.startswith("rows")
    if len(passed) == 1:
        return passed[0]
    name = type(module).__name__
    found_instead = "; or ".join(reasons) if not passed else f"{len(passed)} models that differ less than roundings do"
    advice = "take a layer alone, or the file that torch.onnx.export writes, or make a gatewise.Sequential by hand"
    if ends_rows:
        advice = "check=False makes a model of its layers, whose calls take lengths= in place of padding"
    raise ValueError(
        f"module: expected {name} to do what its layers do one after the other, got {printable(found_instead)}; "
        f"{advice}"
    )


def _is_cell(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.RNNCellBase)


def _sequence_of(cell: Any) -> Callable[[Array], Array]:
    """What a cell, which takes one step, gives for a sequence (T, B, I)."""
    import torch

    def run(x: Array) -> Array:
        state, outputs = None, []
        with torch.no_grad():
            for step in torch.from_numpy(x):
                state = cell(step, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
        return np.stack([output.numpy() for output in outputs])

    return run


def _layers(module: Any) -> Iterator[Any]:
    """The layers of a module, by what its parts are: those on gatewise.torch are torch.nn's, too."""
    import torch

    nn = torch.nn
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"module: expected a module of Python, got {module.original_name} in TorchScript; its state_dict, saved by "
            "torch.save, loads"
        )
    if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        weights = _arrays(module, module._flat_weights_names)
        yield _made(weights, getattr(module, "nonlinearity", None), module.batch_first)
    elif isinstance(module, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)):
        weights = _arrays(module, ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
        weights = {f"{name}_l0": array for name, array in weights.items()}
        yield _made(weights, getattr(module, "nonlinearity", None), False)
    elif isinstance(module, nn.Linear):
        yield _with(
            blocks.Dense, _arrays(module), in_features=module.in_features, out_features=module.out_features,
            bias=module.bias is not None,
        )  # fmt: skip
    elif isinstance(module, nn.Embedding) and module.max_norm is None:
        yield _with(
            blocks.Embedding, _arrays(module), num_embeddings=module.num_embeddings,
            embedding_dim=module.embedding_dim,
        )  # fmt: skip
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and module.elementwise_affine:
        yield _with(
            blocks.LayerNorm, _arrays(module), normalized_shape=module.normalized_shape[0], eps=module.eps,
            bias=module.bias is not None,
        )  # fmt: skip
    elif isinstance(module, (nn.Dropout, nn.Identity)):
        yield blocks.Dropout(getattr(module, "p", 0.0))
    elif (activation := _activation(module)) is not None:
        yield activation
    elif type(module).__module__.startswith("torch.") and type(module) is not nn.Sequential:
        shown = printable(f"{type(module).__name__}({module.extra_repr()})", 200)
        raise ValueError(f"module: expected layers that gatewise has, got {shown}")
    else:
        children = list(module.children())
        if not children:
            raise ValueError(f"module: expected layers, got {type(module).__name__} without any")
        for child in children:
            yield from _layers(child)


def _activation(module: Any) -> Activation | None:
    import torch

    nn = torch.nn
    simple = {
        nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hard_sigmoid", nn.SELU: "selu",
        nn.SiLU: "silu", nn.Softsign: "softsign",
    }  # fmt: skip
    for kind, name in simple.items():
        if isinstance(module, kind):
            return Activation(name)
    if isinstance(module, nn.ELU):
        return Activation("elu", module.alpha)
    if isinstance(module, nn.LeakyReLU):
        return Activation("leaky_relu", module.negative_slope)
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return Activation("gelu")
    if isinstance(module, nn.Softplus) and module.beta == 1 and module.threshold >= 20:  # beyond it is x, but for 2e-9
        return Activation("softplus")
    if isinstance(module, nn.Softmax) and module.dim == -1:
        return Activation("softmax")
    return None


def _arrays(module: Any, names: Iterable[str] = ("weight", "bias")) -> dict[str, Array]:
    """The weights of a module that it has, also where a parametrization makes them."""
    tensors = {name: getattr(module, name, None) for name in names}
    arrays = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.device.type != "cpu":
            raise ValueError(f"module: expected weights on the CPU, got {name} on {tensor.device}")
        if kind not in ("float32", "float64"):
            raise ValueError(f"module: expected weights of float32 or of float64, got {kind}; module.float() has such")
        arrays[name] = tensor.detach().numpy().copy()
    return arrays
