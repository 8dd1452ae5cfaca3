"""Where the files of Keras have the weights of each layer, and reading them in one dtype."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from gatewise.arguments.arrays import Array
from gatewise.formats.keras import hdf5
from gatewise.formats.keras.cells import CUDNN, STACKED, cells_of, forward_layer
from gatewise.formats.keras.config import LayerConfig
from gatewise.formats.keras.graph import group_names

OLD_LAYERS = "_layer_checkpoint_dependencies"  # the name of the group "layers" in Keras 2.12 to 2.15


class Slot(NamedTuple):
    """A weight of a layer: the key that this reader gives it, and its path within the layer's group in Keras 3."""

    key: str
    path: str
    trains: bool = True


def slots_of(layer: LayerConfig) -> list[Slot]:
    """The weights of a layer in the order in which Keras makes them."""
    slots = SLOTS.get(layer.kind)
    return slots(layer) if slots else []


def _variables(*names: str, fixed: Sequence[str] = ()) -> list[Slot]:
    """Slots of the layer's own variables; those that are fixed do not train, and come last."""
    return [Slot(name, f"vars/{i}", name not in fixed) for i, name in enumerate((*names, *fixed))]


def _nested(prefix: str, slots: Sequence[Slot], key: str | None = None) -> list[Slot]:
    """Slots of a layer inside another one, whose group is at `prefix`; the keys begin with `key`, or else `prefix`."""
    key_prefix = prefix if key is None else key
    return [Slot(f"{key_prefix}/{slot.key}", f"{prefix}/{slot.path}", slot.trains) for slot in slots]


def _biased(layer: LayerConfig, *names: str) -> list[Slot]:
    return _variables(*names, *(("bias",) if layer.flag("use_bias", True) else ()))


def _scaled(layer: LayerConfig, fixed: Sequence[str] = ()) -> list[Slot]:
    names = [name for name, option in (("gamma", "scale"), ("beta", "center")) if layer.flag(option, True)]
    return _variables(*names, fixed=fixed)


def _normalization(layer: LayerConfig) -> list[Slot]:
    is_in_config = layer.config.get("mean") is not None
    return [] if is_in_config else _variables(fixed=("mean", "variance", "count"))


def _recurrent(layer: LayerConfig) -> list[Slot]:
    names = "kernel", "recurrent_kernel"
    slots = _variables(*names, "bias") if layer.kind in CUDNN else _biased(layer, *names)
    return [Slot(slot.key, f"cell/{slot.path}") for slot in slots]


def _rnn(layer: LayerConfig) -> list[Slot]:
    cells = cells_of(layer)
    if len(cells) == 1 and layer.inner("cell").kind != STACKED:
        return _nested("cell", _biased(cells[0], "kernel", "recurrent_kernel"), "cells/0")
    groups = group_names([cell.kind for cell in cells])
    return [
        slot
        for i, (cell, group) in enumerate(zip(cells, groups, strict=True))
        for slot in _nested(f"cell/cells/{group}", _biased(cell, "kernel", "recurrent_kernel"), f"cells/{i}")
    ]


def _bidirectional(layer: LayerConfig) -> list[Slot]:
    slots = slots_of(forward_layer(layer))
    return _nested("forward_layer", slots) + _nested("backward_layer", slots)


SLOTS: dict[str, Callable[[LayerConfig], list[Slot]]] = {
    "Embedding": lambda layer: _variables("embeddings"),
    "Dense": lambda layer: _biased(layer, "kernel"),
    "Conv1D": lambda layer: _biased(layer, "kernel"),
    "LayerNormalization": _scaled,
    "BatchNormalization": lambda layer: _scaled(layer, ("moving_mean", "moving_variance")),
    "Normalization": _normalization,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "SimpleRNN": _recurrent,
    "CuDNNLSTM": _recurrent,
    "CuDNNGRU": _recurrent,
    "RNN": _rnn,
    "Bidirectional": _bidirectional,
    "TimeDistributed": lambda layer: _nested("layer", slots_of(layer.inner("layer"))),
}

Places = Mapping[tuple[str, str], str]  # a layer's group and a slot's key -> the path of the dataset


def places_by_class(store: hdf5.Store, layers: Sequence[LayerConfig]) -> Places:
    """Where files of Keras 3 have the weights: in groups that are named for the classes of the layers."""
    root = OLD_LAYERS if store.has(OLD_LAYERS) else "layers"
    places = {
        (layer.group, slot.key): f"{layer.group}/{slot.path}".replace("layers/", f"{root}/")
        for layer in layers
        for slot in slots_of(layer)
    }
    present = {path for path in store.datasets(root) if "/seed_generator/" not in path} if store.has(root) else set()
    expected = set(places.values())
    if present != expected:
        missing, surplus = sorted(expected - present)[:3], sorted(present - expected)[:3]
        raise ValueError(f"expected the weights of the model's layers, got missing {missing}, unexpected {surplus}")
    return places


def places_by_order(store: hdf5.Store, root: str, layers: Sequence[LayerConfig]) -> Places:
    """Where files of Keras 2 have the weights: listed by top-level layers, in the order in which Keras keeps these."""
    slots_by_owner: dict[int, list[tuple[LayerConfig, Slot]]] = {}
    for layer in sorted(layers, key=lambda layer: layer.owner):
        slots_by_owner.setdefault(layer.owner, []).extend((layer, slot) for slot in slots_of(layer))
    expected_layers = [slots for slots in slots_by_owner.values() if slots]
    names = store.texts(root.rstrip("/"), "layer_names") or []
    listed = [(name, store.texts(root + name, "weight_names") or []) for name in names]
    listed = [(name, weights) for name, weights in listed if weights]
    if len(listed) != len(expected_layers):
        raise ValueError(f"expected weights of {len(expected_layers)} layers, got {[name for name, _ in listed]}")
    places: dict[tuple[str, str], str] = {}
    for slots, (name, weights) in zip(expected_layers, listed, strict=True):
        # Weights that train come first, of the top-level layer and all that is inside it.
        ordered = sorted(slots, key=lambda pair: not (pair[0].trains and pair[1].trains))
        expected = [slot.key.rpartition("/")[2] for _, slot in ordered]
        if [re.sub(r"(_\d+)?(:\d+)?$", "", weight.rpartition("/")[2]) for weight in weights] != expected:
            raise ValueError(f"{root}{name}: weight_names: expected {expected}, got {weights}")
        for (layer, slot), weight in zip(ordered, weights, strict=True):
            places[layer.group, slot.key] = f"{root}{name}/{weight}"
    return places


class WeightReader:
    """The weights of all layers, which must be of one dtype."""

    def __init__(self, store: hdf5.Store, places: Places) -> None:
        self._store = store
        self._places = places
        self.dtype = "float32"  # until weights are read
        self._is_first = True

    def read(self, layer: LayerConfig, key: str, *shape: int | None) -> Array:
        try:
            array = self._store.array(self._places[layer.group, layer.key_prefix + key], shape)
        except ValueError as error:
            raise layer.refusal(str(error)) from None
        if not self._is_first and array.dtype.name != self.dtype:
            raise layer.error("weights", f"{self.dtype}, as in the layers before", array.dtype.name)
        self.dtype, self._is_first = array.dtype.name, False
        if layer.policy() not in (None, self.dtype):
            raise layer.error("dtype", f"{self.dtype!r}, as its weights are", layer.policy())
        return array
