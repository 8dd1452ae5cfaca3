"""Trained models of Keras 2 and 3, read without Keras: what their files say, never what a program in them would do."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gatewise.arguments.arrays import MAX_SIZE, Array
from gatewise.formats import json_text
from gatewise.formats.errors import at, reading
from gatewise.formats.keras import hdf5
from gatewise.layers.activation import Activation
from gatewise.layers.blocks import (
    MERGES,
    BatchNorm,
    Bidirectional,
    Conv1D,
    Dense,
    Embedding,
    Last,
    LayerNorm,
    Masking,
    Normalization,
    Reverse,
)
from gatewise.layers.recurrent import GRU, LSTM, RNN, Layer
from gatewise.layers.sequential import Sequential
from gatewise.weights.functions import Function
from gatewise.weights.module import Module

# Of a zip archive's members: times the archive's size, since weights hardly compress, or this many bytes.
MOST_GROWTH = 16
FREE_GROWTH = 2**20
MOST_CONFIG = 2**22  # bytes of JSON: some thousand layers, whatever the size of the file around it
MOST_NESTING = 32  # of models in models
MOST_REPEATED = 2**20  # numbers that are made of one in a configuration, and of which the file holds nothing else

# Names of files, and of groups in them.
CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
OLD_LAYERS = "_layer_checkpoint_dependencies"  # what Keras 2.12 to 2.15 called the group "layers"


def load(path: str | os.PathLike[str], config: object = None) -> Sequential:
    """A trained model from a file that Keras wrote, for inference. Neither Keras nor TensorFlow is needed.

    Parameters
    ----------
    path : str or path-like
        A model: .keras, or .h5 as Keras 2 and 3 write it; or weights alone: .weights.h5, or .h5 of Keras 2.
    config : dict, list or str or path-like, optional
        With weights alone, what the model is: `model.get_config()`, `model.to_json()`, or a file that holds the latter.

    Returns
    -------
    Sequential
        With batch_first=True, as Keras has it.

    Raises
    ------
    FormatError
        Whatever is wrong with the file, or is no layer or option of gatewise. A file that cannot be opened is an
        OSError.
    """
    with open(path, "rb") as file, reading(path):
        size = os.fstat(file.fileno()).st_size
        head = file.read(len(hdf5.SIGNATURE))
        file.seek(0)
        if head.startswith(b"PK"):
            return _from_archive(file, size, config)
        if head != hdf5.SIGNATURE:
            raise ValueError("expected a zip archive (.keras) or an HDF5 file (.h5), got neither")
        return _from_store(hdf5.Store(file.read()), config)


# ---- the files


def _from_archive(file: BinaryIO, size: int, config: object) -> Sequential:
    if config is not None:
        raise ValueError("config: expected none, since the file has its own")
    members = _members(file, size)
    model = _Model.of(_parsed(CONFIG, members[CONFIG]), None)
    if METADATA in members:
        model = replace(model, version=_version(_parsed(METADATA, members[METADATA])))
    store = hdf5.Store(members[WEIGHTS])
    return _build(model, _Weights(store, _by_kind(store, model.layers())))


def _from_store(store: hdf5.Store, config: object) -> Sequential:
    written = store.text("", "model_config")
    if written is not None and config is not None:
        raise ValueError("config: expected none, since the file has its own")
    if written is None and config is None:
        raise ValueError("config: expected model.to_json() or model.get_config(), since the file has only weights")
    described = _given(config) if written is None else _parsed("model_config", written)
    root = "model_weights/" if store.has("model_weights") else ""
    is_legacy = store.texts(root.rstrip("/"), "layer_names") is not None
    version = store.text(root.rstrip("/"), "keras_version") if is_legacy else None
    model = _Model.of(described, version)
    places = _by_order(store, root, model.layers()) if is_legacy else _by_kind(store, model.layers())
    return _build(model, _Weights(store, places))


def _members(file: BinaryIO, size: int) -> dict[str, bytes]:
    """The files of an archive, by name, in memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = [one for one in archive.infolist() if one.filename in (CONFIG, METADATA, WEIGHTS)]
            names = [one.filename for one in found]
            if len(set(names)) != len(names) or not {CONFIG, WEIGHTS} <= set(names):
                raise ValueError(f"expected one {CONFIG} and one {WEIGHTS} in the archive, got {names}")
            for one in found:
                if one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{one.filename}: expected it stored or deflated, got {one.compress_type}")
                if one.filename != WEIGHTS and one.file_size > MOST_CONFIG:
                    raise ValueError(f"{one.filename}: expected at most {MOST_CONFIG} bytes, got {one.file_size}")
            most = max(MOST_GROWTH * size, FREE_GROWTH)
            if sum(one.file_size for one in found) > most:
                raise ValueError(f"expected members of {most} bytes together at most, got more")
            return {one.filename: _member(archive, one) for one in found}
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # of many kinds: zlib's, struct's, zipfile's own
        raise ValueError(f"expected a sound zip archive, got {type(error).__name__}: {error}") from None


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member, of which no more are unpacked than it says that it has."""
    with archive.open(member) as file:
        data = file.read(member.file_size)  # read() would unpack whatever there is, and cut it afterwards
    if len(data) != member.file_size:
        raise ValueError(f"{member.filename}: expected {member.file_size} bytes, got {len(data)}")
    return data


def _given(config: object) -> Any:
    """What the user gave as the model's configuration."""
    if isinstance(config, (Mapping, list)):
        try:
            return json.loads(json.dumps(config))  # with lists for tuples, as in a file
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"config: expected what JSON can say: {error}") from None
    if isinstance(config, str) and config.lstrip()[:1] in ("{", "["):
        return _parsed("config", config)
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(f"config: expected a dict, JSON or the path of a JSON file, got {type(config).__name__}")
    with open(config, "rb") as file:
        return _parsed(f"config: {os.fsdecode(config)}", file.read(MOST_CONFIG + 1))


def _parsed(name: str, text: str | bytes) -> Any:
    data = text.encode() if isinstance(text, str) else text
    with at(name):
        if len(data) > MOST_CONFIG:
            raise ValueError(f"expected JSON of at most {MOST_CONFIG} bytes, got {len(data)}")
        return json_text.parse(data)


def _kind_of(value: object) -> object:
    return value.get("class_name") if isinstance(value, Mapping) else None


def _version(description: object) -> str | None:
    found = description.get("keras_version") if isinstance(description, Mapping) else None
    return found if isinstance(found, str) else None


# ---- what a model is made of


@dataclass(frozen=True)
class _Layer:
    """A layer of the model as its configuration has it."""

    name: str
    kind: str  # its class
    config: Mapping[str, Any]
    group: str = ""  # of its weights in files of Keras 3
    owner: int = 0  # the layer of the whole model that it is part of, which old files list weights by
    trains: bool = True
    is_modern: bool | None = True  # of Keras 3; None: nobody knows
    takes_mask: bool = False  # in its call, as graphs of Keras 3 say

    def error(self, option: str, expected: str, found: object) -> ValueError:
        return ValueError(f"layer {self.name!r} ({self.kind}): {option}: expected {expected}, got {found!r}")

    def refusal(self, reason: str) -> ValueError:
        return ValueError(f"layer {self.name!r} ({self.kind}): {reason}")

    def expect(self, option: str, *allowed: object, default: object = None) -> Any:
        """One of some values of an option."""
        value = self.config.get(option, default)
        for one in allowed:
            if type(value) is type(one) and value == one:
                return value
        raise self.error(option, " or ".join(map(repr, allowed)), value)

    def flag(self, option: str, default: bool) -> bool:
        return bool(self.expect(option, True, False, default=default))

    def refuse(self, *options: str) -> None:
        """Options that must be off."""
        for option in options:
            self.expect(option, False, None)

    def size(self, option: str) -> int:
        return self.whole(option, _single(self.config.get(option)))

    def whole(self, option: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise self.error(option, f"a whole number from 1 to {MAX_SIZE}", value)
        return value

    def number(self, option: str, default: float) -> float:
        value = self.config.get(option, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e30:
            raise self.error(option, "a number", value)
        return float(value)

    def axis(self, rank: int | None) -> None:
        """The last axis is the only one that a row knows."""
        value = _single(self.config.get("axis", -1))
        if value != -1 and (rank is None or value != rank - 1):
            raise self.error("axis", "-1", self.config.get("axis"))

    def inner(self, option: str) -> _Layer:
        """A layer that is an option of this one."""
        entry = _Entry.of(self.config.get(option), f"layer {self.name!r} ({self.kind}): {option}")
        inner = replace(self, name=entry.name or self.name, kind=entry.kind, config=entry.config)
        inner.check_options()
        return inner

    def check_options(self) -> None:
        """Refuse options that this module does not know, as of a later version of Keras, unless they are off."""
        known = OPTIONS.get(self.kind)
        if known is None:  # the class is not known, either
            return
        for option, value in self.config.items():
            if option not in known and value not in (None, False) and not option.endswith(ONLY_TRAINING):
                raise self.error(option, "an option that gatewise knows, or None", value)


def _single(value: object) -> Any:
    """The member of a list of one, which Keras writes for one dimension."""
    values = _listed(value)
    return values[0] if values is not None and len(values) == 1 else value


def _listed(value: object) -> Sequence[Any] | None:
    """A list, or a tuple as some versions write it."""
    if isinstance(value, Mapping) and value.get("class_name") == "__tuple__":
        value = value.get("items")
    return value if isinstance(value, (list, tuple)) else None


class _Entry(NamedTuple):
    """A serialised object: its class, its options, and its place in a graph."""

    name: str
    kind: str
    config: Mapping[str, Any]
    nodes: Any

    @classmethod
    def of(cls, found: object, where: str) -> _Entry:
        if not isinstance(found, Mapping) or not isinstance(found.get("class_name"), str):
            raise ValueError(f"{where}: expected a class and its config, got {found!r}")
        kind, config = found["class_name"], found.get("config")
        if isinstance(config, list):  # a Sequential of Keras 2 before 2.3
            config = {"layers": config}
        if not isinstance(config, Mapping):
            raise ValueError(f"{where}: {kind}: expected a config, got {config!r}")
        name = config.get("name", found.get("name", ""))
        if not isinstance(name, str) or max(len(name), len(kind)) > hdf5.MOST_NAME:  # errors and paths repeat them
            raise ValueError(f"{where}: {kind[:100]}: expected a name of at most {hdf5.MOST_NAME} characters")
        # A class of somebody else may have the name of one of Keras's.
        module = found.get("module", "keras")
        if not isinstance(module, str) or module.split(".")[0] not in ("keras", "tf_keras"):
            raise ValueError(f"layer {name!r} ({kind}): expected a class of Keras, got one of {module!r}")
        return cls(name, kind, config, found.get("inbound_nodes"))


@dataclass(frozen=True)
class _Model:
    """A whole model: the configuration of its layers."""

    entry: _Entry
    version: str | None

    @classmethod
    def of(cls, found: Any, version: str | None) -> _Model:
        if isinstance(found, list):
            found = {"class_name": "Sequential", "config": {"layers": found}}
        elif isinstance(found, Mapping) and "class_name" not in found:  # get_config()
            kind = "Functional" if "output_layers" in found else "Sequential"
            found = {"class_name": kind, "config": found, "keras_version": found.get("keras_version")}
        entry = _Entry.of(found, "the model")
        if entry.kind not in MODELS:
            raise ValueError(f"the model: expected {' or '.join(sorted(MODELS))}, got {entry.kind!r}")
        return cls(entry, version or _version(found))

    @property
    def is_modern(self) -> bool | None:
        """Whether Keras 3 wrote it. Without a version, what only one of them calls so tells, or nothing: None."""
        if self.version is not None:
            return not self.version.startswith(("0.", "1.", "2."))
        configs = [self.entry.config, *(entry.config for entry in _entries(self.entry))]
        if any("batch_shape" in one or _kind_of(one.get("dtype")) == "DTypePolicy" for one in configs):
            return True
        return False if any("batch_input_shape" in one for one in configs) else None

    def layers(self) -> list[_Layer]:
        """Its layers, those of models in it among them, in the order in which data meets them."""
        whole = _Layer("", self.entry.kind, {}, is_modern=self.is_modern)
        return [one for _, one in sorted(_flat(self.entry, whole, 0), key=lambda pair: pair[0])]


def _entries(entry: _Entry) -> list[_Entry]:
    """The layers of a model in the order in which Keras keeps them."""
    layers = entry.config.get("layers")
    if not isinstance(layers, list):
        raise ValueError(f"{entry.kind} {entry.name!r}: layers: expected a list, got {layers!r}")
    return [_Entry.of(one, f"{entry.kind} {entry.name!r}: layers[{i}]") for i, one in enumerate(layers)]


def _flat(model: _Entry, outer: _Layer, depth: int) -> Iterator[tuple[tuple[int, ...], _Layer]]:
    """Every layer of a model with its place in the chain, in the order in which Keras keeps them."""
    if depth > MOST_NESTING:
        raise ValueError(f"expected models nested {MOST_NESTING} deep at most")
    entries = _entries(model)
    masks = _masks(entries)
    entries = [entry for entry in entries if entry.name not in masks]
    order = _chain(model, entries, masks)
    groups = _groups([entry.kind for entry in entries])
    for i, (entry, group) in enumerate(zip(entries, groups, strict=True)):
        layer = replace(
            outer, name=entry.name, kind=entry.kind, config=entry.config, group=f"{outer.group}layers/{group}",
            owner=outer.owner if depth else i, trains=outer.trains and entry.config.get("trainable") is not False,
            takes_mask=_mask_of(entry) is not None,
        )  # fmt: skip
        if entry.kind not in MODELS:
            yield (order[i],), layer
            continue
        inside = replace(layer, group=layer.group + "/")
        for place, one in _flat(entry, inside, depth + 1):
            yield (order[i], *place), one


def _groups(kinds: Sequence[str]) -> list[str]:
    """The groups of layers in files of Keras 3: their classes, numbered."""
    counts: dict[str, int] = {}
    names = []
    for kind in kinds:
        name = re.sub(
            "([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", kind))
        ).lower()
        count = counts.get(name, 0)
        counts[name] = count + 1
        names.append(f"{name}_{count}" if count else name)
    return names


def _masks(entries: Sequence[_Entry]) -> set[str]:
    """The operations of a graph of Keras 3 that say which steps are masked, where a layer before says the same."""
    masks: set[str] = set()
    if not any(entry.kind == "NotEqual" for entry in entries):
        return masks
    makers = {
        (_source(entry), _mask_value(entry))
        for entry in entries
        if entry.kind == "Masking" or entry.config.get("mask_zero") is True
    }
    for entry in entries:  # each behind what it reads
        if entry.kind == "NotEqual":
            tensor, value, *_ = [*_arguments(entry), None, None]
            if isinstance(value, (int, float)) and (_history(tensor), value) in makers:
                masks.add(entry.name)
        elif entry.kind == "Any" and _source(entry) in masks and _single(entry.config.get("axis")) == -1:
            masks.add(entry.name)
    return masks


def _mask_value(entry: _Entry) -> float | None:
    """What a layer that masks looks for, if it is a number."""
    value = entry.config.get("mask_value", 0)
    return value if isinstance(value, (int, float)) else None


def _chain(model: _Entry, entries: Sequence[_Entry], masks: set[str]) -> list[int]:
    """The place of each layer in the one path from the input to the output."""
    if model.kind == "Sequential":
        return list(range(len(entries)))
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError(f"{model.kind} {model.name!r}: expected a name for each layer, got {names}")
    behind = {_source(entry, masks): entry.name for entry in entries if entry.kind != "InputLayer"}
    path: list[str] = _ends(model, "input_layers")
    while len(path) <= len(names) and path[-1] in behind:
        path.append(behind[path[-1]])
    if sorted(path) != sorted(names) or path[-1:] != _ends(model, "output_layers"):
        raise ValueError(f"{model.kind} {model.name!r}: expected one path from its input to its output, got branches")
    places = {name: place for place, name in enumerate(path)}
    return [places[name] for name in names]


def _ends(model: _Entry, option: str) -> list[str]:
    """The name of the one input or output of a model."""
    found = model.config.get(option)
    while isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, list) or len(found) != 3 or not isinstance(found[0], str) or found[2] != 0:
        raise ValueError(f"{model.kind} {model.name!r}: {option}: expected one, got {found!r}")
    return [found[0]]


def _source(entry: _Entry, masks: Container[str] = ()) -> str:
    """The layer whose output is the one input of this one; of `masks` another one may be its mask."""
    layer = _Layer(entry.name, entry.kind, entry.config)
    node = entry.nodes
    while isinstance(node, list) and len(node) == 1 and isinstance(node[0], (list, Mapping)):
        node = node[0]
    if isinstance(node, Mapping):  # Keras 3
        tensors, options = _arguments(entry), node.get("kwargs")
        place = _history(tensors[0]) if len(tensors) == 1 else None
        node = None if place is None else [place, 0, 0]
    else:
        options = node[3] if isinstance(node, list) and len(node) == 4 else {}
        node = node[:3] if isinstance(node, list) and len(node) in (3, 4) else None
    if not isinstance(node, list) or len(node) != 3 or not isinstance(node[0], str) or node[2] != 0:
        raise layer.refusal("expected one call with one input, the only output of another layer")
    for name, value in options.items() if isinstance(options, Mapping) else [("options", options)]:
        is_known = (name == "training" and value is False) or (name == "mask" and _history(value) in masks)
        if value is not None and not is_known:
            raise layer.error(name, "none in its call", value)
    return node[0]


def _arguments(entry: _Entry) -> list[Any]:
    """What the one call of a layer of Keras 3 is given."""
    node: Any = entry.nodes[0] if isinstance(entry.nodes, list) and len(entry.nodes) == 1 else None
    found = node.get("args") if isinstance(node, Mapping) else None
    return found if isinstance(found, list) else []


def _mask_of(entry: _Entry) -> str | None:
    """The operation that makes the mask which the call of a layer of Keras 3 is given."""
    node: Any = entry.nodes[0] if isinstance(entry.nodes, list) and len(entry.nodes) == 1 else None
    options = node.get("kwargs") if isinstance(node, Mapping) else None
    return _history(options.get("mask")) if isinstance(options, Mapping) else None


def _history(tensor: object) -> str | None:
    """The layer whose only output it is."""
    inside = tensor.get("config") if isinstance(tensor, Mapping) else None
    place = inside.get("keras_history") if isinstance(inside, Mapping) else None
    if not isinstance(place, list) or len(place) != 3 or not isinstance(place[0], str) or place[2] != 0:
        return None
    return place[0]


MODELS = {"Sequential", "Functional", "Model"}


# ---- where the weights are


class _Slot(NamedTuple):
    """A weight of a layer: how this module calls it, and where files of Keras 3 have it."""

    key: str
    path: str
    trains: bool = True


def _slots(layer: _Layer) -> list[_Slot]:
    """The weights of a layer in the order in which Keras makes them."""
    find = SLOTS.get(layer.kind)
    return find(layer) if find else []


def _own(*names: str, fixed: Sequence[str] = ()) -> list[_Slot]:
    return [_Slot(name, f"vars/{i}", name not in fixed) for i, name in enumerate((*names, *fixed))]


def _inside(prefix: str, slots: Sequence[_Slot], key: str | None = None) -> list[_Slot]:
    before = prefix if key is None else key
    return [_Slot(f"{before}/{slot.key}", f"{prefix}/{slot.path}", slot.trains) for slot in slots]


def _biased(layer: _Layer, *names: str) -> list[_Slot]:
    return _own(*names, *(("bias",) if layer.flag("use_bias", True) else ()))


def _scaled(layer: _Layer, fixed: Sequence[str] = ()) -> list[_Slot]:
    wanted = [name for name, option in (("gamma", "scale"), ("beta", "center")) if layer.flag(option, True)]
    return _own(*wanted, fixed=fixed)


def _normalization_slots(layer: _Layer) -> list[_Slot]:
    given = layer.config.get("mean") is not None
    return [] if given else _own(fixed=("mean", "variance", "count"))


def _cell_slots(layer: _Layer) -> list[_Slot]:
    names = "kernel", "recurrent_kernel"
    slots = _own(*names, "bias") if layer.kind in CUDNN else _biased(layer, *names)
    return [_Slot(slot.key, f"cell/{slot.path}") for slot in slots]


def _rnn_slots(layer: _Layer) -> list[_Slot]:
    cells = _cells(layer)
    if len(cells) == 1 and layer.inner("cell").kind != STACKED:
        return _inside("cell", _biased(cells[0], "kernel", "recurrent_kernel"), "cells/0")
    groups = _groups([cell.kind for cell in cells])
    return [
        slot
        for i, (cell, group) in enumerate(zip(cells, groups, strict=True))
        for slot in _inside(f"cell/cells/{group}", _biased(cell, "kernel", "recurrent_kernel"), f"cells/{i}")
    ]


def _bidirectional_slots(layer: _Layer) -> list[_Slot]:
    slots = _slots(_forward(layer))
    return _inside("forward_layer", slots) + _inside("backward_layer", slots)


SLOTS: dict[str, Callable[[_Layer], list[_Slot]]] = {
    "Embedding": lambda layer: _own("embeddings"),
    "Dense": lambda layer: _biased(layer, "kernel"),
    "Conv1D": lambda layer: _biased(layer, "kernel"),
    "LayerNormalization": _scaled,
    "BatchNormalization": lambda layer: _scaled(layer, ("moving_mean", "moving_variance")),
    "Normalization": _normalization_slots,
    "LSTM": _cell_slots,
    "GRU": _cell_slots,
    "SimpleRNN": _cell_slots,
    "CuDNNLSTM": _cell_slots,
    "CuDNNGRU": _cell_slots,
    "RNN": _rnn_slots,
    "Bidirectional": _bidirectional_slots,
    "TimeDistributed": lambda layer: _inside("layer", _slots(layer.inner("layer"))),
}

Places = Mapping[tuple[str, str], str]  # a layer's group and a slot's key: the path of the dataset


def _by_kind(store: hdf5.Store, layers: Sequence[_Layer]) -> Places:
    """Where files of Keras 3 have the weights."""
    _check_kinds(layers)
    root = OLD_LAYERS if store.has(OLD_LAYERS) else "layers"
    places = {
        (one.group, slot.key): f"{one.group}/{slot.path}".replace("layers/", f"{root}/")
        for one in layers
        for slot in _slots(one)
    }
    present = {path for path in store.datasets(root) if "/seed_generator/" not in path} if store.has(root) else set()
    expected = set(places.values())
    if present != expected:
        missing, surplus = sorted(expected - present)[:3], sorted(present - expected)[:3]
        raise ValueError(f"expected the weights of the model's layers, got missing {missing}, unexpected {surplus}")
    return places


def _by_order(store: hdf5.Store, root: str, layers: Sequence[_Layer]) -> Places:
    """Where files of Keras 2 have the weights: listed, layer by layer."""
    _check_kinds(layers)
    wanted: dict[int, list[tuple[_Layer, _Slot]]] = {}
    for layer in sorted(layers, key=lambda one: one.owner):
        wanted.setdefault(layer.owner, []).extend((layer, slot) for slot in _slots(layer))
    lists = [slots for slots in wanted.values() if slots]
    names = store.texts(root.rstrip("/"), "layer_names") or []
    found = [(name, store.texts(root + name, "weight_names") or []) for name in names]
    found = [(name, weights) for name, weights in found if weights]
    if len(found) != len(lists):
        raise ValueError(f"expected weights of {len(lists)} layers, got {[name for name, _ in found]}")
    places: dict[tuple[str, str], str] = {}
    for slots, (name, weights) in zip(lists, found, strict=True):
        # Those that train come first, of the whole layer and all that is in it.
        ordered = sorted(slots, key=lambda pair: not (pair[0].trains and pair[1].trains))
        expected = [slot.key.rpartition("/")[2] for _, slot in ordered]
        if [re.sub(r"(_\d+)?(:\d+)?$", "", weight.rpartition("/")[2]) for weight in weights] != expected:
            raise ValueError(f"{root}{name}: weight_names: expected {expected}, got {weights}")
        for (layer, slot), weight in zip(ordered, weights, strict=True):
            places[layer.group, slot.key] = f"{root}{name}/{weight}"
    return places


def _check_kinds(layers: Sequence[_Layer]) -> None:
    """Before anything is asked of a layer: whether it is one that this module knows."""
    for layer in layers:
        if layer.kind not in BUILDERS:
            raise layer.refusal(REFUSED.get(layer.kind, "expected a layer that gatewise has"))
        layer.check_options()


class _Weights:
    """The weights of all layers, of one dtype."""

    def __init__(self, store: hdf5.Store, places: Places) -> None:
        self._store = store
        self._places = places
        self.dtype = "float32"
        self._is_first = True

    def read(self, layer: _Layer, key: str, *shape: int | None) -> Array:
        try:
            array = self._store.array(self._places[layer.group, key], shape)
        except ValueError as error:
            raise layer.refusal(str(error)) from None
        if not self._is_first and array.dtype.name != self.dtype:
            raise layer.error("weights", f"{self.dtype}, as before them", array.dtype.name)
        self.dtype, self._is_first = array.dtype.name, False
        if _policy(layer) not in (None, self.dtype):
            raise layer.error("dtype", f"{self.dtype!r}, as its weights are", _policy(layer))
        return array


def _policy(layer: _Layer) -> object:
    """The name of the dtype that a layer computes in."""
    policy = layer.config.get("dtype")
    if not isinstance(policy, Mapping):
        return policy
    inside = policy.get("config")
    return inside.get("name") if isinstance(inside, Mapping) else policy


# ---- layers


class _Mask(Enum):
    """What has come of the steps that a layer masks."""

    NONE = "none are masked"
    PENDING = "no layer has looked at them yet"
    USED = "a recurrent layer has left them out"


class _Builder:
    """Layers as they are made, one behind the other, and what comes out of the last one."""

    def __init__(self, weights: _Weights) -> None:
        self.mask = _Mask.NONE
        self.policies: list[tuple[_Layer, object]] = []  # what each layer computes in
        self.spare = MOST_REPEATED  # numbers
        self.weights = weights
        self.layers: list[Module] = []
        self.rank: int | None = None  # axes, the batch among them, where the file tells
        self.units: int | None = None

    def add(self, layer: Module, arrays: Mapping[str, object] | None = None, units: int | None = None) -> None:
        if arrays is not None:
            layer.load_state_dict(arrays)
        self.layers.append(layer)
        self.units = self.units if units is None else units

    def read(self, layer: _Layer, key: str, *shape: int | None) -> Array:
        return self.weights.read(layer, key, *shape)

    def start(self, layer: _Layer) -> None:
        """Take note of a layer's dtype, and of the shape of the model's input."""
        self.policies.append((layer, _policy(layer)))
        shape = _listed(layer.config.get("batch_shape", layer.config.get("batch_input_shape")))
        if shape is None or self.layers or self.rank is not None:
            return
        if len(shape) not in (1, 2, 3):
            raise layer.error("batch_shape", "sequences (batch, steps, units)", list(shape))
        self.rank = len(shape)
        self.units = shape[-1] if isinstance(shape[-1], int) and shape[-1] > 0 else None

    def sequences(self, layer: _Layer) -> None:
        """Take note that a layer needs sequences."""
        if self.rank not in (None, 3):
            raise layer.refusal(f"expected sequences (batch, steps, units) before it, got {self.rank} axes")
        self.rank = 3

    def use_mask(self, layer: _Layer) -> None:
        """A recurrent layer leaves out what is masked."""
        if self.mask is _Mask.NONE and layer.takes_mask:
            raise layer.error("mask", "none in its call, since a layer before it ends the mask", layer.takes_mask)
        if self.mask is _Mask.PENDING:
            self.mask = _Mask.USED

    def end_mask(self, layer: _Layer) -> None:
        """A layer that looks at all steps: in Keras nothing is masked from here on."""
        if self.mask is _Mask.USED:
            raise layer.refusal("expected no masked steps before it, whose outputs are others in Keras")
        if self.mask is _Mask.PENDING and not self.drop_mask():
            raise layer.refusal("expected a Masking of mask_value=0 before it, at which the mask ends")

    def drop_mask(self) -> bool:
        """Where no recurrent layer looks at it a mask is nothing: whether it can be left out."""
        self.mask = _Mask.NONE
        first = self.layers[0]
        if isinstance(first, Embedding):
            weight = first.parameters["weight"]
            self.layers[0] = plain = Embedding(first.num_embeddings, first.embedding_dim, dtype=weight.dtype, seed=0)
            plain.load_state_dict({"weight": weight})
            return True
        del self.layers[0]
        return isinstance(first, Masking) and first.mask_value == 0  # other values Keras sets to zero


def _build(model: _Model, weights: _Weights) -> Sequential:
    builder = _Builder(weights)
    for layer in model.layers():
        builder.start(layer)
        try:
            BUILDERS[layer.kind](builder, layer)
        except ValueError as error:
            raise error if str(error).startswith("layer ") else layer.refusal(str(error)) from None
    if builder.mask is _Mask.PENDING and not builder.drop_mask():
        raise ValueError("Masking: expected a recurrent layer behind it, or mask_value=0")
    if not builder.layers:
        raise ValueError("expected a model with a layer at least, got one that does nothing")
    _check_policies(builder)
    return Sequential(builder.layers, batch_first=True)


def _check_policies(builder: _Builder) -> None:
    """Whether all layers, also those without weights, compute in the dtype of the weights."""
    allowed = (None, builder.weights.dtype)
    for layer, policy in builder.policies:
        # The input may be of another width, which the first layer converts, or tokens before an Embedding.
        is_input = layer.kind == "InputLayer" and isinstance(policy, str)
        has_tokens = isinstance(builder.layers[0], Embedding)
        if is_input and (policy in ("float32", "float64") or ("int" in str(policy) and has_tokens)):
            continue
        if policy not in allowed:
            raise layer.error("dtype", f"{builder.weights.dtype!r}, as the model's weights are", policy)


def _ignore(builder: _Builder, layer: _Layer) -> None:
    """What does nothing in inference."""


def _embedding(builder: _Builder, layer: _Layer) -> None:
    masks = layer.flag("mask_zero", False)
    shape = layer.size("input_dim"), layer.size("output_dim")
    if builder.layers:
        raise layer.refusal("expected it as the first layer")
    table = builder.read(layer, "embeddings", *shape)
    builder.add(Embedding(*shape, mask_zero=masks, dtype=table.dtype, seed=0), {"weight": table}, shape[1])
    builder.rank = None if builder.rank is None else builder.rank + 1
    builder.mask = _Mask.PENDING if masks else _Mask.NONE


def _masking(builder: _Builder, layer: _Layer) -> None:
    builder.sequences(layer)
    if builder.layers:
        raise layer.refusal("expected it as the first layer")
    builder.add(Masking(layer.number("mask_value", 0.0)))
    builder.mask = _Mask.PENDING


def _dense(builder: _Builder, layer: _Layer) -> None:
    units = layer.size("units")
    kernel = builder.read(layer, "kernel", builder.units, units)
    bias = {"bias": builder.read(layer, "bias", units)} if layer.flag("use_bias", True) else {}
    made = Dense(
        kernel.shape[0], units, bias=bool(bias), activation=_activation(layer), dtype=kernel.dtype, seed=0
    )  # fmt: skip
    builder.add(made, {"weight": kernel.T, **bias}, units)


def _convolution(builder: _Builder, layer: _Layer) -> None:
    builder.sequences(layer)
    builder.end_mask(layer)
    units, taps = layer.size("filters"), layer.size("kernel_size")
    padding = layer.expect("padding", "causal", "same", *(("valid",) if taps == 1 else ()))
    for option in ("strides", "groups"):
        if _single(layer.config.get(option, 1)) != 1:
            raise layer.error(option, "1", layer.config.get(option))
    layer.expect("data_format", "channels_last", default="channels_last")
    dilation = layer.whole("dilation_rate", _single(layer.config.get("dilation_rate", 1)))
    kernel = builder.read(layer, "kernel", taps, builder.units, units)
    bias = {"bias": builder.read(layer, "bias", units)} if layer.flag("use_bias", True) else {}
    made = Conv1D(
        kernel.shape[1], units, taps, dilation=dilation, padding="causal" if padding == "valid" else padding,
        bias=bool(bias), activation=_activation(layer), dtype=kernel.dtype, seed=0,
    )  # fmt: skip
    builder.add(made, {"weight": kernel.transpose(2, 1, 0), **bias}, units)


def _layer_norm(builder: _Builder, layer: _Layer) -> None:
    layer.axis(builder.rank)
    layer.refuse("rms_scaling")
    arrays = _read_all(builder, layer, {"weight": "gamma", "bias": "beta"})
    units, dtype = _same(builder, layer, arrays)
    if arrays:
        arrays.setdefault("weight", np.ones(units, dtype))
    made = LayerNorm(
        units, eps=layer.number("epsilon", 1e-3), elementwise_affine=bool(arrays), bias="bias" in arrays, dtype=dtype
    )  # fmt: skip
    builder.add(made, arrays, units)


def _batch_norm(builder: _Builder, layer: _Layer) -> None:
    layer.axis(builder.rank)
    layer.refuse("renorm")
    affine = _read_all(builder, layer, {"weight": "gamma", "bias": "beta"})
    arrays = affine | _read_all(builder, layer, {"running_mean": "moving_mean", "running_var": "moving_variance"})
    units, dtype = _same(builder, layer, arrays)
    if affine:
        arrays = {"weight": np.ones(units, dtype), "bias": np.zeros(units, dtype)} | arrays
    builder.add(BatchNorm(units, eps=layer.number("epsilon", 1e-3), affine=bool(affine), dtype=dtype), arrays, units)


def _normalization(builder: _Builder, layer: _Layer) -> None:
    layer.axis(builder.rank)
    layer.refuse("invert")
    if not layer.is_modern:
        builder.end_mask(layer)
    if _slots(layer):
        arrays = _read_all(builder, layer, {"mean": "mean", "variance": "variance"})
    else:
        arrays = {name: _numbers(builder, layer, name) for name in ("mean", "variance")}
    units, dtype = _same(builder, layer, arrays)
    builder.add(Normalization(units, dtype=dtype), arrays, units)


def _read_all(builder: _Builder, layer: _Layer, names: Mapping[str, str]) -> dict[str, Array]:
    """Those weights of a row that a layer has, by gatewise's names."""
    present = {slot.key for slot in _slots(layer)}
    return {ours: builder.read(layer, name, builder.units) for ours, name in names.items() if name in present}


def _same(builder: _Builder, layer: _Layer, arrays: Mapping[str, Array]) -> tuple[int, np.dtype[Any]]:
    """The units and the dtype of a layer of rows."""
    sizes = {array.shape[0] for array in arrays.values()} | ({builder.units} if builder.units else set())
    if len(sizes) != 1:
        raise layer.refusal(f"expected weights of one size, got {sorted(sizes)}")
    dtypes = [array.dtype for array in arrays.values()]
    return sizes.pop(), dtypes[0] if dtypes else np.dtype(builder.weights.dtype)


def _numbers(builder: _Builder, layer: _Layer, option: str) -> Array:
    """The numbers of each unit that a configuration holds itself."""
    try:
        array = np.array(layer.config.get(option), builder.weights.dtype).reshape(-1)
    except (ValueError, TypeError, OverflowError):
        raise layer.error(option, "numbers", layer.config.get(option)) from None
    if array.size != 1 or not builder.units:
        return array
    builder.spare -= builder.units
    if builder.spare < 0:
        raise layer.error(option, f"one number for at most {MOST_REPEATED} units of all layers", builder.units)
    return np.repeat(array, builder.units)


def _time_distributed(builder: _Builder, layer: _Layer) -> None:
    inner = layer.inner("layer")
    if inner.kind not in ROWS:
        raise layer.refusal(f"layer: expected one of {', '.join(sorted(ROWS))}, got {inner.kind!r}")
    builder.sequences(layer)
    builder.policies.append((inner, _policy(inner)))
    builder.rank = 2
    weights = builder.weights
    builder.weights = _Within(weights, layer, "layer")
    BUILDERS[inner.kind](builder, inner)
    builder.weights, builder.rank = weights, 3


class _Within(_Weights):
    """The weights of a layer that another one holds."""

    def __init__(self, whole: _Weights, outer: _Layer, prefix: str) -> None:
        self._whole, self._outer, self._prefix = whole, outer, prefix
        self.dtype = whole.dtype

    def read(self, layer: _Layer, key: str, *shape: int | None) -> Array:
        return self._whole.read(replace(layer, group=self._outer.group), f"{self._prefix}/{key}", *shape)


def _reshape(builder: _Builder, layer: _Layer) -> None:
    """Only where nothing changes."""
    if layer.kind == "Flatten":
        if builder.rank != 2:
            raise layer.refusal("expected one step before it (return_sequences=False), got sequences")
        return
    target = _listed(layer.config.get("target_shape"))
    if builder.rank != 2 or target is None or list(target) not in ([builder.units], [-1]):
        raise layer.error("target_shape", f"the shape before it, [{builder.units}] of one step", target)


# ---- activations


def _activation(layer: _Layer, option: str = "activation") -> Activation:
    """An option that names a function of every unit."""
    value = layer.config.get(option)
    if isinstance(value, Mapping):
        inner = layer.inner(option)
        if inner.kind not in ACTIVATION_LAYERS:
            raise layer.error(option, f"a function or {', '.join(sorted(ACTIVATION_LAYERS))}", inner.kind)
        return ACTIVATION_LAYERS[inner.kind](replace(inner, name=layer.name))
    if value == "leaky_relu":
        return Activation("leaky_relu", 0.2)
    if value == "hard_sigmoid" and layer.is_modern is None:
        raise layer.error(option, "a configuration that tells which Keras it is of, whose lines differ", value)
    if value == "hard_sigmoid" and not layer.is_modern:
        return Activation("hard_sigmoid", 0.2, 0.5)  # its line before Keras 3
    if value is not None and value not in FUNCTIONS:
        raise layer.error(option, f"one of {', '.join(FUNCTIONS)}", value)
    return Activation("silu" if value == "swish" else value or "linear")


FUNCTIONS = (
    "linear", "relu", "tanh", "sigmoid", "softmax", "hard_sigmoid", "elu", "selu", "leaky_relu", "gelu", "silu",
    "swish", "softplus", "softsign",
)  # fmt: skip


def _relu(layer: _Layer) -> Activation:
    layer.expect("max_value", None)
    slope = layer.number("negative_slope", 0.0) if layer.config.get("negative_slope") is not None else 0.0
    threshold = layer.number("threshold", 0.0)
    if threshold and slope:
        raise layer.error("threshold", "0 beside a negative_slope", threshold)
    if threshold:
        return Activation("thresholded_relu", threshold)
    return Activation("leaky_relu", slope) if slope else Activation("relu")


def _leaky_relu(layer: _Layer) -> Activation:
    return Activation(
        "leaky_relu", layer.number("negative_slope" if "negative_slope" in layer.config else "alpha", 0.3)
    )


def _softmax(layer: _Layer) -> Activation:
    layer.axis(None)
    return Activation("softmax")


ACTIVATION_LAYERS: dict[str, Callable[[_Layer], Activation]] = {
    "Activation": _activation,
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "ThresholdedReLU": lambda layer: Activation("thresholded_relu", layer.number("theta", 1.0)),
    "ELU": lambda layer: Activation("elu", layer.number("alpha", 1.0)),
    "Softmax": _softmax,
}


def _activate(builder: _Builder, layer: _Layer) -> None:
    if layer.kind == "Softmax":
        layer.axis(builder.rank)
        if builder.mask is not _Mask.NONE:
            raise layer.refusal("expected no masked steps before it, to which Keras's gives a meaning of its own")
        layer = replace(layer, config={**layer.config, "axis": -1})
    made = ACTIVATION_LAYERS[layer.kind](layer)
    if made.name != "linear":
        builder.add(made)


# ---- recurrent layers

CUDNN = {"CuDNNLSTM": "LSTM", "CuDNNGRU": "GRU"}
STACKED = "StackedRNNCells"
CELLS = ("LSTMCell", "GRUCell", "SimpleRNNCell")


class _Cell(NamedTuple):
    """What a recurrent layer computes, apart from its weights."""

    kind: str  # LSTM, GRU or SimpleRNN
    units: int
    bias: bool
    reset_after: bool = True
    activation: Function = Function("tanh")
    recurrent_activation: Function = Function("sigmoid")
    is_cudnn: bool = False

    def made(self, inputs: int, bidirectional: bool, dtype: np.dtype[Any]) -> Layer:
        options: dict[str, Any] = {
            "bias": self.bias, "batch_first": True, "bidirectional": bidirectional, "dtype": dtype, "seed": 0,
        }  # fmt: skip
        activation, gate = (Activation(of.name, *of.numbers) for of in (self.activation, self.recurrent_activation))
        if self.kind == "SimpleRNN":
            return RNN(inputs, self.units, nonlinearity=activation, **options)
        options |= {"activation": activation, "recurrent_activation": gate}
        if self.kind == "GRU":
            return GRU(inputs, self.units, reset_after=self.reset_after, **options)
        return LSTM(inputs, self.units, **options)


def _function(layer: _Layer, option: str) -> Function:
    function = _activation(layer, option).function
    if function.name == "softmax":
        raise layer.error(option, "a function of one unit", "softmax")
    return function


def _cell(layer: _Layer) -> _Cell:
    kind = CUDNN.get(layer.kind, layer.kind.removesuffix("Cell"))
    units = layer.size("units")
    if layer.kind in CUDNN:
        return _Cell(kind, units, True, is_cudnn=True)
    bias = layer.flag("use_bias", True)
    if "activation" not in layer.config:
        layer = replace(layer, config={**layer.config, "activation": "tanh"})
    activation = _function(layer, "activation")
    if kind == "SimpleRNN":
        return _Cell(kind, units, bias, activation=activation)
    if "recurrent_activation" not in layer.config:  # whose default has changed
        raise layer.error("recurrent_activation", "one", None)
    gate = _function(layer, "recurrent_activation")
    # Keras before 2.1.4 knew no reset_after.
    return _Cell(kind, units, bias, kind != "GRU" or layer.flag("reset_after", False), activation, gate)


GATE_ORDER = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "SimpleRNN": (0,)}  # Keras's, in PyTorch's order


def _gates(cell: _Cell, array: Array) -> list[Array]:
    """The pieces of the last axis that belong to the gates, in PyTorch's order."""
    pieces = np.split(array, len(GATE_ORDER[cell.kind]), -1)
    return [pieces[gate] for gate in GATE_ORDER[cell.kind]]


def _cell_weights(
    builder: _Builder, layer: _Layer, cell: _Cell, prefix: str = "", inputs: int | None = None
) -> dict[str, Array]:
    """The weights of one direction by PyTorch's kinds."""
    wide = cell.units * len(GATE_ORDER[cell.kind])
    kernel = builder.read(layer, f"{prefix}kernel", inputs, wide)
    recurrent = builder.read(layer, f"{prefix}recurrent_kernel", cell.units, wide)
    if cell.is_cudnn:
        # CuDNN's matrices are already (H, I): only the shape that Keras gave them is another one.
        turned = [piece.reshape(cell.units, -1) for piece in _gates(cell, kernel)]
        weights = {"weight_ih": np.concatenate(turned), "weight_hh": np.concatenate(_gates(cell, recurrent))}
    else:
        weights = {
            name: np.concatenate([piece.T for piece in _gates(cell, array)])
            for name, array in (("weight_ih", kernel), ("weight_hh", recurrent))
        }
    return weights | (_biases(builder, layer, cell, prefix, wide) if cell.bias else {})


def _biases(builder: _Builder, layer: _Layer, cell: _Cell, prefix: str, wide: int) -> dict[str, Array]:
    if cell.is_cudnn:
        both = builder.read(layer, f"{prefix}bias", 2 * wide).reshape(2, wide)
    elif cell.kind == "GRU" and cell.reset_after:
        both = builder.read(layer, f"{prefix}bias", 2, wide)
    else:
        one = builder.read(layer, f"{prefix}bias", wide)
        both = np.stack([one, np.zeros_like(one)])
    return {name: np.concatenate(_gates(cell, bias)) for name, bias in zip(("bias_ih", "bias_hh"), both, strict=True)}


def _check_sequence(layer: _Layer) -> None:
    layer.refuse("return_state", "time_major")


def _start_sequence(builder: _Builder, layer: _Layer) -> None:
    """What reads backwards gives its outputs in the order in which it makes them."""
    _check_sequence(layer)
    builder.sequences(layer)
    builder.use_mask(layer)
    if builder.mask is _Mask.USED and not layer.flag("return_sequences", False):
        layer.refuse("zero_output_for_mask")
    if layer.flag("go_backwards", False):
        if builder.mask is _Mask.USED and layer.flag("return_sequences", False):
            raise layer.error("go_backwards", "False where steps are masked and sequences returned", True)
        builder.add(Reverse())


def _recurrent(builder: _Builder, layer: _Layer) -> None:
    _start_sequence(builder, layer)
    _add_cell(builder, layer, _cell(layer))
    _finish(builder, layer)


def _rnn(builder: _Builder, layer: _Layer) -> None:
    _start_sequence(builder, layer)
    for i, cell in enumerate(_cells(layer)):
        _add_cell(builder, replace(cell, group=layer.group), _cell(cell), f"cells/{i}/")
    _finish(builder, layer)


def _cells(layer: _Layer) -> list[_Layer]:
    """The cells of an RNN, one above the other."""
    cell = layer.inner("cell")
    if cell.kind != STACKED:
        cells = [cell]
    else:
        found = cell.config.get("cells")
        listed = found if isinstance(found, list) else []
        cells = [replace(cell, config={"cell": one}).inner("cell") for one in listed]
    for one in cells:
        if one.kind not in CELLS:
            raise layer.refusal(f"cell: expected one of {', '.join(CELLS)}, got {one.kind!r}")
    if not cells:
        raise layer.error("cell", "a cell at least", cell.config)
    return cells


def _add_cell(builder: _Builder, layer: _Layer, cell: _Cell, prefix: str = "") -> None:
    weights = _cell_weights(builder, layer, cell, prefix, builder.units)
    inputs = weights["weight_ih"].shape[1]
    made = cell.made(inputs, False, weights["weight_ih"].dtype)
    builder.add(made, {f"{kind}_l0": array for kind, array in weights.items()}, cell.units)


def _finish(builder: _Builder, layer: _Layer) -> None:
    """Of a layer that does not return sequences only the last step."""
    if not layer.flag("return_sequences", False):
        builder.add(Last())
        builder.rank, builder.mask = 2, _Mask.NONE


def _forward(layer: _Layer) -> _Layer:
    """The layer that a Bidirectional runs from the first step to the last."""
    inner = layer.inner("layer")
    if inner.kind not in ("LSTM", "GRU", "SimpleRNN", *CUDNN):
        raise layer.refusal(f"layer: expected LSTM, GRU, SimpleRNN, CuDNNLSTM or CuDNNGRU, got {inner.kind!r}")
    return inner


def _bidirectional(builder: _Builder, layer: _Layer) -> None:
    builder.sequences(layer)
    builder.use_mask(layer)
    mode = layer.expect("merge_mode", *MERGES, default="concat")
    forward = _forward(layer)
    _check_sequence(forward)
    forward.expect("go_backwards", False, default=False)
    cell = _cell(forward)
    if layer.config.get("backward_layer") is not None:
        backward = layer.inner("backward_layer")
        _check_sequence(backward)
        backward.expect("go_backwards", True)
        if (
            backward.kind != forward.kind
            or _cell(backward) != cell
            or any(
                backward.config.get(option) != forward.config.get(option) for option in ("return_sequences", "dtype")
            )
        ):
            raise layer.refusal("backward_layer: expected the options of the layer, got others")
    inside = replace(forward, group=layer.group)
    weights = _cell_weights(builder, inside, cell, "forward_layer/", builder.units)
    inputs, dtype = weights["weight_ih"].shape[1], weights["weight_ih"].dtype
    reverse = _cell_weights(builder, inside, cell, "backward_layer/", inputs)
    made = cell.made(inputs, True, dtype)
    arrays = {f"{kind}_l0": array for kind, array in weights.items()}
    arrays |= {f"{kind}_l0_reverse": array for kind, array in reverse.items()}
    made.load_state_dict(arrays)
    if mode == "concat":
        builder.add(made, None, 2 * cell.units)
    else:
        builder.add(Bidirectional(made, mode), None, cell.units)
    _finish(builder, forward)


# ---- which layers there are

IDENTITIES = (
    "InputLayer", "Dropout", "SpatialDropout1D", "GaussianNoise", "GaussianDropout", "AlphaDropout",
    "ActivityRegularization",
)  # fmt: skip
REFUSED = {
    "Lambda": "expected a layer of Keras without code of its own; nothing in a file is executed",
}
BUILDERS: dict[str, Callable[[_Builder, _Layer], None]] = {
    **dict.fromkeys(IDENTITIES, _ignore),
    **dict.fromkeys(ACTIVATION_LAYERS, _activate),
    "Masking": _masking,
    "Embedding": _embedding,
    "Dense": _dense,
    "Conv1D": _convolution,
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "Normalization": _normalization,
    "TimeDistributed": _time_distributed,
    "Flatten": _reshape,
    "Reshape": _reshape,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "SimpleRNN": _recurrent,
    "CuDNNLSTM": _recurrent,
    "CuDNNGRU": _recurrent,
    "RNN": _rnn,
    "Bidirectional": _bidirectional,
}
# What may stand in a TimeDistributed: what needs one step.
ROWS = {
    "Dense", "LayerNormalization", "BatchNormalization", "Normalization", "Dropout", "Flatten", "Reshape",
    *ACTIVATION_LAYERS,
}  # fmt: skip

# Options of each class that this module computes, or that change nothing in inference.
ONLY_TRAINING = ("_initializer", "_regularizer", "_constraint")
_ALL = "name trainable dtype batch_shape batch_input_shape dynamic seed"
_CELL = "units activation use_bias dropout recurrent_dropout implementation"
_GATED = f"{_CELL} recurrent_activation"
_SEQUENCE = (
    "return_sequences return_state go_backwards stateful unroll time_major zero_output_for_mask input_dim input_length "
    "use_cudnn"
)
OPTIONS = {
    kind: set(f"{_ALL} {options}".split())
    for kind, options in {
        "InputLayer": "",
        "Dropout": "rate noise_shape",
        "SpatialDropout1D": "rate noise_shape",
        "GaussianNoise": "stddev",
        "GaussianDropout": "rate",
        "AlphaDropout": "rate noise_shape",
        "ActivityRegularization": "l1 l2",
        "Activation": "activation",
        "ReLU": "max_value negative_slope threshold",
        "LeakyReLU": "alpha negative_slope",
        "ThresholdedReLU": "theta",
        "ELU": "alpha",
        "Softmax": "axis robust_masking",
        "Masking": "mask_value",
        "Embedding": "input_dim output_dim mask_zero input_length lora_rank lora_alpha",
        "Dense": "units activation use_bias input_dim lora_rank lora_alpha",
        "Conv1D": "filters kernel_size strides padding data_format dilation_rate groups activation use_bias lora_rank "
        "lora_alpha",
        "LayerNormalization": "axis epsilon center scale rms_scaling",
        "BatchNormalization": "axis momentum epsilon center scale renorm renorm_clipping renorm_momentum fused "
        "virtual_batch_size synchronized",
        "Normalization": "axis mean variance invert",
        "TimeDistributed": "layer",
        "Flatten": "data_format",
        "Reshape": "target_shape",
        "LSTM": f"{_GATED} unit_forget_bias {_SEQUENCE}",
        "GRU": f"{_GATED} reset_after {_SEQUENCE}",
        "SimpleRNN": f"{_CELL} {_SEQUENCE}",
        "CuDNNLSTM": f"units unit_forget_bias {_SEQUENCE}",
        "CuDNNGRU": f"units {_SEQUENCE}",
        "LSTMCell": f"{_GATED} unit_forget_bias",
        "GRUCell": f"{_GATED} reset_after",
        "SimpleRNNCell": _CELL,
        "StackedRNNCells": "cells reverse_state_order",
        "RNN": f"cell {_SEQUENCE}",
        "Bidirectional": "layer backward_layer merge_mode",
    }.items()
}
