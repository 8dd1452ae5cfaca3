"""The reader of HDF5: what the library of HDF5 writes is read to the bit, in every form that Keras has ever used."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatewise.formats.keras.hdf5 import Store

h5py = pytest.importorskip("h5py")

DATA = Path(__file__).parents[1] / "data"
VERSIONS = ["earliest", "v108", "v110", "latest"]


def written(fill: Any, **options: Any) -> bytes:
    """The bytes of a file that `fill` puts something in."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **options) as file:
        fill(file)
    return buffer.getvalue()


def files_of_keras() -> list[Any]:
    files = []
    for path in sorted(DATA.iterdir()):
        if path.suffix == ".h5":
            files.append(pytest.param(path.read_bytes(), id=path.name))
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                files.append(pytest.param(archive.read("model.weights.h5"), id=path.name))
    return files


@pytest.mark.parametrize("data", files_of_keras())
def test_files_of_keras(data: bytes) -> None:
    """Every dataset and every text attribute is read as the HDF5 library reads it."""
    store, paths = Store(data), []

    def compare(path: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.dtype.kind == "f" and item.shape:
                array = store.array(path, item.shape)
                np.testing.assert_array_equal(array, item[()])
                assert array.dtype == item.dtype
            paths.append(path)
            return
        for name, value in item.attrs.items():
            if np.ndim(value) == 1:
                assert store.texts(path, name) == [text.decode() if isinstance(text, bytes) else text for text in value]
            else:
                assert store.text(path, name) == (value.decode() if isinstance(value, bytes) else value)

    with h5py.File(io.BytesIO(data)) as file:
        compare("", file)
        file.visititems(compare)
        roots = list(file)
    assert sorted(path for root in roots for path in store.datasets(root)) == sorted(paths)
    assert store._file._left > len(data)  # it may read the whole file three times, and needs less than two


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
def test_numbers(version: str, dtype: str) -> None:
    array = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)

    def fill(file: Any) -> None:
        file["a/b"] = array
        compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        compact.set_layout(h5py.h5d.COMPACT)
        kind, space = h5py.h5t.py_create(array.dtype), h5py.h5s.create_simple(array.shape)
        h5py.h5d.create(file["a"].id, b"compact", kind, space, compact).write(h5py.h5s.ALL, h5py.h5s.ALL, array)

    store = Store(written(fill, libver=version))
    for name in ("a/b", "a/compact"):
        read = store.array(name, (3, None))
        np.testing.assert_array_equal(read, array)
        assert read.dtype == array.dtype.newbyteorder("=")
        assert read.flags.aligned
        assert read.flags.writeable


@pytest.mark.parametrize("version", VERSIONS)
def test_texts(version: str) -> None:
    """Of fixed and of variable length, padded in all three ways, one and many and none."""
    words = ["a", "", "größe", "x" * 999]

    def fill(file: Any) -> None:
        attributes = file.create_group("g").attrs
        attributes["one"] = "größe"
        attributes["bytes"] = b"ab"
        attributes["many"] = [word.encode() for word in words]
        attributes.create("long", words, dtype=h5py.string_dtype())
        attributes["none"] = []
        attributes = file.create_group("h").attrs
        attributes["number"] = 3.0
        attributes["empty"] = h5py.Empty("S1")
        paddings = h5py.h5t.STR_SPACEPAD, h5py.h5t.STR_NULLTERM, h5py.h5t.STR_NULLPAD
        for padding, name, text in zip(
            paddings, ("spaces", "ended", "filled"), (b"abc   ", b"abc\0de", b"abc"), strict=True
        ):
            kind = h5py.h5t.C_S1.copy()
            kind.set_size(6)
            kind.set_strpad(padding)
            space = h5py.h5s.create(h5py.h5s.SCALAR)
            h5py.h5a.create(attributes._id, name.encode(), kind, space).write(np.array(text, "S6"), kind)
        for piece in range(3):
            file.attrs[f"pieces{piece}"] = [f"{piece}".encode()]

    store = Store(written(fill, libver=version))
    assert store.text("g", "one") == "größe"
    assert store.text("g", "bytes") == "ab"
    assert store.texts("g", "many") == store.texts("g", "long") == words
    assert store.texts("g", "none") == []
    assert [store.text("h", name) for name in ("spaces", "ended", "filled")] == ["abc"] * 3
    assert store.texts("", "pieces") == ["0", "1", "2"]
    assert store.text("g", "missing") is store.texts("g", "missing") is None
    for place in ("g/many", "h/number", "h/empty"):
        path, name = place.split("/")
        with pytest.raises(ValueError, match=f"{path}: {name}: expected a text"):
            store.text(path, name)
    for place in ("g/one", "h/number", "h/empty"):
        path, name = place.split("/")
        with pytest.raises(ValueError, match=f"{path}: {name}: expected a list of texts"):
            store.texts(path, name)


@pytest.mark.parametrize("count", [0, 1, 9, 400, 5000])
def test_groups_of_many(count: int) -> None:
    """Whose tree of names has no, one and several levels."""

    def fill(file: Any) -> None:
        group = file.create_group("g")
        for i in range(count):
            group[f"n{i}"] = np.float32([i])

    store = Store(written(fill))
    assert sorted(store.datasets("g")) == sorted(f"g/n{i}" for i in range(count))
    for i in range(0, count, 100):
        assert store.array(f"g/n{i}", (1,)) == [i]
    assert not store.has("g/n")
    assert not store.has("g/n0/x")


def test_groups_in_the_newer_form() -> None:
    """A few links and attributes lie one after another; more of them in a heap, which is refused by name."""

    def fill(file: Any) -> None:
        for count in (3, 20):
            group = file.create_group(f"links{count}", track_order=True)
            for i in range(count):
                group[f"n{i}"] = np.float32([i])
        group = file.create_group("attributes20", track_order=True)
        for i in range(20):
            group.attrs[f"n{i}"] = "x"

    for version in VERSIONS:
        store = Store(written(fill, libver=version))
        assert sorted(store.datasets("links3")) == ["links3/n0", "links3/n1", "links3/n2"]
        assert store.array("links3/n2", (1,)) == [2]
        for name in ("links", "attributes"):
            with pytest.raises(ValueError, match=f"expected the {name} of a group in its header"):
                store.datasets(f"{name}20")


def test_what_is_in_no_group() -> None:
    def fill(file: Any) -> None:
        file["type"] = np.dtype("f4")
        file["shared"] = np.float32([1])
        file.create_dataset("of", (3,), file["type"])

    store = Store(written(fill))
    with pytest.raises(ValueError, match="expected groups and datasets, got something else at 'type'"):
        store.has("type")
    with pytest.raises(ValueError, match="share no types"):
        store.has("of")
    with pytest.raises(ValueError, match="expected an HDF5 file"):
        Store(written(fill, userblock_size=512))
    with pytest.raises(ValueError, match=r"expected a sound HDF5 file of \d+ bytes, got \d+"):
        Store(written(fill)[:-1])
