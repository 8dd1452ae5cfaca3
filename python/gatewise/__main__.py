"""The command line: `gatewise demo`, `info`, `convert`, `verify`, `run`, `bench`; the same as `python -m gatewise`.

This file knows the options and their limits, and nothing else: what a command needs is imported when it
runs, so that `gatewise --help` works without any extra.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gatewise as gw

DESCRIPTION = "gatewise: small, fast gated recurrent networks (LSTM, GRU, RNN)."

EXAMPLES = """\
models are files of gatewise (.safetensors), Keras (.keras, .h5, .hdf5), ONNX
(.onnx), PyTorch (.pt, .pth, .ckpt, .bin) and RTNeural (.json)

examples:
  gatewise demo              learn the Python language reference for a minute,
                             then write some of it
  gatewise demo --help       what else the demo can do
  gatewise info              version, backends, threads: for a bug report
  gatewise info model.keras  what a model is
  gatewise run model.keras --input x.npy --output y.npy
                             what a model gives for a sequence
  gatewise COMMAND --help    more, with examples
"""

# The files that the commands take.
MODEL = "a model: .safetensors, .keras, .h5, .hdf5, .onnx, .pt, .pth, .ckpt, .bin or .json"

INFO_DESCRIPTION = """\
Without FILE: version, processor backends and threads, what to paste into a
bug report. With FILE: the layers of a model, their sizes, parameters, state
and multiply-adds, and what can stream and what cannot.
"""

INFO_EXAMPLES = """\
examples:
  gatewise info                     this installation
  gatewise info model.keras         a model that Keras saved
  gatewise info model.safetensors   a model that gatewise.save wrote
"""

CONVERT_DESCRIPTION = """\
Read the model in IN and write it to OUT, in the format that the end of OUT's
name says: .onnx for ONNX, .json for RTNeural, .safetensors for gatewise's own.
OUT appears as a whole or not at all.
"""

CONVERT_EXAMPLES = """\
examples:
  gatewise convert model.keras model.onnx
  gatewise convert model.safetensors model.json
  gatewise convert model.onnx model.safetensors
  gatewise verify model.safetensors model.onnx
"""

VERIFY_DESCRIPTION = """\
Run a model and the one that it was made from over the same random sequences
and windows, and print the largest differences, relative to the largest output
(or to 1). The exit status is 0 if they are within the tolerance, 1 if they are
above it, 2 if the two could not be compared.
"""

VERIFY_EXAMPLES = """\
examples:
  gatewise verify model.safetensors original.onnx
  gatewise verify model.safetensors original.keras || echo "do not ship it"
"""

RUN_DESCRIPTION = """\
Run a model over the sequence in one file and write what it gives to another
one, in chunks of some steps, so that a sequence may be longer than memory. The
results have the same bits as those of one call.

.npy: an array (T, I) or, of tokens, (T,); with a batch (T, B, I), or (B, T, I)
      if the model is batch first.
.csv: a line a step, without a header: I numbers with commas between them, or
      one token.

A model that ends in Last gives one row: that of the last step. One that needs
the end of the sequence first (two directions, padding="same") cannot run in
chunks: --whole takes the sequence at once, and --window N gives at each step
what the model gives on the last N inputs alone.
"""

RUN_EXAMPLES = """\
examples:
  gatewise run model.keras --input x.npy --output y.npy
  gatewise run model.onnx --input log.csv --output scores.csv --threads 1
  gatewise run model.keras --input x.npy --output y.npy --chunk 100000
  gatewise run both-ways.keras --input x.npy --output y.npy --whole
  gatewise run both-ways.keras --input x.npy --output y.npy --window 30
"""

BENCH_DESCRIPTION = """\
Time single steps of one row (stream.step(x, out), one call after the other),
blocks of some steps of one row (stream.run(block, out)) and calls over a whole
sequence: half of them take at most p50, 99 of 100 at most p99. ONNX Runtime
runs the same model with the same number of threads, where it is installed and
the model can be saved for it.

With --peers in place of FILE: the benchmarks of gatewise itself, each against
PyTorch, ONNX Runtime, OpenVINO, JAX and TensorFlow, as far as they are
installed. pip install 'gatewise[bench]' brings them.
"""

BENCH_EXAMPLES = """\
examples:
  gatewise bench model.keras
  gatewise bench model.keras --threads 1 --steps 1000 --batch 1
  gatewise bench model.keras --block 128    as an audio callback gets them
  gatewise bench both-ways.keras --window 30
  gatewise bench --peers --quick            gatewise against its peers
  gatewise bench --peers PyTorch --only "LSTM step" --threads 1
  gatewise bench --peers --help             what else this can do
"""

# What brings a package that a command asks for; any other one is brought by its own name.
EXTRAS = {
    "jax": "'gatewise[jax]'",
    "matplotlib": "'gatewise[plot]'",
    "rich": "'gatewise[demo]'",
    "threadpoolctl": "'gatewise[demo]'",
    "torch": "'gatewise[torch]'",
}

DEMO_DESCRIPTION = """\
A character model learns a text, then writes. It reads the text as long rows
side by side, a piece at a time, and learns to tell the next character; the
state of the network goes on from one piece to the next (truncated
backpropagation through time). The recurrent layers are gatewise; softmax, loss
and optimiser are a page of NumPy: read gatewise/demo.py.

The loss is in nats a character: 4.6 is guessing among 100 symbols, 3.2 is
knowing how frequent each one is, and below 1.9 there are words. It is also
measured on the last sixteenth of the text, which is never learned ("held
out"). Ctrl-C ends the learning, not the demo: what was learned is kept, saved
and shown.
"""

DEMO_EXAMPLES = """\
examples:
  gatewise demo           one minute with the Python language reference
  gatewise demo --text novel.txt --seconds 600
                          ten minutes with a text of yours (UTF-8)
  gatewise demo --cell gru --hidden 256 --threads 4
                          another network, more threads
  gatewise demo --text novel.txt --save novel.npz
                          keep what was learned
  gatewise demo --text novel.txt --load novel.npz
                          go on learning from there
  gatewise demo --load novel.npz --seconds 0 --temperature 0.5
                          no learning, only writing, and more carefully
"""

# A network's own sizes. They are no argparse defaults, because a loaded network brings its own.
SIZES = {"cell": "lstm", "hidden": 128, "layers": 2}


def number(
    kind: type, low: float, high: float, *, open_below: bool = False, open_above: bool = False
) -> Callable[[str], Any]:
    """Make an argparse type: a number of a kind within limits, and an error that says which."""
    name = "a whole number" if kind is int else "a number"
    from_low = "above" if open_below else "from"
    to_high = "to below" if open_above else "to"

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        above_low = value > low if open_below else value >= low
        below_high = value < high if open_above else value <= high
        if not (above_low and below_high):  # also for NaN
            raise argparse.ArgumentTypeError(f"expected {name} {from_low} {low:g} {to_high} {high:g}, got {text!r}")
        return value

    return convert


class Parser(argparse.ArgumentParser):
    """A parser that refuses what it does not know itself, with its own usage: the parser above says only its own."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return options, unknown

    def _meant(self, unknown: Sequence[str]) -> str:
        """A question that names the options that are nearest to the unknown ones."""
        known = re.findall(r"--[a-z-]+", self.format_usage())
        names = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        near = [name for word in names for name in difflib.get_close_matches(word, known, n=1)]
        return f"; did you mean {' '.join(near)}?" if near else ""


def add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    """Describe `gatewise demo`."""
    demo = add_command(
        commands, "demo", "learn a text character by character, then write", DEMO_DESCRIPTION, DEMO_EXAMPLES
    )
    count = number(int, 1, 4096)

    data = demo.add_argument_group("data")
    data.add_argument("--text", metavar="FILE", help="text to learn, UTF-8 (default: Python's language reference)")
    data.add_argument("--save", metavar="FILE", help="write the network to FILE (.npz) after learning")
    data.add_argument("--load", metavar="FILE", help="start from a network that --save wrote")

    network = demo.add_argument_group("network (with --load, the file's)")
    network.add_argument("--cell", choices=("lstm", "gru", "rnn"), help=f"default: {SIZES['cell']}")
    network.add_argument("--hidden", type=count, metavar="N", help=f"units a layer (default: {SIZES['hidden']})")
    network.add_argument("--layers", type=number(int, 1, 16), metavar="N", help=f"layers (default: {SIZES['layers']})")

    learning = demo.add_argument_group("learning")
    learning.add_argument(
        "--seconds", type=number(float, 0, 1e6), default=60.0, metavar="S", help="time limit (default: 60)"
    )
    learning.add_argument(
        "--batch", type=count, default=32, metavar="B", help="rows read side by side (default: %(default)s)"
    )
    learning.add_argument(
        "--steps", type=count, default=64, metavar="T", help="characters a piece (default: %(default)s)"
    )
    learning.add_argument(
        "--learning-rate",
        type=number(float, 0, 1, open_below=True),
        default=0.01,
        metavar="RATE",
        help="Adam's, at the start; it falls to zero over the time limit (default: %(default)s)",
    )
    learning.add_argument(
        "--dropout",
        type=number(float, 0, 1, open_above=True),
        default=0.0,
        metavar="P",
        help="share of values dropped between layers while learning (default: 0)",
    )
    learning.add_argument("--threads", type=number(int, 1, 1024), metavar="N", help="default: the library's choice")

    writing = demo.add_argument_group("writing")
    writing.add_argument(
        "--temperature",
        type=number(float, 0, 10),
        default=0.7,
        metavar="X",
        help="0 always takes the likeliest character, 1 draws as it learned (default: %(default)s)",
    )
    writing.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=1,
        metavar="N",
        help="of every draw (default: %(default)s)",
    )


def add_command(
    commands: argparse._SubParsersAction[Parser], name: str, help: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """A command whose help teaches with examples."""
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_info(commands: argparse._SubParsersAction[Parser]) -> None:
    """Describe `gatewise info`."""
    info = add_command(
        commands, "info", "say what this installation is, or a model in a file", INFO_DESCRIPTION, INFO_EXAMPLES
    )
    info.add_argument("file", nargs="?", metavar="FILE", help=MODEL)


def add_convert(commands: argparse._SubParsersAction[Parser]) -> None:
    """Describe `gatewise convert`."""
    convert = add_command(commands, "convert", "write a model in another format", CONVERT_DESCRIPTION, CONVERT_EXAMPLES)
    convert.add_argument("file", metavar="IN", help=MODEL)
    convert.add_argument("output", metavar="OUT", help="the file to write: .onnx, .json or .safetensors")


def add_verify(commands: argparse._SubParsersAction[Parser]) -> None:
    """Describe `gatewise verify`."""
    verify = add_command(
        commands, "verify", "compare a model with the one it was made from", VERIFY_DESCRIPTION, VERIFY_EXAMPLES
    )
    verify.add_argument("file", metavar="FILE", help=MODEL)
    verify.add_argument("original", metavar="ORIGINAL", help="what it was made from: an ONNX or Keras file")


def add_run(commands: argparse._SubParsersAction[Parser]) -> None:
    """Describe `gatewise run`."""
    run = add_command(commands, "run", "run a model over a sequence in a file", RUN_DESCRIPTION, RUN_EXAMPLES)
    run.add_argument("file", metavar="FILE", help=MODEL)
    run.add_argument("--input", required=True, metavar="X", help="the sequence, .npy or .csv")
    run.add_argument("--output", required=True, metavar="Y", help="the file to write, .npy or .csv")
    run.add_argument(
        "--chunk", type=number(int, 1, 2**40), metavar="N", help="steps at a time (default: a few MB of them)"
    )
    how = run.add_mutually_exclusive_group()
    how.add_argument("--window", type=number(int, 1, 2**20), metavar="N", help="each step on the last N inputs alone")
    how.add_argument("--whole", action="store_true", help="the whole sequence at once, in memory")
    add_threads(run)


class PeersAction(argparse.Action):
    """Takes all that follows `--peers`, and refuses options before it, which would be ignored."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for name, value in vars(namespace).items():
            if name not in ("file", self.dest) and value != parser.get_default(name):
                parser.error(f"argument --peers: expected --{name} after it, got it before")
        setattr(namespace, self.dest, values)


def add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    """Describe `gatewise bench`."""
    bench = add_command(
        commands, "bench", "time a model, or gatewise against its peers", BENCH_DESCRIPTION, BENCH_EXAMPLES
    )
    subject = bench.add_mutually_exclusive_group(required=True)
    subject.add_argument("file", nargs="?", metavar="FILE", help=MODEL)
    subject.add_argument(
        "--peers",
        action=PeersAction,
        nargs=argparse.REMAINDER,
        metavar="NAME",
        help="compare gatewise with these peers, or with all; options that follow are those of --peers --help",
    )
    size = number(int, 1, 2**24)
    bench.add_argument("--steps", type=size, default=100, metavar="T", help="of the sequence (default: %(default)s)")
    bench.add_argument(
        "--batch", type=size, default=32, metavar="B", help="rows of the sequence (default: %(default)s)"
    )
    bench.add_argument(
        "--block", type=size, default=64, metavar="N", help="steps of a block of one row (default: %(default)s)"
    )
    bench.add_argument("--window", type=number(int, 1, 2**20), metavar="N", help="steps on the last N inputs alone")
    add_threads(bench)


def add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=number(int, 1, 1024), metavar="N", help="default: the library's choice")


def make_parser() -> argparse.ArgumentParser:
    """Describe the whole command line."""
    parser = Parser(
        prog="gatewise",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gatewise {gw.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    add_demo(commands)
    add_info(commands)
    add_convert(commands)
    add_verify(commands)
    add_run(commands)
    add_bench(commands)
    return parser


def run_demo(options: argparse.Namespace) -> int:
    """Run `gatewise demo`; the exit status."""
    from gatewise import demo

    if options.load is None:
        for name, size in SIZES.items():
            if getattr(options, name) is None:
                setattr(options, name, size)
    values = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        demo.run(demo.Settings(**values))
    except demo.DemoError as error:
        return refuse("demo", str(error))
    except MemoryError:
        return refuse("demo", "not enough memory for this text and network")
    return 0


def run_command(options: argparse.Namespace) -> int:
    """Run one of the commands on files; the exit status."""
    from gatewise import commands

    values = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        return commands.COMMANDS[options.command](**values)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return refuse(options.command, f"{where}{error.strerror or error}")
    except (ValueError, TypeError) as error:  # FormatError is a ValueError
        return refuse(options.command, str(error))
    except MemoryError as error:
        return refuse(options.command, f"not enough memory {error}".strip())


def refuse(command: str, reason: str) -> int:
    """Say in one line why a command does nothing; the exit status."""
    print(f"gatewise {command}: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def missing(error: ImportError) -> str:
    """What brings a package that is not there."""
    package = (error.name or "").partition(".")[0]
    if not str(error).startswith(("No module named", "import of")):  # who raised it said more
        return str(error)
    return f"{package} is missing; try: pip install {EXTRAS.get(package, package)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows the program's name; `sys.argv[1:]` by default.

    Returns
    -------
    int
        The exit status: 0, 1 if `verify` finds too large a difference, 2 for an error of use, 130 after Ctrl-C.
    """
    _prepare_streams()
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by gatewise.startup
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run_demo(options) if options.command == "demo" else run_command(options)
    except ModuleNotFoundError as error:
        if (error.name or "gatewise").partition(".")[0] == "gatewise":
            raise
        return refuse(options.command, missing(error))
    except KeyboardInterrupt:
        print("gatewise: interrupted", file=sys.stderr)
        return 130


def _prepare_streams() -> None:
    """Make sure that whatever is printed goes somewhere, and raises nothing."""
    for name in ("stdout", "stderr"):
        file = getattr(sys, name)
        if file is None:  # closed, as `2>&-` does: what is opened next must not take its place and get the messages
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the process ends
        elif hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark


if __name__ == "__main__":
    sys.exit(main())
