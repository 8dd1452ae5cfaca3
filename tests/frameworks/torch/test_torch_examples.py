"""The examples for PyTorch run in processes of their own, and their numbers are right."""

import subprocess
import sys

from torch_modules import REPOSITORY


def run_example(*command):
    """The output of an example. The last argument is a list of its file name and its own arguments."""
    *options, (example, *arguments) = command
    done = subprocess.run(
        [sys.executable, *options, REPOSITORY / "examples" / example, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_example_of_a_tagger():
    out = run_example(["torch_tagger.py", "--hidden", "16", "--steps", "10"])
    assert float(out.split()[-1]) < 1e-4


def test_distributed_training():
    """Two processes reach the losses of one process with the joined batch."""
    out = run_example("-m", "torch.distributed.run", "--nproc-per-node=2", ["torch_distributed.py"])
    assert out.startswith("2 processes: loss")
    assert float(out.split()[-1]) < 1e-5
