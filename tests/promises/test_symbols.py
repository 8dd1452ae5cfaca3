"""No weak symbol is shared by two kernel objects or with the rest: each CPU level runs its own code.

The linker keeps one copy of a weak symbol; were it built for a newer CPU, an older one would crash in it.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
KERNEL = re.compile(r"CMakeFiles/(kernel_[^/]+)\.dir/")
WEAK, STRONG = set("WVuw"), set("TDRB")
IGNORED = {"DW.ref.__gxx_personality_v0"}  # the address of the unwinder's function: the same in every object
REQUIRED = os.environ.get("GATEWISE_REQUIRE_SYMBOLS") == "1"


def build_directories():
    folder = os.environ.get("GATEWISE_BUILD_DIR")
    candidates = [Path(folder)] if folder else sorted((REPOSITORY / "build").glob("*"))
    return [path for path in candidates if any(KERNEL.search(str(file)) for file in path.rglob("*.o"))]


def symbols(objects):
    """{object: {symbol: type}} of what each object defines."""
    table = {}
    for path in objects:
        command = ["nm", "--defined-only", "--format=posix", str(path)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        table[path] = {fields[0]: fields[1] for fields in map(str.split, lines) if fields[0] not in IGNORED}
    return table


def weak(defined):
    return {name for name, kind in defined.items() if kind in WEAK}


def shared(kernels, table):
    """(kernel, other object, symbol) for every weak symbol that a kernel shares with any other object."""
    return sorted(
        (str(kernel), str(other), name)
        for kernel in kernels
        for other in table
        if other != kernel
        for name in weak(table[kernel]) & (weak(table[other]) | strong(table[other]))
    )


def strong(defined):
    return {name for name, kind in defined.items() if kind in STRONG}


@pytest.fixture(params=build_directories() or [None], ids=lambda path: path.name if path else "none")
def build(request):
    """(kernel objects, all objects with their symbols) of a build directory."""
    missing = [] if request.param else ["build directory with kernel objects"]
    missing += [] if shutil.which("nm") else ["nm"]
    if missing:
        (pytest.fail if REQUIRED else pytest.skip)(f"no {' and no '.join(missing)}; see GATEWISE_BUILD_DIR")
    table = symbols(sorted(request.param.rglob("*.o")))
    return [path for path in table if KERNEL.search(str(path))], table


def test_no_weak_symbol_is_shared(build):
    kernels, table = build
    assert shared(kernels, table) == []


def test_a_kernel_exports_one_table(build):
    kernels, table = build
    exported = {path: strong(table[path]) for path in kernels}
    assert {path.name: names for path, names in exported.items() if len(names) != 1} == {}
    assert len(set.union(*exported.values())) == len(kernels)  # each by its own name


def test_objects_are_the_whole_module(build):
    """The kernels of both dtypes, and objects that are none: there was something to compare."""
    kernels, table = build
    names = {KERNEL.search(str(path))[1] for path in kernels}
    assert len(names) == len(kernels) >= 2
    assert len(table) > len(kernels)


def test_check_sees_what_is_shared():
    table = {
        "one": {"a": "W", "b": "T", "c": "V", "own": "W"},
        "two": {"a": "W", "c": "T"},
        "three": {"b": "T", "d": "u"},
        "four": {"d": "u"},
    }
    assert shared(["one"], table) == [("one", "two", "a"), ("one", "two", "c")]
    assert shared(["three"], table) == [("three", "four", "d")]
