"""The inputs of the fuzzer, and the changes that many formats share: of bytes, of JSON, of archives."""

from __future__ import annotations

import copy
import io
import json
import random
import warnings
import zipfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NUMBERS = (
    0, 1, -1, 2, 3, 4, 5, 7, 8, 9, 16, 63, 64, 127, 128, 255, 256, 4096, 2**15, 2**16, 2**20, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31), -(2**63),
)  # fmt: skip
VALUES = (
    None, True, False, 0.5, -0.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"), "", "a", "x" * 300,
    "\ud800", "\0", "../a", "tanh", "relu", "linear", "float64", "int8", [], {}, [[]], [None], {"a": None}, [0] * 100,
)  # fmt: skip
DEEP = "@nested {} times@"  # stands in a tree of JSON for lists that json.dumps could not write


class Input(NamedTuple):
    """One file, and the options that it is loaded with."""

    suffix: str
    data: bytes
    options: Mapping[str, Any] = MappingProxyType({})  # of gw.load


# ---- bytes


def changed_bytes(chance: random.Random, data: bytes, most: int = 4) -> bytes:
    """The same bytes with some replaced, left out, doubled, moved, or overwritten by another number."""
    changed = bytearray(data or b"\0")
    for _ in range(chance.randint(1, most)):
        if not changed:
            break
        start, size = chance.randrange(len(changed)), min(chance.choice((1, 1, 2, 4, 8, 16, 100)), len(changed))
        change = chance.randrange(8)
        if change == 0:
            changed[start] = chance.randrange(256)
        elif change == 1:
            changed[start] ^= 1 << chance.randrange(8)
        elif change == 2:
            del changed[start : start + size]
        elif change == 3:
            changed[start:start] = changed[start : start + size]
        elif change == 4:
            other = chance.randrange(len(changed))
            changed[start : start + size] = changed[other : other + size]
        elif change == 5:
            changed[start : start + 1] = chance.choice(
                (b"9", b"-", b"{", b"]", b'"', b"e", b"null", b"\\u0000", b"\xff" * 8)
            )
        elif change == 6:
            width = chance.choice((1, 2, 4, 8))
            number = chance.choice((*NUMBERS, len(changed), start)) % (1 << 8 * width)
            changed[start : start + width] = number.to_bytes(width, chance.choice(("little", "little", "big")))
        elif chance.random() < 0.2:
            del changed[start:]
    return bytes(changed)


# ---- JSON


def changed_tree(chance: random.Random, tree: Any) -> Any:
    """The same tree with some nodes left out, doubled, swapped, renamed, nested or replaced."""
    try:
        root = [copy.deepcopy(tree)]
    except RecursionError:  # an earlier change nested it deeply
        return tree
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        container, key = _spot(chance, root)
        value, change = container[key], chance.randrange(12)
        if change == 0 and container is not root:
            del container[key]
        elif change == 1:
            _insert(chance, container, key, copy.deepcopy(value))
        elif change == 2:
            other, place = _spot(chance, root)
            if other is container or not isinstance(value, (list, dict)):
                other[place], container[key] = container[key], other[place]
        elif change == 3:
            container[key] = copy.deepcopy(chance.choice(VALUES))
        elif change == 4:
            other, place = _spot(chance, root)
            container[key] = copy.deepcopy(other[place])
        elif change == 5:
            for _ in range(chance.choice((1, 1, 2, 30))):
                container[key] = [container[key]] if chance.random() < 0.5 else {chance.choice(KEYS): container[key]}
        elif change == 6 and isinstance(value, list):
            container[key] = (value * chance.choice((2, 3, 100)))[:5000]
        elif change == 7 and isinstance(value, dict) and value:
            name = chance.choice([*value])
            value[chance.choice((*KEYS, str(name) + "x"))] = value.pop(name)
        elif change == 8:
            _insert(chance, container, key, copy.deepcopy(chance.choice((*VALUES, *NUMBERS))))
        elif change == 9:
            container[key] = DEEP.format(chance.choice((50, 500, 5000, 100_000)))
        elif isinstance(value, str):
            container[key] = chance.choice((value + "_1", value[:-1], value.upper(), chance.choice(NAMES)))
        else:
            container[key] = chance.choice((*NUMBERS, value if isinstance(value, bool) else -1))
    return root[0]


KEYS = ("name", "config", "class_name", "layers", "units", "dtype", "activation", "type", "shape", "seed", "alpha", "a")
NAMES = (
    "LSTM", "GRU", "SimpleRNN", "Dense", "Bidirectional", "TimeDistributed", "Masking", "Embedding", "Conv1D",
    "Sequential", "Functional", "NotEqual", "InputLayer", "Lambda", "lstm", "gru", "dense", "conv1d", "batchnorm",
    "activation", "elu", "sigmoid", "softmax", "selu", "F32", "F64", "BF16", "I64", "weight_ih_l0",
    "weight_hh_l0_reverse", "kind", "bogus",
)  # fmt: skip


def _spot(chance: random.Random, root: list[Any]) -> tuple[Any, Any]:
    """A random node. The search may end at each level, so that it does not nearly always end at a number."""
    container, key = root, 0
    while isinstance(container[key], (list, dict)) and container[key] and chance.random() < 0.8:
        container = container[key]
        key = chance.choice([*container]) if isinstance(container, dict) else chance.randrange(len(container))
    return container, key


def _insert(chance: random.Random, container: Any, key: Any, value: Any) -> None:
    if isinstance(container, dict):
        container[chance.choice((*KEYS, str(key) + "_1"))] = value
    else:
        container.insert(key, value)
        del container[5000:]


def text_of(tree: Any) -> bytes:
    """JSON of a tree, in which each DEEP text is replaced by nesting that json.dumps could not write.

    Only the first three texts of each depth are replaced, since a list may hold thousands of them.
    """
    try:
        text = json.dumps(tree)
    except RecursionError:
        text = "[" * 10_000 + "]" * 10_000
    for count in (50, 500, 5000, 100_000):
        text = text.replace(json.dumps(DEEP.format(count)), "[" * count + "]" * count, 3)
    return text.encode()


# ---- archives


def unpacked(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def packed(members: list[tuple[str, bytes]], compressed: bool = False) -> bytes:
    file, how = io.BytesIO(), zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", how) as archive:
        warnings.simplefilter("ignore")  # of names that occur twice
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)  # a fixed date
    return file.getvalue()


def changed_members(chance: random.Random, members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """The same members with one of them left out, doubled, renamed, swapped, cut or much longer."""
    changed = [*members]
    i = chance.randrange(len(changed))
    (name, data), change = changed[i], chance.randrange(6)
    if change == 0:
        del changed[i]
    elif change == 1:
        changed.insert(chance.randrange(len(changed)), (name, chance.choice(changed)[1]))
    elif change == 2:
        changed[i] = chance.choice((name + "x", "../" + name, name.upper(), chance.choice(changed)[0] + "0", "")), data
    elif change == 3:
        other = chance.randrange(len(changed))
        changed[i], changed[other] = (name, changed[other][1]), (changed[other][0], data)
    elif change == 4:
        changed[i] = name, data[: chance.randrange(len(data) + 1)]
    else:
        changed[i] = name, data + chance.choice((b" ", b"\0", b"[],", b"{}")) * chance.choice((1, 1000, 200_000))
    return changed
