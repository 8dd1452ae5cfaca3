"""The layers of a model of Keras in the order in which data meets them: a Sequential, or a graph that is one path."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gatewise.formats.keras.config import Entry, LayerConfig, single

MODELS = {"Sequential", "Functional", "Model"}
MAX_NESTING = 32  # of models inside each other


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: the configuration of its layers."""

    entry: Entry
    version: str | None  # of Keras

    @classmethod
    def of(cls, value: Any, version: str | None) -> ModelConfig:
        if isinstance(value, list):
            value = {"class_name": "Sequential", "config": {"layers": value}}
        elif isinstance(value, Mapping) and "class_name" not in value:  # of get_config()
            kind = "Functional" if "output_layers" in value else "Sequential"
            value = {"class_name": kind, "config": value, "keras_version": value.get("keras_version")}
        entry = Entry.of(value, "the model")
        if entry.kind not in MODELS:
            raise ValueError(f"the model: expected {' or '.join(sorted(MODELS))}, got {entry.kind!r}")
        return cls(entry, version or version_in(value))

    @property
    def is_modern(self) -> bool | None:
        """Whether Keras 3 wrote the model, by its version or by options that only one of them uses; None: not known."""
        if self.version is not None:
            return not self.version.startswith(("0.", "1.", "2."))
        configs = [self.entry.config, *(entry.config for entry in _entries(self.entry))]
        if any("batch_shape" in config or _class_name(config.get("dtype")) == "DTypePolicy" for config in configs):
            return True
        return False if any("batch_input_shape" in config for config in configs) else None

    def layers(self) -> list[LayerConfig]:
        """All its layers, also those of models inside it, in the order in which data meets them."""
        outer = LayerConfig("", self.entry.kind, {}, is_modern=self.is_modern)
        return [layer for _, layer in sorted(_flatten(self.entry, outer, 0), key=lambda pair: pair[0])]


def version_in(value: object) -> str | None:
    """The version of Keras that a file names."""
    version = value.get("keras_version") if isinstance(value, Mapping) else None
    return version if isinstance(version, str) else None


def _class_name(value: object) -> object:
    return value.get("class_name") if isinstance(value, Mapping) else None


def _entries(model: Entry) -> list[Entry]:
    """The layers of a model in the order in which the file has them."""
    layers = model.config.get("layers")
    if not isinstance(layers, list):
        raise ValueError(f"{model.kind} {model.name!r}: layers: expected a list, got {layers!r}")
    return [Entry.of(layer, f"{model.kind} {model.name!r}: layers[{i}]") for i, layer in enumerate(layers)]


def _flatten(model: Entry, outer: LayerConfig, depth: int) -> Iterator[tuple[tuple[int, ...], LayerConfig]]:
    """Every layer of a model, in the order of the file, with its place in the path: one number for each level."""
    if depth > MAX_NESTING:
        raise ValueError(f"expected models nested {MAX_NESTING} deep at most")
    entries = _entries(model)
    masks = mask_operations(entries)
    entries = [entry for entry in entries if entry.name not in masks]
    places = _places_in_path(model, entries, masks)
    groups = group_names([entry.kind for entry in entries])
    for i, (entry, group) in enumerate(zip(entries, groups, strict=True)):
        layer = replace(
            outer,
            name=entry.name,
            kind=entry.kind,
            config=entry.config,
            group=f"{outer.group}layers/{group}",
            owner=outer.owner if depth else i,
            trains=outer.trains and entry.config.get("trainable") is not False,
            takes_mask=_mask_source(entry) is not None,
        )
        if entry.kind not in MODELS:
            yield (places[i],), layer
            continue
        inner = replace(layer, group=layer.group + "/")
        for place, inner_layer in _flatten(entry, inner, depth + 1):
            yield (places[i], *place), inner_layer


def group_names(kinds: Sequence[str]) -> list[str]:
    """The groups of layers of these classes in files of Keras 3: lstm, lstm_1, time_distributed, ..."""
    counts: dict[str, int] = {}
    names = []
    for kind in kinds:
        words = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", kind))
        name = re.sub("([a-z])([A-Z])", r"\1_\2", words).lower()
        count = counts.get(name, 0)
        counts[name] = count + 1
        names.append(f"{name}_{count}" if count else name)
    return names


# ---- graphs


def mask_operations(entries: Sequence[Entry]) -> set[str]:
    """The operations of a graph of Keras 3 that only say again which steps a layer before them masks."""
    masks: set[str] = set()
    if not any(entry.kind == "NotEqual" for entry in entries):
        return masks
    masked = {
        (input_layer(entry), _mask_value(entry))
        for entry in entries
        if entry.kind == "Masking" or entry.config.get("mask_zero") is True
    }
    for entry in entries:  # each comes after what it reads
        if entry.kind == "NotEqual":
            tensor, value, *_ = [*_arguments(entry), None, None]
            if isinstance(value, (int, float)) and (_source_layer(tensor), value) in masked:
                masks.add(entry.name)
        elif entry.kind == "Any" and input_layer(entry) in masks and single(entry.config.get("axis")) == -1:
            masks.add(entry.name)
    return masks


def _mask_value(entry: Entry) -> float | None:
    """The input value that marks a step as masked for this layer; None if it is not a number."""
    value = entry.config.get("mask_value", 0)
    return value if isinstance(value, (int, float)) else None


def _places_in_path(model: Entry, entries: Sequence[Entry], masks: set[str]) -> list[int]:
    """The place of each layer in the only path from the input to the output."""
    if model.kind == "Sequential":
        return list(range(len(entries)))
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError(f"{model.kind} {model.name!r}: expected a name for each layer, got {names}")
    next_layers = {input_layer(entry, masks): entry.name for entry in entries if entry.kind != "InputLayer"}
    path = [_only_tensor(model, "input_layers")]
    while len(path) <= len(names) and path[-1] in next_layers:
        path.append(next_layers[path[-1]])
    if sorted(path) != sorted(names) or path[-1] != _only_tensor(model, "output_layers"):
        raise ValueError(f"{model.kind} {model.name!r}: expected one path from its input to its output, got branches")
    places = {name: place for place, name in enumerate(path)}
    return [places[name] for name in names]


def _only_tensor(model: Entry, option: str) -> str:
    """The layer of the only input or output of a model."""
    value = model.config.get(option)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str) or value[2] != 0:
        raise ValueError(f"{model.kind} {model.name!r}: {option}: expected one, got {value!r}")
    return value[0]


def input_layer(entry: Entry, masks: Container[str] = ()) -> str:
    """The layer whose output is the only input of this one; its mask may come from an operation of `masks`."""
    layer = LayerConfig(entry.name, entry.kind, entry.config)
    node = entry.nodes
    while isinstance(node, list) and len(node) == 1 and isinstance(node[0], (list, Mapping)):
        node = node[0]
    if isinstance(node, Mapping):  # Keras 3
        tensors, options = _arguments(entry), node.get("kwargs")
        source = _source_layer(tensors[0]) if len(tensors) == 1 else None
        node = None if source is None else [source, 0, 0]
    else:  # [layer, node, tensor, options] of Keras 2
        options = node[3] if isinstance(node, list) and len(node) == 4 else {}
        node = node[:3] if isinstance(node, list) and len(node) in (3, 4) else None
    if not isinstance(node, list) or len(node) != 3 or not isinstance(node[0], str) or node[2] != 0:
        raise layer.refusal("expected one call with one input, the only output of another layer")
    for name, value in options.items() if isinstance(options, Mapping) else [("options", options)]:
        is_known = (name == "training" and value is False) or (name == "mask" and _source_layer(value) in masks)
        if value is not None and not is_known:
            raise layer.error(name, "None in its call", value)
    return node[0]


def _call(entry: Entry) -> Mapping[str, Any]:
    """The only call of a layer in a graph of Keras 3; empty where there is none, or several."""
    node: Any = entry.nodes[0] if isinstance(entry.nodes, list) and len(entry.nodes) == 1 else None
    return node if isinstance(node, Mapping) else {}


def _arguments(entry: Entry) -> list[Any]:
    arguments = _call(entry).get("args")
    return arguments if isinstance(arguments, list) else []


def _mask_source(entry: Entry) -> str | None:
    """The operation that makes the mask in the call of a layer of Keras 3."""
    options = _call(entry).get("kwargs")
    return _source_layer(options.get("mask")) if isinstance(options, Mapping) else None


def _source_layer(tensor: object) -> str | None:
    """The layer whose only output a tensor is."""
    config = tensor.get("config") if isinstance(tensor, Mapping) else None
    history = config.get("keras_history") if isinstance(config, Mapping) else None
    if not isinstance(history, list) or len(history) != 3 or not isinstance(history[0], str) or history[2] != 0:
        return None
    return history[0]
