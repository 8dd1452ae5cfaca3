"""Models as plain data, and back: each layer is a dict of its kind and options, without its weights."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gatewise.arguments.arrays import flag, whole_number
from gatewise.formats import json_text
from gatewise.formats.errors import at
from gatewise.formats.safetensors.tensors import METADATA, NAMES, Source
from gatewise.layers.activation import Activation
from gatewise.layers.layer import Layer
from gatewise.layers.normalization import BatchNorm, LayerNorm, Normalization
from gatewise.layers.products import Conv1D, Dense, Embedding
from gatewise.layers.recurrent import GRU, LSTM, RNN
from gatewise.layers.sequential import Sequential
from gatewise.layers.structure import Bidirectional, Dropout, Last, Masking, Reverse, TimeDistributed
from gatewise.weights.module import Module

VERSION = "1"
MAX_NESTED = 8  # layers inside each other; an Activation in a Dense in a TimeDistributed is the third
_LAYERS: tuple[type[Module], ...] = (
    LSTM,
    GRU,
    RNN,
    Activation,
    BatchNorm,
    Bidirectional,
    Conv1D,
    Dense,
    Dropout,
    Embedding,
    Last,
    LayerNorm,
    Masking,
    Normalization,
    Reverse,
    TimeDistributed,
)
KINDS = {kind.__name__: kind for kind in _LAYERS}
# Options that did not exist when the first files were written, and the value that those files mean.
GATED_LATER: dict[str, Any] = {"activation": "tanh", "recurrent_activation": "sigmoid", "clip": None}
LATER: dict[str, dict[str, Any]] = {
    "LSTM": GATED_LATER | {"output_activation": None, "peepholes": False},
    "GRU": GATED_LATER | {"reset_after": True},
    "RNN": {"clip": None},
    "Activation": {"beta": None},
    "Embedding": {"mask_zero": False},
}
# The options in a description of each kind. The seed belongs only to recurrent layers, which also draw dropout with it;
# elsewhere it only drew the first weights, and those are in the file.
OPTIONS = {
    name: {*inspect.signature(kind).parameters} - {"seed"}
    | ({"seed", "call_count"} if issubclass(kind, Layer) else set())
    for name, kind in KINDS.items()
}


def metadata_of(model: object) -> dict[str, str]:
    """What a file says of a model: the version of this format, and the description as JSON."""
    return {"gatewise": VERSION, "model": json.dumps(_describe(model))}


def is_described(header: Mapping[str, Any]) -> bool | None:
    """Whether gatewise wrote a file with this header; None where the metadata is not sound."""
    metadata = header.get(METADATA, {})
    return "gatewise" in metadata if isinstance(metadata, dict) else None


def description_in(header: Mapping[str, Any]) -> Any:
    """The description of a model in the header of a file."""
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA}: expected names and texts")
    if "gatewise" not in metadata:
        raise ValueError("expected 'gatewise' in the metadata, got a file of another program")
    if metadata["gatewise"] != VERSION:
        raise ValueError(f"expected format version {VERSION}, got {metadata['gatewise']!r}")
    if "model" not in metadata:
        raise ValueError("expected 'model' in the metadata")
    return json_text.parse(metadata["model"].encode(), is_strict=True)


# ---- from models to descriptions


def _describe(model: object) -> dict[str, Any]:
    if type(model) is not Sequential:
        return _describe_layer(model)
    layers = []
    for i, layer in enumerate(model):
        with at(f"layers[{i}]"):
            layers.append(_describe_layer(layer))
    return {"kind": "Sequential", "batch_first": model.batch_first, "layers": layers}


def _describe_layer(layer: object, depth: int = 1) -> dict[str, Any]:
    kind = type(layer).__name__
    if not isinstance(layer, Module) or type(layer) is not KINDS.get(kind):
        raise TypeError(f"expected a Sequential or a layer of gatewise itself, got {type(layer).__qualname__}")
    _check_depth(depth)
    description: dict[str, Any] = {"kind": kind}
    later = LATER.get(kind, {})
    for name, value in layer._options().items():
        if name in later and value == later[name]:
            continue
        with at(name):
            description[name] = _describe_layer(value, depth + 1) if isinstance(value, Module) else value
    return description | ({"call_count": layer.call_count} if isinstance(layer, Layer) else {})


# ---- from descriptions to models


def build(description: Any, source: Source) -> Module | Sequential:
    """Make the described model or layer, which must need exactly the weights of the source."""
    is_model = _kind(description, ("Sequential", *KINDS)) == "Sequential"
    model = _build_model(description, source) if is_model else _build_layer(description, source)
    source.check_empty()
    return model


def _build_model(description: Mapping[str, Any], source: Source) -> Sequential:
    _check_names(description, {"kind", "batch_first", "layers"})
    batch_first = flag("batch_first", description["batch_first"])  # Sequential also takes None, which no file means
    if not isinstance(description["layers"], list):
        raise TypeError(f"layers: expected a list, got {type(description['layers']).__name__}")
    layers = []
    tensors = source.split(len(description["layers"]))
    for i, layer in enumerate(description["layers"]):
        layer_source = replace(source, tensors=tensors.get(str(i), {}))
        with at(f"layers[{i}]"):
            layers.append(_build_layer(layer, layer_source))
            layer_source.check_empty()
    return Sequential(layers, batch_first=batch_first)


def _build_layer(description: Any, source: Source, depth: int = 1) -> Module:
    kind = _kind(description, (*KINDS,))
    _check_names(description, {"kind", *OPTIONS[kind]} - (LATER.get(kind, {}).keys() - description.keys()))
    _check_depth(depth)
    options: dict[str, Any] = {}
    for name, value in description.items():
        with at(name):
            options[name] = _build_layer(value, source, depth + 1) if isinstance(value, dict) else value
    if options.get("dtype", "float32") not in (*NAMES,):
        raise ValueError(f"dtype: expected float32 or float64, got {options['dtype']!r}")
    if issubclass(KINDS[kind], Layer):
        whole_number("seed", options["seed"], 0, 2**64 - 1)  # a layer also takes None, which no file means
        # Each layer has a tensor at least. Without this check the names of missing ones could fill the memory.
        whole_number("num_layers", options["num_layers"], 1, len(source.tensors))
    del options["kind"]
    call_count = options.pop("call_count", None)
    layer = KINDS[kind]._from(source, options)
    if isinstance(layer, Layer):
        layer.call_count = call_count
    return layer


def _kind(description: Any, kinds: tuple[str, ...]) -> str:
    if not isinstance(description, dict) or description.get("kind") not in kinds:
        raise ValueError(f"expected a kind of {', '.join(kinds)}")
    return str(description["kind"])


def _check_names(description: Mapping[str, Any], expected: set[str]) -> None:
    if description.keys() != expected:
        raise ValueError(f"expected {', '.join(sorted(expected))}, got {', '.join(sorted(description))}")


def _check_depth(depth: int) -> None:
    if depth > MAX_NESTED:
        raise ValueError(f"expected at most {MAX_NESTED} layers inside each other, got more")
