"""The demo as a user runs it: each test in its own process, on a small text."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

TEXT = "the quick brown fox jumps over the lazy dog, and the dog goes on sleeping. " * 60
SMALL = ["--hidden", "16", "--layers", "1", "--batch", "8", "--steps", "16"]


def gatewise(*arguments, cwd, **options):
    command = [sys.executable, "-m", "gatewise", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_learn_save_load_write(folder, cell):
    learned = gatewise("demo", "--text", "text", "--seconds", 2, "--cell", cell, "--save", "m.npz", *SMALL, cwd=folder)
    assert learned.returncode == 0, learned.stderr
    assert "held out" in learned.stdout
    assert "characters/s" in learned.stdout
    assert "p99" in learned.stdout
    with np.load(folder / "m.npz") as saved:
        assert any(name.endswith("weight_hh_l0") for name in saved.files)
    written = gatewise("demo", "--text", "text", "--load", "m.npz", "--seconds", 0, cwd=folder)
    assert written.returncode == 0, written.stderr
    assert len(written.stdout) > 400


def test_learns(folder):
    """A text of one sentence is soon learned by heart."""
    learned = gatewise("demo", "--text", "text", "--seconds", 5, "--temperature", 0.1, *SMALL, cwd=folder)
    assert learned.returncode == 0, learned.stderr
    last = [line for line in learned.stdout.splitlines() if line.startswith("held out")][-1]
    assert float(last.split()[2]) < 1.5  # from ln 24 = 3.2


def test_ctrl_c(folder):
    """Ctrl-C ends the learning; the demo saves what was learned, and writes."""
    command = [sys.executable, "-m", "gatewise", "demo", "--text", "text", "--seconds", "60", "--save", "m.npz", *SMALL]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(8)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "p99" in output
    assert (folder / "m.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere"], "cannot read nowhere"),
        (["--text", "short"], "too short"),
        (["--text", "same"], "one symbol"),
        (["--load", "text"], "text"),
        (["--hidden", "0"], "--hidden"),
        (["--hidden", "many"], "--hidden"),
        (["--cell", "cnn"], "--cell"),
        (["--seconds", "-1"], "--seconds"),
        (["--temperature", "nan"], "--temperature"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(folder, arguments, message):
    (folder / "short").write_text("too short")
    (folder / "same").write_text("a" * 1000)
    refused = gatewise("demo", *arguments, cwd=folder)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_help_and_info(tmp_path):
    assert "demo" in gatewise("--help", cwd=tmp_path).stdout
    assert "--temperature" in gatewise("demo", "--help", cwd=tmp_path).stdout
    assert "backend" in gatewise("info", cwd=tmp_path).stdout
