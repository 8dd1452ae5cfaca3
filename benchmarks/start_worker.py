"""Starts a worker process: `python start_worker.py`, with a job on the standard input.

The worker imports the harness by the name benchmarks, also where it is installed as gatewise.benchmarks: by that name
it would import gatewise before a cold start can time that.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    # Python adds the folder of a script. No library may find this harness's modules instead of its own.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != FOLDER]
    spec = spec_from_file_location("benchmarks", FOLDER / "__init__.py")
    assert spec
    assert spec.loader
    package = sys.modules["benchmarks"] = module_from_spec(spec)
    spec.loader.exec_module(package)
    import_module("benchmarks.worker").main()


if __name__ == "__main__":
    main()
