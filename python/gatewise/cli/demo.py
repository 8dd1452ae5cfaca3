"""`gatewise demo`: a character model learns a text, then writes.

The data goes one way:

    text -> codes (N) -> rows side by side (N / B, B) -> pieces (T, B) -> one-hot (T, B, A)
         -> gatewise (T, B, H) -> softmax (T, B, A) -> loss, and the gradients back again

T steps a piece, B rows, A symbols of the alphabet, H hidden units. The recurrent layers are gatewise;
everything around them is NumPy, written out below: softmax, loss, clipping, Adam, and the loop.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from threadpoolctl import threadpool_limits

import gatewise as gw
from gatewise.layers.layer import Layer

Array = npt.NDArray[Any]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # symbol 0: whatever is not in the alphabet
ALPHABET_SIZE = 100
SHORTEST_TEXT = 200
CHARACTERS_WRITTEN = 400
CLIP_NORM = 1.0
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
FORMAT = "gatewise demo 1"


class DemoError(Exception):
    """What the demo cannot do, said to its user."""


@dataclass(frozen=True)
class Settings:
    """What the command line asks for; `cell`, `hidden`, `layers`: None takes a loaded model's."""

    text: str | None
    save: str | None
    load: str | None
    cell: str | None
    hidden: int | None
    layers: int | None
    seconds: float
    batch: int
    steps: int
    learning_rate: float
    dropout: float
    threads: int | None
    temperature: float
    seed: int


# ---- The text ------------------------------------------------------------------------------------


def read_text(path: str | None) -> tuple[str, str]:
    """Read the text to learn: its title and itself."""
    if path is None:
        return "Python's language reference", language_reference()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DemoError(f"--text: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DemoError(f"--text: {path} is not UTF-8 text (byte {error.start})") from error
    if len(text) < SHORTEST_TEXT:
        raise DemoError(f"--text: {path} is too short: {len(text)} characters, at least {SHORTEST_TEXT} are needed")
    return path, text


def language_reference() -> str:
    """Return what every Python brings along for `help()`: a third of a million characters of English and code."""
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DemoError("this Python has no pydoc_data; name a text to learn with --text") from error
    paragraphs = "\n\n".join(topics[name].strip() for name in sorted(topics)).split("\n\n")
    # Topics repeat each other. A paragraph stays where it comes first, so that none held out is also learned.
    # Tables and grammars go: they are lines of blanks and bars, easy to learn and dull to read.
    return "\n\n".join(text for text in dict.fromkeys(paragraphs) if not re.search(r"::=|^ *[|+]", text, re.MULTILINE))


def choose_alphabet(text: str) -> str:
    """Return the most frequent characters of a text, after the one that stands for all others."""
    counts = Counter(character for character in text if is_symbol(character))
    frequent = sorted(character for character, _ in counts.most_common(ALPHABET_SIZE - 1))
    if len(frequent) < 2:
        raise DemoError("--text: nothing to learn in a text of one symbol only")
    return REPLACEMENT + "".join(frequent)


def is_symbol(character: str) -> bool:
    """Whether a character can be written to a terminal as it is: no escapes, no bells."""
    return character in "\n\t" or (character.isprintable() and character != REPLACEMENT)


def encode(text: str, alphabet: str) -> Array:
    """Replace the characters of a text by their places in the alphabet: (N,) uint8."""
    code_of = np.zeros(0x110000, np.uint8)  # a table of all of Unicode: one look-up a character
    code_of[[ord(symbol) for symbol in alphabet]] = np.arange(len(alphabet))
    return code_of[np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)]


def split(codes: Array) -> tuple[Array, Array]:
    """Cut codes into what is learned and what is held out: the last sixteenth, within reason."""
    held_out = min(max(len(codes) // 16, 16), 50_000)
    return codes[:-held_out], codes[-held_out:]


def side_by_side(codes: Array, rows: int) -> Array:
    """Cut one long row into several and stand them side by side: (N,) -> (N / rows, rows)."""
    length = len(codes) // rows
    return np.ascontiguousarray(codes[: length * rows].reshape(rows, length).T)


def pieces(table: Array, steps: int) -> Iterator[tuple[Array, Array]]:
    """Yield inputs and targets, each (T, B), from top to bottom; a target is the input one step later."""
    for start in range(0, len(table) - 1, steps):
        piece = table[start : start + steps + 1]
        yield piece[:-1], piece[1:]


def endless_pieces(table: Array, steps: int) -> Iterator[tuple[bool, Array, Array]]:
    """Yield the pieces again and again, each with whether it is the first of its epoch."""
    while True:
        for number, (inputs, targets) in enumerate(pieces(table, steps)):
            yield number == 0, inputs, targets


def hot(symbols: int) -> float:
    """Return the value of the one in a one-hot vector of A symbols: sqrt(A), so that its mean square is 1.

    Of a plain 1 the first layer sees next to nothing: it would need several times as long to learn.
    """
    return math.sqrt(symbols)


class OneHot:
    """Spreads codes (T, B) over the alphabet (T, B, A), always in the same memory."""

    def __init__(self, steps: int, rows: int, symbols: int) -> None:
        self.memory = np.zeros((steps, rows, symbols), np.float32)

    def __call__(self, codes: Array) -> Array:
        """Spread codes; what comes back is good until the next call."""
        x = self.memory[: len(codes)]
        x.fill(0)
        np.put_along_axis(x, codes[..., None].astype(np.intp), hot(x.shape[-1]), axis=-1)
        return x


# ---- The network ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Recurrent layers, the softmax layer over them (`weight` (A, H), `bias` (A)), and the symbols."""

    alphabet: str
    cell: str
    recurrent: Layer
    softmax: dict[str, Array]


def make_recurrent(cell: str, symbols: int, hidden: int, layers: int, settings: Settings) -> Layer:
    """Make the gatewise layers: one-hot characters in, hidden units out."""
    if settings.dropout > 0 and layers == 1:
        raise DemoError("--dropout acts between layers: it needs --layers 2 or more")
    kinds: dict[str, Callable[..., Layer]] = {"lstm": gw.LSTM, "gru": gw.GRU, "rnn": gw.RNN}
    return kinds[cell](symbols, hidden, layers, dropout=settings.dropout, seed=settings.seed)


def make_model(alphabet: str, settings: Settings) -> Model:
    """Make a model that knows nothing yet."""
    cell, symbols, hidden, layers = settings.cell, len(alphabet), settings.hidden, settings.layers
    if cell is None or hidden is None or layers is None:
        raise DemoError("a new network needs --cell, --hidden and --layers")
    recurrent = make_recurrent(cell, symbols, hidden, layers, settings)
    bound = 1 / math.sqrt(hidden)
    weight = np.random.default_rng(settings.seed).uniform(-bound, bound, (symbols, hidden))
    softmax = {"weight": weight.astype(np.float32), "bias": np.zeros(symbols, np.float32)}
    return Model(alphabet, cell, recurrent, softmax)


def log_softmax(output: Array, softmax: Mapping[str, Array]) -> Array:
    """Logarithms of the probabilities of the next character: (N, H) -> (N, A)."""
    logits: Array = output @ softmax["weight"].T + softmax["bias"]
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def cross_entropy(log_probability: Array, targets: Array) -> float:
    """Mean surprise in nats: (N, A), (N,) -> a number."""
    return -float(log_probability[np.arange(len(targets)), targets].mean())


def softmax_loss(output: Array, targets: Array, softmax: Mapping[str, Array]) -> tuple[float, Array, dict[str, Array]]:
    """Loss of a piece, its gradient by the output (T, B, H), and by the softmax layer's parameters."""
    flat, right = output.reshape(-1, output.shape[-1]), targets.ravel()  # (T*B, H), (T*B)
    log_probability = log_softmax(flat, softmax)
    loss = cross_entropy(log_probability, right)
    slope = np.exp(log_probability)  # of the loss by the logits: probabilities, less one for the right symbol
    slope[np.arange(len(right)), right] -= 1
    slope /= len(right)
    gradients = {"weight": slope.T @ flat, "bias": slope.sum(axis=0)}
    return loss, (slope @ softmax["weight"]).reshape(output.shape), gradients


def clip_scale(*gradients: Mapping[str, Array]) -> float:
    """Return the factor that brings the norm of all gradients together down to CLIP_NORM."""
    square = sum(float(np.vdot(g, g)) for group in gradients for g in group.values())
    return min(1.0, CLIP_NORM / math.sqrt(square)) if square > 0 else 1.0


class Adam:
    """Adam over a dictionary of parameters: steps by the running mean of a gradient over its running size."""

    def __init__(self, parameters: Mapping[str, Array]) -> None:
        self.means = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.squares = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.updates = 0

    def update(
        self,
        parameters: MutableMapping[str, Array],
        gradients: Mapping[str, Array],
        scale: float,
        rate: float,
    ) -> None:
        """Move `parameters` against `scale` times `gradients`."""
        self.updates += 1
        # Both running values start at zero; this makes good for it.
        rate *= math.sqrt(1 - 0.999**self.updates) / (1 - 0.9**self.updates)
        for name, mean in self.means.items():
            gradient, square = scale * gradients[name], self.squares[name]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient * gradient - square)
            parameters[name] -= rate * mean / (np.sqrt(square) + 1e-8)


# ---- Learning ------------------------------------------------------------------------------------


class Learner:
    """Teaches a model pieces of a text, one after the other."""

    def __init__(self, model: Model, steps: int, rows: int) -> None:
        self.model = model
        self.one_hot = OneHot(steps, rows, len(model.alphabet))
        self.recurrent_adam, self.softmax_adam = Adam(model.recurrent.parameters), Adam(model.softmax)

    def learn(self, inputs: Array, targets: Array, state: Any, rate: float) -> tuple[float, Any]:
        """Learn one piece, (T, B) and (T, B): the loss before, and the state for the piece that follows.

        Truncated backpropagation: the state goes on to the next piece, its gradient ends here.
        """
        recurrent, softmax = self.model.recurrent, self.model.softmax
        tape = recurrent.record(self.one_hot(inputs), state)
        loss, slope, softmax_gradients = softmax_loss(tape.output, targets, softmax)
        gradients = tape.backward(slope).parameters
        scale = clip_scale(gradients, softmax_gradients)
        with recurrent.edit() as parameters:
            self.recurrent_adam.update(parameters, gradients, scale, rate)
        self.softmax_adam.update(softmax, softmax_gradients, scale, rate)
        return loss, tape.state


def held_out_loss(model: Model, codes: Array) -> float:
    """Mean loss over a text that was not learned, (N,) codes."""
    table = side_by_side(codes, min(32, max(1, len(codes) // 256)))
    one_hot = OneHot(64, table.shape[1], len(model.alphabet))
    total, state = 0.0, None
    for inputs, targets in pieces(table, 64):
        output, state = model.recurrent(one_hot(inputs), state)
        log_probability = log_softmax(output.reshape(-1, output.shape[-1]), model.softmax)
        total += cross_entropy(log_probability, targets.ravel()) * len(targets)
    return total / (len(table) - 1)


class CtrlC:
    """Inside, Ctrl-C sets `pressed`, and no update stops half-way; a second one interrupts as usual."""

    def __init__(self) -> None:
        self.pressed = False
        self.ours = threading.current_thread() is threading.main_thread()  # only there may a handler be set

    def __enter__(self) -> CtrlC:
        if self.ours:
            self.before = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, *_: object) -> None:
        """Note the first Ctrl-C and give the second its usual meaning."""
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self.ours:
            signal.signal(signal.SIGINT, self.before or signal.default_int_handler)


class Display:
    """A live bar on a terminal; six sober lines there and everywhere else."""

    LINES = 6

    def __init__(self, console: Console, seconds: float) -> None:
        columns = (
            TextColumn("learning"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[left]:.0f} s left", style="dim"),
        )
        # Refreshed between pieces, not by a thread of its own: that would take a core from the learning.
        self.bar = Progress(
            *columns,
            console=console,
            auto_refresh=False,
            expand=True,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=seconds, left=seconds)
        self.console, self.seconds = console, seconds
        self.next_refresh, self.next_line = 0.0, seconds / self.LINES

    def refresh(self, elapsed: float, loss: float, speed: float) -> None:
        """Refresh the bar, a few times a second."""
        if elapsed >= self.next_refresh:
            self.next_refresh = elapsed + 0.2
            left = max(0.0, self.seconds - elapsed)
            text = f"loss {loss:.3f}  {speed:,.0f} characters/s"
            self.bar.update(self.task, completed=elapsed, description=text, left=left, refresh=True)

    def line_due(self, elapsed: float) -> bool:
        """Whether it is time for the next line; the last one is left to whoever reports the result."""
        if not self.next_line <= elapsed < self.seconds:
            return False
        self.next_line = elapsed + self.seconds / self.LINES
        return True

    def line(self, elapsed: float, epoch: float, loss: float, held_out: float, speed: float) -> None:
        """Print a line that stays."""
        self.console.print(
            f"{elapsed:6.1f} s   epoch {epoch:5.2f}   loss {loss:.3f}   held out {held_out:.3f}"
            f"   {speed:8,.0f} characters/s"
        )


class Meter:
    """What was learned so far."""

    def __init__(self) -> None:
        self.characters = 0
        self.seconds = 0.0  # spent on learning alone
        self.loss = math.nan  # mean of the latest pieces
        self.speeds: list[float] = []  # of each piece, characters a second

    def add(self, characters: int, seconds: float, loss: float) -> None:
        """Count one more piece."""
        if not math.isfinite(loss):
            raise DemoError("the loss is not a finite number any more; a lower --learning-rate helps")
        self.characters += characters
        self.seconds += seconds
        self.speeds.append(characters / seconds)
        pieces = len(self.speeds)
        self.loss = loss if pieces == 1 else self.loss + (loss - self.loss) / min(pieces, 20)

    @property
    def speed(self) -> float:
        """Characters a second."""
        return self.characters / self.seconds


def fit(codes: Array, settings: Settings) -> tuple[Array, int]:
    """Lay codes (N,) out for learning: rows side by side, steps a piece; fewer for a short text."""
    table = side_by_side(codes, max(1, min(settings.batch, len(codes) // 32)))
    return table, min(settings.steps, len(table) - 1)


def learning_rate(settings: Settings, elapsed: float) -> float:
    """Half a cosine: large steps first, for speed, and small ones in the end, to settle."""
    return settings.learning_rate * (1 + math.cos(math.pi * elapsed / settings.seconds)) / 2


def train(model: Model, codes: Array, held_out: Array, settings: Settings, console: Console) -> tuple[Meter, bool]:
    """Learn codes (N,) until the time is over or Ctrl-C: what was done, and whether by Ctrl-C."""
    table, steps = fit(codes, settings)
    learner = Learner(model, steps, table.shape[1])
    display, meter = Display(console, settings.seconds), Meter()
    start, elapsed, state = perf_counter(), 0.0, None
    # Threads of NumPy's BLAS go on spinning for a while after each product, and take turns with those of gatewise on
    # the same cores: with both, learning takes twice as long.
    with threadpool_limits(1, user_api="blas"), CtrlC() as ctrl_c, display.bar:
        for first, inputs, targets in endless_pieces(table, steps):
            before = perf_counter()
            rate = learning_rate(settings, elapsed)
            loss, state = learner.learn(inputs, targets, None if first else state, rate)
            meter.add(inputs.size, perf_counter() - before, loss)
            elapsed = perf_counter() - start
            display.refresh(elapsed, meter.loss, meter.speed)
            if display.line_due(elapsed):
                epoch = meter.characters / len(codes)
                display.line(elapsed, epoch, meter.loss, held_out_loss(model, held_out), meter.speed)
            if elapsed >= settings.seconds or ctrl_c.pressed:
                break
    return meter, ctrl_c.pressed


# ---- Writing -------------------------------------------------------------------------------------


def write(model: Model, before: Array, characters: int, settings: Settings) -> tuple[str, Array]:
    """Write on from codes `before` (N,): the text, and the nanoseconds that each step of the stream took."""
    draws, symbols = np.random.default_rng(settings.seed), len(model.alphabet)
    stream = network_of(model).stream()
    score = np.ascontiguousarray(stream.run(before)[-1])  # (A,)
    written, nanoseconds = [], np.empty(characters)
    for number in range(characters):
        # The largest score with Gumbel noise added is a draw from their softmax; without, the likeliest.
        code = int(np.argmax(score + settings.temperature * draws.gumbel(size=symbols)))
        written.append(model.alphabet[code])
        start = perf_counter_ns()
        stream.step(code, score)
        nanoseconds[number] = perf_counter_ns() - start
    return "".join(written), nanoseconds


def network_of(model: Model) -> gw.Sequential:
    """Make one network of codes in, scores out: its stream looks the products of the one-hot characters up."""
    symbols, hidden = model.softmax["weight"].shape
    one_hot, softmax = gw.Embedding(symbols, symbols), gw.Dense(hidden, symbols)
    one_hot.parameters["weight"] = hot(symbols) * np.eye(symbols)
    softmax.load_state_dict(model.softmax)
    return gw.Sequential([one_hot, model.recurrent, softmax])


def opening(text: str) -> str:
    """Return the first line or lines of a text: what the network reads before it writes."""
    return text[: text.rfind("\n", 0, 120) + 1] or text[:120]


# ---- Comparing -----------------------------------------------------------------------------------


def undisturbed(speeds: list[float]) -> float:
    """Return the speed that one piece in ten exceeds: the others may have met with whatever else was running."""
    return float(np.percentile(speeds, 90))


def torch_learner(torch: Any, model: Model, table: Array, steps: int, settings: Settings) -> Callable[[], None]:
    """Make the same network and learning in PyTorch: a function that learns one piece."""
    symbols, hidden = model.softmax["weight"].shape
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[model.cell]
    recurrent = kind(symbols, hidden, model.recurrent.num_layers, dropout=settings.dropout)
    softmax = torch.nn.Linear(hidden, symbols)
    parameters = [*recurrent.parameters(), *softmax.parameters()]
    adam = torch.optim.Adam(parameters, lr=1e-3)
    # One piece, again and again: what it says does not matter to the speed.
    x = torch.from_numpy(OneHot(steps, table.shape[1], symbols)(table[:steps]))  # (T, B, A)
    targets = torch.from_numpy(table[1 : steps + 1].astype(np.int64)).flatten()  # (T*B)
    state = None

    def learn() -> None:
        nonlocal state
        output, after = recurrent(x, state)
        loss = torch.nn.functional.cross_entropy(softmax(output).flatten(0, 1), targets)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        adam.step()
        state = tuple(part.detach() for part in after) if isinstance(after, tuple) else after.detach()

    return learn


def seconds_each(learn: Callable[[], None], limit: float) -> list[float]:
    """Time a function, again and again until the limit, after a first time that sets things up."""
    learn()
    times: list[float] = []
    while sum(times) < limit:
        start = perf_counter()
        learn()
        times.append(perf_counter() - start)
    return times


def compare(model: Model, table: Array, steps: int, settings: Settings, speeds: list[float], console: Console) -> None:
    """Print how fast PyTorch, where it is installed, trains the same network: at best with as many threads or one."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError):  # OSError: installed, but its libraries do not load
        return
    learn = torch_learner(torch, model, table, steps, settings)
    characters = steps * table.shape[1]
    theirs, best_threads = 0.0, 0
    for threads in sorted({1, gw.get_num_threads()}):
        torch.set_num_threads(threads)
        speed = undisturbed([characters / time for time in seconds_each(learn, min(2.0, settings.seconds / 10))])
        if speed > theirs:
            theirs, best_threads = speed, threads
    console.print(f"PyTorch   {theirs:,.0f} characters/s, undisturbed ({torch.__version__}, threads: {best_threads})")
    console.print(f"ratio     gatewise learns {undisturbed(speeds) / theirs:.2f} times as fast")


# ---- Saving and loading --------------------------------------------------------------------------


def parameter_shapes(cell: str, symbols: int, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Return what a saved model holds: names and shapes of its parameters."""
    wide = GATES[cell] * hidden
    shapes: dict[str, tuple[int, ...]] = {"softmax.weight": (symbols, hidden), "softmax.bias": (symbols,)}
    for layer in range(layers):
        shapes[f"recurrent.weight_ih_l{layer}"] = (wide, symbols if layer == 0 else hidden)
        shapes[f"recurrent.weight_hh_l{layer}"] = (wide, hidden)
        shapes[f"recurrent.bias_ih_l{layer}"] = shapes[f"recurrent.bias_hh_l{layer}"] = (wide,)
    return shapes


def check_save(path: str) -> None:
    """Make sure, before a minute of learning, that its result has somewhere to go."""
    target = Path(path)
    if target.exists() and not target.is_file():
        raise DemoError(f"--save: {path} is not a file")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise DemoError(f"--save: cannot write {path}")


def save(model: Model, path: str) -> None:
    """Write a model to a file, whole or not at all."""
    recurrent = model.recurrent.state_dict()
    arrays: dict[str, Any] = {f"recurrent.{name}": array for name, array in recurrent.items()}
    arrays |= {f"softmax.{name}": array for name, array in model.softmax.items()}
    symbols, hidden = model.softmax["weight"].shape
    arrays["format"], arrays["cell"] = np.array(FORMAT), np.array(model.cell)
    arrays["sizes"] = np.array([symbols, hidden, model.recurrent.num_layers])
    arrays["alphabet"] = np.array([ord(symbol) for symbol in model.alphabet])
    target = Path(path).resolve()
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        unfinished.replace(target)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise DemoError(f"--save: cannot write {path}: {error.strerror}") from error


def read_arrays(path: str) -> dict[str, Array]:
    """Read all arrays of an npz file."""
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise DemoError(f"--load: cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a file that is no npz, or a damaged one, can raise nearly anything
        raise DemoError(f"--load: {path} was not written by gatewise demo, or is damaged") from error


def read_alphabet(points: Array, symbols: int) -> str:
    """Check and decode a saved alphabet: (A,) code points."""
    if points.shape != (symbols,) or points.dtype.kind not in "iu":
        raise ValueError(f"alphabet: expected {symbols} code points, got {points.dtype} {points.shape}")
    if not 3 <= symbols <= 256 or points.min() < 0 or points.max() > 0x10FFFF:
        raise ValueError("alphabet: expected 3 to 256 code points of Unicode")
    alphabet = "".join(map(chr, points))
    if alphabet[0] != REPLACEMENT or len(set(alphabet)) < symbols or not all(map(is_symbol, alphabet[1:])):
        raise ValueError("alphabet: expected the replacement character, then printable ones, each once")
    return alphabet


def check_parameters(arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that saved parameters are all there, and of the right shape and kind."""
    for name, shape in shapes.items():
        if name not in arrays:
            raise ValueError(f"{name} is missing")
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError(f"{name}: expected float32 {shape}, got {array.dtype} {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: not all values are finite")


def restore(arrays: Mapping[str, Array], settings: Settings) -> Model:
    """Make a model of what `save` wrote; whatever does not fit is a ValueError."""
    for name in ("cell", "sizes", "alphabet"):
        if name not in arrays:
            raise ValueError(f"{name} is missing")
    cell, sizes = str(arrays["cell"]), arrays["sizes"]
    if cell not in GATES:
        raise ValueError(f"cell: expected one of {', '.join(GATES)}, got {cell!r}")
    if sizes.shape != (3,) or sizes.dtype.kind not in "iu" or sizes.min() < 1 or sizes.max() > 4096:
        raise ValueError("sizes: expected three numbers from 1 to 4096")
    symbols, hidden, layers = (int(size) for size in sizes)
    for name, has, asked in (
        ("cell", cell, settings.cell),
        ("hidden", hidden, settings.hidden),
        ("layers", layers, settings.layers),
    ):
        if asked is not None and asked != has:
            raise ValueError(f"--{name} {asked} was asked for, but the network in the file has {has}")
    alphabet = read_alphabet(arrays["alphabet"], symbols)
    check_parameters(arrays, parameter_shapes(cell, symbols, hidden, layers))
    recurrent = make_recurrent(cell, symbols, hidden, layers, settings)
    recurrent.load_state_dict({name: arrays[f"recurrent.{name}"] for name in recurrent.parameters})
    return Model(alphabet, cell, recurrent, {name: arrays[f"softmax.{name}"] for name in ("weight", "bias")})


def load(path: str, settings: Settings) -> Model:
    """Read a model from a file that `save` wrote."""
    arrays = read_arrays(path)
    if str(arrays.get("format")) != FORMAT:
        raise DemoError(f"--load: {path} was not written by gatewise demo")
    try:
        return restore(arrays, settings)
    except ValueError as error:
        raise DemoError(f"--load: {path}: {error}") from error


# ---- All of it -----------------------------------------------------------------------------------


def describe(model: Model, table: Array, steps: int) -> str:
    """Say in a line what will be learned, and how."""
    parameters = [*model.recurrent.parameters.values(), *model.softmax.values()]
    return (
        f"{model.cell.upper()}, {model.recurrent.num_layers} x {model.recurrent.hidden_size} units, "
        f"{sum(array.size for array in parameters):,} parameters; "
        f"{table.shape[1]} rows, {steps} characters a piece, threads: {gw.get_num_threads()}"
    )


def run(settings: Settings) -> None:
    """Run the whole demo.

    Parameters
    ----------
    settings : Settings
        What the command line asks for.

    Raises
    ------
    DemoError
        When it cannot go on, with a message for the user.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if settings.save is not None:
        check_save(settings.save)
    if settings.threads is not None:
        gw.set_num_threads(settings.threads)
    title, text = read_text(settings.text)
    model = load(settings.load, settings) if settings.load else make_model(choose_alphabet(text), settings)
    codes, held_out = split(encode(text, model.alphabet))
    table, steps = fit(codes, settings)
    console.print(f"text      {title}: {len(text):,} characters, {len(model.alphabet)} symbols")
    console.print(f"network   {describe(model, table, steps)}")

    meter, interrupted = None, False
    if settings.seconds > 0:
        meter, interrupted = train(model, codes, held_out, settings, console)
    if interrupted:
        console.print("stopped   by Ctrl-C; what was learned is kept")
    if settings.save is not None:
        save(model, settings.save)
        console.print(f"saved     {settings.save}")
    loss = held_out_loss(model, held_out)
    console.print(f"held out  {loss:.3f} nats a character ({loss / math.log(2):.2f} bits)")

    written, nanoseconds = write(model, encode(opening(text), model.alphabet), CHARACTERS_WRITTEN, settings)
    console.print(f"\n{written}\n")
    median, slow = np.percentile(nanoseconds, [50, 99]) / 1000
    console.print(f"stream    {median:.1f} us a character (p50), {slow:.1f} us (p99)")
    if meter is not None:
        best = undisturbed(meter.speeds)
        console.print(f"learning  {best:,.0f} characters/s, undisturbed ({meter.speed:,.0f} on average)")
        if not interrupted:
            compare(model, table, steps, settings, meter.speeds, console)
