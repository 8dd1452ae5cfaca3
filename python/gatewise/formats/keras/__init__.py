"""Trained models of Keras 2 and 3, read without Keras: as data, so that no program in a file is ever executed."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO

from gatewise.formats import json_text
from gatewise.formats.errors import at, reading
from gatewise.formats.files import open_regular
from gatewise.formats.keras import hdf5
from gatewise.formats.keras.graph import ModelConfig, version_in
from gatewise.formats.keras.layers import build, check_kinds
from gatewise.formats.keras.weights import WeightReader, places_by_class, places_by_order
from gatewise.layers.sequential import Sequential

# The members of a zip archive may have this many times its own bytes, since weights hardly compress, or FREE_GROWTH.
MAX_GROWTH = 16
FREE_GROWTH = 2**20
MAX_CONFIG = 2**22  # bytes of JSON: some thousand layers, however large the file around it is

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"  # the members that are read


def load(path: str | os.PathLike[str], config: object = None) -> Sequential:
    """Read a trained model from a file that Keras wrote, for inference. Neither Keras nor TensorFlow is needed.

    Parameters
    ----------
    path : str or path-like
        A model: .keras, or .h5 of Keras 2 and 3; or only weights: .weights.h5, or .h5 of Keras 2.
    config : dict, list or str or path-like, optional
        What the model is, if the file has only weights: `model.get_config()`, `model.to_json()`, or a file of the
        latter.

    Returns
    -------
    Sequential
        With batch_first=True, as in Keras.

    Raises
    ------
    FormatError
        A ValueError: the file is damaged, or a layer or option in it has no counterpart in gatewise.
    OSError
        If it cannot be read.
    """
    with reading(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(len(hdf5.SIGNATURE))
        file.seek(0)
        if head.startswith(b"PK"):
            return _load_archive(file, size, config)
        if head != hdf5.SIGNATURE:
            raise ValueError("expected a zip archive (.keras) or an HDF5 file (.h5), got neither")
        return _load_hdf5(hdf5.Store(file.read()), config)


def _load_archive(file: BinaryIO, size: int, config: object) -> Sequential:
    if config is not None:
        raise ValueError("config: expected None, since the file has its own")
    members = _read_members(file, size)
    model = ModelConfig.of(_parse(CONFIG, members[CONFIG]), None)
    if METADATA in members:
        model = replace(model, version=version_in(_parse(METADATA, members[METADATA])))
    store, layers = hdf5.Store(members[WEIGHTS]), model.layers()
    check_kinds(layers)
    return build(layers, WeightReader(store, places_by_class(store, layers)))


def _load_hdf5(store: hdf5.Store, config: object) -> Sequential:
    text = store.text("", "model_config")
    if text is not None and config is not None:
        raise ValueError("config: expected None, since the file has its own")
    if text is None and config is None:
        raise ValueError("config: expected model.to_json() or model.get_config(), since the file has only weights")
    description = _parse_argument(config) if text is None else _parse("model_config", text)
    root = "model_weights/" if store.has("model_weights") else ""
    is_legacy = store.texts(root.rstrip("/"), "layer_names") is not None
    version = store.text(root.rstrip("/"), "keras_version") if is_legacy else None
    layers = ModelConfig.of(description, version).layers()
    check_kinds(layers)
    places = places_by_order(store, root, layers) if is_legacy else places_by_class(store, layers)
    return build(layers, WeightReader(store, places))


# ---- archives


def _read_members(file: BinaryIO, size: int) -> dict[str, bytes]:
    """The members of an archive of `size` bytes that matter, by name."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if member.filename in (CONFIG, METADATA, WEIGHTS)]
            _check_members(members, size)
            return {member.filename: _read_member(archive, member) for member in members}
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # of many kinds: zlib's, struct's, zipfile's own
        raise ValueError(f"expected a sound zip archive, got {type(error).__name__}: {error}") from None


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse members that would take far more memory than the archive, or that could not be told apart."""
    names = [member.filename for member in members]
    if len(set(names)) != len(names) or not {CONFIG, WEIGHTS} <= set(names):
        raise ValueError(f"expected one {CONFIG} and one {WEIGHTS} in the archive, got {names}")
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename}: expected it stored or deflated, got {member.compress_type}")
        if member.filename != WEIGHTS and member.file_size > MAX_CONFIG:
            raise ValueError(f"{member.filename}: expected at most {MAX_CONFIG} bytes, got {member.file_size}")
    most = max(MAX_GROWTH * size, FREE_GROWTH)
    total = sum(member.file_size for member in members)
    if total > most:
        raise ValueError(f"expected members of at most {most} bytes together, got {total}")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member, of which no more are unpacked than its entry says."""
    with archive.open(member) as file:
        data = file.read(member.file_size)  # read() would unpack all that there is before it cuts it
    if len(data) != member.file_size:
        raise ValueError(f"{member.filename}: expected {member.file_size} bytes, got {len(data)}")
    return data


# ---- configurations


def _parse_argument(config: object) -> Any:
    """The configuration that the user gave."""
    if isinstance(config, (Mapping, list)):
        try:
            return json.loads(json.dumps(config))  # which makes lists of tuples, as in a file
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"config: expected values that JSON has: {error}") from None
    if isinstance(config, str) and config.lstrip()[:1] in ("{", "["):
        return _parse("config", config)
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(f"config: expected a dict, JSON or the path of a JSON file, got {type(config).__name__}")
    name = f"config: {os.fsdecode(config)}"
    with at(name), open_regular(config) as file:
        text = file.read(MAX_CONFIG + 1)
    return _parse(name, text)


def _parse(name: str, text: str | bytes) -> Any:
    data = text.encode() if isinstance(text, str) else text
    with at(name):
        if len(data) > MAX_CONFIG:
            raise ValueError(f"expected JSON of at most {MAX_CONFIG} bytes, got {len(data)}")
        return json_text.parse(data)
