"""The command run, in this process unless memory or a signal matters."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial

import gatewise as gw
import numpy as np
import pytest
from command_cases import (
    TEMPORARY,
    assert_refused,
    bidirectional_model,
    in_own_folder,  # noqa: F401
    last_step_model,
    layer_stack,
    run_captured,
    saved,
    token_model,
)
from conftest import assert_same_bits


@pytest.fixture
def run_cli(capsys):
    return partial(run_captured, capsys)


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.fixture
def sequence(rng):
    return rng.standard_normal((50, 3)).astype(np.float32)


@pytest.mark.parametrize("chunk", [[], ["--chunk", 1], ["--chunk", 7], ["--chunk", 50], ["--whole"]])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 4])
@pytest.mark.parametrize("make", [layer_stack, last_step_model])
def test_run_npy(run_cli, rng, make, batch, batch_first, chunk):
    model = saved(make(batch_first=batch_first))
    rows = [] if batch is None else [batch]
    shape = [*rows, 50] if batch_first else [50, *rows]
    x = rng.standard_normal((*shape, 3)).astype(np.float32)
    np.save("x.npy", x)
    result = run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", *chunk)
    assert (result.status, result.out, result.err) == (0, "", "")
    assert_same_bits(np.load("y.npy"), model(x))


@pytest.mark.parametrize("batch", [None, 4])
def test_run_tokens(run_cli, rng, batch):
    model = saved(token_model())
    x = rng.integers(0, 10, 50 if batch is None else (50, batch)).astype(np.uint8)
    np.save("x.npy", x)
    assert run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", 9).status == 0
    assert_same_bits(np.load("y.npy"), model(x))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4", ">f8"])
def test_run_other_numbers(run_cli, sequence, dtype, order):
    model = saved(layer_stack())
    x = np.asarray(sequence.astype(dtype), order=order)
    np.save("x.npy", x)
    assert run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", 9).status == 0
    assert_same_bits(np.load("y.npy"), model(x))


def test_run_a_layer(run_cli, sequence):
    layer = gw.LSTM(3, 4, seed=1)
    saved(layer)
    np.save("x.npy", sequence)
    assert run_cli("run", "model", "--input", "x.npy", "--output", "y.npy").status == 0
    assert_same_bits(np.load("y.npy"), layer(sequence)[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [["--chunk", 7], ["--whole"], []])
def test_run_csv(run_cli, rng, dtype, options):
    model = saved(gw.GRU(3, 4, seed=1, dtype=dtype))
    x = rng.standard_normal((50, 3)) * 10.0 ** rng.integers(-30, 30, (50, 3))
    with open("x.csv", "w") as file:
        file.writelines(f"{','.join(map(repr, row))}\n" for row in x.tolist())
    expected = model(x)[0]
    for output in ("y.csv", "y.npy"):
        assert run_cli("run", "model", "--input", "x.csv", "--output", output, *options).status == 0
    assert_same_bits(np.load("y.npy"), expected)
    assert_same_bits(np.loadtxt("y.csv", delimiter=",", dtype=dtype), expected)


def test_run_csv_of_other_programs(run_cli, tmp_path):
    """A byte-order mark, CRLF, spaces, and no newline at the end are all accepted."""
    model = saved(layer_stack())
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf1, 2,3\r\n4,5e-1,inf\r\n-0,.5,nan")
    assert run_cli("run", "model", "--input", "x.csv", "--output", "y.npy").status == 0
    assert_same_bits(np.load("y.npy"), model(np.array([[1, 2, 3], [4, 0.5, np.inf], [-0.0, 0.5, np.nan]])))


def test_run_csv_of_tokens(run_cli, tmp_path):
    model = saved(token_model())
    (tmp_path / "x.csv").write_text("1\n9\n 0\n")
    assert run_cli("run", "model", "--input", "x.csv", "--output", "y.npy", "--chunk", 2).status == 0
    assert_same_bits(np.load("y.npy"), model(np.array([1, 9, 0])))


def test_run_to_one_row_of_csv(run_cli, sequence):
    model = saved(last_step_model())
    np.save("x.npy", sequence)
    assert run_cli("run", "model", "--input", "x.npy", "--output", "y.csv", "--chunk", 8).status == 0
    assert_same_bits(np.loadtxt("y.csv", delimiter=",", dtype=np.float32), model(sequence))


@pytest.mark.parametrize("ending", [".npy", ".csv"])
@pytest.mark.parametrize("options", [[], ["--whole"]])
@pytest.mark.parametrize("make", [layer_stack, last_step_model])
def test_run_without_steps(run_cli, tmp_path, ending, options, make):
    """The output is that of the call: no steps, or the last step of none."""
    model = saved(make())
    np.save("x.npy", np.zeros((0, 3), np.float32))
    (tmp_path / "x.csv").touch()
    assert run_cli("run", "model", "--input", f"x{ending}", "--output", "y.npy", *options).status == 0
    assert_same_bits(np.load("y.npy"), model(np.zeros((0, 3), np.float32)))


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("chunk", [[], ["--chunk", 7]])
def test_run_windows(run_cli, rng, batch, chunk):
    model = saved(bidirectional_model(batch_first=True))
    x = rng.standard_normal((30, 3) if batch is None else (batch, 30, 3)).astype(np.float32)
    np.save("x.npy", x)
    assert run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", "--window", 5, *chunk).status == 0
    y = np.load("y.npy")
    assert_same_bits(y, model.stream(batch, window=5).run(x))
    assert_same_bits(np.ascontiguousarray(y[..., -1, :]), np.ascontiguousarray(model(x[..., -5:, :])[..., -1, :]))


def test_run_a_model_that_cannot_stream(run_cli, sequence):
    model = saved(bidirectional_model())
    np.save("x.npy", sequence)
    arguments = ["run", "model", "--input", "x.npy", "--output", "y.npy"]
    assert_refused(run_cli(*arguments), "layers[0]: expected one direction", "--whole or --window N")
    assert run_cli(*arguments, "--whole").status == 0
    assert_same_bits(np.load("y.npy"), model(sequence))


@pytest.mark.parametrize("ending", ["npy", "csv"])
def test_run_in_constant_memory(run_cli, ending, monkeypatch):
    """The sequence and its output are several times as large as the memory that is ever used."""
    saved(gw.Sequential([gw.GRU(4, 8, seed=1)]))
    steps = 100_000 if ending == "npy" else 30_000
    x = np.zeros((steps, 4), np.float32)
    np.save("x.npy", x)
    np.savetxt("x.csv", x, delimiter=",", fmt="%g")
    del x
    chunks = []
    run = gw.Stream.run
    monkeypatch.setattr(gw.Stream, "run", lambda self, x: chunks.append(len(x)) or run(self, x))
    run_cli("info", "model")  # so that imports are not counted
    tracemalloc.start()
    try:
        result = run_cli("run", "model", "--input", f"x.{ending}", "--output", f"y.{ending}", "--chunk", 250)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.status == 0
    assert len(chunks) == steps // 250
    assert max(chunks) == 250
    assert peak < 300_000


def test_default_chunks_are_bounded(run_cli, rng, monkeypatch):
    """With 50,000 rows a chunk has 2 steps."""
    saved(gw.Sequential([gw.GRU(4, 8, seed=1)]))
    np.save("x.npy", rng.standard_normal((3, 50_000, 4)).astype(np.float32))
    chunks = []
    run = gw.Stream.run
    monkeypatch.setattr(gw.Stream, "run", lambda self, x: chunks.append(len(x)) or run(self, x))
    assert run_cli("run", "model", "--input", "x.npy", "--output", "y.npy").status == 0
    assert max(chunks) == 2


def test_run_on_some_threads(run_cli, sequence, monkeypatch):
    saved(layer_stack())
    np.save("x.npy", sequence)
    threads = []
    run = gw.Stream.run
    monkeypatch.setattr(gw.Stream, "run", lambda self, x: threads.append(gw.get_num_threads()) or run(self, x))
    assert run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", "--threads", 3).status == 0
    assert threads == [3]


def test_run_in_place_of_a_file(run_cli, sequence, tmp_path):
    """The new file has the permissions of the old one, and a link stays a link."""
    model = saved(layer_stack())
    np.save("x.npy", sequence)
    (tmp_path / "old.npy").write_text("old")
    (tmp_path / "old.npy").chmod(0o640)
    (tmp_path / "y.npy").symlink_to("old.npy")
    assert run_cli("run", "model", "--input", "x.npy", "--output", "y.npy").status == 0
    assert (tmp_path / "y.npy").is_symlink()
    assert (tmp_path / "old.npy").stat().st_mode & 0o777 == 0o640
    assert_same_bits(np.load("old.npy"), model(sequence))


def test_progress(run_cli, sequence, monkeypatch):
    """On a terminal a bar shows the progress."""
    pytest.importorskip("rich")
    saved(layer_stack())
    np.save("x.npy", sequence)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    result = run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", 10)
    assert result.status == 0
    assert result.out == ""
    assert "50/50" in result.err


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
def test_bad_arrays(run_cli, x, texts):
    saved(layer_stack())
    np.save("x.npy", x)
    assert_refused(run_cli("run", "model", "--input", "x.npy", "--output", "y.npy"), "gatewise run: ", *texts)
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
def test_bad_tokens(run_cli, x, texts):
    saved(token_model())
    np.save("x.npy", x)
    assert_refused(run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", 5), *texts)
    assert not os.path.exists("y.npy")


@pytest.mark.parametrize("line", ["1,2", "1,2,3,4", "a,b,c", "", "1,,3", "1_0,2,3", "1;2;3", "\xff\xff", "1 2 3", "\0"])
def test_bad_lines(run_cli, tmp_path, line):
    saved(layer_stack())
    (tmp_path / "x.csv").write_bytes(f"1,2,3\n4,5,6\n{line}\n".encode("latin-1"))
    result = run_cli("run", "model", "--input", "x.csv", "--output", "y.csv", "--chunk", 1)
    assert_refused(result, "x.csv: line 3: expected 3 numbers with commas")
    assert not os.path.exists("y.csv")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", ["1e400", "-1e39", "3.4028236e38"])
def test_numbers_too_large_for_the_model(run_cli, tmp_path, number, dtype):
    saved(gw.GRU(3, 4, seed=1, dtype=dtype))
    (tmp_path / "x.csv").write_text(f"inf,2,3\n4,{number},nan\n")
    result = run_cli("run", "model", "--input", "x.csv", "--output", "y.csv")
    if dtype == "float64" and number != "1e400":
        assert result.status == 0
    else:
        assert_refused(result, f"x.csv: line 2: expected numbers that fit {dtype}, got {number}")


def test_the_largest_numbers(run_cli, tmp_path):
    """The largest finite numbers as NumPy writes them, and infinities that are written as such."""
    model = saved(gw.GRU(3, 4, seed=1))
    (tmp_path / "x.csv").write_text("3.4028235e38,-3.4028235e+38,1e-400\n-inf, Infinity,+INF\n")
    assert run_cli("run", "model", "--input", "x.csv", "--output", "y.npy").status == 0
    largest = np.finfo(np.float32).max
    assert_same_bits(
        np.load("y.npy"), model(np.array([[largest, -largest, 0], [-np.inf, np.inf, np.inf]], np.float32))[0]
    )


@pytest.mark.parametrize("line", ["1.5", "1,2", "x", "10", "-1", "1_0", str(2**63), "9" * 5000])
def test_bad_lines_of_tokens(run_cli, tmp_path, line):
    saved(token_model())
    (tmp_path / "x.csv").write_text(f"1\n{line}\n")
    assert_refused(run_cli("run", "model", "--input", "x.csv", "--output", "y.csv"), "x.csv: ", "expected", line[:60])
    assert not os.path.exists("y.csv")


def peak_memory_of(*arguments):
    """Run a command in its own process: the largest number of bytes that it uses, and its exit status."""
    code = (
        "import sys; from gatewise.__main__ import main; status = main(sys.argv[1:]); "
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')), status)"
    )
    command = [sys.executable, "-c", code, *arguments]
    peak, status = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.split()
    return int(peak) * 1024, int(status)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize("options", [[], ["--whole"], ["--chunk", "1000000000"]])
@pytest.mark.parametrize(
    "text",
    ["1," * 8_000_000, "1" * 16_000_000, "\n" * 16_000_000, "0.5\n" * 500_000],
    ids=["fields", "digits", "lines", "numbers"],
)
def test_memory_for_a_csv_is_bounded(tmp_path, text, options):
    """Bad lines are refused in little memory; 500,000 numbers are a few arrays in memory at one time."""
    saved(gw.Sequential([gw.GRU(1, 1, seed=1)]))
    run = ["run", "model", "--output", "y.npy", *options, "--input"]
    (tmp_path / "small.csv").write_text("0.5\n")
    usual, status = peak_memory_of(*run, "small.csv")
    assert status == 0
    (tmp_path / "x.csv").write_text(text)
    peak, status = peak_memory_of(*run, "x.csv")
    assert status == (0 if text.startswith("0.5") else 2)
    assert peak - usual < (30e6 if text.startswith("0.5") else 8e6)


def write_header(path, shape):
    """Write an .npy file that has only a header."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


@pytest.mark.parametrize("options", [[], ["--whole"]])
def test_rows_without_steps(run_cli, options):
    """Rows without steps take no byte of the file, but memory each: five of them run, a billion are refused."""
    saved(last_step_model())
    write_header("x.npy", (0, 5, 3))
    assert run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", *options).status == 0
    assert np.load("y.npy").shape == (5, 2)
    write_header("x.npy", (0, 10**9, 3))
    assert_refused(
        run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", *options),
        "x.npy: expected at least one step, got",
    )


@pytest.mark.parametrize("options", [[], ["--whole"]])
@pytest.mark.parametrize("steps", [5, 10**12])
def test_steps_without_rows(run_cli, steps, options):
    saved(layer_stack())
    write_header("x.npy", (steps, 0, 3))
    assert run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", *options).status == 0
    assert np.load("y.npy").shape == (steps, 0, 2)


def test_damaged_files(run_cli, tmp_path, sequence):
    saved(layer_stack())
    np.save("x.npy", sequence)
    valid = (tmp_path / "x.npy").read_bytes()
    for damaged in (b"", valid[:5], valid[:60], valid[:-1], b"PK\x03\x04" + valid, valid.replace(b"descr", b"dscr!")):
        (tmp_path / "x.npy").write_bytes(damaged)
        assert_refused(run_cli("run", "model", "--input", "x.npy", "--output", "y.npy"), "x.npy")
    (tmp_path / "x.npy").write_bytes(valid)
    (tmp_path / "model").write_bytes((tmp_path / "model").read_bytes()[:-1])
    for command in (["info"], ["bench"], ["run", "--input", "x.npy", "--output", "y.npy"]):
        assert_refused(run_cli(command[0], "model", *command[1:]), "model: expected")
    assert not os.path.exists("y.npy")


def test_missing_files(run_cli, sequence):
    for arguments in (["info", "n"], ["bench", "n"], ["convert", "n", "m"]):
        assert_refused(run_cli(*arguments), f"gatewise {arguments[0]}: n: No such file or directory")
    saved(layer_stack())
    np.save("x.npy", sequence)
    assert_refused(run_cli("run", "model", "--input", "n.npy", "--output", "y.npy"), "n.npy: No such file")
    assert_refused(run_cli("run", "n", "--input", "x.npy", "--output", "y.npy"), "n: No such file")
    assert_refused(run_cli("run", "model", "--input", "x.npy", "--output", "n/y.npy"), "n/y.npy: No such file")
    assert_refused(run_cli("convert", "model", "n/m"), "No such file")
    assert sorted(os.listdir()) == ["model", "x.npy"]


def test_bad_outputs(run_cli, tmp_path, sequence, rng):
    model = saved(layer_stack())
    np.save("x.npy", sequence)
    (tmp_path / "y.npy").mkdir()
    os.mkfifo("pipe.csv")
    run = ["run", "model", "--input", "x.npy", "--output"]
    assert_refused(run_cli(*run, "y.npy"), "y.npy: expected a file")
    assert_refused(run_cli(*run, "pipe.csv"), "pipe.csv: expected a file")
    assert_refused(run_cli(*run, "y.txt"), "y.txt: expected a name that ends in .npy or .csv")
    assert_refused(run_cli(*run, "x.npy"), "x.npy: expected another file than x.npy")
    assert_refused(run_cli("run", "model", "--input", "pipe.csv", "--output", "z.npy"), "pipe.csv: expected a file")
    assert_refused(run_cli("run", "model", "--input", "y.npy", "--output", "z.npy"), "y.npy: expected a file")
    (tmp_path / "model.npy").symlink_to("model")
    assert_refused(run_cli(*run, "model.npy"), "model.npy: expected another file than model")
    np.save("batch.npy", rng.standard_normal((5, 2, 3)))
    assert_refused(run_cli("run", "model", "--input", "batch.npy", "--output", "z.csv"), "z.csv", "several rows")
    assert_same_bits(np.load("x.npy"), sequence)
    assert_same_bits(gw.load("model")(sequence), model(sequence))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_full_disk(run_cli, sequence, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    saved(layer_stack())
    np.save("x.npy", sequence)
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert_refused(run_cli("run", "model", "--input", "x.npy", "--output", "y.npy"), "y.npy: No space left")
    assert sorted(os.listdir()) == ["model", "x.npy"]


def test_a_failure_keeps_the_old_output(run_cli, tmp_path):
    saved(token_model())
    np.save("x.npy", np.arange(11))
    (tmp_path / "y.npy").write_text("old")
    assert_refused(run_cli("run", "model", "--input", "x.npy", "--output", "y.npy", "--chunk", 2), "got 10")
    assert (tmp_path / "y.npy").read_text() == "old"


@pytest.mark.parametrize("ending", ["npy", "csv"])
def test_ctrl_c_during_run(tmp_path, ending):
    """Ctrl-C ends the command at once, and no file is left."""
    saved(gw.Sequential([gw.LSTM(1, 64, seed=1), gw.Dense(64, 1, seed=1)]))
    np.save("x.npy", np.zeros((10_000_000, 1), np.float32))
    arguments = ["run", "model", "--input", "x.npy", "--output", f"y.{ending}", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "gatewise", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if any(name.startswith(TEMPORARY) for name in os.listdir()):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert (output, errors) == ("", "gatewise: interrupted\n")
    assert sorted(os.listdir()) == ["model", "x.npy"]
