"""The fuzzer, for a short time: the files of every fault that was found, and 200 inputs of each format."""

import random
import subprocess
import sys
from pathlib import Path

import gatewise as gw
import pytest

from tests.fuzz import __main__ as command
from tests.fuzz import formats, inputs, workers

ROOT = Path(__file__).parents[2]

# The fuzzer forks before it imports anything; here, JAX may have been imported, and warns of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:os.fork"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.skipif(not workers.is_supported(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize("name", formats.FORMATS)
def test_files_that_are_almost_right(name, tmp_path):
    """Each loads or is a FormatError, in little time and memory, in another process, which may crash."""
    for package in formats.FORMATS[name].needs:
        pytest.importorskip(package)
    order = ["--format", name, "--count", "200", "--workers", "1", "--save", tmp_path]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzz", *order],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_same_seed_makes_the_same_inputs():
    for name in ("safetensors", "json", "keras"):
        assert formats.made(name, 3, 5) == formats.made(name, 3, 5)
        assert len({formats.made(name, seed, i).data for seed in (3, 4) for i in range(10)}) > 15


def test_what_is_wrong_is_told(monkeypatch, tmp_path):
    """Errors of another kind, time, memory and crashes are; and the inputs after one that ends a child are tried."""

    def load(path):
        data = Path(path).read_bytes()
        exec(data, {"gw": gw})

    monkeypatch.setattr(gw, "load", load)
    monkeypatch.setattr(workers, "SECONDS", 0.2)
    monkeypatch.setattr(workers, "SECONDS_OF_C", 2)
    programs = [
        "",
        "raise gw.FormatError",
        "raise KeyError('a')",
        "while True: pass",
        "import os; os.abort()",
        "b'x' * 200_000_000",
        "b'x' * 2**50",
        "key = ()\nfor _ in range(60): key = (key, key)\nhash(key)",
        "import os; os._exit(3)",
        "raise gw.FormatError",
    ]
    expected = [
        "loaded",
        "refused",
        "KeyError",
        "takes more than",
        "crashes (SIGABRT)",
        "loaded with 19",
        "MemoryError",
        "hangs in C",
        "crashes (3)",
        "refused",
    ]
    files = [inputs.Input(".py", program.encode()) for program in programs]
    results = list(workers.run({"a": files.__getitem__}, iter([workers.Job("a", 0, len(files))]), 1))
    told = {result.index: result.outcome for result in results}
    assert len(results) == len(programs)
    for i, start in enumerate(expected):
        assert told[i].startswith(start), (programs[i], told[i])


def test_what_is_wrong_is_saved(monkeypatch, tmp_path, capsys):
    def load(path, **options):
        raise KeyError(options.get("prefix"))

    monkeypatch.setattr(gw, "load", load)
    assert command.main(["--format", "safetensors", "--count", "30", "--workers", "1", "--save", str(tmp_path)]) == 1
    assert "FAULT" in capsys.readouterr().out
    saved = sorted(path for path in tmp_path.iterdir() if not path.name.endswith(formats.OPTIONS))
    assert saved
    assert formats.read(saved[0]) == formats.made("safetensors", 0, int(saved[0].stem.split("-")[2]))
    assert command.main(["--replay", *map(str, saved)]) == 1


def test_every_file_of_the_corpus_is_of_a_format():
    assert {path.name for path in formats.CORPUS.iterdir()} <= {*formats.FORMATS}


def test_changed_trees_can_be_written():
    chance = random.Random(0)
    tree = {"a": [1, {"b": "c"}], "d": {"e": [[1.5, 2], []]}}
    texts = {inputs.text_of(inputs.changed_tree(chance, tree)) for _ in range(500)}
    assert len(texts) > 300
    assert tree == {"a": [1, {"b": "c"}], "d": {"e": [[1.5, 2], []]}}
