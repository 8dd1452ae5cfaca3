"""The command line: `gatewise demo`, `gatewise info`; the same as `python -m gatewise`.

This file knows the options and their limits, and nothing else: what a command needs is imported when it
runs, so that `gatewise --help` works without any extra.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gatewise as gw

DESCRIPTION = "gatewise: small, fast gated recurrent networks (LSTM, GRU, RNN)."

EXAMPLES = """\
examples:
  gatewise demo                 learn the Python language reference for a minute, then write some of it
  gatewise demo --help          what else the demo can do
  gatewise info                 version, processor backends and threads: what to paste into a bug report
"""

DEMO_DESCRIPTION = """\
A character model learns a text, then writes. It reads the text as long rows side by side, a piece at a
time, and learns to tell the next character; the state of the network goes on from one piece to the next
(truncated backpropagation through time). The recurrent layers are gatewise; softmax, loss and optimiser
are a page of NumPy: read gatewise/demo.py.

The loss is in nats a character: 4.6 is guessing among 100 symbols, 3.2 is knowing how frequent each one
is, and below 1.9 there are words. It is also measured on the last sixteenth of the text, which is never
learned ("held out"). Ctrl-C ends the learning, not the demo: what was learned is kept, saved and shown.
"""

DEMO_EXAMPLES = """\
examples:
  gatewise demo                                           one minute with the Python language reference
  gatewise demo --text novel.txt --seconds 600            ten minutes with a text of yours (UTF-8)
  gatewise demo --cell gru --hidden 256 --threads 4       another network, more threads
  gatewise demo --text novel.txt --save novel.npz         keep what was learned
  gatewise demo --text novel.txt --load novel.npz         go on learning from there
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


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe `gatewise demo`."""
    demo = commands.add_parser(
        "demo",
        help="learn a text character by character, then write",
        description=DEMO_DESCRIPTION,
        epilog=DEMO_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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


def make_parser() -> argparse.ArgumentParser:
    """Describe the whole command line."""
    parser = argparse.ArgumentParser(
        prog="gatewise",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gatewise {gw.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    add_demo(commands)
    commands.add_parser(
        "info",
        help="print version, processor backends and threads",
        description="Print version, processor backends and threads: what to paste into a bug report.",
    )
    return parser


def run_demo(options: argparse.Namespace) -> int:
    """Run `gatewise demo`; the exit status."""
    try:
        from gatewise import demo
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("rich", "threadpoolctl"):
            raise
        print(f"gatewise demo: {missing} is missing; try: pip install 'gatewise[demo]'", file=sys.stderr)
        return 2
    if options.load is None:
        for name, size in SIZES.items():
            if getattr(options, name) is None:
                setattr(options, name, size)
    values = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        demo.run(demo.Settings(**values))
    except demo.DemoError as error:
        print(f"gatewise demo: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("gatewise demo: not enough memory for this text and network", file=sys.stderr)
        return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows the program's name; `sys.argv[1:]` by default.

    Returns
    -------
    int
        The exit status: 0, 2 for an error of use, 130 after Ctrl-C.
    """
    # A terminal or pipe that cannot show a character gets a question mark, not a traceback.
    for file in (sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "demo":
            return run_demo(options)
        if options.command == "info":
            gw.show_config()
        else:
            parser.print_help()
    except KeyboardInterrupt:
        print("gatewise: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
