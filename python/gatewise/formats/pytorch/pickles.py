"""Pickles with tensors of PyTorch, read as data: nothing in them is called, imported or instantiated.

A pickle is a program for a stack machine (PEP 307, PEP 3154; the module pickletools lists its instructions). This
machine knows texts, whole numbers, tuples, lists, dicts and the calls that stand for tensors. An object of any other
class becomes the name of the class. Floats, bytes, sets, and members of dicts whose keys are not texts are left out.

Time and memory are linear in the bytes that are read: whatever would take many times more has a limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

MAX_STACK = 2**20  # values on the stack
MAX_NESTED = 1000  # marks, each of which is where the values of a list, dict or tuple begin on the stack
MAX_CLASSES = 2**12
MAX_NAME = 2**12  # bytes of a class's name
MAX_INTEGER = 16  # bytes
MAX_AXES = 64
MAX_ARGUMENTS = 8
# Values are counted in units of up to 75 bytes of memory. A pickle may make FREE_UNITS, and one more for every
# BYTES_A_UNIT bytes of its size.
FREE_UNITS = 2**18
BYTES_A_UNIT = 8


class Class(NamedTuple):
    """A class or a function, by its name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Instance(NamedTuple):
    """An object that a class or a function would have made."""

    made_by: Class


class Storage(NamedTuple):
    """Numbers of one type, which are elsewhere in the file: all those under a key, or a part of them."""

    kind: str  # of the numbers: "float32"
    key: str
    length: int
    begin: int  # numbers under this key before the first one
    total: int  # numbers under this key


class Tensor(NamedTuple):
    """A view of a storage; a tensor of another kind has none."""

    kind: str  # of the numbers, or of the tensor if it has no storage
    storage: Storage | None = None
    offset: int = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()


KINDS = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "UntypedStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
UNKNOWN = Instance(Class("builtins", "object"))


def read(file: BinaryIO, size: int, storages: dict[str, Storage]) -> Any:
    """The value of the pickle that begins at the file's position and has at most `size` bytes.

    The storages that it names are added to `storages`, by their keys.
    """
    return _Machine(file, size, storages).run()


class _Machine:
    """The stack machine: its stack, the marks in it, and the memo of values that can be recalled."""

    def __init__(self, file: BinaryIO, size: int, storages: dict[str, Storage]) -> None:
        self.file, self.left, self.storages = file, size, storages
        self.units = FREE_UNITS + size // BYTES_A_UNIT
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.classes: dict[tuple[str, str], Class] = {}
        self.instances: dict[Class, Instance] = {}

    def run(self) -> Any:
        stack, instructions = self.stack, INSTRUCTIONS
        while True:
            code = self.take(1)
            if code == b".":
                return self.pop()
            instruction = instructions.get(code)
            if instruction is None:
                raise ValueError(f"expected a pickle as torch.save writes it, got one with the instruction {code!r}")
            instruction(self)
            if len(stack) > MAX_STACK:
                raise ValueError(f"expected a pickle of at most {MAX_STACK} values at a time, got more")

    # -- reading the pickle

    def take(self, count: int) -> bytes:
        self._leave(count)
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("expected a whole pickle, got one that is cut short")
        return data

    def skip(self, count: int) -> None:
        self._leave(count)
        self.file.seek(count, 1)

    def _leave(self, count: int) -> None:
        if count > self.left:
            raise ValueError("expected a whole pickle, got one that is cut short")
        self.left -= count

    def line(self) -> str:
        line = self.file.readline(min(self.left, MAX_NAME))
        self._leave(len(line))
        if not line.endswith(b"\n"):
            raise ValueError(f"expected names of classes of at most {MAX_NAME} bytes, got a longer one")
        return line[:-1].decode()

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    # -- the stack and the memo

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("expected a sound pickle, got one that takes a value from an empty stack")
        return self.stack.pop()

    def pop_all(self) -> list[Any]:
        """Take all values above the last mark, and the mark."""
        if not self.marks:
            raise ValueError("expected a sound pickle, got one that takes values without a mark")
        first = self.marks.pop()
        values = self.stack[first:]
        del self.stack[first:]
        return values

    def mark(self) -> None:
        if len(self.marks) == MAX_NESTED:
            raise ValueError("nested too deeply")
        self.marks.append(len(self.stack))

    def spend(self, units: int) -> None:
        self.units -= units
        if self.units < 0:
            raise ValueError("expected a pickle of tensors, got one of far more other things")

    def remember(self, index: int) -> None:
        if index > len(self.memo) + 1:  # each index is the next one, but Python 2 begins with 1
            raise ValueError("expected a sound pickle, got one whose memo has gaps")
        self.memo += [None] * (index + 1 - len(self.memo))
        value = self.pop()
        self.memo[index] = value
        self.push(value)

    def recall(self, index: int) -> None:
        if index >= len(self.memo):
            raise ValueError("expected a sound pickle, got one that recalls a value before it is in the memo")
        self.push(self.memo[index])

    # -- values

    def text(self, count: int) -> None:
        self.push(self.take(count).decode("utf-8", "surrogatepass"))

    def old_text(self, count: int) -> None:
        """Push a text that Python 2 wrote."""
        self.push(self.take(count).decode("latin-1"))

    def integer(self, count: int) -> None:
        if count > MAX_INTEGER:
            self.unknown(count)
        else:
            self.push(int.from_bytes(self.take(count), "little", signed=True))

    def unknown(self, count: int = 0) -> None:
        """Skip a value of `count` bytes that no tensor needs."""
        self.skip(count)
        self.push(UNKNOWN)

    def make_tuple(self, values: list[Any]) -> None:
        self.spend(1)
        self.push((*values,))

    def make_short_tuple(self, count: int) -> None:
        self.make_tuple([self.pop() for _ in range(count)][::-1])

    def make_list(self) -> None:
        self.spend(1)
        self.push([])

    def extend(self, values: list[Any]) -> None:
        target = self.pop()
        if isinstance(target, list):
            target += [value for value in values if isinstance(value, (str, list, dict, Tensor))]
        elif not isinstance(target, Instance):
            raise ValueError(f"expected a list to append to, got {type(target).__name__}")
        self.push(target)

    def make_dict(self) -> None:
        self.spend(2)
        self.push({})

    def update(self, values: list[Any]) -> None:
        target = self.pop()
        if isinstance(target, dict):
            if len(values) % 2:
                raise ValueError("expected a sound pickle, got a key without a value")
            for key, value in zip(values[::2], values[1::2], strict=True):
                self.set(target, key, value)
        elif not isinstance(target, Instance):
            raise ValueError(f"expected a dict to set names in, got {type(target).__name__}")
        self.push(target)

    def set(self, target: dict[str, Any], key: Any, value: Any) -> None:
        if not isinstance(key, str):
            return
        if isinstance(value, (Tensor, dict, bool)):
            self.spend(2)
            target[key] = value
        else:
            target.pop(key, None)

    def push_class(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > MAX_NAME:
            raise ValueError("expected a class by its name")
        if (module, name) not in self.classes and len(self.classes) == MAX_CLASSES:
            raise ValueError(f"expected at most {MAX_CLASSES} classes, got more")
        self.push(self.classes.setdefault((module, name), Class(module, name)))

    def frozen_set(self) -> None:
        self.pop_all()
        self.push(UNKNOWN)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, (Class, Instance)) or not isinstance(arguments, tuple):
            raise ValueError("expected a class or a function to be called")
        self.push(self.called(function, arguments) if isinstance(function, Class) else UNKNOWN)

    def called(self, function: Class, arguments: tuple[Any, ...]) -> Any:
        """The data that stands for the result of a call."""
        first = arguments[0] if arguments else None
        if function in DICTS:
            return self.ordered(first)
        if function in PARAMETERS and isinstance(first, Tensor):
            return first
        if function == FROM_TYPE and len(arguments) == 4 and isinstance(first, Class) and first != FROM_TYPE:
            return self.called(first, arguments[2]) if isinstance(arguments[2], tuple) else UNKNOWN
        if function.module == "torch._utils" and function.name.startswith("_rebuild_"):
            self.spend(4)
            return _tensor(function.name.removeprefix("_rebuild_"), *arguments[:MAX_ARGUMENTS])
        return self.instances.setdefault(function, Instance(function))

    def ordered(self, pairs: Any) -> dict[str, Any]:
        """An OrderedDict, to which Python 2 gave pairs of names and values."""
        members: dict[str, Any] = {}
        pairs = pairs if isinstance(pairs, list) else []
        self.spend(2 + len(pairs))
        for pair in pairs:
            if isinstance(pair, list) and len(pair) == 2:
                self.set(members, *pair)
        return members

    def call_with_names(self) -> None:
        self.pop()
        self.call()

    def build(self) -> None:
        """Drop the attributes of an object: tensors do not need them."""
        self.pop()
        self.push(self.pop())

    def storage(self) -> None:
        reference = self.pop()
        is_module = isinstance(reference, tuple) and reference[:1] == ("module",) and len(reference) > 1
        if is_module and isinstance(reference[1], Class):
            self.push(reference[1])  # a class with its source, in files of PyTorch before 1.6
            return
        self.spend(4)
        storage = _storage(reference)
        self.storages.setdefault(storage.key, storage)
        self.push(storage)


def _storage(reference: Any) -> Storage:
    """A storage as torch.save refers to it: its type, key, device, size, and perhaps a part of it."""
    if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
        raise ValueError("expected a reference to a storage")
    _, kind, key, _, count, *parts = reference
    if not isinstance(kind, Class) or not isinstance(key, str) or not _is_size(count):
        raise ValueError("expected the type, the key and the size of a storage")
    name = KINDS.get(kind.name, kind.name)
    if parts in ([], [None]):
        return Storage(name, key, count, 0, count)
    part = parts[0]
    if not isinstance(part, tuple) or len(part) != 3 or not _is_size(part[1]) or not _is_size(part[2]):
        raise ValueError(f"storage {key!r}: expected a part of it")
    if part[1] + part[2] > count:
        raise ValueError(f"storage {key!r}: expected a part of its {count} numbers, got {part[1]} to {sum(part[1:])}")
    return Storage(name, key, part[2], part[1], count)


def _tensor(
    kind: str, storage: Any = None, offset: Any = None, shape: Any = None, strides: Any = None, *options: Any
) -> Tensor:
    """The tensor that PyTorch's function `_rebuild_` + `kind` makes; the first two options are gradients and hooks."""
    if kind not in ("tensor", "tensor_v2"):
        return Tensor(options[2].name if len(options) > 2 and isinstance(options[2], Class) else kind)
    if not isinstance(storage, Storage) or not _is_size(offset):
        raise ValueError("expected a tensor of a storage")
    if not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        raise ValueError(f"storage {storage.key!r}: expected a tensor of some shape and strides")
    if len(options) > 2:
        return Tensor("a negative or conjugate view")
    return Tensor(storage.kind, storage, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= MAX_AXES and all(map(_is_size, values))


ITEM_SIZES = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}
DICTS = {
    Class("collections", "OrderedDict"),
    Class("collections", "defaultdict"),
    Class("builtins", "dict"),
    Class("__builtin__", "dict"),
}
PARAMETERS = {
    Class("torch._utils", "_rebuild_parameter"),
    Class("torch._utils", "_rebuild_parameter_with_state"),
    Class("torch.nn.parameter", "Parameter"),
    Class("torch.nn.parameter", "Buffer"),
}
FROM_TYPE = Class("torch._tensor", "_rebuild_from_type_v2")

# What each instruction does. `number(n)` reads a number of n bytes after it: a value, an index, or a count of bytes.
INSTRUCTIONS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda m: m.skip(1),  # the protocol
    b"\x95": lambda m: m.skip(8),  # a frame
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": _Machine.pop_all,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.integer(4),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"\x8a": lambda m: m.integer(m.number(1)),
    b"\x8b": lambda m: m.integer(m.number(4)),
    b"G": lambda m: m.unknown(8),
    b"X": lambda m: m.text(m.number(4)),
    b"\x8c": lambda m: m.text(m.number(1)),
    b"\x8d": lambda m: m.text(m.number(8)),
    b"T": lambda m: m.old_text(m.number(4)),
    b"U": lambda m: m.old_text(m.number(1)),
    b"B": lambda m: m.unknown(m.number(4)),
    b"C": lambda m: m.unknown(m.number(1)),
    b"\x8e": lambda m: m.unknown(m.number(8)),
    b"\x96": lambda m: m.unknown(m.number(8)),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.make_tuple(m.pop_all()),
    b"\x85": lambda m: m.make_short_tuple(1),
    b"\x86": lambda m: m.make_short_tuple(2),
    b"\x87": lambda m: m.make_short_tuple(3),
    b"]": _Machine.make_list,
    b"a": lambda m: m.extend([m.pop()]),
    b"e": lambda m: m.extend(m.pop_all()),
    b"}": _Machine.make_dict,
    b"s": lambda m: m.update([m.pop() for _ in range(2)][::-1]),
    b"u": lambda m: m.update(m.pop_all()),
    b"\x8f": lambda m: m.unknown(),  # a set
    b"\x90": lambda m: m.extend(m.pop_all()),
    b"\x91": _Machine.frozen_set,
    b"c": lambda m: m.push_class(m.line(), m.line()),
    b"\x93": lambda m: m.push_class(*[m.pop() for _ in range(2)][::-1]),
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"\x92": _Machine.call_with_names,
    b"b": _Machine.build,
    b"Q": _Machine.storage,
    b"h": lambda m: m.recall(m.number(1)),
    b"j": lambda m: m.recall(m.number(4)),
    b"q": lambda m: m.remember(m.number(1)),
    b"r": lambda m: m.remember(m.number(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),
}
