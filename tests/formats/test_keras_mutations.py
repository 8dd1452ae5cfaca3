"""Files of Keras with random changes: each loads, or is refused with a FormatError."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.make_keras import COMMITTED
from gatewise.formats import keras
from gatewise.formats.errors import FormatError
from keras_files import DATA, archive, config_of, members

SECONDS = 2.5  # for the files of each test,
LEAST = 50  # or for this many files, whichever takes longer


def mutations(data: bytes, count: int) -> Iterator[bytes]:
    generator = np.random.default_rng(3)
    for i in range(count):
        if i % 4 == 0:
            yield data[: generator.integers(8, len(data))]
            continue
        changed = bytearray(data)
        for _ in range(int(generator.integers(1, 12))):
            changed[generator.integers(8, len(data))] = generator.choice([0, 1, 255, generator.integers(256)])
        yield bytes(changed)


def json_mutations(text: str, count: int) -> Iterator[str]:
    """The same JSON with one value, anywhere in it, replaced."""
    generator = np.random.default_rng(4)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        2**31,
        2**70,
        1e308,
        float("nan"),
        "",
        "x",
        [],
        {},
        [[1]],
        {"class_name": 3},
    ]
    for _ in range(count):
        root = json.loads(text)
        places = []
        waiting = [root]
        while waiting:
            value = waiting.pop()
            for key in value if isinstance(value, dict) else range(len(value)):
                places.append((value, key))
                if isinstance(value[key], (dict, list)):
                    waiting.append(value[key])
        target, key = places[generator.integers(len(places))]
        source, source_key = places[generator.integers(len(places))]
        if generator.random() < 0.7:
            target[key] = values[generator.integers(len(values))]
        else:
            target[key] = json.loads(json.dumps(source[source_key]))
        yield json.dumps(root)


def assert_only_format_errors(path: Path, files: Iterator[bytes], config: object = None) -> int:
    """Load as many of these files as there is time for; each loads, or is refused. Returns how many there were."""
    end, count = time.monotonic() + SECONDS, 0
    for data in files:
        path.write_bytes(data)
        with suppress(FormatError):
            keras.load(path, config)
        count += 1
        if time.monotonic() > end and count > LEAST:
            break
    return count


@pytest.mark.parametrize("name", COMMITTED)
def test_mutated_files(tmp_path: Path, name: str) -> None:
    path = DATA / (name + COMMITTED[name])
    config = config_of(path)
    assert assert_only_format_errors(tmp_path / path.name, mutations(path.read_bytes(), 2000), config) > 20


def test_mutated_weights_in_an_archive(tmp_path: Path) -> None:
    sound = members()
    files = (
        archive(tmp_path / "a", sound | {"model.weights.h5": data}).read_bytes()
        for data in mutations(sound["model.weights.h5"], 2000)
    )
    assert assert_only_format_errors(tmp_path / "m.keras", files) > 20


def test_mutated_configurations(tmp_path: Path) -> None:
    text = (DATA / "chain.json").read_text()
    weights = (DATA / "chain.weights.h5").read_bytes()
    count = 0
    end = time.monotonic() + SECONDS
    for config in json_mutations(text, 1000):
        count += assert_only_format_errors(tmp_path / "m.weights.h5", iter([weights]), config)
        if time.monotonic() > end and count > LEAST:
            break
    sound = members()
    files = (
        archive(tmp_path / "a", sound | {"config.json": config.encode()}).read_bytes()
        for config in json_mutations(sound["config.json"].decode(), 1000)
    )
    assert assert_only_format_errors(tmp_path / "m.keras", files) + count > 40
