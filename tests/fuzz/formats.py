"""The formats, each with its seeds, its changes, and how many inputs of it are tried by default."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.inputs import Input
from tests.fuzz.large import LARGE

CORPUS = Path(__file__).parent / "corpus"
OPTIONS = ".options.json"  # beside a file of the corpus: the options of gw.load


class Format(NamedTuple):
    module: str
    seeds: str
    changed: str
    count: int  # inputs that take some 15 seconds of one processor
    needs: Sequence[str] = ()  # packages


FORMATS = {
    "safetensors": Format("texts", "safetensors_seeds", "safetensors_changed", 8000),
    "json": Format("texts", "rtneural_seeds", "rtneural_changed", 8000),
    "h5": Format("keras", "hdf5_seeds", "hdf5_changed", 3000),
    "keras": Format("keras", "archive_seeds", "archive_changed", 4000),
    "onnx": Format("onnx", "seeds", "changed", 4000, ["onnx"]),
    "pt": Format("pytorch", "seeds", "changed", 8000, ["torch"]),
}


def missing(name: str) -> list[str]:
    return [package for package in FORMATS[name].needs if importlib.util.find_spec(package) is None]


@functools.cache
def seeds(name: str) -> list[Input]:
    """Valid files."""
    format = FORMATS[name]
    made: list[Input] = getattr(importlib.import_module(f"tests.fuzz.{format.module}"), format.seeds)()
    return made


def changed(name: str, chance: random.Random, item: Input) -> Input:
    format = FORMATS[name]
    changed: Input = getattr(importlib.import_module(f"tests.fuzz.{format.module}"), format.changed)(chance, item)
    return changed


def made(name: str, seed: int, index: int) -> Input:
    """One input, which is the same whatever was made before it."""
    chance = random.Random(f"{name} {seed} {index}")
    valid = seeds(name)
    if index < len(valid) and seed == 0:
        return valid[index]
    return changed(name, chance, chance.choice(valid))


def corpus(name: str) -> dict[str, Callable[[], Input]]:
    """The inputs of every fault that was found: files, by their paths, and those that are made anew."""
    saved = {str(path): functools.partial(read, path) for path in files(name)}
    return saved | {f"large.py: {name}: {key}": make for key, make in LARGE[name].items()}


def files(name: str) -> list[Path]:
    return sorted(path for path in (CORPUS / name).glob("*") if not path.name.endswith(OPTIONS))


def read(path: Path) -> Input:
    """A file that was saved, with its options."""
    beside = path.with_name(path.name + OPTIONS)
    options = json.loads(beside.read_text()) if beside.exists() else {}
    suffix = "".join(path.suffixes[-2:]) if path.name.endswith(".weights.h5") else path.suffix
    return Input(suffix, path.read_bytes(), options)


def write(path: Path, item: Input) -> Path:
    path = path.with_name(path.name + item.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(item.data)
    if item.options:
        path.with_name(path.name + OPTIONS).write_text(json.dumps(item.options))
    return path
