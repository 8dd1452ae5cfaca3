"""Files of JSON: RTNeural's, and safetensors, gatewise's own and PyTorch's weights."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import gatewise as gw
import numpy as np

from tests.fuzz.inputs import NUMBERS, Input, changed_bytes, changed_tree, text_of


def _saved(model: gw.Sequential | gw.LSTM, suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        gw.save(model, path)
        return path.read_bytes()


def rtneural_seeds() -> list[Input]:
    models = [
        gw.Sequential([gw.Dense(1, 3, activation="tanh", seed=1), gw.GRU(3, 2, seed=2), gw.Dense(2, 1, seed=3)]),
        gw.Sequential([gw.Conv1D(2, 3, 2, dilation=2, seed=1), gw.BatchNorm(3), gw.LSTM(3, 2, seed=2)]),
        gw.Sequential([gw.LSTM(1, 2, seed=1), gw.Activation("relu"), gw.Dense(2, 1, activation="sigmoid", seed=2)]),
    ]
    return [Input(".json", _saved(model, ".json")) for model in models]


def rtneural_changed(chance: random.Random, valid: Input) -> Input:
    data = valid.data
    if chance.random() < 0.85:
        data = text_of(changed_tree(chance, json.loads(data)))
    if chance.random() < 0.3:
        data = changed_bytes(chance, data)
    return valid._replace(data=data)


def safetensors_seeds() -> list[Input]:
    models = [
        gw.LSTM(2, 3, 2, bidirectional=True, proj_size=2, seed=1),
        gw.Sequential([gw.Embedding(7, 3, seed=1), gw.GRU(3, 2, seed=2), gw.Last(), gw.Dense(2, 2, seed=3)]),
        gw.Sequential(
            [
                gw.TimeDistributed(gw.Dense(3, 2, activation=gw.Activation("elu", 0.5), seed=1)),
                gw.Bidirectional(gw.RNN(2, 2, bidirectional=True, seed=2), "ave"),
                gw.Conv1D(2, 2, 3, seed=3),
                gw.LayerNorm(2),
                gw.BatchNorm(2),
                gw.Dropout(0.5),
            ]
        ),
    ]
    weights = gw.GRU(2, 3, seed=4).state_dict()
    foreign = [packed_weights({f"encoder.{name}": array for name, array in weights.items()}), packed_weights(weights)]
    return [Input(".safetensors", data) for data in (*(_saved(model, ".safetensors") for model in models), *foreign)]


def packed_weights(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file that does not say to which layer the weights belong."""
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": [*array.shape], "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values())


def safetensors_changed(chance: random.Random, valid: Input) -> Input:
    data = valid.data
    if chance.random() < 0.85:
        end = 8 + int.from_bytes(data[:8], "little")
        header, numbers = json.loads(data[8:end]), data[end:]
        model = header.get("__metadata__", {}).get("model")
        if model is not None and chance.random() < 0.6:
            header["__metadata__"]["model"] = text_of(changed_tree(chance, json.loads(model))).decode()
        else:
            header = changed_tree(chance, header)
        text = text_of(header)
        length = len(text) if chance.random() < 0.95 else chance.choice(NUMBERS) % 2**64
        data = length.to_bytes(8, "little") + text + numbers
    if chance.random() < 0.3:
        data = changed_bytes(chance, data)
    options = {"prefix": chance.choice(("encoder.", "", "a"))} if chance.random() < 0.1 else {}
    return Input(valid.suffix, data, options)
