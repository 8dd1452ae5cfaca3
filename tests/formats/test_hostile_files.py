"""Files made to do harm: each is refused, and takes time and memory in proportion to its size.

Memory is the peak of a child process, which sees what libraries take, too. Work is counted where it can be, and else
bounded by time limits against what never ends.
"""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gatewise as gw
import pytest
from children import assert_refused, load_in_child
from gatewise.formats import json_text
from gatewise.formats.keras import graph, hdf5, hdf5_objects
from gatewise.formats.keras.config import Entry

h5py = pytest.importorskip("h5py")

DATA = Path(__file__).parents[1] / "data"
WEIGHTS = "model.weights.h5"

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
OUTCOMES = {"valid": "Sequential", "group_in_itself": "Sequential"}  # and all others are refused


def test_corpus() -> None:
    """One small file of each fault that was found: each is a model or a FormatError, and takes next to nothing."""
    paths = sorted(path for kind in ("h5", "keras", "safetensors", "json") for path in (CORPUS / kind).iterdir())
    assert len(paths) > 20
    for path, outcome in zip(paths, load_in_child(paths, warm_up=DATA / "stack.keras", seconds=5), strict=True):
        assert outcome.kind == OUTCOMES.get(path.stem, "FormatError"), f"{path}: {outcome}"
        assert outcome.peak < 4 << 20, f"{path}: {outcome}"


# ---- JSON

JSON_TEXTS = {
    "empty lists": "[],", "lists of one": "[0],", "nested lists": "[[[[[[[[]]]]]]]],", "empty objects": "{},",
    "objects of one": '{"a":0},', "objects in objects": '{"b":{"c":{}}},', "numbers": "-9,", "texts": '"ab",',
}  # fmt: skip


def rtneural_file(path: Path, text: str, count: int) -> None:
    layer = '{"type": "dense", "shape": [null, null, 2], "weights": [[' + text * count + "[]], [1]]}"
    path.write_text('{"in_shape": [null, null, 2], "layers": [' + layer + "]}")


def safetensors_file(path: Path, text: str, count: int) -> None:
    model = '{"kind": "Sequential", "batch_first": false, "layers": [' + text * count + "[]]}"
    header = json.dumps({"__metadata__": {"gatewise": "1", "model": model}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def header_file(path: Path, text: str, count: int) -> None:
    header = ('{"a": [' + text * count + "[]]}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def keras_config(text: str, count: int) -> str:
    return '{"class_name": "Sequential", "config": {"layers": [' + text * count + "[]]}}"


def keras_file(path: Path, text: str, count: int) -> None:
    """With a configuration that is packed to a thousandth."""
    weights = path.with_name("empty.h5")
    with h5py.File(weights, "w") as file:
        file.create_group("layers")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", keras_config(text, count))
        archive.write(weights, WEIGHTS)
        archive.writestr(zipfile.ZipInfo("padding"), os.urandom(len(text) * count // 16))


def h5_file(path: Path, text: str, count: int) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = keras_config(text, count)


@pytest.mark.parametrize(
    ("ending", "write", "megabytes"),
    [
        ("json", rtneural_file, 8), ("safetensors", safetensors_file, 4), ("safetensors", header_file, 8),
        ("keras", keras_file, 8), ("keras", keras_file, 3), ("h5", h5_file, 8), ("h5", h5_file, 3),
    ],
)  # fmt: skip
def test_memory_of_json(ending: str, write: Callable[..., None], megabytes: int, tmp_path: Path) -> None:
    """Three bytes make an empty list, which takes a hundred bytes of memory."""
    paths = []
    for name, text in JSON_TEXTS.items():
        paths.append(tmp_path / f"{name}.{ending}")
        write(paths[-1], text, (megabytes << 20) // len(text))
    small = tmp_path / f"small.{ending}"
    write(small, "[],", 3)
    assert_refused(paths, warm_up=small, factor=32 if ending == "keras" else 20)


@pytest.mark.parametrize("text", JSON_TEXTS.values(), ids=JSON_TEXTS)
def test_costs_of_json(text: str) -> None:
    """What is counted before a text is parsed is no less than what its objects take."""
    data = ("[" + text * (2**18 // len(text)) + "0]").encode()
    counted = sum(data.count(character) * size for character, size in json_text.COSTS.items())
    tracemalloc.start()
    value = json_text.parse(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert value
    assert peak < counted + 2 * len(data)


def test_what_people_write_costs_little() -> None:
    """Of all that is written by hand or by a framework nothing comes near the bound."""
    for path in sorted(DATA.glob("*.json")):
        json_text.check_cost(path.read_bytes() * 10_000)
    layers = [gw.Dense(3, 4, activation="relu", seed=0), gw.LSTM(4, 5, seed=0), gw.Dropout(), gw.Dense(5, 1, seed=0)]
    for ending in ("json", "safetensors"):
        path = DATA.parent / f"cost.{ending}"
        try:
            gw.save(gw.Sequential(layers), path)
            data = path.read_bytes()
        finally:
            path.unlink(missing_ok=True)
        json_text.check_cost((data if ending == "json" else data[8 : 8 + int.from_bytes(data[:8], "little")]) * 10_000)


# ---- archives


def test_a_member_that_unpacks_to_more_than_it_says(tmp_path: Path) -> None:
    """A quarter of a gigabyte of zeros, of which the archive says that it has a hundred bytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1 << 8)) + packer.flush()
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", packed)
        archive.writestr(WEIGHTS, bytes(100))
    data = bytearray(path.read_bytes())
    # The method and the size, in front of the member and in the list of members.
    for signature, method, size in ((b"PK\3\4", 8, 22), (b"PK\1\2", 10, 24)):
        place = data.index(signature)
        data[place + method : place + method + 2] = struct.pack("<H", 8)
        data[place + size : place + size + 4] = struct.pack("<I", 100)
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("config.json").file_size == 100
    assert_refused([path], warm_up=DATA / "stack.keras")


def test_an_archive_of_many_members(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(20_000):
            archive.writestr(zipfile.ZipInfo(f"{i}"), b"")
    assert_refused([path], warm_up=DATA / "stack.keras", factor=20)


# ---- graphs of Keras


def graph_entry(kind: str, name: str, source: str, **config: Any) -> dict[str, Any]:
    history = {"class_name": "__keras_tensor__", "config": {"keras_history": [source, 0, 0]}}
    nodes = [{"args": [history], "kwargs": {}}]
    return {"class_name": kind, "config": {"name": name, **config}, "inbound_nodes": nodes}


def graph_config(layers: list[dict[str, Any]], last: str) -> dict[str, Any]:
    first = {"class_name": "InputLayer", "config": {"name": "x", "batch_shape": [None, None, 3]}, "inbound_nodes": []}
    config = {"layers": [first, *layers], "input_layers": [["x", 0, 0]], "output_layers": [[last, 0, 0]]}
    return {"class_name": "Functional", "config": config}


def calls(monkeypatch: pytest.MonkeyPatch, function: str, work: Callable[[], object]) -> int:
    """How often a function of the reader of graphs is called."""
    count, original = 0, getattr(graph, function)

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(graph, function, counted)
        work()
    return count


def test_masks_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer that masks is looked at once, not once for each operation."""
    count = 200
    layers = [graph_entry("Masking", f"m{i}", "x", mask_value=1) for i in range(count)]
    layers += [graph_entry("NotEqual", f"n{i}", "elsewhere") for i in range(count)]
    entries = [Entry.of(layer, "") for layer in layers]
    assert calls(monkeypatch, "input_layer", lambda: graph.mask_operations(entries)) == count


def test_long_chains(tmp_path: Path) -> None:
    """Eight thousand layers one after another, in a graph and in a sequential model."""
    count = 8_000
    layers = [graph_entry("Dropout", f"d{i}", f"d{i - 1}" if i else "x", rate=0.5) for i in range(count)]
    paths = []
    for name, model in (
        ("graph", graph_config(layers, f"d{count - 1}")),
        ("sequence", {"class_name": "Sequential", "config": {"name": "s" * 1000, "layers": layers}}),
    ):
        paths.append(tmp_path / f"{name}.h5")
        with h5py.File(paths[-1], "w") as file:
            file.attrs["model_config"] = json.dumps(model)
            file.create_group("model_weights").attrs["layer_names"] = []
    assert_refused(paths, warm_up=DATA / "around.h5", factor=30, seconds=20)


def test_long_names(tmp_path: Path) -> None:
    """A name is repeated in errors, groups and paths."""
    for layer in (
        {"class_name": "Dropout", "config": {"name": "x" * 1001}},
        {"class_name": "Dropout" * 200, "config": {"name": "x"}},
    ):
        path = tmp_path / "m.h5"
        with h5py.File(path, "w") as file:
            file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": [layer]})
        with pytest.raises(gw.FormatError, match="expected a name of at most 1000 characters"):
            gw.load(path)


def test_one_number_for_many_units(tmp_path: Path) -> None:
    """A mean of one number, of as many units as a file says that there are."""
    config = {"name": "n", "axis": [-1], "mean": 0.5, "variance": 2.0}
    layer = {"class_name": "Normalization", "config": config}
    path, weights = tmp_path / "m.keras", tmp_path / "weights.h5"
    with h5py.File(weights, "w") as file:
        file.create_group("layers")
    for units, count in ((3, 2), (10**9, 1), (2**19, 3)):
        first = {"class_name": "InputLayer", "config": {"name": "x", "batch_shape": [None, None, units]}}
        model = {"class_name": "Sequential", "config": {"name": "s", "layers": [first, *[layer] * count]}}
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", json.dumps(model))
            archive.write(weights, WEIGHTS)
        if units == 3:
            assert len(gw.load(path)) == 2
            continue
        assert_refused([path], warm_up=DATA / "stack.keras")
        with pytest.raises(gw.FormatError, match=r"(mean|variance): expected one number for at most 1048576"):
            gw.load(path)


# ---- HDF5


def h5_bytes(fill: Callable[[Any], None], path: Path, **options: Any) -> bytearray:
    with h5py.File(path, "w", **options) as file:
        fill(file)
    return bytearray(path.read_bytes())


def places(data: bytes, signature: bytes) -> list[int]:
    addresses, address = [], data.find(signature)
    while address >= 0:
        addresses.append(address)
        address = data.find(signature, address + 1)
    return addresses


def test_heaps_whose_free_lists_are_circles(tmp_path: Path) -> None:
    """The library of HDF5 would follow them for ever, and take memory at each turn."""
    path = tmp_path / "m.h5"

    def fill(file: Any) -> None:
        file.attrs["model_config"] = "{}"
        file.create_group("model_weights")

    data = h5_bytes(fill, path, libver="earliest")
    heaps = places(data, b"HEAP")
    assert heaps
    for heap in heaps:
        free, begin = struct.unpack_from("<QQ", data, heap + 16)
        struct.pack_into("<Q", data, begin + free, free)
    path.write_bytes(data)
    assert_refused([path], warm_up=DATA / "around.h5", seconds=10)


def test_trees_whose_nodes_are_circles(tmp_path: Path) -> None:
    """A tree of names that has itself, or one node many times, below it."""
    path = tmp_path / "m.h5"

    def fill(file: Any) -> None:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": []})
        group = file.create_group("model_weights")
        for i in range(2000):
            group.create_group(f"g{i}")

    data = h5_bytes(fill, path)
    trees = [tree for tree in places(data, b"TREE") if data[tree + 5] > 0]
    assert trees
    paths = []
    for kind in ("itself", "one node"):
        changed = bytearray(data)
        for tree in trees:
            count = struct.unpack_from("<H", data, tree + 6)[0]
            for i in range(count):
                child = tree if kind == "itself" else struct.unpack_from("<Q", data, tree + 32)[0]
                struct.pack_into("<Q", changed, tree + 32 + 16 * i, child)
        paths.append(tmp_path / f"{kind}.h5")
        paths[-1].write_bytes(changed)
    assert_refused(paths, warm_up=DATA / "around.h5", seconds=10)


def test_trees_of_shared_nodes() -> None:
    """A tree of eight levels, each of which has the next one 16 times: 2**32 names in 4 KB."""
    tree = bytearray(b"TREE\0\0\1\0" + bytes(16) + bytes(8) + struct.pack("<Q", 0) + bytes(8))
    for level in range(1, 9):
        below = len(tree) - (48 if level == 1 else 24 + 8 + 256)
        tree += b"TREE\0" + bytes([level]) + struct.pack("<H", 16) + bytes(16)
        tree += b"".join(bytes(8) + struct.pack("<Q", below) for _ in range(16)) + bytes(8)
    file = hdf5_objects.BoundedFile(bytes(tree))
    with pytest.raises(ValueError, match="lead to the same bytes again and again"):
        list(hdf5_objects.tree_nodes(file, len(tree) - 24 - 8 - 256))


def test_headers_that_continue_in_themselves(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"

    def fill(file: Any) -> None:
        for i in range(20):
            file.attrs[f"a{i}"] = "x" * 100

    data = h5_bytes(fill, path)
    root = struct.unpack_from("<Q", data, 64)[0]
    size_of_header = struct.unpack_from("<I", data, root + 8)[0]
    assert struct.unpack_from("<HH", data, root + 16) == (hdf5_objects.CONTINUATION, 16)
    struct.pack_into("<QQ", data, root + 24, root + 16, size_of_header)
    path.write_bytes(data)
    assert_refused([path], warm_up=DATA / "around.h5", seconds=10)
    with pytest.raises(gw.FormatError, match="lead to the same bytes again and again"):
        gw.load(path)


def test_groups_in_circles(tmp_path: Path) -> None:
    """A group that is in itself, and one that is in many."""
    with zipfile.ZipFile(DATA / "stack.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    paths = []
    for kind in ("itself", "shared"):
        weights = tmp_path / "weights.h5"
        weights.write_bytes(members[WEIGHTS])
        with h5py.File(weights, "r+") as file:
            group = file.create_group("layers/more")
            if kind == "itself":
                group["again"] = group
            for _ in range(20 if kind == "shared" else 0):
                deeper = group.create_group("a")
                group["b"] = deeper
                group = deeper
        paths.append(tmp_path / f"{kind}.keras")
        with zipfile.ZipFile(paths[-1], "w") as archive:
            for name, data in (members | {WEIGHTS: weights.read_bytes()}).items():
                archive.writestr(name, data)
    assert_refused(paths, warm_up=DATA / "stack.keras", seconds=10)


def test_texts_of_attributes(tmp_path: Path) -> None:
    """A name that stands in the file a thousand times, as of an attribute of endless texts."""
    name = b"model_config\0"
    message = bytes([3, 0]) + struct.pack("<HHH", len(name), 1, 12) + b"\0" + name
    message += bytes([0x19, 2, 1, 0, 0]) + struct.pack("<Q", 2**60)
    path = tmp_path / "m.h5"

    def fill(file: Any) -> None:
        file.attrs["model_config"] = "{}"
        file.create_dataset("names", data=list(message * 1500), dtype="u1")

    h5_bytes(fill, path)
    assert_refused([path], warm_up=DATA / "around.h5", seconds=10)


def test_one_text_many_times(tmp_path: Path) -> None:
    """A list of names of which each leads to the same long text."""
    path = tmp_path / "m.h5"

    def fill(file: Any) -> None:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": []})
        file.create_group("model_weights").attrs.create(
            "layer_names", ["x" * 900, *["y"] * 3999], dtype=h5py.string_dtype()
        )

    data = h5_bytes(fill, path)
    names = data.index(b"layer_names\0")
    first = data.index(struct.pack("<I", 900), names)
    for i in range(4000):
        data[first + 16 * i : first + 16 * i + 16] = data[first : first + 16]
    path.write_bytes(data)
    with pytest.raises(gw.FormatError, match="lead to the same bytes again and again"):
        gw.load(path)


@pytest.mark.parametrize("count", [3, hdf5.MAX_PIECES])
def test_lists_in_pieces(count: int, tmp_path: Path) -> None:
    """As many as anybody needs, and no more."""
    path = tmp_path / "m.h5"

    def fill(file: Any) -> None:
        for i in range(count):
            file.attrs[f"names{i}"] = [f"{i}".encode()]

    store = hdf5.Store(bytes(h5_bytes(fill, path)))
    if count < hdf5.MAX_PIECES:
        assert store.texts("", "names") == ["0", "1", "2"]
        return
    with pytest.raises(ValueError, match="names: expected 300 pieces at most"):
        store.texts("", "names")


# ---- safetensors


def test_layers_without_weights(tmp_path: Path) -> None:
    """Many layers that are nothing need no place of their own for tensors."""
    path = tmp_path / "m.safetensors"
    for text in ("0,", '{"kind": "Last"},', '{"kind": "Dropout", "p": 0.5},'):
        safetensors_file(path, text, (1 << 20) // len(text))
        assert_refused([path], factor=40, spare=8 << 20, seconds=30)
