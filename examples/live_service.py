"""A service of many live sessions in one event loop: frames arrive at random, and each tick steps those that have one.

    python examples/live_service.py --clients 200 --seconds 5

Clients come and go. Each sends a frame every 20 ms or so, as audio does, and wants the answer within the deadline. All
sessions share one pool: one copy of the weights, one call a tick, and a session's numbers do not depend on the others.
"""

import argparse
import asyncio
import time
from dataclasses import dataclass, field

import gatewise as gw
import numpy as np

FEATURES, FRAME_SECONDS = 40, 0.02


@dataclass
class Frame:
    slot: int
    values: np.ndarray  # (FEATURES,)
    arrived: float
    answer: "asyncio.Future[np.ndarray]"


@dataclass
class Service:
    """Frames wait here until the next tick."""

    layer: gw.LSTM
    tick: float
    waiting: list[Frame] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of each tick
    seconds: list[float] = field(default_factory=list)  # likewise

    def __post_init__(self) -> None:
        self.pool = self.layer.pool(16)

    def open(self) -> int:
        if len(self.pool) == self.pool.capacity:
            self.pool.grow(self.pool.capacity)
        return self.pool.open()

    async def send(self, slot: int, values: np.ndarray) -> np.ndarray:
        frame = Frame(slot, values, time.perf_counter(), asyncio.get_running_loop().create_future())
        self.waiting.append(frame)
        return await frame.answer

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self.tick)
            # A session that was faster than the tick has its second frame in the next one.
            frames, later, named = [], [], set()
            for frame in self.waiting:
                (later if frame.slot in named else frames).append(frame)
                named.add(frame.slot)
            self.waiting = later
            if not frames:
                continue
            start = time.perf_counter()
            answers = self.pool.step(np.stack([f.values for f in frames]), [f.slot for f in frames])  # (n, H)
            self.seconds.append(time.perf_counter() - start)
            self.rows.append(len(frames))
            for frame, answer in zip(frames, answers, strict=True):
                frame.answer.set_result(answer)


async def client(service: Service, seed: int, until: float, latencies: list[float]) -> None:
    """Sessions of random length, one after the other."""
    rng = np.random.default_rng(seed)
    while time.perf_counter() < until:
        slot = service.open()
        for _ in range(int(rng.integers(20, 200))):
            await asyncio.sleep(FRAME_SECONDS * rng.uniform(0.5, 1.5))
            if time.perf_counter() >= until:
                break
            start = time.perf_counter()
            await service.send(slot, rng.standard_normal(FEATURES).astype("float32"))
            latencies.append(time.perf_counter() - start)
        service.pool.close(slot)


async def serve(options: argparse.Namespace) -> None:
    service = Service(gw.LSTM(FEATURES, options.hidden, seed=0), options.tick / 1000)
    latencies: list[float] = []
    until = time.perf_counter() + options.seconds
    ticking = asyncio.create_task(service.run())
    await asyncio.gather(*(client(service, seed, until, latencies) for seed in range(options.clients)))
    ticking.cancel()
    found = np.array(latencies) * 1000
    missed = int((found > options.deadline).sum())
    print(f"{len(found)} frames of {options.clients} clients in {options.seconds:g} s")
    rows, microseconds = np.mean(service.rows), np.mean(service.seconds) * 1e6
    print(f"{len(service.rows)} ticks, {rows:.1f} rows and {microseconds:.0f} us each")
    print("from sending a frame to its answer: " + ", ".join(
        f"{name} {np.percentile(found, q):.1f} ms" for name, q in (("median", 50), ("99 %", 99), ("worst", 100))
    ))  # fmt: skip
    print(f"later than {options.deadline:g} ms: {missed} ({100 * missed / len(found):.2f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--tick", type=float, default=2, help="milliseconds between two ticks")
    parser.add_argument("--deadline", type=float, default=10, help="milliseconds in which an answer is wanted")
    try:
        asyncio.run(serve(parser.parse_args()))
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
