"""The parser of the command line: the options of every command, their limits and their help.

It imports nothing that a command needs to run, so that `gatewise --help` is quick and needs no extra.
"""

from __future__ import annotations

import argparse
import math
import re
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
  gatewise info model.keras  the layers of a model and their sizes
  gatewise run model.keras --input x.npy --output y.npy
                             the output of a model for a sequence
  gatewise COMMAND --help    more, with examples
"""

# The help of each argument that is a model.
MODEL = "a model: .safetensors, .keras, .h5, .hdf5, .onnx, .pt, .pth, .ckpt, .bin or .json"

INFO_DESCRIPTION = """\
Without FILE: version, processor backends and threads, to paste into a bug
report. With FILE: the layers of a model, their sizes, parameters, state and
multiply-adds, and which of them can stream.
"""

INFO_EXAMPLES = """\
examples:
  gatewise info                     this installation
  gatewise info model.keras         a model that Keras saved
  gatewise info model.safetensors   a model that gatewise.save wrote
"""

CONVERT_DESCRIPTION = """\
Read the model in IN and write it to OUT. The ending of OUT selects the format:
.onnx for ONNX, .json for RTNeural, .safetensors for gatewise's own. OUT is
never left half written.
"""

CONVERT_EXAMPLES = """\
examples:
  gatewise convert model.keras model.onnx
  gatewise convert model.safetensors model.json
  gatewise convert model.onnx model.safetensors
  gatewise verify model.safetensors model.onnx
"""

VERIFY_DESCRIPTION = """\
Run a model and the one that it was made from on the same random sequences and
windows, and print the largest differences, relative to the largest output (or
to 1). The exit status is 0 if they are within the tolerance, 1 if they are
above it, 2 if the two could not be compared.
"""

VERIFY_EXAMPLES = """\
examples:
  gatewise verify model.safetensors original.onnx
  gatewise verify model.safetensors original.keras || echo "do not ship it"
"""

RUN_DESCRIPTION = """\
Run a model over the sequence in one file and write its output to another one,
in chunks of some steps, so that a sequence may be larger than memory. The
output has the same bits as that of one call.

.npy: an array (T, I) or, of tokens, (T,); with a batch (T, B, I), or (B, T, I)
      if the model is batch first.
.csv: a line for each step, without a header: I numbers with commas between
      them, or one token.

A model that ends in Last gives one row, that of the last step. A model that
needs the end of the sequence first (two directions, padding="same") cannot run
in chunks: --whole runs the sequence in one call, and --window N runs the model
at each step on only the last N inputs.
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
Time single steps of one row (stream.step(x, out), one call after another),
blocks of some steps of one row (stream.run(block, out)) and calls over a whole
sequence. Half of the calls take at most p50, 99 of 100 at most p99. If ONNX
Runtime is installed and the model can be saved for it, it runs the same model
with the same number of threads.

With --peers in place of FILE: the benchmarks of gatewise itself, each against
PyTorch, ONNX Runtime, OpenVINO, JAX and TensorFlow, as far as they are
installed. pip install 'gatewise[bench]' brings them.
"""

BENCH_EXAMPLES = """\
examples:
  gatewise bench model.keras
  gatewise bench model.keras --threads 1 --steps 1000 --batch 1
  gatewise bench model.keras --block 128    as in an audio callback
  gatewise bench both-ways.keras --window 30
  gatewise bench --peers --quick            gatewise against its peers
  gatewise bench --peers PyTorch --only "LSTM step" --threads 1
  gatewise bench --peers --help             what else this can do
"""

DEMO_DESCRIPTION = """\
A character model learns a text, then writes. It reads the text as long rows
side by side, a piece at a time, and learns to predict the next character; the
state of the network continues from one piece to the next (truncated
backpropagation through time). The recurrent layers are gatewise's; softmax,
loss and optimiser are a page of NumPy: read gatewise/cli/demo.py.

The loss is in nats per character: 4.6 is guessing among 100 symbols, 3.2 is
knowing how frequent each one is, and below 1.9 there are words. It is also
measured on the last sixteenth of the text, which is never learned ("held
out"). Ctrl-C ends the learning, not the demo: what was learned is kept, saved
and shown.
"""

DEMO_EXAMPLES = """\
examples:
  gatewise demo           one minute with the Python language reference
  gatewise demo --text novel.txt --seconds 600
                          ten minutes with your own text (UTF-8)
  gatewise demo --cell gru --hidden 256 --threads 4
                          another network, more threads
  gatewise demo --text novel.txt --save novel.npz
                          keep what was learned
  gatewise demo --text novel.txt --load novel.npz
                          go on learning from there
  gatewise demo --load novel.npz --seconds 0 --temperature 0.5
                          no learning, only writing, and more carefully
"""

# The default sizes of the network in the demo. They are not defaults of argparse, since a loaded network has its own.
DEFAULT_SIZES = {"cell": "lstm", "hidden": 128, "layers": 2}


def number(
    kind: type, low: float, high: float, *, open_below: bool = False, open_above: bool = False
) -> Callable[[str], Any]:
    """Make a type for argparse: a number within limits, which the error for any other value names."""
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
        if not (above_low and below_high):  # NaN is neither
            raise argparse.ArgumentTypeError(f"expected {name} {from_low} {low:g} {to_high} {high:g}, got {text!r}")
        return value

    return convert


demo_size = number(int, 1, 4096)  # of the demo's network and batches


class Parser(argparse.ArgumentParser):
    """A parser that refuses unknown options itself, with the usage of its command instead of that of `gatewise`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggestion(unknown)}")
        return options, unknown

    def _suggestion(self, unknown: Sequence[str]) -> str:
        """A question that names the known options that are closest to the unknown ones."""
        from difflib import get_close_matches

        known = re.findall(r"--[a-z-]+", self.format_usage())
        names = [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]
        closest = [option for name in names for option in get_close_matches(name, known, n=1)]
        return f"; did you mean {' '.join(closest)}?" if closest else ""


def add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    """Describe `gatewise demo`."""
    demo = add_command(
        commands, "demo", "learn a text character by character, then write", DEMO_DESCRIPTION, DEMO_EXAMPLES
    )
    data = demo.add_argument_group("data")
    data.add_argument("--text", metavar="FILE", help="text to learn, UTF-8 (default: Python's language reference)")
    data.add_argument("--save", metavar="FILE", help="write the network to FILE (.npz) after learning")
    data.add_argument("--load", metavar="FILE", help="start from a network that --save wrote")

    network = demo.add_argument_group("network (with --load, the file's)")
    network.add_argument("--cell", choices=("lstm", "gru", "rnn"), help=f"default: {DEFAULT_SIZES['cell']}")
    network.add_argument(
        "--hidden", type=demo_size, metavar="N", help=f"units per layer (default: {DEFAULT_SIZES['hidden']})"
    )
    network.add_argument(
        "--layers", type=number(int, 1, 16), metavar="N", help=f"layers (default: {DEFAULT_SIZES['layers']})"
    )

    _add_learning(demo.add_argument_group("learning"))

    writing = demo.add_argument_group("writing")
    writing.add_argument(
        "--temperature",
        type=number(float, 0, 10),
        default=0.7,
        metavar="X",
        help="0 always takes the likeliest character, 1 draws as learned (default: %(default)s)",
    )
    writing.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=1,
        metavar="N",
        help="seed of all random numbers (default: %(default)s)",
    )


def _add_learning(learning: argparse._ArgumentGroup) -> None:
    learning.add_argument(
        "--seconds", type=number(float, 0, 1e6), default=60.0, metavar="S", help="time limit (default: 60)"
    )
    learning.add_argument(
        "--batch", type=demo_size, default=32, metavar="B", help="rows read side by side (default: %(default)s)"
    )
    learning.add_argument(
        "--steps", type=demo_size, default=64, metavar="T", help="characters per piece (default: %(default)s)"
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


def add_command(
    commands: argparse._SubParsersAction[Parser], name: str, help: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command whose help ends in examples."""
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
    verify.add_argument("original", metavar="ORIGINAL", help="the model it was made from: an ONNX or Keras file")


def add_run(commands: argparse._SubParsersAction[Parser]) -> None:
    """Describe `gatewise run`."""
    run = add_command(commands, "run", "run a model over a sequence in a file", RUN_DESCRIPTION, RUN_EXAMPLES)
    run.add_argument("file", metavar="FILE", help=MODEL)
    run.add_argument("--input", required=True, metavar="X", help="the sequence, .npy or .csv")
    run.add_argument("--output", required=True, metavar="Y", help="the file to write, .npy or .csv")
    run.add_argument("--chunk", type=number(int, 1, 2**40), metavar="N", help="steps at a time (default: a few MB)")
    mode = run.add_mutually_exclusive_group()
    mode.add_argument(
        "--window", type=number(int, 1, 2**20), metavar="N", help="run each step on only the last N inputs"
    )
    mode.add_argument("--whole", action="store_true", help="run the whole sequence in one call, in memory")
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
    bench.add_argument(
        "--steps", type=size, default=100, metavar="T", help="steps of the sequence (default: %(default)s)"
    )
    bench.add_argument(
        "--batch", type=size, default=32, metavar="B", help="rows of the sequence (default: %(default)s)"
    )
    bench.add_argument("--block", type=size, default=64, metavar="N", help="steps of a block (default: %(default)s)")
    bench.add_argument(
        "--window", type=number(int, 1, 2**20), metavar="N", help="run each step on only the last N inputs"
    )
    add_threads(bench)


def add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=number(int, 1, 1024), metavar="N", help="default: the library's choice")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line."""
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
