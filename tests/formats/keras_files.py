"""Files of Keras, written by hand as Keras 2 wrote them, and the archives of Keras 3."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

DATA = Path(__file__).parents[1] / "data"


def config_of(path: Path) -> Path | None:
    """The configuration beside a file that has only weights."""
    return path.with_suffix("").with_suffix(".json") if path.name.endswith(".weights.h5") else None


Arrays = Mapping[str, np.ndarray]


def entry(kind: str, name: str, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": {"name": name, "trainable": True, **config}}


def recurrent(kind: str, name: str, units: int, **config: Any) -> dict[str, Any]:
    """A recurrent layer as Keras 2 describes it."""
    options = {} if kind.startswith("CuDNN") else {"activation": "tanh", "use_bias": True, "implementation": 1}
    if kind in ("LSTM", "GRU"):
        options["recurrent_activation"] = "sigmoid"
    options |= {"return_sequences": True, "return_state": False, "go_backwards": False, "stateful": False}
    return entry(kind, name, units=units, **options | config)


def write(
    path: Path,
    layers: Sequence[tuple[dict[str, Any], Arrays]],
    *,
    bare: bool = True,
    version: str = "2.1.6",
    has_config: bool = True,
    model: Any = None,
) -> Any:
    """Write a file as Keras 2 did, and return the model's configuration."""
    entries = [layer for layer, _ in layers]
    if model is None:
        config = entries if bare else {"name": "sequential", "layers": entries}
        model = {"class_name": "Sequential", "config": config}
    with h5py.File(path, "w") as file:
        group = file
        if has_config:
            file.attrs["model_config"] = json.dumps(model).encode()
            file.attrs["keras_version"] = version.encode()
            file.attrs["training_config"] = b"{}"
            group = file.create_group("model_weights")
        group.attrs["layer_names"] = [layer["config"]["name"].encode() for layer in entries]
        group.attrs["keras_version"] = version.encode()
        for layer, weights in layers:
            layer_group = group.create_group(layer["config"]["name"])
            layer_group.attrs["weight_names"] = [name.encode() for name in weights]
            for name, array in weights.items():
                layer_group.create_dataset(name, data=array)
    return model


def draw(seed: int, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(0, 0.5, shape).astype("float32") for name, shape in shapes.items()}


def named(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}:0": array for name, array in arrays.items()}


def archive(path: Path, members: Mapping[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def members() -> dict[str, bytes]:
    with zipfile.ZipFile(DATA / "stack.keras") as file:
        return {name: file.read(name) for name in file.namelist()}
