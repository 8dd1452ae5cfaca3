"""The same inputs, guided by coverage: those that reach new lines of the readers are changed further.

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
    """Fuzz one format until libFuzzer, which gets the arguments, ends the process."""
    warnings.simplefilter("ignore")
    seeds = [formats.made(name, 0, i) for i in range(len(formats.seeds(name)))]
    # The kinds of files that a format has; the first byte of libFuzzer's data tells which of them the rest is.
    kinds = list({seed.suffix: seed for seed in seeds}.values())
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
        item = as_input(data)
        path = pool.parent / f"{name}-input{item.suffix}"
        path.write_bytes(item.data)
        with contextlib.suppress(gw.FormatError):
            gw.load(path, **item.options)

    def change(data: bytes, most: int, seed: int) -> bytes:
        chance, item = random.Random(seed), as_input(data)
        try:
            changed = formats.changed(name, chance, item).data
        except Exception:  # after earlier changes the data is not JSON, an archive or a pickle any more
            changed = changed_bytes(chance, item.data)
        return (data[:1] + changed)[:most]

    atheris.Setup([sys.argv[0], *arguments, folder], try_one, custom_mutator=change)
    atheris.Fuzz()


def run(name: str, seconds: int, seed: int, save: Path) -> int:
    """Fuzz one format in another process, which puts what it finds into `save`.

    Such a file is one of the format, after a first byte.
    """
    save.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-max_total_time={seconds}",
        f"-seed={seed + 1}",
        f"-artifact_prefix={save}/{name}-guided-",
        "-timeout=20",
        "-rss_limit_mb=4096",
        "-max_len=300000",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    command = [sys.executable, "-m", "tests.fuzz.guided", name, str(save / f"{name}-pool"), *arguments]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    main(*sys.argv[1:])
