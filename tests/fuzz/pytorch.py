"""Files of torch.save: archives with pickles in them, and from PyTorch before 1.6 pickles one after another."""

from __future__ import annotations

import io
import pickletools
import random

import torch

from tests.fuzz.inputs import NUMBERS, Input, changed_bytes, changed_members, packed, unpacked

# What pickles are made of: containers, memory, numbers, texts, names of functions, and what puts them together.
OPCODES = (
    b")", b"}", b"]", b"\x8f", b"(", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"0", b"1", b"2", b"q\0", b"h\0",
    b"h\1", b"R", b"b", b"s", b"u", b"a", b"e", b"\x90", b"\x91", b".", b"N", b"\x88", b"\x89", b"Q", b"\x93",
    b"\x94", b"\x81", b"K\1", b"K\0", b"J\xff\xff\xff\x7f", b"M\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"G" + bytes(8), b"X\1\0\0\0a", b"X\xff\xff\xff\x7f", b"\x8c\1a", b"B\4\0\0\0abcd", b"C\1a", b"\x95" + bytes(8),
    b"\x80\2", b"\x80\5", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n", b"cbuiltins\ngetattr\n", b"cposix\ngetpid\n",
    b"ctorch\nfloat32\n", b"ctorch._utils\n_rebuild_parameter\n",
)  # fmt: skip


def seeds() -> list[Input]:
    torch.manual_seed(0)
    lstm, gru = torch.nn.LSTM(2, 3, 2, bidirectional=True), torch.nn.GRU(2, 3)
    optimiser = torch.optim.Adam(gru.parameters())
    gru(torch.ones(4, 2))[0].sum().backward()
    optimiser.step()
    weights = [
        lstm.state_dict(),
        {"epoch": 3, "model_state_dict": gru.state_dict(), "optimizer_state_dict": optimiser.state_dict(), "loss": 0.5},
        {f"encoder.{name}": value.half() for name, value in gru.state_dict().items()},
        dict(gru.named_parameters()),
    ]
    files = []
    for is_zip in (True, False):
        for value in weights[: 4 if is_zip else 2]:
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=is_zip)
            files.append(file.getvalue())
    return [Input(".pt", data) for data in files]


def changed(chance: random.Random, valid: Input) -> Input:
    data, change = valid.data, chance.random()
    if data[:2] == b"PK" and change < 0.85:
        members = unpacked(data)
        if change < 0.6:
            members = [(n, _changed_pickle(chance, d) if n.endswith("data.pkl") else d) for n, d in members]
        else:
            members = changed_members(chance, members)
        data = packed(members)
    elif change < 0.85:
        pickles, numbers = _pickles(data)
        i = chance.randrange(len(pickles))
        if chance.random() < 0.8:
            pickles[i] = _changed_pickle(chance, pickles[i])
        else:
            pickles.insert(chance.randrange(len(pickles)), pickles.pop(i) if chance.random() < 0.5 else pickles[i])
        data = b"".join(pickles) + (numbers if chance.random() < 0.8 else numbers[: chance.randrange(len(numbers) + 1)])
    if change > 0.8:
        data = changed_bytes(chance, data)
    options = {"prefix": chance.choice(("encoder.", "model_state_dict."))} if chance.random() < 0.1 else {}
    return Input(valid.suffix, data, options)


def _pickles(data: bytes) -> tuple[list[bytes], bytes]:
    """The pickles at the beginning of a file, and the numbers after them."""
    reader, pickles = io.BytesIO(data), []
    for _ in range(5):  # a mark, the version, the system, the object, the names of the storages
        begin = reader.tell()
        for _ in pickletools.genops(reader):
            pass
        pickles.append(data[begin : reader.tell()])
    return pickles, data[reader.tell() :]


def _changed_pickle(chance: random.Random, data: bytes) -> bytes:
    """The same pickle with operations left out, doubled, swapped or added, or with another number or text."""
    places = [place for _, _, place in pickletools.genops(data)]
    parts = [data[begin:end] for begin, end in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(chance.choice((1, 1, 2, 4))):
        i, change = chance.randrange(len(parts)), chance.randrange(7)
        if change == 0:
            del parts[i]
        elif change == 1:
            parts[i:i] = [parts[i]] * chance.choice((1, 1, 2, 100))
        elif change == 2:
            other = chance.randrange(len(parts))
            parts[i], parts[other] = parts[other], parts[i]
        elif change == 3:
            parts.insert(i, chance.choice(OPCODES))
        elif change == 4:
            parts[i] = chance.choice(OPCODES)
        elif change == 5:
            parts[i:i] = [chance.choice(OPCODES) for _ in range(chance.choice((2, 5, 30)))]
        elif parts[i][:1] in (b"K", b"M", b"J"):
            width = {b"K": 1, b"M": 2, b"J": 4}[parts[i][:1]]
            parts[i] = parts[i][:1] + (chance.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        else:
            parts[i] = parts[i][:1] + changed_bytes(chance, parts[i][1:] or b"\0", 1)
        if not parts:
            break
    return b"".join(parts)
