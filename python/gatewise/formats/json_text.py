"""JSON from files that may come from anywhere: memory is bounded before the text is parsed."""

from __future__ import annotations

import json
from typing import Any, NoReturn

# Bytes of memory that each of these characters of a text may cost, at most: a list or an object, a member of one, a
# name with its place in an object, half a string.
COSTS = {b"[": 80, b"{": 80, b",": 40, b":": 120, b'"': 16}
MAX_COST = 20  # times the bytes of the text; what people write takes some 2 (numbers) to 15 (names and short lists)
FREE_COST = 2**24  # bytes that any text may cost in addition


def check_cost(text: bytes) -> None:
    """Refuse a text whose objects would take far more memory than the text itself.

    Three bytes can make an empty list, which takes a hundred bytes. Counting characters gives an upper bound: those
    within strings only add to it.
    """
    cost = sum(text.count(character) * size for character, size in COSTS.items())
    most = MAX_COST * len(text) + FREE_COST
    if cost > most:
        raise ValueError(f"expected JSON that takes at most {most} bytes of memory, got one of up to {cost}")


def parse(text: bytes, *, is_strict: bool = False) -> Any:
    """The value of a JSON text.

    Parameters
    ----------
    text : bytes
        In UTF-8, or in another encoding that `json.loads` takes.
    is_strict : bool
        Refuse what readers of JSON disagree about: names that occur twice, NaN, infinities.

    Raises
    ------
    ValueError
        If it is not valid JSON, is nested too deeply, or its objects would take far more memory than the text.
    """
    check_cost(text)
    try:
        if is_strict:
            return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        return json.loads(text)
    except RecursionError:
        raise ValueError("expected JSON, got one that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"expected JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice")
    return members


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")
