"""What the tests of the commands share: small models, their files, and a way to run a command in this process."""

import os
from types import SimpleNamespace

import gatewise as gw
import pytest
from gatewise.__main__ import main

TEMPORARY = ".gatewise."  # the beginning of the name of a file that is not complete yet


def layer_stack(**options):
    return gw.Sequential([gw.LSTM(3, 8, seed=1, **options), gw.LayerNorm(8), gw.Dense(8, 2, seed=1)])


def token_model():
    return gw.Sequential([gw.Embedding(10, 4, seed=1), gw.GRU(4, 5, seed=1), gw.Dense(5, 3, activation="softmax")])


def last_step_model(**options):
    return gw.Sequential([gw.GRU(3, 8, seed=1, **options), gw.Last(), gw.Dense(8, 2, seed=1)])


def bidirectional_model(**options):
    return gw.Sequential([gw.LSTM(3, 4, bidirectional=True, seed=1, **options), gw.Dense(8, 2, seed=1)])


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    """Run each test in its own folder, where files have short names."""
    monkeypatch.chdir(tmp_path)


def run_captured(capsys, *arguments):
    """Run a command, and return its exit status and what it printed."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return SimpleNamespace(status=status, out=captured.out, err=captured.err)


def saved(model):
    """Save a model in the file "model"."""
    gw.save(model, "model")
    return model


def assert_refused(result, *texts):
    """The command failed with one line that contains the texts, and left no temporary file."""
    assert result.status == 2
    assert result.err.count("\n") == 1
    for text in texts:
        assert text in result.err
    assert not [name for name in os.listdir() if name.startswith(TEMPORARY)]
