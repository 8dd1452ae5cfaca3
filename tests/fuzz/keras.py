"""Files of Keras: HDF5 with what is inside its structures, and archives with JSON and HDF5 in them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from tests.fuzz.inputs import NUMBERS, Input, changed_bytes, changed_members, changed_tree, packed, text_of, unpacked

DATA = Path(__file__).parent.parent / "data"
SIGNATURES = re.compile(
    rb"TREE|SNOD|HEAP|GCOL|OHDR|OCHK|FRHP|FHDB|FHIB|BTHD|BTLF|BTIN|FSHD|\x89HDF\r\n\x1a\n"
    rb"|\x01\x00.\x00\x01\x00\x00\x00",  # the head of an object in the older format
    re.DOTALL,
)
CONFIGS = re.compile(rb'\{"(?:class_name|module|name|config)[ -~]*\}')


def hdf5_seeds() -> list[Input]:
    with_weights = [
        Input(
            ".weights.h5",
            (DATA / f"{name}.weights.h5").read_bytes(),
            {"config": json.loads((DATA / f"{name}.json").read_text())},
        )
        for name in ("chain", "keras2_chain")
    ]
    models = [Input(".h5", (DATA / name).read_bytes()) for name in ("around.h5", "keras2_gates.h5")]
    return [*models, *with_weights]


def hdf5_changed(chance: random.Random, valid: Input) -> Input:
    data, options = valid.data, valid.options
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        change = chance.random()
        if change < 0.1 and "config" in options:
            changed = changed_tree(chance, options["config"])
            options = {"config": json.loads(text_of(changed)) if _is_plain(changed) else options["config"]}
        elif change < 0.25:
            data = _with_text(chance, data)
        elif change < 0.55:
            data = _with_address(chance, data)
        elif change < 0.85:
            data = _with_field(chance, data)
        else:
            data = changed_bytes(chance, data, 2)
    return Input(valid.suffix, data, options)


def _is_plain(tree: object) -> bool:
    """Whether it could come from a JSON file."""
    return isinstance(tree, dict) and "@nested" not in repr(tree)


def _with_address(chance: random.Random, data: bytes) -> bytes:
    """The same bytes with one address replaced, such as by its own or that of another structure."""
    places, addresses = [], []
    for position in range(0, min(len(data), 60_000) - 8, 4):
        number = int.from_bytes(data[position : position + 8], "little")
        if 0 < number < len(data):
            places.append(position)
            addresses.append(number)
    if not places:
        return data
    place = chance.choice(places)
    starts = [match.start() for match in SIGNATURES.finditer(data)]
    number = chance.choice(
        (
            chance.choice(addresses),
            chance.choice(starts or [0]),
            place,
            place - 8,
            len(data),
            len(data) - 1,
            2**64 - 1,
            0,
            1,
        )
    )
    return data[:place] + (number % 2**64).to_bytes(8, "little") + data[place + 8 :]


def _with_field(chance: random.Random, data: bytes) -> bytes:
    """The same bytes with a number replaced, in the head of a structure or after it."""
    starts = [match.start() for match in SIGNATURES.finditer(data)]
    if not starts:
        return data
    width = chance.choice((1, 1, 2, 4, 8))
    place = chance.choice(starts) + chance.randrange(4, chance.choice((16, 48, 200)))
    before = int.from_bytes(data[place : place + width], "little")
    number = chance.choice((*NUMBERS, before + 1, before - 1, before + 8, 2 * before, len(data))) % (1 << 8 * width)
    return data[:place] + number.to_bytes(width, "little") + data[place + width :]


def _with_text(chance: random.Random, data: bytes) -> bytes:
    """The same bytes with the configuration in an attribute replaced by another one that is not longer."""
    matches = [match for match in CONFIGS.finditer(data) if len(match[0]) > 50]
    if not matches:
        return data
    match = chance.choice(matches)
    try:
        text = text_of(changed_tree(chance, json.loads(match[0])))
    except ValueError:
        return data
    text = text[: len(match[0])].ljust(len(match[0]))
    return data[: match.start()] + text + data[match.end() :]


def archive_seeds() -> list[Input]:
    names = ("stack.keras", "masked_graph.keras", "keras2_masks.keras")
    return [Input(".keras", (DATA / name).read_bytes()) for name in names]


def archive_changed(chance: random.Random, valid: Input) -> Input:
    data, change = valid.data, chance.random()
    if change < 0.9:
        members = unpacked(data)
        for i, (name, content) in enumerate(members):
            if name == "config.json" and change < 0.55:
                members[i] = name, text_of(changed_tree(chance, json.loads(content)))
            elif name.endswith(".h5") and 0.55 < change < 0.75:
                members[i] = name, hdf5_changed(chance, Input(".h5", content)).data
        if change > 0.75:
            members = changed_members(chance, members)
        data = packed(members, compressed=chance.random() < 0.5)
    if change > 0.85:
        data = changed_bytes(chance, data)
    return valid._replace(data=data)
