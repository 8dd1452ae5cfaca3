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
OPTIONS = ".options.json"  # beside a file of the corpus: what gw.load is given besides


class Format(NamedTuple):
    module: str
    seeds: str
    changed: str
    count: int  # inputs, so that each takes about ten seconds of one processor
    needs: Sequence[str] = ()  # packages


FORMATS = {
    "safetensors": Format("texts", "safetensors_seeds", "safetensors_changed", 2000),
    "rtneural": Format("texts", "rtneural_seeds", "rtneural_changed", 2000),
    "hdf5": Format("keras", "hdf5_seeds", "hdf5_changed", 2000),
    "keras": Format("keras", "archive_seeds", "archive_changed", 1000),
    "onnx": Format("onnx", "seeds", "changed", 2000, ["onnx"]),
    "pytorch": Format("pytorch", "seeds", "changed", 2000, ["torch"]),
}


def missing(name: str) -> list[str]:
    return [package for package in FORMATS[name].needs if importlib.util.find_spec(package) is None]


@functools.cache
def _seeds(name: str) -> list[Input]:
    format = FORMATS[name]
    seeds: list[Input] = getattr(importlib.import_module(f"tests.fuzz.{format.module}"), format.seeds)()
    return seeds


def made(name: str, seed: int, index: int) -> Input:
    """One input, which is the same whatever was made before it."""
    chance = random.Random(f"{name} {seed} {index}")
    seeds = _seeds(name)
    if index < len(seeds) and seed == 0:
        return seeds[index]  # which must load, or be refused, too
    change = getattr(importlib.import_module(f"tests.fuzz.{FORMATS[name].module}"), FORMATS[name].changed)
    changed: Input = change(chance, chance.choice(seeds))
    return changed


def corpus(name: str) -> dict[str, Callable[[], Input]]:
    """The files of every fault that was found, by their paths, and those that are made."""
    paths = sorted(path for path in (CORPUS / name).glob("*") if not path.name.endswith(OPTIONS))
    kept = {str(path): functools.partial(read, path) for path in paths}
    return kept | {f"large.py: {name}: {key}": make for key, make in LARGE[name].items()}


def read(path: Path) -> Input:
    """A file that was saved, with its options."""
    beside = path.with_name(path.name + OPTIONS)
    options = json.loads(beside.read_text()) if beside.exists() else {}
    suffix = "".join(path.suffixes[-2:]) if path.name.endswith(".weights.h5") else path.suffix
    return Input(suffix, path.read_bytes(), options)


def write(path: Path, given: Input) -> Path:
    path = path.with_name(path.name + given.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(given.data)
    if given.options:
        path.with_name(path.name + OPTIONS).write_text(json.dumps(given.options))
    return path
