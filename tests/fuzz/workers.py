"""Children that load one file after the other, with limits, so that a crash or a hang ends one of them at most.

Each is forked once everything is imported, works on a few inputs at a time, and is replaced when it dies.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import gatewise as gw

from tests.fuzz.inputs import Input

SECONDS = 5  # of the processor for one input, as it takes milliseconds
SECONDS_OF_C = 15  # after which the process is ended, whatever it is in
SECONDS_OF_NOTHING = 120  # of the clock without any progress
FACTOR, SPARE = 50, 128 << 20  # the limit of memory: FACTOR times the size of the file, plus SPARE bytes
ADDRESSES = 2 << 30  # more than what is mapped once all is imported


NOT_MADE = "the fuzzer itself fails"
Source = Callable[[int], Input]  # an input by its number


class Job(NamedTuple):
    """Inputs of one source, by their numbers."""

    source: str
    first: int
    end: int


class Result(NamedTuple):
    source: str
    index: int
    outcome: str  # "loaded", "refused", or what is wrong


class TookTooLongError(BaseException):
    """No reader catches it."""


def run(sources: dict[str, Source], jobs: Iterator[Job], count: int) -> Iterator[Result]:
    """The results of the inputs, each as soon as it is known, in any order."""
    workers = [_Worker(sources) for _ in range(count)]
    try:
        for worker in workers:
            worker.take(next(jobs, None))
        while busy := [worker for worker in workers if worker.job is not None]:
            wait([worker.connection for worker in busy], timeout=1)
            for i, worker in enumerate(workers):
                if worker.job is None:
                    continue
                yield from worker.results()
                if worker.job is None:
                    worker.take(next(jobs, None))
                elif ended := worker.ended():
                    job, index = worker.job, worker.index.value
                    worker.end()
                    yield Result(job.source, index, ended)
                    workers[i] = _Worker(sources)
                    rest = Job(job.source, index + 1, job.end)
                    workers[i].take(rest if rest.first < rest.end else next(jobs, None))
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    def __init__(self, sources: dict[str, Source]) -> None:
        context = multiprocessing.get_context("fork")
        self.job: Job | None = None
        self.index = context.Value("q", 0, lock=False)
        self._folder = tempfile.TemporaryDirectory(prefix="gatewise-fuzz-")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, sources, self.index, self._folder.name), daemon=True
        )
        self._process.start()
        theirs.close()
        self._seen, self._since = -1, time.monotonic()

    def take(self, job: Job | None) -> None:
        self.job = job
        if job is not None:
            self.index.value = job.first
            self._since = time.monotonic()
            self.connection.send(job)

    def results(self) -> Iterator[Result]:
        """The results that have come since the last call."""
        with contextlib.suppress(EOFError, OSError):
            while self.connection.poll():
                result = self.connection.recv()
                if result is None:
                    self.job = None
                    return
                yield result

    def ended(self) -> str:
        """Why the process has ended, or hangs; empty while it works."""
        if self.index.value != self._seen:
            self._seen, self._since = self.index.value, time.monotonic()
        if time.monotonic() - self._since > SECONDS_OF_NOTHING:
            return f"hangs: nothing within {SECONDS_OF_NOTHING} s"
        if self._process.is_alive():
            return ""
        code = self._process.exitcode or 0
        if -code == signal.SIGXCPU:
            return f"hangs in C: more than {SECONDS_OF_C} s of the processor"
        said = Path(self._folder.name, "stderr").read_text(errors="replace").strip()
        return f"crashes ({signal.Signals(-code).name if code < 0 else code}): {said[-1500:]}"

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()
        with contextlib.suppress(OSError):
            self._folder.cleanup()


def _work(connection: Connection, sources: dict[str, Source], index: Any, folder: str) -> None:
    """Load the inputs of one job after another: the main loop of a child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _too_long)
    said = os.open(os.path.join(folder, "stderr"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 2)
    faulthandler.enable(2, all_threads=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESSES,) * 2)
    while True:
        job = connection.recv()
        for i in range(job.first, job.end):
            index.value = i
            try:
                item = sources[job.source](i)
            except Exception as error:
                connection.send(Result(job.source, i, f"{NOT_MADE}: {type(error).__name__}: {str(error)[:300]}"))
            else:
                connection.send(Result(job.source, i, outcome(item, folder)))
        connection.send(None)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TookTooLongError


def outcome(item: Input, folder: str) -> str:
    """The outcome of loading one input: "loaded", "refused", or what is wrong."""
    path = os.path.join(folder, f"input{item.suffix}")
    with open(path, "wb") as file:
        file.write(item.data)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak of memory
    before = _status("VmRSS")
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS_OF_C, most))
    said = "loaded"
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        gw.load(path, **item.options)
    except gw.FormatError:
        said = "refused"
    except TookTooLongError as error:
        said = f"takes more than {SECONDS} s of the processor: {_place(error)}"
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:300]} ({_place(error)})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    peak = _status("VmHWM") - before
    if said in ("loaded", "refused") and peak > FACTOR * len(item.data) + SPARE:
        return f"{said} with {peak >> 20} MB of memory for {len(item.data) >> 10} KB"
    return said


def _place(error: BaseException) -> str:
    """The last lines of gatewise in its traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "gatewise" in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-4:-1])


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def is_supported() -> bool:
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)
