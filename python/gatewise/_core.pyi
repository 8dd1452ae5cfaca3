"""The C++ core. Private: it checks for memory's sake only; the checks that speak to users are in Python."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, final

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]

_Function = tuple[str, float, float]
_Formula = tuple[_Function, _Function, _Function, float, bool]

class _Cell(TypedDict):
    gates: int  # rows of the weight matrices are this many times the hidden size
    kept: int  # values of a unit and step that a tape keeps, not counting the carried state
    carried: bool  # whether a tape keeps the carried state, too: c of an LSTM, h of a GRU
    has_cell_state: bool
    trains: bool

class _Configuration(TypedDict):
    version: str
    compiler: str
    openmp: bool
    eigen: str
    levels: list[str]

def backend() -> str: ...
def backends() -> tuple[str, ...]: ...
def cells() -> dict[str, _Cell]: ...
def configuration() -> _Configuration: ...
def release_memory() -> int: ...
def empty(shape: list[int], dtype: np.dtype[Any]) -> _Array: ...
def evaluate(name: str, x: _Array, alpha: float = 0.0, beta: float = 0.0) -> _Array: ...
def floating_point_mode() -> int: ...
def get_num_threads() -> int: ...
def lanes() -> tuple[int, int]: ...
def multiply_add(dtype: np.dtype[Any], repetitions: int) -> int: ...
def read(dtype: np.dtype[Any], bytes: int, repetitions: int) -> int: ...
def set_floating_point_mode(mode: int) -> None: ...
def set_num_threads(threads: int) -> None: ...
def set_threading_threshold(operations: int) -> int: ...
def tape_bytes(
    cell: str,
    dtype: np.dtype[Any],
    input: int,
    hidden: int,
    projection: int,
    layers: int,
    directions: int,
    steps: int,
    batch: int,
    checkpoint_every: int = 0,
) -> int: ...
def use_backend(name: str) -> bool: ...
def xla_handlers() -> dict[str, object]: ...
def xla_sizes(
    backend: str,
    cell: str,
    item_bytes: int,
    input: int,
    hidden: int,
    projection: int,
    layers: int,
    directions: int,
    steps: int,
    batch: int,
    checkpoint_every: int,
) -> tuple[int, int]: ...

@final
class Schedule:
    def __init__(
        self, steps: int, batch: int, lengths: _Array | None, resets: _Array | None, packed: bool = False
    ) -> None: ...

@final
class Packed:
    def __init__(
        self,
        cell: str,
        dtype: np.dtype[Any],
        input: int,
        hidden: int,
        projection: int,
        layers: int,
        directions: int,
        weights: list[list[_Array | None]],
        formula: _Formula | None = None,
    ) -> None: ...
    @property
    def backend(self) -> str: ...
    def forward(
        self,
        x: _Array,
        hidden: _Array | None,
        cell: _Array | None,
        output: _Array,
        hidden_after: _Array,
        cell_after: _Array | None,
        schedule: Schedule | None = None,
    ) -> None: ...

@final
class Tape:
    def __init__(
        self,
        packed: Packed,
        x: _Array,
        hidden: _Array | None,
        cell: _Array | None,
        output: _Array,
        hidden_after: _Array,
        cell_after: _Array | None,
        schedule: Schedule | None,
        checkpoint_every: int,
        probability: float,
        seed: int,
        call_count: int,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def trace(self, layer: int, direction: int, kept: list[_Array], carried: _Array | None, hidden: _Array) -> None: ...
    def backward(
        self,
        grad_output: _Array | None,
        grad_hidden: _Array | None,
        grad_cell: _Array | None,
        grad_x: _Array,
        grad_hidden_before: _Array,
        grad_cell_before: _Array | None,
        gradients: list[list[_Array | None]],
    ) -> None: ...

@final
class RowWeights:
    def __init__(
        self,
        operation: str,
        dtype: np.dtype[Any],
        input: int,
        output: int,
        function: _Function,
        epsilon: float,
        weights: Sequence[_Array | None],
    ) -> None: ...
    @property
    def backend(self) -> str: ...

@final
class Table:
    def __init__(self, array: _Array) -> None: ...
    @property
    def backend(self) -> str: ...

@final
class Sums:
    def __init__(self, packed: Packed, table: Table) -> None: ...

@final
class Network:
    def __init__(self, dtype: np.dtype[Any], nodes: list[tuple[Any, ...]], sums: Sums | None = None) -> None: ...
    @property
    def backend(self) -> str: ...
    def forward(
        self,
        x: _Array,
        before: Sequence[_Array | None],
        output: _Array,
        after: Sequence[_Array | None],
        schedule: Schedule | None = None,
    ) -> None: ...

class Stream:
    def __init__(
        self,
        network: Network,
        batch: int,
        unbatched: bool,
        head: Network | None = None,
        window: int = 0,
        batch_first: bool = False,
    ) -> None: ...
    def _window_counts(self) -> list[int]: ...
    def _get_window(self, inputs: _Array, counts: list[int]) -> None: ...
    def _set_window(self, inputs: _Array, counts: list[int]) -> None: ...
    def step(self, x: object, out: _Array | None = None, *, resets: object = None) -> _Array: ...
    def run(self, x: object, out: _Array | None = None, *, resets: object = None) -> _Array: ...
    def _reset(self, rows: _Array) -> None: ...
    def _get_state(self, parts: Sequence[_Array]) -> None: ...
    def _set_state(self, parts: Sequence[_Array]) -> None: ...
    def _use(self, network: Network, head: Network | None = None) -> None: ...
    @property
    def _backend(self) -> str: ...

class Pool:
    def __init__(self, network: Network, capacity: int) -> None: ...
    def step(self, x: object, slots: object, out: _Array | None = None) -> _Array: ...
    def _open(self) -> int: ...
    def _close(self, slot: int) -> None: ...
    def _reset(self, slots: list[int]) -> None: ...
    def _get_state(self, slot: int, parts: Sequence[_Array]) -> None: ...
    def _set_state(self, slot: int, parts: Sequence[_Array]) -> None: ...
    def _grow(self, more: int, most: int) -> None: ...
    @property
    def capacity(self) -> int: ...
    def _use(self, network: Network) -> None: ...
    @property
    def _open_slots(self) -> list[int]: ...

_Rows = tuple[int, int, int]

@final
class Foreign:
    def __init__(
        self,
        packed: Packed,
        steps: int,
        batch: int,
        schedule: Schedule | None,
        checkpoint_every: int,
        probability: float,
        seed: int,
        max_threads: int,
    ) -> None: ...
    @property
    def tape_bytes(self) -> int: ...
    def forward(
        self, x: _Rows, hidden: int, cell: int, output: _Rows, hidden_after: int, cell_after: int, tape: int, /
    ) -> None: ...
    def backward(
        self,
        x: _Rows,
        hidden: int,
        output: _Rows,
        tape: int,
        grad_output: _Rows,
        grad_hidden: int,
        grad_cell: int,
        grad_x: _Rows,
        grad_hidden_before: int,
        grad_cell_before: int,
        gradients: list[list[int]],
        /,
    ) -> None: ...

@final
class TensorLibrary:
    def __init__(
        self,
        exchange: Any,
        tensor: type,
        parameter: type,
        is_negative: Callable[[Any], bool],
        threads: Callable[[], int],
        busy: tuple[Callable[[], object], ...],
    ) -> None: ...
    def empty(self, shape: Sequence[int], item_bytes: int) -> Any: ...
    def array(self, tensor: Any) -> _Array: ...

@final
class TensorWeights:
    def __init__(
        self,
        library: TensorLibrary,
        names: tuple[str, ...],
        weights: tuple[Any, ...],
        pack: Callable[[tuple[Any, ...]], Packed],
        is_frozen: bool,
    ) -> None: ...
    def hold(self, weights: tuple[Any, ...]) -> bool: ...
    @property
    def is_cacheable(self) -> bool: ...
    @property
    def packed(self) -> Packed: ...
    def step(self, parameters: dict[str, Any] | None, x: Any, state: Any, /) -> Any: ...
    def walk(self, parameters: dict[str, Any] | None, x: Any, state: Any, batch_first: bool, /) -> Any: ...
