"""The same inputs led by coverage: those that reach new lines of the readers are changed further.

`python -m tests.fuzz --guided` starts this module once for each format, with atheris (libFuzzer) in the process.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import subprocess
import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gatewise.formats"]):
    import gatewise as gw

    for _module in ("safetensors", "rtneural", "keras", "onnx", "pytorch"):
        importlib.import_module(f"gatewise.formats.{_module}")

from tests.fuzz import formats
from tests.fuzz.inputs import Input, changed_bytes


def main(name: str, folder: str, *arguments: str) -> None:
    """Until libFuzzer ends the process, with what its arguments say."""
    warnings.simplefilter("ignore")
    seeds = [formats.made(name, 0, i) for i in range(len(formats.seeds(name)))]
    kinds = list({seed.suffix: seed for seed in seeds}.values())  # of files, which a first byte tells apart
    pool = Path(folder)
    pool.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate([*seeds, *(formats.read(path) for path in formats.files(name))]):
        suffixes = [kind.suffix for kind in kinds]
        if seed.suffix in suffixes:
            (pool / f"seed-{i}").write_bytes(bytes([suffixes.index(seed.suffix)]) + seed.data)

    def as_input(data: bytes) -> Input:
        kind = kinds[data[0] % len(kinds)] if data else kinds[0]
        return kind._replace(data=data[1:])

    def try_one(data: bytes) -> None:
        one = as_input(data)
        path = pool.parent / f"{name}-input{one.suffix}"
        path.write_bytes(one.data)
        with contextlib.suppress(gw.FormatError):
            gw.load(path, **one.options)

    def change(data: bytes, most: int, seed: int) -> bytes:
        chance, one = random.Random(seed), as_input(data)
        try:
            changed = formats.changed(name, chance, one).data
        except Exception:  # what was changed before is no JSON, archive or pickle any more
            changed = changed_bytes(chance, one.data)
        return (data[:1] + changed)[:most]

    atheris.Setup([sys.argv[0], *arguments, folder], try_one, custom_mutator=change)
    atheris.Fuzz()


def run(name: str, seconds: int, seed: int, save: Path) -> int:
    """One format in a process of its own; what it found lies in `save`, without its first byte a file of the format."""
    save.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-max_total_time={seconds}", f"-seed={seed + 1}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=300000",
        f"-artifact_prefix={save}/{name}-guided-", "-print_final_stats=1", "-verbosity=0",
    ]  # fmt: skip
    order = [sys.executable, "-m", "tests.fuzz.guided", name, str(save / f"{name}-pool"), *arguments]
    return subprocess.run(order).returncode


if __name__ == "__main__":
    main(*sys.argv[1:])
