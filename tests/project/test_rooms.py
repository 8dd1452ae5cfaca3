"""The rooms of the package have an order: a module imports only from rooms before its own, without circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import gatewise as gw

PACKAGE = Path(gw.__file__).parent
# The lowest first. Rooms of the same floor do not know each other.
FLOORS = (
    {"_core", "startup", "reference"},
    {"arguments"},
    {"settings", "weights"},
    {"running"},
    {"layers", "plot"},
    {"formats"},
    {"torch", "jax"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Two modules that know each other, for the sake of a type.
CIRCLE = ("formats.onnx.operators", "formats.onnx.graph")
FACE = "__init__"  # of the package: it imports everything, and only the command line imports it


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "benchmarks":  # a program of its own, which a wheel puts here
            continue
        yield path, ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(path, names):
    """The modules of the package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            imported = [name if name.removeprefix("gatewise.") in names else node.module for name in inner]
        else:
            continue
        for name in imported:
            if name == "gatewise" or name.startswith("gatewise."):
                yield name.removeprefix("gatewise").removeprefix(".") or FACE


def room_of(module):
    return module.partition(".")[0]


def test_a_module_imports_from_rooms_below_its_own():
    names = {name for _, name in modules()} | {"_core"}
    graph = {}
    for path, name in modules():
        if name == FACE:
            continue
        graph[name] = set(imports(path, names)) - {name}
        for other in graph[name]:
            if room_of(other) == room_of(name):
                continue
            assert other != FACE or room_of(name) in ("cli", "__main__"), f"{name} imports the face of the package"
            if other != FACE:
                assert FLOOR_OF[room_of(other)] < FLOOR_OF[room_of(name)], f"{name} imports {other}"
    graph[CIRCLE[0]].remove(CIRCLE[1])
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_each_room_is_on_a_floor():
    assert {room_of(name) for _, name in modules()} - {FACE} == set(FLOOR_OF) - {"_core"}
