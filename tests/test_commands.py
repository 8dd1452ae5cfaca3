"""The commands on files: info, convert, verify, run, bench. In this process, but where a signal or a crash matters."""

import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import gatewise as gw
import numpy as np
import pytest
from gatewise.__main__ import main
from gatewise.cli import bench, options

COMMANDS = ("info", "convert", "verify", "run", "bench")
SECRET = ".gatewise."  # how files begin that are not there yet


def stack(**options):
    return gw.Sequential([gw.LSTM(3, 8, seed=1, **options), gw.LayerNorm(8), gw.Dense(8, 2, seed=1)])


def tokens():
    return gw.Sequential([gw.Embedding(10, 4, seed=1), gw.GRU(4, 5, seed=1), gw.Dense(5, 3, activation="softmax")])


def ends_at_last(**options):
    return gw.Sequential([gw.GRU(3, 8, seed=1, **options), gw.Last(), gw.Dense(8, 2, seed=1)])


def two_directions(**options):
    return gw.Sequential([gw.LSTM(3, 4, bidirectional=True, seed=1, **options), gw.Dense(8, 2, seed=1)])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Files are named as they stand in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def say(capsys):
    """Run a command: its exit status, and what it says."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def sequence(rng):
    return rng.standard_normal((50, 3)).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def saved(model):
    gw.save(model, "model")
    return model


def same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def refused(said, *texts):
    assert said.status == 2
    assert said.err.count("\n") == 1
    for text in texts:
        assert text in said.err
    assert not [name for name in os.listdir() if name.startswith(SECRET)]


# -----------------------------------------------------------------------------------------------------------
# info


def test_info(say):
    model = saved(tokens())
    said = say("info", "model")
    assert said.status == 0
    assert said.err == ""
    total = sum(array.size for array in model.state_dict().values())
    together = next(line for line in said.out.splitlines() if line.startswith("together"))
    # A GRU of 4 and 5 units has 3 x 5 x (4 + 5) weights, each used once; then come 5 x 3.
    assert together.split() == ["together", str(total), str(3 * 5 * 9 + 15), str(5 * 4), "yes"]
    assert "GRU(4, 5)" in said.out
    assert "whole numbers from 0 to 9" in said.out
    assert "float32, time first" in said.out


def test_info_counts_what_a_chain_has(say):
    model = saved(gw.Sequential([gw.Conv1D(3, 4, 5, dilation=2), gw.LSTM(4, 6, proj_size=2, dtype="float32")]))
    together = next(line for line in say("info", "model").out.splitlines() if line.startswith("together"))
    assert together.split()[3] == str(model._chain.state_bytes)
    assert together.split()[2] == str(3 * 4 * 5 + 24 * (4 + 2) + 2 * 6)


def test_info_says_why_not(say):
    saved(gw.Sequential([gw.Conv1D(3, 4, 3, padding="same"), gw.GRU(4, 4, bidirectional=True, batch_first=True)]))
    said = say("info", "model")
    assert "stream  no: layers[0]: expected padding='causal'" in said.out
    assert "layers[1]: expected one direction" in said.out
    assert "(B, T, 3) or (T, 3)" in said.out


def test_info_of_a_layer_and_of_what_ends(say):
    saved(gw.LSTM(3, 4, num_layers=2, dtype="float64"))
    assert "LSTM(3, 4, num_layers=2, dtype='float64')" in say("info", "model").out
    saved(ends_at_last())
    assert "of the last step" in say("info", "model").out


def test_info_without_a_file(say):
    assert "backend: " in say("info").out


def test_tables_of_rich(say, monkeypatch):
    """The same cells, brackets included."""
    pytest.importorskip("rich")
    saved(two_directions())
    plain = say("info", "model").out
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = say("info", "model").out
    assert "\x1b[" in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).split() == plain.split()


# -----------------------------------------------------------------------------------------------------------
# convert, verify


def test_convert(say):
    model = saved(stack())
    said = say("convert", "model", "copy")
    assert said.status == 0
    assert said.out == f"copy: {os.path.getsize('copy'):,} bytes\n"
    for name, array in gw.load("copy").state_dict().items():
        same_bits(array, model.state_dict()[name])


def test_convert_onto_itself(say, folder):
    saved(stack())
    (folder / "link").symlink_to("model")
    before = (folder / "model").read_bytes()
    refused(say("convert", "model", "model"), "another file than model")
    refused(say("convert", "model", "link"), "another file than model")
    assert (folder / "model").read_bytes() == before


@pytest.mark.parametrize("windows", [None, 0.5])
@pytest.mark.parametrize("passed", [True, False])
def test_verify(say, monkeypatch, windows, passed):
    saved(stack())
    found = SimpleNamespace(sequences=0.25, windows=windows, tolerance=1e-5, passed=passed)
    asked = []
    monkeypatch.setattr(gw, "verify", lambda model, original: asked.append((model, original)) or found, raising=False)
    said = say("verify", "model", "original.onnx")
    assert said.status == (0 if passed else 1)
    assert [original for _, original in asked] == ["original.onnx"]
    assert isinstance(asked[0][0], gw.Sequential)
    for text in ("0.25", "1e-05", "not compared" if windows is None else "0.5", "same as" if passed else "differs"):
        assert text in said.out


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ModuleNotFoundError("No module named 'keras.src'", name="keras.src"),
            "keras is missing; try: pip install keras",
        ),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "pip install 'gatewise[torch]'"),
        (ModuleNotFoundError("of onnx: pip install it", name="onnx"), "of onnx: pip install it"),
        (gw.FormatError("o.onnx: no\ngraph"), "gatewise verify: o.onnx: no graph"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_verify_cannot(say, monkeypatch, error, text):
    def verify(model, original):
        raise error

    saved(stack())
    monkeypatch.setattr(gw, "verify", verify, raising=False)
    refused(say("verify", "model", "o.onnx"), text)


# -----------------------------------------------------------------------------------------------------------
# run


@pytest.mark.parametrize("chunk", [[], ["--chunk", 1], ["--chunk", 7], ["--chunk", 50], ["--whole"]])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 4])
@pytest.mark.parametrize("make", [stack, ends_at_last])
def test_run_npy(say, rng, make, batch, batch_first, chunk):
    model = saved(make(batch_first=batch_first))
    rows = [] if batch is None else [batch]
    shape = [*rows, 50] if batch_first else [50, *rows]
    x = rng.standard_normal((*shape, 3)).astype(np.float32)
    np.save("x.npy", x)
    said = say("run", "model", "--input", "x.npy", "--output", "y.npy", *chunk)
    assert (said.status, said.out, said.err) == (0, "", "")
    same_bits(np.load("y.npy"), model(x))


@pytest.mark.parametrize("batch", [None, 4])
def test_run_tokens(say, rng, batch):
    model = saved(tokens())
    x = rng.integers(0, 10, 50 if batch is None else (50, batch)).astype(np.uint8)
    np.save("x.npy", x)
    assert say("run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", 9).status == 0
    same_bits(np.load("y.npy"), model(x))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4", ">f8"])
def test_run_other_numbers(say, sequence, dtype, order):
    model = saved(stack())
    x = np.asarray(sequence.astype(dtype), order=order)
    np.save("x.npy", x)
    assert say("run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", 9).status == 0
    same_bits(np.load("y.npy"), model(x))


def test_run_a_layer(say, sequence):
    layer = gw.LSTM(3, 4, seed=1)
    saved(layer)
    np.save("x.npy", sequence)
    assert say("run", "model", "--input", "x.npy", "--output", "y.npy").status == 0
    same_bits(np.load("y.npy"), layer(sequence)[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("how", [["--chunk", 7], ["--whole"], []])
def test_run_csv(say, rng, dtype, how):
    model = saved(gw.GRU(3, 4, seed=1, dtype=dtype))
    x = rng.standard_normal((50, 3)) * 10.0 ** rng.integers(-30, 30, (50, 3))
    with open("x.csv", "w") as file:
        file.writelines(f"{','.join(map(repr, row))}\n" for row in x.tolist())
    expected = model(x)[0]
    for output in ("y.csv", "y.npy"):
        assert say("run", "model", "--input", "x.csv", "--output", output, *how).status == 0
    same_bits(np.load("y.npy"), expected)
    same_bits(np.loadtxt("y.csv", delimiter=",", dtype=dtype), expected)


def test_run_csv_as_others_write_it(say, folder):
    """A mark of the byte order, two characters at the line's end, none at the last one, blanks."""
    model = saved(stack())
    (folder / "x.csv").write_bytes(b"\xef\xbb\xbf1, 2,3\r\n4,5e-1,inf\r\n-0,.5,nan")
    assert say("run", "model", "--input", "x.csv", "--output", "y.npy").status == 0
    same_bits(np.load("y.npy"), model(np.array([[1, 2, 3], [4, 0.5, np.inf], [-0.0, 0.5, np.nan]])))


def test_run_csv_of_tokens(say, folder):
    model = saved(tokens())
    (folder / "x.csv").write_text("1\n9\n 0\n")
    assert say("run", "model", "--input", "x.csv", "--output", "y.npy", "--chunk", 2).status == 0
    same_bits(np.load("y.npy"), model(np.array([1, 9, 0])))


def test_run_to_one_row_of_csv(say, sequence):
    model = saved(ends_at_last())
    np.save("x.npy", sequence)
    assert say("run", "model", "--input", "x.npy", "--output", "y.csv", "--chunk", 8).status == 0
    same_bits(np.loadtxt("y.csv", delimiter=",", dtype=np.float32), model(sequence))


@pytest.mark.parametrize("ending", [".npy", ".csv"])
@pytest.mark.parametrize("how", [[], ["--whole"]])
@pytest.mark.parametrize("make", [stack, ends_at_last])
def test_run_nothing(say, folder, ending, how, make):
    """No steps in, no steps out; what ends at the last one gives what the call gives."""
    model = saved(make())
    np.save("x.npy", np.zeros((0, 3), np.float32))
    (folder / "x.csv").touch()
    assert say("run", "model", "--input", f"x{ending}", "--output", "y.npy", *how).status == 0
    same_bits(np.load("y.npy"), model(np.zeros((0, 3), np.float32)))


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("chunk", [[], ["--chunk", 7]])
def test_run_windows(say, rng, batch, chunk):
    model = saved(two_directions(batch_first=True))
    x = rng.standard_normal((30, 3) if batch is None else (batch, 30, 3)).astype(np.float32)
    np.save("x.npy", x)
    assert say("run", "model", "--input", "x.npy", "--output", "y.npy", "--window", 5, *chunk).status == 0
    y = np.load("y.npy")
    same_bits(y, model.stream(batch, window=5).run(x))
    same_bits(np.ascontiguousarray(y[..., -1, :]), np.ascontiguousarray(model(x[..., -5:, :])[..., -1, :]))


def test_run_what_cannot_stream(say, sequence):
    model = saved(two_directions())
    np.save("x.npy", sequence)
    arguments = ["run", "model", "--input", "x.npy", "--output", "y.npy"]
    refused(say(*arguments), "layers[0]: expected one direction", "--whole or --window N")
    assert say(*arguments, "--whole").status == 0
    same_bits(np.load("y.npy"), model(sequence))


@pytest.mark.parametrize("ending", ["npy", "csv"])
def test_run_in_constant_memory(say, ending, monkeypatch):
    """The sequence and its output are some times as large as what is ever in memory."""
    saved(gw.Sequential([gw.GRU(4, 8, seed=1)]))
    steps = 100_000 if ending == "npy" else 30_000
    x = np.zeros((steps, 4), np.float32)
    np.save("x.npy", x)
    np.savetxt("x.csv", x, delimiter=",", fmt="%g")
    del x
    longest = []
    plain = gw.Stream.run
    monkeypatch.setattr(gw.Stream, "run", lambda self, x: longest.append(len(x)) or plain(self, x))
    say("info", "model")  # what is imported once
    tracemalloc.start()
    try:
        said = say("run", "model", "--input", f"x.{ending}", "--output", f"y.{ending}", "--chunk", 250)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said.status == 0
    assert len(longest) == steps // 250
    assert max(longest) == 250
    assert peak < 300_000


def test_default_chunks_are_bounded(say, rng, monkeypatch):
    """Also with many rows."""
    saved(gw.Sequential([gw.GRU(4, 8, seed=1)]))
    np.save("x.npy", rng.standard_normal((3, 50_000, 4)).astype(np.float32))
    longest = []
    plain = gw.Stream.run
    monkeypatch.setattr(gw.Stream, "run", lambda self, x: longest.append(len(x)) or plain(self, x))
    assert say("run", "model", "--input", "x.npy", "--output", "y.npy").status == 0
    assert max(longest) == 2


def test_run_on_some_threads(say, sequence, monkeypatch):
    saved(stack())
    np.save("x.npy", sequence)
    seen = []
    plain = gw.Stream.run
    monkeypatch.setattr(gw.Stream, "run", lambda self, x: seen.append(gw.get_num_threads()) or plain(self, x))
    assert say("run", "model", "--input", "x.npy", "--output", "y.npy", "--threads", 3).status == 0
    assert seen == [3]


def test_run_in_place_of_a_file(say, sequence, folder):
    """It keeps the permissions; a link stays one."""
    model = saved(stack())
    np.save("x.npy", sequence)
    (folder / "old.npy").write_text("old")
    (folder / "old.npy").chmod(0o640)
    (folder / "y.npy").symlink_to("old.npy")
    assert say("run", "model", "--input", "x.npy", "--output", "y.npy").status == 0
    assert (folder / "y.npy").is_symlink()
    assert (folder / "old.npy").stat().st_mode & 0o777 == 0o640
    same_bits(np.load("old.npy"), model(sequence))


def test_progress(say, sequence, monkeypatch):
    """On a terminal there is a bar, which says how far it is."""
    pytest.importorskip("rich")
    saved(stack())
    np.save("x.npy", sequence)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    said = say("run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", 10)
    assert said.status == 0
    assert said.out == ""
    assert "50/50" in said.err


@pytest.mark.parametrize(
    ("x", "texts"),
    [
        (np.zeros((5, 4), np.float32), ["x.npy: expected shape (T, B, 3) or (T, 3), got (5, 4)"]),
        (np.zeros((5, 2, 2, 3), np.float32), ["x.npy: expected shape"]),
        (np.float32(1), ["x.npy: expected shape"]),
        (np.zeros((5, 3), np.int64), ["x.npy: expected floating numbers (float32), got int64"]),
        (np.zeros((5, 3), np.complex64), ["x.npy: expected floating numbers", "complex64"]),
        (np.array([["a", None, {}]], object), ["x.npy: expected an array as numpy.save writes it", "Python objects"]),
    ],
)
def test_bad_arrays(say, x, texts):
    saved(stack())
    np.save("x.npy", x)
    refused(say("run", "model", "--input", "x.npy", "--output", "y.npy"), "gatewise run: ", *texts)
    assert not os.path.exists("y.npy")


@pytest.mark.parametrize(
    ("x", "texts"),
    [
        (np.arange(20), ["x.npy: steps 10 to 14: x: expected numbers from 0 to 9, got 10"]),
        (np.array([-1]), ["expected numbers from 0 to 9, got -1"]),
        (np.zeros(3), ["x.npy: expected whole numbers, got float64"]),
        (np.zeros((5, 3, 2), int), ["x.npy: expected shape (T, B) or (T,)"]),
    ],
)
def test_bad_tokens(say, x, texts):
    saved(tokens())
    np.save("x.npy", x)
    refused(say("run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", 5), *texts)
    assert not os.path.exists("y.npy")


@pytest.mark.parametrize("line", ["1,2", "1,2,3,4", "a,b,c", "", "1,,3", "1_0,2,3", "1;2;3", "\xff\xff", "1 2 3", "\0"])
def test_bad_lines(say, folder, line):
    saved(stack())
    (folder / "x.csv").write_bytes(f"1,2,3\n4,5,6\n{line}\n".encode("latin-1"))
    said = say("run", "model", "--input", "x.csv", "--output", "y.csv", "--chunk", 1)
    refused(said, "x.csv: line 3: expected 3 numbers with commas")
    assert not os.path.exists("y.csv")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", ["1e400", "-1e39", "3.4028236e38"])
def test_numbers_too_large_for_the_model(say, folder, number, dtype):
    saved(gw.GRU(3, 4, seed=1, dtype=dtype))
    (folder / "x.csv").write_text(f"inf,2,3\n4,{number},nan\n")
    said = say("run", "model", "--input", "x.csv", "--output", "y.csv")
    if dtype == "float64" and number != "1e400":
        assert said.status == 0
    else:
        refused(said, f"x.csv: line 2: expected numbers that fit {dtype}, got {number}")


def test_the_largest_numbers(say, folder):
    """As NumPy writes them; the infinite ones are written as such."""
    model = saved(gw.GRU(3, 4, seed=1))
    (folder / "x.csv").write_text("3.4028235e38,-3.4028235e+38,1e-400\n-inf, Infinity,+INF\n")
    assert say("run", "model", "--input", "x.csv", "--output", "y.npy").status == 0
    largest = np.finfo(np.float32).max
    same_bits(np.load("y.npy"), model(np.array([[largest, -largest, 0], [-np.inf, np.inf, np.inf]], np.float32))[0])


@pytest.mark.parametrize("line", ["1.5", "1,2", "x", "10", "-1", "1_0", str(2**63), "9" * 5000])
def test_bad_lines_of_tokens(say, folder, line):
    saved(tokens())
    (folder / "x.csv").write_text(f"1\n{line}\n")
    refused(say("run", "model", "--input", "x.csv", "--output", "y.csv"), "x.csv: ", "expected", line[:60])
    assert not os.path.exists("y.csv")


def peak_of(*arguments):
    """Bytes that a command needs at most, in a process of its own, and its exit status."""
    code = (
        "import sys; from gatewise.__main__ import main; status = main(sys.argv[1:]); "
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')), status)"
    )
    command = [sys.executable, "-c", code, *arguments]
    peak, status = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.split()
    return int(peak) * 1024, int(status)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize("how", [[], ["--whole"], ["--chunk", "1000000000"]])
@pytest.mark.parametrize(
    "text",
    ["1," * 8_000_000, "1" * 16_000_000, "\n" * 16_000_000, "0.5\n" * 500_000],
    ids=["fields", "digits", "lines", "numbers"],
)
def test_a_csv_takes_no_more_memory_than_its_size_says(folder, text, how):
    """The line is refused, or, of 500,000 numbers, some arrays of them are in memory at once."""
    saved(gw.Sequential([gw.GRU(1, 1, seed=1)]))
    run = ["run", "model", "--output", "y.npy", *how, "--input"]
    (folder / "small.csv").write_text("0.5\n")
    usual, status = peak_of(*run, "small.csv")
    assert status == 0
    (folder / "x.csv").write_text(text)
    peak, status = peak_of(*run, "x.csv")
    assert status == (0 if text.startswith("0.5") else 2)
    assert peak - usual < (30e6 if text.startswith("0.5") else 8e6)


def write_header(path, shape):
    """An .npy file of no more than its header."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


@pytest.mark.parametrize("how", [[], ["--whole"]])
def test_rows_without_steps(say, how):
    """They take no byte of the file, and memory each: some are nothing's outputs, a billion are refused."""
    saved(ends_at_last())
    write_header("x.npy", (0, 5, 3))
    assert say("run", "model", "--input", "x.npy", "--output", "y.npy", *how).status == 0
    assert np.load("y.npy").shape == (5, 2)
    write_header("x.npy", (0, 10**9, 3))
    refused(say("run", "model", "--input", "x.npy", "--output", "y.npy", *how), "x.npy: expected some steps, got none")


@pytest.mark.parametrize("how", [[], ["--whole"]])
@pytest.mark.parametrize("steps", [5, 10**12])
def test_steps_without_rows(say, steps, how):
    saved(stack())
    write_header("x.npy", (steps, 0, 3))
    assert say("run", "model", "--input", "x.npy", "--output", "y.npy", *how).status == 0
    assert np.load("y.npy").shape == (steps, 0, 2)


def test_damaged_files(say, folder, sequence):
    saved(stack())
    np.save("x.npy", sequence)
    whole = (folder / "x.npy").read_bytes()
    for damaged in (b"", whole[:5], whole[:60], whole[:-1], b"PK\x03\x04" + whole, whole.replace(b"descr", b"dscr!")):
        (folder / "x.npy").write_bytes(damaged)
        refused(say("run", "model", "--input", "x.npy", "--output", "y.npy"), "x.npy")
    (folder / "x.npy").write_bytes(whole)
    (folder / "model").write_bytes((folder / "model").read_bytes()[:-1])
    for command in (["info"], ["bench"], ["run", "--input", "x.npy", "--output", "y.npy"]):
        refused(say(command[0], "model", *command[1:]), "model: expected")
    assert not os.path.exists("y.npy")


def test_missing_files(say, sequence):
    for arguments in (["info", "n"], ["bench", "n"], ["convert", "n", "m"]):
        refused(say(*arguments), f"gatewise {arguments[0]}: n: No such file or directory")
    saved(stack())
    np.save("x.npy", sequence)
    refused(say("run", "model", "--input", "n.npy", "--output", "y.npy"), "n.npy: No such file")
    refused(say("run", "n", "--input", "x.npy", "--output", "y.npy"), "n: No such file")
    refused(say("run", "model", "--input", "x.npy", "--output", "n/y.npy"), "n/y.npy: No such file")
    refused(say("convert", "model", "n/m"), "No such file")
    assert sorted(os.listdir()) == ["model", "x.npy"]


def test_bad_outputs(say, folder, sequence, rng):
    model = saved(stack())
    np.save("x.npy", sequence)
    (folder / "y.npy").mkdir()
    os.mkfifo("pipe.csv")
    run = ["run", "model", "--input", "x.npy", "--output"]
    refused(say(*run, "y.npy"), "y.npy: expected a file")
    refused(say(*run, "pipe.csv"), "pipe.csv: expected a file")
    refused(say(*run, "y.txt"), "y.txt: expected a name that ends in .npy or .csv")
    refused(say(*run, "x.npy"), "x.npy: expected another file than x.npy")
    refused(say("run", "model", "--input", "pipe.csv", "--output", "z.npy"), "pipe.csv: expected a file")
    refused(say("run", "model", "--input", "y.npy", "--output", "z.npy"), "y.npy: expected a file")
    (folder / "model.npy").symlink_to("model")
    refused(say(*run, "model.npy"), "model.npy: expected another file than model")
    np.save("batch.npy", rng.standard_normal((5, 2, 3)))
    refused(say("run", "model", "--input", "batch.npy", "--output", "z.csv"), "z.csv", "several rows")
    same_bits(np.load("x.npy"), sequence)
    same_bits(gw.load("model")(sequence), model(sequence))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_full_disk(say, sequence, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    saved(stack())
    np.save("x.npy", sequence)
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(say("run", "model", "--input", "x.npy", "--output", "y.npy"), "y.npy: No space left")
    assert sorted(os.listdir()) == ["model", "x.npy"]


def test_a_failure_keeps_the_old_output(say, folder):
    saved(tokens())
    np.save("x.npy", np.arange(11))
    (folder / "y.npy").write_text("old")
    refused(say("run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", 2), "got 10")
    assert (folder / "y.npy").read_text() == "old"


@pytest.mark.parametrize(
    "start", [["-m", "gatewise"], ["-mgatewise"], ["gatewise"], ["-W", "ignore", "-m", "gatewise"]]
)
def test_ctrl_c_while_it_imports(folder, start):
    """No traceback, and the exit status of what Ctrl-C ends: 130 in a shell."""
    (folder / "gatewise").write_text("import sys; from gatewise.__main__ import main; sys.exit(main())")
    (folder / "slow" / "numpy").mkdir(parents=True)
    (folder / "slow" / "numpy" / "__init__.py").write_text("import time; print('imports', flush=True); time.sleep(60)")
    paths = [str(folder / "slow"), str(Path(gw.__file__).parents[1])]
    with subprocess.Popen(
        [sys.executable, *start, "info"], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "imports\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGINT, "")


def test_ctrl_c_is_nobody_elses(folder):
    """A program that imports gatewise keeps what Ctrl-C does, and so do the commands once they run."""
    code = "import signal; {}; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    (folder / "other.py").write_text(code.format("import gatewise"))
    (folder / "gatewise").write_text(code.format("from gatewise.__main__ import main; main(['info'])"))
    for command in (["other.py"], ["-m", "other", "gatewise"], ["gatewise"]):
        said = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
        assert said.stdout.splitlines()[-1:] == ["True"], said.stderr


@pytest.mark.parametrize("ending", ["npy", "csv"])
def test_ctrl_c(folder, ending):
    """It ends at once and leaves nothing."""
    saved(gw.Sequential([gw.LSTM(1, 64, seed=1), gw.Dense(64, 1, seed=1)]))
    np.save("x.npy", np.zeros((10_000_000, 1), np.float32))
    arguments = ["run", "model", "--input", "x.npy", "--output", f"y.{ending}", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "gatewise", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if any(name.startswith(SECRET) for name in os.listdir()):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert (output, errors) == ("", "gatewise: interrupted\n")
    assert sorted(os.listdir()) == ["model", "x.npy"]


# -----------------------------------------------------------------------------------------------------------
# bench


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "MOST_CALLS", 50)
    monkeypatch.setattr(bench, "SECONDS", 0.01)


@pytest.mark.parametrize("make", [stack, tokens, ends_at_last])
def test_bench(say, quick, monkeypatch, make):
    saved(make())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = say("bench", "model", "--steps", 5, "--batch", 2, "--threads", 1)
    assert said.status == 0
    lines = {line.split("  ")[0]: line for line in said.out.splitlines()}
    for line in ("step", "sequence 5 x 2", "block of 64"):
        assert lines[line].split()[-1] in {str(n) for n in range(10, 51)}  # fewer where the machine is busy
    assert "1 thread\n" in said.out
    assert "ONNX Runtime: not installed; try: pip install onnxruntime onnx" in said.out
    assert "clock's own" in said.out


@pytest.mark.parametrize("batch_first", [False, True])
def test_bench_times_blocks_of_a_stream(say, quick, monkeypatch, batch_first):
    """Each is written into `out`, which is made before."""
    saved(stack(batch_first=batch_first))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    shapes, plain = set(), gw.Stream.run
    monkeypatch.setattr(gw.Stream, "run", lambda self, x, out: shapes.add((x.shape, out.shape)) or plain(self, x, out))
    assert say("bench", "model", "--block", 9).status == 0
    assert shapes == {((9, 3), (9, 2))}


def test_bench_of_windows(say, quick):
    saved(two_directions())
    said = say("bench", "model", "--window", 5, "--block", 3)
    assert "step, window 5" in said.out
    assert "block of 3, window 5" in said.out
    assert "has no windows" in said.out
    said = say("bench", "model", "--steps", 3)
    assert "\nstep " not in said.out
    assert "\nblock " not in said.out
    assert "try --window N, since layers[0]: expected one direction" in said.out


class Session:
    """What the command knows of a session of ONNX Runtime; this one runs a GRU of gatewise."""

    layer = gw.GRU(3, 4, seed=1)
    factor = 1.0

    def __init__(self, path, options, providers):
        assert Path(path).read_text() == "a graph"

    def get_inputs(self):
        return [SimpleNamespace(name="x", shape=["T", "B", 3]), SimpleNamespace(name="h", shape=[1, "B", 4])]

    def get_outputs(self):
        return [SimpleNamespace(name="y"), SimpleNamespace(name="h_after")]

    def run(self, names, feed):
        y, state = self.layer(feed["x"], feed["h"])
        return [y * self.factor, state][: len(names)]


@pytest.fixture
def runtime(monkeypatch):
    def save(model, path):
        Path(path).write_text("a graph")

    saved(Session.layer)
    module = SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=Session)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setattr(gw, "save", save)
    return module


def test_bench_against_onnx_runtime(say, quick, runtime):
    said = say("bench", "model", "--steps", 5, "--batch", 2)
    assert said.status == 0
    assert said.out.count("  ONNX Runtime ") == 3
    assert "left out" not in said.out


def test_bench_refuses_a_peer_that_errs(say, quick, runtime, monkeypatch):
    monkeypatch.setattr(Session, "factor", 1.1)
    assert "ONNX Runtime: left out: its output is another one" in say("bench", "model").out


def test_bench_without_a_way_to_onnx(say, quick, runtime, monkeypatch):
    def save(model, path):
        raise ValueError("model: layers[0]: ONNX has\nno such layer")

    monkeypatch.setattr(gw, "save", save)
    said = say("bench", "model")
    assert said.status == 0
    assert "ONNX Runtime: left out: model: layers[0]: ONNX has no such layer" in said.out


# -----------------------------------------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    _, examples = capsys.readouterr().out.split("examples:\n")
    assert examples.count(f"gatewise {command}") >= 2


@pytest.mark.parametrize("command", [[], ["demo"], *([name] for name in COMMANDS)])
def test_help_fits_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80


def test_help_names_the_endings_of_models(capsys):
    from gatewise import formats

    read = {ending for ending in formats.ENDINGS if ending}
    for command in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        said = capsys.readouterr().out
        assert set(re.findall(r"\.[a-z0-9]+\b", said)) >= read, command
    written = {ending for ending, format in formats.ENDINGS.items() if ending and format in formats.WRITTEN}
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    about_output = re.search(r"OUT  .*", capsys.readouterr().out)[0]
    assert set(re.findall(r"\.[a-z0-9]+\b", about_output)) == written


def test_examples_are_commands():
    """Each line of the examples is one that the parser takes."""
    parser = options.make_parser()
    for command in COMMANDS:
        examples = getattr(options, f"{command.upper()}_EXAMPLES")
        for line in examples.splitlines()[1:]:
            for text in line.replace("||", "&&").split("&&"):
                words = text.strip().split("   ")[0].split()
                if words[0] == "gatewise":
                    assert parser.parse_args(words[1:]).command in (command, "verify")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "model"],
        ["run", "model", "--input", "x.npy"],
        ["run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", "0"],
        ["run", "model", "--input", "x.npy", "--output", "y.npy", "--whole", "--window", "3"],
        ["run", "model", "--input", "x.npy", "--output", "y.npy", "--threads", "many"],
        ["bench"],
        ["bench", "model", "--steps", "0"],
        ["convert", "model"],
        ["verify", "model"],
    ],
)
def test_bad_options(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert f"gatewise {arguments[0]}: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["demo", "--secnds", "3"], ["usage: gatewise demo", "arguments: --secnds 3; did you mean --seconds?"]),
        (["run", "m", "--input", "x", "--output", "y", "--hole"], ["usage: gatewise run", "did you mean --whole?"]),
        (["bench", "m", "--blok=3"], ["usage: gatewise bench", "did you mean --block?"]),
        (["info", "a", "b"], ["usage: gatewise info", "unrecognized arguments: b\n"]),
        (["--versoin"], ["usage: gatewise [-h]", "did you mean --version?"]),
        (["info", "--nothing-like-it"], ["usage: gatewise info", "unrecognized arguments: --nothing-like-it\n"]),
    ],
)  # fmt: skip
def test_misspelt_options(capsys, arguments, texts):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    for text in texts:
        assert text in said


def closing(descriptors, *arguments):
    """Run a command that starts without its standard streams, as a service does."""
    closed = " ".join(f"{descriptor}>&-" for descriptor in descriptors)
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "gatewise", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("descriptors", [(2,), (1,), (1, 2), (0, 1, 2)])
def test_without_standard_streams(folder, sequence, descriptors):
    """A command does its work and has its exit status; what it says goes nowhere, and into no file that it opens."""
    model = saved(stack())
    np.save("x.npy", sequence)
    said = closing(descriptors, "run", "model", "--input", "x.npy", "--output", "y.npy")
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
    same_bits(np.load("y.npy"), model(sequence))
    wrong = closing(descriptors, "run", "model", "--input", "model", "--output", "z.npy")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert closing(descriptors, "run").returncode == 2
    for arguments in (["info"], ["info", "model"], ["convert", "model", "copy"], ["--help"]):
        said = closing(descriptors, *arguments)
        assert (said.returncode, said.stderr) == (0, "")
    same_bits(gw.load("copy")(sequence), model(sequence))


def test_interrupted_here(say, monkeypatch):
    def load(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(gw, "load", load)
    said = say("info", "model")
    assert (said.status, said.err) == (130, "gatewise: interrupted\n")


def test_without_rich(say, sequence, monkeypatch):
    """Nothing on files needs it, also on a terminal."""
    saved(stack())
    np.save("x.npy", sequence)
    for name in ("rich", "rich.console", "rich.table", "rich.text", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "together" in say("info", "model").out
    said = say("run", "model", "--input", "x.npy", "--output", "y.npy")
    assert (said.status, said.err) == (0, "")
    monkeypatch.delitem(sys.modules, "gatewise.cli.demo", raising=False)
    refused(say("demo"), "gatewise demo: rich is missing; try: pip install 'gatewise[demo]'")
