"""Protocol Buffers, checked before they are parsed.

A message of two bytes becomes an object of a few hundred, whatever the parser is. So the tags and lengths of a file
are walked first, and what they would become is counted.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

MAX_DEPTH = 100  # of messages inside messages, which is protobuf's own limit
# The types of a field and the kinds of a tag, by the numbers that protobuf gives them.
STRING, MESSAGE, BYTES, ENUM = 9, 11, 12, 14
VARINT, EIGHT_BYTES, LENGTH, GROUP, END_OF_GROUP, FOUR_BYTES = range(6)
WIDTHS = {1: 8, 6: 8, 16: 8, 2: 4, 7: 4, 15: 4}  # of numbers that are not varints


class Field(NamedTuple):
    """What one occurrence of a field takes once it is parsed."""

    bytes: int
    bytes_each: int = 0  # for each byte of its length
    message: Any = None  # the descriptor of what is inside


UNKNOWN = Field(32)  # which protobuf keeps as it is


def check(data: bytes, message: Any, budget: int) -> None:
    """Refuse bytes that are no such message, or that would take far more memory than they are.

    Parameters
    ----------
    data : bytes
    message : Descriptor
        Of the message that they should be.
    budget : int
        How many bytes the parsed messages may take, besides the texts and numbers that `data` holds.
    """
    fields, end, closing = _fields(message), len(data), 0
    position = 0
    enclosing: list[tuple[dict[int, Field], int, int]] = []  # the messages that this one is in
    try:
        while True:
            while position == end and not closing:
                if not enclosing:
                    return
                fields, end, closing = enclosing.pop()
            tag = data[position]
            position += 1
            if tag > 127:
                tag, position = _varint(data, position - 1)
                if tag >> 32:  # of which some parsers look only at the lower half
                    raise ValueError("a tag that is too large")
            kind = tag & 7
            if kind == END_OF_GROUP:
                if tag != closing:
                    raise ValueError("a group ends that has not begun")
                fields, _, closing = enclosing.pop()
                continue
            field = fields.get(tag, UNKNOWN)
            length = 0
            if kind == VARINT:
                if data[position] > 127:
                    position = _varint(data, position)[1]
                else:
                    position += 1
            elif kind == LENGTH:
                length = data[position]
                position += 1
                if length > 127:
                    length, position = _varint(data, position - 1)
            elif kind in (EIGHT_BYTES, FOUR_BYTES):
                position += 8 if kind == EIGHT_BYTES else 4
            elif kind != GROUP:
                raise ValueError("a kind of field that does not exist")
            if position + length > end:
                raise ValueError("a field that is longer than what it is in")
            budget -= field.bytes + field.bytes_each * length
            if budget < 0:
                raise ValueError("it would take far more memory than the file: too many parts that hold nothing")
            if field.message is None and kind != GROUP:
                position += length
                continue
            if len(enclosing) == MAX_DEPTH:
                raise ValueError("nested too deeply")
            enclosing.append((fields, end, closing))
            if kind == GROUP:
                fields, closing = {}, tag - GROUP + END_OF_GROUP
            else:
                fields, end, closing = _fields(field.message), position + length, 0
    except IndexError:
        raise ValueError("the end is missing") from None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of up to ten bytes, and where the next begins."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise ValueError("a number that is too long")


@cache
def _fields(message: Any) -> dict[int, Field]:
    """The fields of a message by their tags."""
    fields: dict[int, Field] = {}
    for field in message.fields:
        number, type = field.number << 3, field.type
        if type == MESSAGE:
            # Its own size: 16 bytes for each field, its header and the reference to it.
            fields[number | LENGTH] = Field(40 + 16 * len(field.message_type.fields), message=field.message_type)
        elif type in (STRING, BYTES):
            fields[number | LENGTH] = Field(32 if _is_repeated(field) else 0)
        elif type == ENUM:  # whose unknown values are kept as unknown fields
            fields[number | VARINT] = Field(16)
        else:
            width = WIDTHS.get(type, 0)
            kind = {8: EIGHT_BYTES, 4: FOUR_BYTES}.get(width, VARINT)
            fields[number | kind] = Field(16 if _is_repeated(field) else 0)
            if _is_repeated(field):
                fields[number | LENGTH] = Field(0, bytes_each=1 if width else 16)
    return fields


def _is_repeated(field: Any) -> bool:
    repeated = getattr(field, "is_repeated", None)  # of newer versions, whose `label` is deprecated
    return bool(field.label == field.LABEL_REPEATED if repeated is None else repeated)
