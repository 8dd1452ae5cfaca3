"""Files of torch.save, read without PyTorch: training checkpoints load, and no file takes more than its size says."""

import io
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import gatewise as gw
import numpy as np
import pytest
import torch
from children import assert_refused, load_in_child
from conftest import assert_same_bits
from gatewise.formats.errors import reading
from torch import nn

CORPUS = Path(__file__).parents[1] / "fuzz/corpus/pt"
FORMATS = {
    "zip": {}, "zip, protocol 4": {"pickle_protocol": 4}, "zip, protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pt"


@pytest.fixture
def small(tmp_path):
    """For the child that measures memory, whose first load imports what is needed."""
    torch.save(nn.GRU(2, 3).state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"


def weights_of(module):
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def trained(module, make):
    """An optimizer that has a state."""
    optimizer = make(module.parameters())
    module(torch.randn(3, 2, 5))[0].square().sum().backward()
    optimizer.step()
    return optimizer


def lightning(module, optimizer):
    """As PyTorch Lightning 2 writes it, with values of its loops, callbacks and hyperparameters."""
    progress = {"total": {"ready": 3, "completed": 3}, "current": {"ready": 3, "completed": 3}}
    return {
        "epoch": 2,
        "global_step": 300,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": OrderedDict((f"model.{name}", value) for name, value in module.state_dict().items()),
        "loops": {
            "fit_loop": {"state_dict": {}, "epoch_progress": progress, "epoch_loop.batch_progress": progress},
            "validate_loop": {"state_dict": {}},
        },
        "callbacks": {
            "ModelCheckpoint{'monitor': 'loss', 'mode': 'min'}": {
                "monitor": "loss",
                "best_model_score": torch.tensor(0.25),
                "best_model_path": "/tmp/best.ckpt",
                "kth_value": torch.tensor(0.5),
                "best_k_models": {"/tmp/best.ckpt": torch.tensor(0.25)},
            },
            "EarlyStopping": {"wait_count": 1, "best_score": torch.tensor(0.1), "stopped_epoch": 0},
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "lr": 1e-3,
            "sizes": (5, 7),
            "names": ["a", "b"],
            "folder": Path("x"),
            "rate": np.float32(1),
        },
        "NativeMixedPrecisionPlugin": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
    }


CHECKPOINTS = {
    "state_dict": lambda module: module.state_dict(),
    "parameters": lambda module: dict(module.named_parameters()),
    "PyTorch's tutorial": lambda module: {
        "epoch": 5,
        "model_state_dict": module.state_dict(),
        "optimizer_state_dict": trained(module, torch.optim.Adam).state_dict(),
        "loss": torch.tensor(0.4),
    },
    "momentum": lambda module: {
        "net": module.state_dict(),
        "acc": 91.5,
        "best": None,
        "optimizer": trained(module, lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9)).state_dict(),
        "random": torch.get_rng_state(),
        "words": {f"word{i}": i for i in range(2000)},
        "pairs": [(i, i + 1) for i in range(2000)],
        ("a", "key"): {3: {4, 5}, 2.5: b"bytes", True: bytearray(b"more"), frozenset((1,)): 1 + 2j},
    },
    "nested": lambda module: {"training": {"args": {"lr": 0.1}, "model": module.state_dict()}, "step": 2**70},
    "lightning": lambda module: lightning(module, trained(module, torch.optim.AdamW)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("format", FORMATS)
def test_checkpoints(kind, format, path):
    """Optimizers, schedulers, numbers of training and words beside the weights are no hindrance."""
    module = nn.LSTM(5, 7, 2, bidirectional=True)
    torch.save(CHECKPOINTS[kind](module), path, **FORMATS[format])
    layer = gw.load(path, **({"prefix": "model"} if kind == "lightning" else {}))
    assert_same_bits(layer.state_dict(), weights_of(module))


def test_pytorch_is_not_needed(path):
    """Nor imported: what a file says is data to the reader."""
    torch.save({"model": nn.GRU(3, 4).state_dict()}, path)
    program = f"import sys; sys.modules['torch'] = None; import gatewise as gw; print(gw.load({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "GRU(3, 4)\n", done.stderr


@pytest.mark.parametrize("format", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, format, path):
    """Values of 16 bits become float32 exactly, including subnormals, infinity and NaN."""
    module = nn.GRU(3, 4).to(dtype)
    with torch.no_grad():
        for i, value in enumerate((float("inf"), float("nan"), -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max)):
            module.weight_hh_l0[0, i % 4] = value
        module.bias_hh_l0.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[3] = 1  # a denormal number
    torch.save(module.state_dict(), path, **FORMATS[format])
    wide = module.float() if dtype.itemsize == 2 else module
    assert_same_bits(gw.load(path).state_dict(), weights_of(wide))


@pytest.mark.parametrize("kind", [torch.int32, torch.float8_e4m3fn, torch.uint16, torch.complex64])
def test_other_dtypes_are_refused_by_name(kind, path):
    weights = nn.GRU(3, 4).state_dict()
    torch.save(weights | {"weight_hh_l0": torch.zeros(12, 4).to(kind)}, path)
    with pytest.raises(gw.FormatError, match=rf"weight_hh_l0: expected numbers of .*, got {str(kind)[6:]}"):
        gw.load(path)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_tensors_that_are_no_rows_of_numbers(path):
    weights = nn.GRU(3, 4).state_dict()
    for value, name in (
        (torch._neg_view(torch.zeros(12, 4)), "negative"),
        (torch.zeros(12, 4).to_sparse(), "sparse_tensor"),
        (torch.quantize_per_tensor(torch.zeros(12, 4), 0.1, 0, torch.qint8), "qtensor"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested_tensor"),
        (torch.zeros(12, 4, device="meta"), "meta_tensor"),
    ):
        torch.save(weights | {"weight_hh_l0": value}, path)
        with pytest.raises(gw.FormatError, match=f"weight_hh_l0: expected numbers of .*, got .*{name}"):
            gw.load(path)


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_views_and_tied_weights(format, path):
    """Transposed, cut out of others, shared by several names: the numbers of each storage are there once."""
    module = nn.LSTM(6, 6)
    base = torch.randn(80, 30)
    with torch.no_grad():
        module.weight_ih_l0.copy_(base.t()[2:26, 7:67:10])
    tied = nn.Embedding(40, 6)
    whole = {f"rnn.{name}": value for name, value in module.state_dict().items()}
    whole |= {"rnn.weight_ih_l0": base.t()[2:26, 7:67:10], "encoder.weight": tied.weight, "decoder.weight": tied.weight}
    whole |= {f"again.{name}": value for name, value in module.state_dict().items()}
    torch.save(whole, path, **FORMATS[format])
    assert_same_bits(gw.load(path, prefix="rnn").state_dict(), weights_of(module))
    assert_same_bits(gw.load(path, prefix="again").state_dict(), weights_of(module))
    same = {f"{kind}_l{i}": module.state_dict()[f"{kind}_l0"] for i in (0, 1) for kind in ("weight_ih", "weight_hh")}
    torch.save(same, path, **FORMATS[format])
    assert gw.load(path).num_layers == 2


class Reference:
    """It is pickled as a storage, or as a tensor of one."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments

    def __reduce__(self):
        return getattr(torch._utils, self.name), self.arguments


class OldPickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.arguments if isinstance(value, Reference) and value.name == "storage" else None


@pytest.mark.parametrize("order", ["little", "big"])
def test_files_of_the_first_versions(order, path):
    """Storages that are parts of others, tensors without the news of later versions, and Python 2's ordered dicts."""
    module = nn.GRU(3, 4)
    weights = module.state_dict()
    numbers = np.concatenate([np.zeros(2), *(value.numpy().ravel() for value in weights.values())]).astype("f4")
    tensors, begin = [], 2
    for name, value in weights.items():
        part = ("part", begin - 1, value.numel() + 1)  # with the last number of the tensor before it
        storage = Reference("storage", "storage", torch.FloatStorage, "7", "cpu", len(numbers), part)
        tensors.append([name, Reference("_rebuild_tensor", storage, 1, tuple(value.shape), value.stride())])
        begin += value.numel()
    file = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": order == "little"}):
        pickle.dump(value, file, 2)
    OldPickler(file, 2).dump(tensors)
    pickle.dump(["7"], file, 2)
    code = "<" if order == "little" else ">"
    file.write(struct.pack(f"{code}q", len(numbers)) + numbers.astype(f"{code}f4").tobytes())
    pairs = file.getvalue().replace(b"]q\x00", b"ccollections\nOrderedDict\n]q\x00", 1)
    end = pairs.rindex(b".\x80\x02]q\x00")  # of the tensors
    path.write_bytes(pairs[:end] + b"\x85R" + pairs[end:])
    assert_same_bits(gw.load(path).state_dict(), weights_of(module))


def test_several_state_dicts_are_named(path):
    weights = nn.GRU(3, 4).state_dict()
    torch.save({"model": {"rnn": {}, **weights}, "average": weights | {"bias_ih_l0": torch.ones(12)}}, path)
    with pytest.raises(gw.FormatError, match=r"got layers of prefix 'average\.', 'model\.' and 0 other arrays"):
        gw.load(path)
    assert gw.load(path, prefix="average").parameters["bias_ih_l0"].all()


# -----------------------------------------------------------------------------------------------------------
# Files that are not a state_dict


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_that_are_not_a_state_dict(path):
    """They are refused in one line, without escapes, and without advice to let the file execute anything."""
    module = nn.GRU(3, 4)
    torch.jit.script(module).save(path)
    refusals = {"TorchScript": refusal(path)}
    for format in FORMATS.values():
        torch.save(module, path, **format)
        refusals[f"torch.nn.modules.rnn.GRU {format}"] = refusal(path)
    path.write_bytes(pickle.dumps(gw.LSTM(3, 4)))
    refusals["gatewise.layers.recurrent.LSTM"] = refusal(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    refusals["torch.save wrote, got dict"] = refusal(path)
    path.write_text("no archive\n")
    refusals["got text"] = refusal(path)
    np.savez(path.with_suffix(".npz"), a=1)
    path.with_suffix(".npz").rename(path)
    refusals["one data.pkl"] = refusal(path)
    for words, text in refusals.items():
        assert words.split(" {")[0] in text
        assert text.isprintable()
        assert "weights_only" not in text
        assert "torch.load" not in text


def refusal(path):
    with pytest.raises(gw.FormatError) as caught:
        gw.load(path)
    return str(caught.value)


# -----------------------------------------------------------------------------------------------------------
# Files made to do harm


def with_pickle(path, pickled, storage=b"\0" * 4, **changes):
    """An archive as torch.save writes it, of this pickle and one storage."""
    with zipfile.ZipFile(path, "w") as archive:
        members = {"data.pkl": pickled, "byteorder": b"little", "data/0": storage, "version": b"3\n"} | changes
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"weights/{name}"), data)
    return path


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01t"
MANY = 1_000_000


def test_memory_is_bounded(tmp_path, small):
    """A byte or two of a pickle, a thousandfold: none makes more than some bytes for each."""
    texts = b"".join(b"\x8c\x03" + b"%03x" % (i % 4096) + b"\x94" for i in range(MANY // 8))
    names = b"".join(b"\x8c\x05%05x}" % i for i in range(MANY // 8))
    classes = b"".join(b"c%x\n%x\n" % (i, i) for i in range(MANY // 8))
    pickles = {
        "sets": b"](" + b"\x8f" * MANY + b"e",
        "dicts": b"](" + b"}" * MANY + b"e",
        "lists": b"](" + b"]" * MANY + b"e",
        "marks": b"(" * MANY,
        "tuples": b")" + b"\x85" * MANY,
        "wide": b"(" + b"K\x01" * MANY + b"t",
        "numbers": b"](" + b"Mab" * MANY + b"e",
        "calls": b"](" + b"ccollections\nOrderedDict\nq\0" + b"h\0)R" * (MANY // 4) + b"e",
        "texts": b"](" + texts + b"e",
        "names": b"}(" + names + b"u",
        "classes": b"](" + classes + b"e",
        "memory": b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(MANY // 4)),
        "place": b"Nr\xff\xff\xff\xff",
        "text": b"X\xff\xff\xff\x7fa",
        "long": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa",
        "bytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa",
        "digits": b"\x8b\xff\xff\xff\x7f1",
        "tensors": b"](" + REBUILD + b"q\0(" + STORAGE + b"QK\0))\x89Ntq\x01" + b"h\0h\x01R" * (MANY // 8) + b"e",
        "storages": b"](" + STORAGE + b"q\0" + b"h\0Q" * (MANY // 4) + b"e",
    }  # fmt: skip
    paths = [with_pickle(tmp_path / f"{name}.pt", b"\x80\x02" + code + b".") for name, code in pickles.items()]
    legacy = tmp_path / "legacy.pt"
    head = legacy_parts({})[:3]
    legacy.write_bytes(b"".join(head) + b"\x80\x02](" + b"}" * MANY + b"e.")
    assert_refused([*paths, legacy], warm_up=small, spare=32 << 20)


def test_time_is_bounded(tmp_path, small):
    """What would be worked on again at each mention of it: hashes of pairs of pairs, long texts, wide tuples."""
    pairs = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200))
    wide = b"(" + b"K\x01" * (MANY // 4) + b"tq\0"
    long = b"X" + struct.pack("<I", MANY) + b"a" * MANY + b"q\0"
    shapes = REBUILD + b"q\1(" + STORAGE + b"QK\0h\0h\0\x89Ntq\2"
    ordered = b"ccollections\nOrderedDict\nq\1]("
    weights = {f"{'deep' * 9000}{i}": {"weight_ih_l0": torch.zeros(1), "weight_hh_l0": torch.zeros(1)} for i in (0, 1)}
    torch.save(weights, tmp_path / "deep.pt")
    pickles = {
        "key": b"}" + pairs + b"K\x01s",
        "keys": b"}(" + pairs + b"q\xc8" + b"h\xc8K\x01" * 1000 + b"K\x01u",
        "shapes": wide + shapes + b"](" + b"h\1h\2R" * (MANY // 8) + b"e",
        "arguments": wide + REBUILD + b"q\1](" + b"h\1h\0R" * (MANY // 8) + b"e",
        "calls": wide + ordered + b"h\1h\0R" * (MANY // 8) + b"e",
        "texts": b"}(" + long + b"K\x01" + b"h\0K\x01" * (MANY // 8) + b"u",
        "pairs": b"](" + b"]" * (MANY // 8) + b"e\x85q\0" + ordered + b"h\1h\0R" * (MANY // 8) + b"e",
    }  # fmt: skip
    paths = [with_pickle(tmp_path / f"{name}.pt", b"\x80\x02" + code + b".") for name, code in pickles.items()]
    for outcome in load_in_child([*paths, tmp_path / "deep.pt"], warm_up=small, seconds=30):
        assert outcome.kind == "FormatError", outcome


def legacy_parts(weights):
    """The pickles of an old file, and the numbers after them."""
    written = io.BytesIO()
    torch.save(weights, written, _use_new_zipfile_serialization=False)
    data = written.getvalue()
    reader, ends = io.BytesIO(data), [0]
    for _ in range(5):  # magic, protocol, system, object, keys
        for _ in pickletools.genops(reader):
            pass
        ends.append(reader.tell())
    return [data[begin:end] for begin, end in zip(ends, [*ends[1:], None], strict=True)]


def test_old_files_have_all_their_numbers(path):
    """A storage that is listed but missing must not become uninitialised memory."""
    weights = {name: value + 1 for name, value in nn.LSTM(3, 32).state_dict().items()}
    *head, keys, numbers = legacy_parts(weights)
    listed = pickle.loads(keys)
    for wrong in ([], listed[:-1], [*listed, listed[0]], [*listed[:-1], listed[0]], [*listed, "7"], [[]], [1, 2, 3, 4]):
        path.write_bytes(b"".join(head) + pickle.dumps(wrong, 2) + numbers)
        with pytest.raises(gw.FormatError, match="expected the numbers of each storage once"):
            gw.load(path)
    for wrong in (b"", numbers[:-1], struct.pack("<q", 10) + numbers[8:], struct.pack("<q", -1) + numbers[8:]):
        path.write_bytes(b"".join(head) + keys + wrong)
        with pytest.raises(gw.FormatError, match=r"storage '.*': expected .* numbers, got"):
            gw.load(path)
    path.write_bytes(b"".join(head) + keys + numbers)
    assert_same_bits(gw.load(path).state_dict(), {name: value.numpy() for name, value in weights.items()})


def test_archives_that_are_not_what_they_seem(path):
    """Numbers cut short, members that occur twice, overlap or are compressed, and offsets beyond the file's end."""
    torch.save(nn.GRU(3, 4).state_dict(), path)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
        places = {member.filename: member.header_offset for member in archive.infolist()}

    def written(changes, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in (members | changes).items():
                archive.writestr(name, data)
        return refusal(path)

    assert "expected 144 bytes of numbers, got 140" in written({"weights/data/0": members["weights/data/0"][:-4]})
    assert "without compression" in written({}, zipfile.ZIP_DEFLATED)
    assert "TorchScript" in written({"weights/constants.pkl": b""})
    assert "byteorder: expected little or big" in written({"weights/byteorder": b"middle"})
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            archive.writestr(name, members[name])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("weights/data/0", members["weights/data/0"])
    assert "two members of the same name" in refusal(path)
    first, second = (struct.pack("<I", places[f"weights/data/{i}"]) for i in range(2))
    directory = good.index(b"PK\x01\x02")
    path.write_bytes(good[:directory] + good[directory:].replace(second, first))
    assert "overlap" in refusal(path)
    for size in (1, 30, 100, directory, directory + 50, len(good) - 1):
        path.write_bytes(good[:size])
        assert refusal(path)
    path.write_bytes(good[:directory] + good[directory:].replace(first, struct.pack("<I", 2**31)))
    assert refusal(path)


UNFORESEEN = [KeyError("name"), StopIteration(), AttributeError("x"), struct.error("short"), zipfile.BadZipFile("bad")]


@pytest.mark.parametrize("error", UNFORESEEN, ids=repr)
def test_errors_that_no_reader_foresaw(error):
    """Whoever catches FormatError catches them, and their kind and place are there for who looks for the fault."""
    with pytest.raises(gw.FormatError, match=rf"^a\.pt: {type(error).__name__}: ") as caught, reading("a.pt"):
        raise error
    assert caught.value.__cause__ is error


def test_errors_that_are_of_no_file():
    for error in (OSError(5, "broken disk"), MemoryError(), ImportError("no h5py"), KeyboardInterrupt()):
        with pytest.raises(type(error)), reading("a.pt"):
            raise error
    with pytest.raises(gw.FormatError, match=r"^a\.pt: one two\\x1b\[0m \\xe4$"), reading("a.pt"):
        raise ValueError("one\n\ttwo\x1b[0m\u2028\xe4")
    with pytest.raises(gw.FormatError, match=r"a \.\.\.$") as caught, reading("a.pt"):
        raise ValueError("a" * 10**6)
    assert len(str(caught.value)) < 1100


@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.glob("*")))
def test_corpus(name):
    """Small files that once did harm."""
    if name.startswith("good"):
        gw.load(CORPUS / name)
    else:
        refusal(CORPUS / name)


def test_damaged_files(path):
    """Changed bytes, pieces cut out and put in: a layer or a FormatError."""
    rng, unforeseen = np.random.default_rng(0), []
    for format in ("zip", "legacy"):
        torch.save({"model": nn.GRU(3, 4).state_dict(), "epoch": 3}, path, **FORMATS[format])
        good = path.read_bytes()
        for _ in range(300):
            bad = bytearray(good)
            for place in rng.integers(0, len(bad), rng.integers(1, 6)):
                bad[place] = rng.integers(0, 256)
            begin, size = rng.integers(0, len(bad)), rng.integers(0, 50)
            if rng.random() < 0.3:
                del bad[begin : begin + size]
            path.write_bytes(bad[: rng.integers(0, len(bad))] if rng.random() < 0.3 else bad)
            try:
                gw.load(path)
            except gw.FormatError as error:
                unforeseen += [error] if error.__cause__ else []
    assert not unforeseen
