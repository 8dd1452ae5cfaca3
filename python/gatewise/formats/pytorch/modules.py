"""Models from modules of PyTorch: their layers, and a comparison that tells whether these are all that they do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from gatewise.arguments.arrays import Array, flag
from gatewise.formats.errors import printable
from gatewise.formats.pytorch.state_dicts import build_layer
from gatewise.formats.verification import verify
from gatewise.formats.weights import layer_with
from gatewise.layers.activation import Activation
from gatewise.layers.layer import Layer
from gatewise.layers.normalization import LayerNorm
from gatewise.layers.products import Dense, Embedding
from gatewise.layers.sequential import Sequential
from gatewise.layers.structure import Dropout, Last
from gatewise.weights.module import Module


def load_module(module: Any, *, check: bool = True, **options: Any) -> Module | Sequential:
    """Make a model of a module of PyTorch that has layers one after the other.

    Parameters
    ----------
    module : torch.nn.LSTM, GRU, RNN, a cell, or a module whose children, in their order, are such layers and Linear,
        Embedding, LayerNorm, activations, Dropout or nn.Sequential of these
        On the CPU, in float32 or float64; it may be accelerated by gatewise.torch. Its output tells whether all steps
        or only the last one go from the last recurrent layer to the layers after it.
    check : bool
        Whether to run both as `verify` does, and refuse a module whose outputs differ. For a module with a forward of
        its own, which may do anything, only this comparison tells that the model is right.

    Raises
    ------
    ValueError
        If a layer, which is then named, has no counterpart; or if no model gives what the module gives.
    """
    if options:
        raise TypeError(f"load: expected no {', '.join(options)} with a module")
    check = flag("check", check)
    candidates = _candidates(module, list(_layers(module)))
    if not check:
        return candidates[0]
    _check_arguments(module)
    return _matching(candidates, module)


# ---- the model that a module is


def _candidates(module: Any, layers: list[Any]) -> list[Module | Sequential]:
    """The models that a module with these layers may be: all of them in their order, or with a `Last` among them."""
    recurrent = max((i for i, layer in enumerate(layers) if isinstance(layer, Layer)), default=None)
    try:
        model = layers[0] if len(layers) == 1 else Sequential(layers)
    except ValueError as error:
        if recurrent is not None:
            raise ValueError(f"module: {error}") from None
        names = ", ".join(type(layer).__name__ for layer in layers[:8])
        raise ValueError(
            f"module: expected a recurrent layer, or layers that follow each other, got {type(module).__name__} of "
            f"{names} without a recurrent layer: {error}"
        ) from None
    if recurrent is None or _is_cell(module):
        return [model]
    before, after = layers[: recurrent + 1], layers[recurrent + 1 :]
    last_steps: list[list[Module]] = [[Last()]]
    if layers[recurrent].bidirectional:
        # The last step of the sequence, y[-1], is the first step of the reverse direction. `Last` directly after a
        # recurrent layer takes the last step of each direction; an activation between them makes it take y[-1].
        last_steps.append([Activation("linear"), Last()])
    return [model, *(Sequential([*before, *last_step, *after]) for last_step in last_steps)]


def _check_arguments(module: Any) -> None:
    """Whether a module can be called with one argument, the sequence."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(None)
    except TypeError:
        forward = printable(f"{type(module).__name__}.forward{signature}", 200)
        raise ValueError(
            f"module: expected a forward that takes one argument, got {forward}; states are arguments of a model's call"
        ) from None


def _matching(candidates: list[Module | Sequential], module: Any) -> Module | Sequential:
    """The only one of these models that does what the module does."""
    matching, differences, has_padding = [], [], False
    original = _as_sequence(module) if _is_cell(module) else module
    for candidate in candidates:
        try:
            verification = verify(candidate, original, steps=5, batch=2)
        except Exception as error:  # the module's own, of any kind
            differences.append(f"{type(error).__name__}: {error}")
            continue
        if verification.passed:
            matching.append(candidate)
        else:
            differences.append(f"outputs that differ by {verification.largest:.2g} on {verification.input}")
            has_padding = has_padding or verification.input.startswith("rows")
    if len(matching) == 1:
        return matching[0]
    name = type(module).__name__
    got = "; or ".join(differences)
    if matching:
        got = f"{len(matching)} models that differ less than roundings do"
    advice = "take a single layer, or the file that torch.onnx.export writes, or make a gatewise.Sequential by hand"
    if has_padding:
        advice = "check=False makes a model of its layers, whose calls take lengths= in place of padding"
    raise ValueError(
        f"module: expected {name} to do what its layers do one after the other, got {printable(got)}; {advice}"
    )


def _is_cell(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.RNNCellBase)


def _as_sequence(cell: Any) -> Callable[[Array], Array]:
    """A function of sequences (T, B, I) that calls a cell, which takes single steps, for each step."""
    import torch

    def run(x: Array) -> Array:
        state, outputs = None, []
        with torch.no_grad():
            for step in torch.from_numpy(x):
                state = cell(step, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
        return np.stack([output.numpy() for output in outputs])

    return run


# ---- its layers


def _layers(module: Any) -> Iterator[Any]:
    """The layers of a module, one by one; a module on gatewise.torch is also one of torch.nn."""
    import torch

    nn = torch.nn
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"module: expected a module of Python, got {module.original_name} in TorchScript; its state_dict, saved by "
            "torch.save, loads"
        )
    layer = _recurrent(module) or _rowwise(module) or _activation(module)
    if layer is not None:
        yield layer
    elif type(module).__module__.startswith("torch.") and type(module) is not nn.Sequential:
        shown = printable(f"{type(module).__name__}({module.extra_repr()})", 200)
        raise ValueError(f"module: expected layers that gatewise has, got {shown}")
    else:
        children = list(module.children())
        if not children:
            raise ValueError(f"module: expected layers, got {type(module).__name__} without any")
        for child in children:
            yield from _layers(child)


def _recurrent(module: Any) -> Layer | None:
    from torch import nn

    if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        weights = _weights(module, module._flat_weights_names)
        return build_layer(weights, getattr(module, "nonlinearity", None), module.batch_first)
    if isinstance(module, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)):
        weights = _weights(module, ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
        weights = {f"{name}_l0": array for name, array in weights.items()}
        return build_layer(weights, getattr(module, "nonlinearity", None), False)
    return None


def _rowwise(module: Any) -> Any:
    """A layer that treats each step by itself, or None."""
    from torch import nn

    if isinstance(module, nn.Linear):
        sizes = {"in_features": module.in_features, "out_features": module.out_features}
        return layer_with(Dense, _weights(module), **sizes, bias=module.bias is not None)
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        sizes = {"num_embeddings": module.num_embeddings, "embedding_dim": module.embedding_dim}
        return layer_with(Embedding, _weights(module), **sizes)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and module.elementwise_affine:
        (units,) = module.normalized_shape
        bias = module.bias is not None
        return layer_with(LayerNorm, _weights(module), normalized_shape=units, eps=module.eps, bias=bias)
    if isinstance(module, (nn.Dropout, nn.Identity)):
        return Dropout(getattr(module, "p", 0.0))
    return None


def _activation(module: Any) -> Activation | None:
    from torch import nn

    plain = {
        nn.ReLU: "relu",
        nn.Tanh: "tanh",
        nn.Sigmoid: "sigmoid",
        nn.Hardsigmoid: "hard_sigmoid",
        nn.SELU: "selu",
        nn.SiLU: "silu",
        nn.Softsign: "softsign",
    }
    for kind, name in plain.items():
        if isinstance(module, kind):
            return Activation(name)
    if isinstance(module, nn.ELU):
        return Activation("elu", module.alpha)
    if isinstance(module, nn.LeakyReLU):
        return Activation("leaky_relu", module.negative_slope)
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return Activation("gelu")
    # Above its threshold PyTorch's softplus is x: from 20 on that differs by at most 2e-9.
    if isinstance(module, nn.Softplus) and module.beta == 1 and module.threshold >= 20:
        return Activation("softplus")
    if isinstance(module, nn.Softmax) and module.dim == -1:
        return Activation("softmax")
    return None


def _weights(module: Any, names: Iterable[str] = ("weight", "bias")) -> dict[str, Array]:
    """Those of these weights that a module has, also where a parametrization makes them."""
    tensors = {name: getattr(module, name, None) for name in names}
    arrays = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.device.type != "cpu":
            raise ValueError(f"module: expected weights on the CPU, got {name} on {tensor.device}")
        if kind not in ("float32", "float64"):
            raise ValueError(
                f"module: expected weights of float32 or of float64, got {kind}; module.float() converts them"
            )
        arrays[name] = tensor.detach().numpy().copy()
    return arrays
