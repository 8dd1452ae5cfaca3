"""Recurrent layers from weights under PyTorch's names: which of them belong together, and what layer they are of."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from gatewise.arguments.arrays import Array
from gatewise.formats.errors import at
from gatewise.formats.pytorch.checkpoints import DTYPES, Checkpoint, described, size_of
from gatewise.formats.pytorch.pickles import Tensor
from gatewise.formats.weights import layer_with
from gatewise.layers.layer import Layer
from gatewise.layers.recurrent import GRU, LSTM, RNN

WEIGHT = re.compile(r"^(.*?)((?:weight|bias)_(?:ih|hh|hr))(_l(\d+)(_reverse)?)?$")
KINDS_BY_GATES: dict[int, type[Layer]] = {4: LSTM, 3: GRU, 1: RNN}
MAX_GROWTH = 8  # of weights, times the file: half precision widens them twofold, and some are used two or three times
MAX_DEPTH = 4  # of dicts inside each other that are looked into


def read_weights(checkpoint: Checkpoint, prefix: str | None) -> dict[str, Array]:
    """The weights of one recurrent layer in a file, by the layer's names; no other numbers are read."""
    max_bytes = MAX_GROWTH * checkpoint.size
    tensors = _state_dict(checkpoint.root, max_bytes)
    names = pick_layer(tensors, prefix)
    size = sum(size_of(tensors[name]) for name in names.values())
    if size > max_bytes:
        raise ValueError(
            f"expected weights of at most {MAX_GROWTH} times the file's size, got {size} bytes: views that repeat "
            "their numbers"
        )
    weights = {}
    for layer_name, name in names.items():
        with at(name):
            weights[layer_name] = checkpoint.numbers(tensors[name])
    return weights


def pick_layer(names: Collection[str], prefix: str | None) -> dict[str, str]:
    """The names in a file of the weights of one recurrent layer, by the names that the layer has for them."""
    layers = _group_by_prefix(names)
    if prefix is not None and prefix not in layers:
        prefix = f"{prefix}." if f"{prefix}." in layers else prefix
    if prefix is None and len(layers) == 1 and len(next(iter(layers.values()))) == len(names):
        (prefix,) = layers
    if prefix is None or prefix not in layers:
        expected = "only the weights of one recurrent layer" if prefix is None else f"weights of prefix {prefix!r}"
        prefixes = f"layers of prefix {', '.join(map(repr, sorted(layers)))}" if layers else "no recurrent layer"
        others = len(names) - sum(map(len, layers.values()))
        raise ValueError(f"expected {expected}, got {prefixes} and {others} other arrays; prefix= picks a layer")
    return layers[prefix]


def build_layer(weights: Mapping[str, Array], nonlinearity: str | None, batch_first: bool) -> Layer:
    """The layer that has these weights. Only what they do not tell is asked for."""
    first, second = weights.get("weight_ih_l0"), weights.get("weight_hh_l0")
    if first is None or second is None or first.ndim != 2 or second.ndim != 2 or 0 in (*first.shape, *second.shape):
        raise ValueError("expected weight_ih_l0 and weight_hh_l0 of two axes")
    projection = weights.get("weight_hr_l0")
    hidden = second.shape[1] if projection is None or projection.ndim != 2 else projection.shape[1]
    kind = KINDS_BY_GATES.get(second.shape[0] // hidden) if second.shape[0] % hidden == 0 else None
    if kind is None:
        raise ValueError(f"weight_hh_l0: expected 4, 3 or 1 times {hidden} rows, got {second.shape[0]}")
    options: dict[str, Any] = {
        "num_layers": sum(name.startswith("weight_ih_l") and not name.endswith("_reverse") for name in weights),
        "bias": "bias_ih_l0" in weights,
        "bidirectional": "weight_ih_l0_reverse" in weights,
        "batch_first": batch_first,
    }
    if kind is RNN:
        if nonlinearity is None:
            raise ValueError("expected nonlinearity='tanh' or 'relu', which the weights of an RNN do not tell")
        options["nonlinearity"] = nonlinearity
    if kind is LSTM and projection is not None:
        options["proj_size"] = projection.shape[0]
    layer: Layer = layer_with(kind, weights, input_size=first.shape[1], hidden_size=hidden, **options)
    return layer


def _state_dict(root: object, most: int) -> dict[str, Tensor]:
    """The tensors of what was saved: of the only dict in it that has a recurrent layer, or of all such dicts.

    Training programs keep a state_dict beside other things, as "state_dict", "model_state_dict", "model" or "net". With
    several dicts, names begin with the keys that lead to them; together these names have at most `most` characters.
    """
    if not isinstance(root, dict):
        raise ValueError(
            f"expected a state_dict, got {described(root)}; torch.save(module.state_dict(), path) writes one"
        )
    start = root["state_dict"] if isinstance(root.get("state_dict"), dict) else root
    tensors = {path: _tensors(members) for path, members in _nested_dicts(start)}
    with_layers = [path for path, members in tensors.items() if any(map(WEIGHT.match, members))]
    with_tensors = [path for path, members in tensors.items() if members]
    if not with_tensors:
        raise ValueError(f"expected a state_dict, got a dict without tensors of {', '.join(sorted(DTYPES))}")
    paths = with_layers or with_tensors
    if len(paths) == 1:
        return tensors[paths[0]]
    if sum(len(".".join(path)) * len(tensors[path]) for path in paths) > most:
        raise ValueError("expected a state_dict, got tensors in dicts of far longer names")
    return {".".join((*path, name)): tensors[path][name] for path in paths for name in tensors[path]}


def _tensors(members: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of floating numbers, and those of other kinds that have the name of a weight."""
    return {
        name: value
        for name, value in members.items()
        if isinstance(value, Tensor) and (value.kind in DTYPES or WEIGHT.match(name))
    }


def _nested_dicts(root: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """A dict and those in it, each once, with the keys that lead there."""
    seen = {id(root)}
    level: list[tuple[tuple[str, ...], dict[str, Any]]] = [((), root)]
    for _ in range(MAX_DEPTH):
        next_level = []
        for path, members in level:
            yield path, members
            for key, value in members.items():
                if isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    next_level.append(((*path, key), value))
        level = next_level


def _group_by_prefix(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each prefix, the names of a recurrent layer's weights; those of a cell count as a layer's ..._l0."""
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        match = WEIGHT.match(name)
        if match:
            layers.setdefault(match[1], {})[match[2] + (match[3] or "_l0")] = name
    return layers
