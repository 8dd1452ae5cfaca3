"""Files that did harm and are too large to be kept: made anew for each run of the corpus."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.inputs import Input, packed, unpacked

DATA = Path(__file__).parent.parent / "data"


def _hollow(tag: int) -> Input:
    """An ONNX file of a million empty messages in its graph, of two bytes each."""
    content = bytes([tag, 0]) * 1_000_000
    length = b"".join(bytes([len(content) >> shift & 127 | 128]) for shift in (0, 7)) + bytes([len(content) >> 14])
    return Input(".onnx", b"\x3a" + length + content)


def _lists() -> Input:
    layer = {"type": "dense", "shape": [None, None, 2], "weights": ["@", [1]]}
    text = json.dumps({"in_shape": [None, None, 2], "layers": [layer]})
    return Input(".json", text.replace('"@"', "[" + "[]," * 2_000_000 + "[]]").encode())


def _layers_of_safetensors() -> Input:
    model = '{"kind": "Sequential", "batch_first": false, "layers": [' + "[]," * 1_000_000 + "[]]}"
    header = json.dumps({"__metadata__": {"gatewise": "1", "model": model}}).encode()
    return Input(".safetensors", struct.pack("<Q", len(header)) + header)


def _archive(config: str) -> Input:
    members = [("config.json", config.encode()), ("model.weights.h5", (DATA / "keras2_chain.weights.h5").read_bytes())]
    return Input(".keras", packed(members, compressed=True))


def _entry(kind: str, name: str, source: str, **config: Any) -> dict[str, Any]:
    history = {"class_name": "__keras_tensor__", "config": {"keras_history": [source, 0, 0]}}
    return {
        "class_name": kind,
        "config": {"name": name, **config},
        "inbound_nodes": [{"args": [history], "kwargs": {}}],
    }


def _graph(layers: list[dict[str, Any]], last: str) -> Input:
    first = {"class_name": "InputLayer", "config": {"name": "x", "batch_shape": [None, None, 3]}, "inbound_nodes": []}
    model = {"layers": [first, *layers], "input_layers": [["x", 0, 0]], "output_layers": [[last, 0, 0]]}
    return _archive(json.dumps({"class_name": "Functional", "config": model}))


def _masks() -> Input:
    makers = [_entry("Masking", f"m{i}", "x", mask_value=1) for i in range(2000)]
    return _graph([*makers, *(_entry("NotEqual", f"n{i}", "elsewhere") for i in range(2000))], "x")


def _chain() -> Input:
    layers = [_entry("Dropout", f"d{i}", f"d{i - 1}" if i else "x", rate=0.5) for i in range(10_000)]
    return _graph(layers, "d9999")


def _sets() -> Input:
    """A checkpoint whose pickle is a million empty sets."""
    import torch

    usual = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, usual)
    pickled = b"\x80\x02](" + b"\x8f" * 1_000_000 + b"e."
    members = [(name, pickled if name.endswith(".pkl") else data) for name, data in unpacked(usual.getvalue())]
    return Input(".pt", packed(members))


LARGE: dict[str, dict[str, Callable[[], Input]]] = {
    "safetensors": {"layers": _layers_of_safetensors},
    "json": {"lists": _lists},
    "h5": {},
    "keras": {
        "lists": lambda: _archive('{"class_name": "Sequential", "config": {"layers": [' + "[]," * 5_000_000 + "[]]}}"),
        "masks": _masks,
        "chain": _chain,
    },
    "onnx": {
        "nodes": lambda: _hollow(1 << 3 | 2),
        "initializers": lambda: _hollow(5 << 3 | 2),
        "inputs": lambda: _hollow(11 << 3 | 2),
    },
    "pt": {"sets": _sets},
}
