"""Functions of one element by name, from which layers and cells choose."""

from __future__ import annotations

from typing import Any, NamedTuple

from gatewise.arguments.arrays import number

# Each function, with the default values of its numbers alpha and beta. The equations are in reference.py.
NUMBERS: dict[str, tuple[float, ...]] = {
    "linear": (),
    "affine": (1.0, 0.0),
    "relu": (),
    "leaky_relu": (0.01,),
    "thresholded_relu": (1.0,),
    "elu": (1.0,),
    "selu": (),
    "tanh": (),
    "scaled_tanh": (1.0, 1.0),
    "sigmoid": (),
    "hard_sigmoid": (1 / 6, 0.5),
    "softmax": (),  # over a row, and so not in a cell
    "softplus": (),
    "softsign": (),
    "silu": (),
    "gelu": (),
}


class Function(NamedTuple):
    """A function and its numbers, as the core takes them."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.alpha, self.beta)[: len(NUMBERS[self.name])]

    @property
    def is_default(self) -> bool:
        return self.numbers == NUMBERS[self.name]


def function_of(name: object, alpha: object = None, beta: object = None, argument: str = "name") -> Function:
    """The function of a name; a number that is None has its default value."""
    if not isinstance(name, str) or name not in NUMBERS:
        raise ValueError(f"{argument}: expected {', '.join(NUMBERS)}, got {name!r}")
    numbers = list(NUMBERS[name])
    for i, (symbol, value) in enumerate((("alpha", alpha), ("beta", beta))):
        if value is None:
            continue
        if i >= len(numbers):
            raise ValueError(f"{symbol}: expected none, since {name} has none, got {value!r}")
        numbers[i] = number(symbol, value)
    return Function(name, *numbers)


def function_in_cell(argument: str, value: Any) -> Function:
    """The function of a gate or a state, from a name or an Activation."""
    function = function_of(value, argument=argument) if isinstance(value, str) else getattr(value, "function", None)
    if not isinstance(function, Function):
        raise TypeError(f"{argument}: expected a name or an Activation, got {type(value).__name__}")
    if function.name == "softmax":
        raise ValueError(f"{argument}: expected a function of one element, got 'softmax'")
    return function
