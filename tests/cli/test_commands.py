"""The commands info, convert, verify and bench, and the command line. In this process unless a crash matters."""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gatewise as gw
import numpy as np
import pytest
from command_cases import (
    assert_refused,
    bidirectional_model,
    in_own_folder,  # noqa: F401
    last_step_model,
    layer_stack,
    run_captured,
    saved,
    token_model,
)
from conftest import assert_same_bits, random
from gatewise.__main__ import main
from gatewise.cli import bench, options

COMMANDS = ("info", "convert", "verify", "run", "bench")


@pytest.fixture
def run_cli(capsys):
    return partial(run_captured, capsys)


# ---- info


def test_info(run_cli):
    model = saved(token_model())
    result = run_cli("info", "model")
    assert result.status == 0
    assert result.err == ""
    total = sum(array.size for array in model.state_dict().values())
    together = next(line for line in result.out.splitlines() if line.startswith("together"))
    # A GRU of 4 and 5 units has 3 x 5 x (4 + 5) weights, each used once; then come 5 x 3.
    assert together.split() == ["together", str(total), str(3 * 5 * 9 + 15), str(5 * 4), "yes"]
    assert "GRU(4, 5)" in result.out
    assert "whole numbers from 0 to 9" in result.out
    assert "float32, time first" in result.out


def test_info_counts_state_and_multiply_adds(run_cli):
    model = saved(gw.Sequential([gw.Conv1D(3, 4, 5, dilation=2), gw.LSTM(4, 6, proj_size=2, dtype="float32")]))
    together = next(line for line in run_cli("info", "model").out.splitlines() if line.startswith("together"))
    assert together.split()[3] == str(model._chain.state_bytes)
    assert together.split()[2] == str(3 * 4 * 5 + 24 * (4 + 2) + 2 * 6)


def test_info_says_why_a_model_cannot_stream(run_cli):
    saved(gw.Sequential([gw.Conv1D(3, 4, 3, padding="same"), gw.GRU(4, 4, bidirectional=True, batch_first=True)]))
    result = run_cli("info", "model")
    assert "stream  no: layers[0]: expected padding='causal'" in result.out
    assert "layers[1]: expected one direction" in result.out
    assert "(B, T, 3) or (T, 3)" in result.out


def test_info_of_a_layer_and_of_a_last_step(run_cli):
    saved(gw.LSTM(3, 4, num_layers=2, dtype="float64"))
    assert "LSTM(3, 4, num_layers=2, dtype='float64')" in run_cli("info", "model").out
    saved(last_step_model())
    assert "of the last step" in run_cli("info", "model").out


def test_info_without_a_file(run_cli):
    assert "backend: " in run_cli("info").out


def test_tables_of_rich(run_cli, monkeypatch):
    """Rich prints the same cells, brackets included."""
    pytest.importorskip("rich")
    saved(bidirectional_model())
    plain = run_cli("info", "model").out
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    colored = run_cli("info", "model").out
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored).split() == plain.split()


# ---- convert, verify


def test_convert(run_cli):
    model = saved(layer_stack())
    result = run_cli("convert", "model", "copy")
    assert result.status == 0
    assert result.out == f"copy: {os.path.getsize('copy'):,} bytes\n"
    for name, array in gw.load("copy").state_dict().items():
        assert_same_bits(array, model.state_dict()[name])


def test_convert_onto_itself(run_cli, tmp_path):
    saved(layer_stack())
    (tmp_path / "link").symlink_to("model")
    before = (tmp_path / "model").read_bytes()
    assert_refused(run_cli("convert", "model", "model"), "another file than model")
    assert_refused(run_cli("convert", "model", "link"), "another file than model")
    assert (tmp_path / "model").read_bytes() == before


@pytest.mark.parametrize("windows", [None, 0.5])
@pytest.mark.parametrize("passed", [True, False])
def test_verify(run_cli, monkeypatch, windows, passed):
    saved(layer_stack())
    verification = SimpleNamespace(sequences=0.25, windows=windows, tolerance=1e-5, passed=passed)
    calls = []
    monkeypatch.setattr(gw, "verify", lambda model, original: calls.append((model, original)) or verification)
    result = run_cli("verify", "model", "original.onnx")
    assert result.status == (0 if passed else 1)
    assert [original for _, original in calls] == ["original.onnx"]
    assert isinstance(calls[0][0], gw.Sequential)
    for text in ("0.25", "1e-05", "not compared" if windows is None else "0.5", "same as" if passed else "differs"):
        assert text in result.out


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
def test_verify_cannot(run_cli, monkeypatch, error, text):
    def verify(model, original):
        raise error

    saved(layer_stack())
    monkeypatch.setattr(gw, "verify", verify)
    assert_refused(run_cli("verify", "model", "o.onnx"), text)


# ---- bench


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "MAX_CALLS", 50)
    monkeypatch.setattr(bench, "SECONDS", 0.01)


@pytest.mark.parametrize("make", [layer_stack, token_model, last_step_model])
def test_bench(run_cli, quick, monkeypatch, make):
    saved(make())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run_cli("bench", "model", "--steps", 5, "--batch", 2, "--threads", 1)
    assert result.status == 0
    lines = {line.split("  ")[0]: line for line in result.out.splitlines()}
    for line in ("step", "sequence 5 x 2", "block of 64"):
        assert lines[line].split()[-1] in {str(n) for n in range(10, 51)}  # fewer where the machine is busy
    assert "1 thread\n" in result.out
    assert "ONNX Runtime: not installed; try: pip install onnxruntime onnx" in result.out
    assert "clock's own" in result.out


@pytest.mark.parametrize("batch_first", [False, True])
def test_bench_times_blocks_of_a_stream(run_cli, quick, monkeypatch, batch_first):
    """The output of each block is written into `out`, which is made once."""
    saved(layer_stack(batch_first=batch_first))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    shapes, run = set(), gw.Stream.run
    monkeypatch.setattr(gw.Stream, "run", lambda self, x, out: shapes.add((x.shape, out.shape)) or run(self, x, out))
    assert run_cli("bench", "model", "--block", 9).status == 0
    assert shapes == {((9, 3), (9, 2))}


def test_bench_of_windows(run_cli, quick):
    saved(bidirectional_model())
    result = run_cli("bench", "model", "--window", 5, "--block", 3)
    assert "step, window 5" in result.out
    assert "block of 3, window 5" in result.out
    assert "has no windows" in result.out
    result = run_cli("bench", "model", "--steps", 3)
    assert "\nstep " not in result.out
    assert "\nblock " not in result.out
    assert "try --window N, since layers[0]: expected one direction" in result.out


class Session:
    """A session as the command expects it of ONNX Runtime; it runs a GRU of gatewise."""

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


def test_bench_against_onnx_runtime(run_cli, quick, runtime):
    result = run_cli("bench", "model", "--steps", 5, "--batch", 2)
    assert result.status == 0
    assert result.out.count("  ONNX Runtime ") == 3
    assert "left out" not in result.out


def test_bench_leaves_out_onnx_runtime_with_other_outputs(run_cli, quick, runtime, monkeypatch):
    monkeypatch.setattr(Session, "factor", 1.1)
    assert "ONNX Runtime: left out: its output differs" in run_cli("bench", "model").out


def test_bench_of_a_model_that_onnx_lacks(run_cli, quick, runtime, monkeypatch):
    def save(model, path):
        raise ValueError("model: layers[0]: ONNX has\nno such layer")

    monkeypatch.setattr(gw, "save", save)
    result = run_cli("bench", "model")
    assert result.status == 0
    assert "ONNX Runtime: left out: model: layers[0]: ONNX has no such layer" in result.out


# ---- the command line


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as system_exit:
        main([command, "--help"])
    assert system_exit.value.code == 0
    _, examples = capsys.readouterr().out.split("examples:\n")
    assert examples.count(f"gatewise {command}") >= 2


@pytest.mark.parametrize("command", [[], ["demo"], *([name] for name in COMMANDS)])
def test_help_fits_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80


def test_help_imports_no_command():
    code = """
import sys
from gatewise.__main__ import main

try:
    main(["--help"])
except SystemExit:
    print(sorted(name for name in sys.modules if name.startswith(("gatewise.cli", "gatewise.formats"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "['gatewise.cli', 'gatewise.cli.options']"


def test_help_names_the_endings_of_models(capsys):
    from gatewise import formats

    readable = {ending for ending in formats.ENDINGS if ending}
    for command in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        result = capsys.readouterr().out
        assert set(re.findall(r"\.[a-z0-9]+\b", result)) >= readable, command
    writable = {ending for ending, format in formats.ENDINGS.items() if ending and format in formats.WRITTEN}
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    about_output = re.search(r"OUT  .*", capsys.readouterr().out)[0]
    assert set(re.findall(r"\.[a-z0-9]+\b", about_output)) == writable


def test_examples_are_commands():
    """The parser accepts each line of the examples."""
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
    with pytest.raises(SystemExit) as system_exit:
        main(arguments)
    assert system_exit.value.code == 2
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
)
def test_misspelt_options(capsys, arguments, texts):
    with pytest.raises(SystemExit) as system_exit:
        main(arguments)
    assert system_exit.value.code == 2
    result = capsys.readouterr().err
    for text in texts:
        assert text in result


def run_with_closed_streams(descriptors, *arguments):
    """Run a command without some of its standard streams, as a service may."""
    closed = " ".join(f"{descriptor}>&-" for descriptor in descriptors)
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "gatewise", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("descriptors", [(2,), (1,), (1, 2), (0, 1, 2)])
def test_without_standard_streams(descriptors):
    """A command does its work and has its exit status; its messages go nowhere, not into a file that it opens."""
    model, x = saved(layer_stack()), random((50, 3), "float32")
    np.save("x.npy", x)
    result = run_with_closed_streams(descriptors, "run", "model", "--input", "x.npy", "--output", "y.npy")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert_same_bits(np.load("y.npy"), model(x))
    wrong = run_with_closed_streams(descriptors, "run", "model", "--input", "model", "--output", "z.npy")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert run_with_closed_streams(descriptors, "run").returncode == 2
    for arguments in (["info"], ["info", "model"], ["convert", "model", "copy"], ["--help"]):
        result = run_with_closed_streams(descriptors, *arguments)
        assert (result.returncode, result.stderr) == (0, "")
    assert_same_bits(gw.load("copy")(x), model(x))


def test_ctrl_c_in_this_process(run_cli, monkeypatch):
    def load(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(gw, "load", load)
    result = run_cli("info", "model")
    assert (result.status, result.err) == (130, "gatewise: interrupted\n")


def test_without_rich(run_cli, monkeypatch):
    """No command on files needs Rich, on a terminal either."""
    saved(layer_stack())
    np.save("x.npy", random((50, 3), "float32"))
    for name in ("rich", "rich.console", "rich.table", "rich.text", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "together" in run_cli("info", "model").out
    result = run_cli("run", "model", "--input", "x.npy", "--output", "y.npy")
    assert (result.status, result.err) == (0, "")
    monkeypatch.delitem(sys.modules, "gatewise.cli.demo", raising=False)
    assert_refused(run_cli("demo"), "gatewise demo: rich is missing; try: pip install 'gatewise[demo]'")


# ---- Ctrl-C while gatewise is imported


@pytest.mark.parametrize(
    "start", [["-m", "gatewise"], ["-mgatewise"], ["gatewise"], ["-W", "ignore", "-m", "gatewise"]]
)
def test_ctrl_c_during_the_import(tmp_path, start):
    """There is no traceback, and the exit status is that of a process that Ctrl-C ended: 130 in a shell."""
    (tmp_path / "gatewise").write_text("import sys; from gatewise.__main__ import main; sys.exit(main())")
    (tmp_path / "slow" / "numpy").mkdir(parents=True)
    (tmp_path / "slow" / "numpy" / "__init__.py").write_text(
        "import time; print('importing', flush=True); time.sleep(60)"
    )
    paths = [str(tmp_path / "slow"), str(Path(gw.__file__).parents[1])]
    with subprocess.Popen(
        [sys.executable, *start, "info"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGINT, "")


def test_ctrl_c_after_the_import(tmp_path):
    """Ctrl-C has its usual meaning in a program that imports gatewise, and in a command once it runs."""
    code = "import signal; {}; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    (tmp_path / "other.py").write_text(code.format("import gatewise"))
    (tmp_path / "gatewise").write_text(code.format("from gatewise.__main__ import main; main(['info'])"))
    for command in (["other.py"], ["-m", "other", "gatewise"], ["gatewise"]):
        result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
        assert result.stdout.splitlines()[-1:] == ["True"], result.stderr
