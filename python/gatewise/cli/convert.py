"""`gatewise convert`: write a model in another format."""

from __future__ import annotations

import os

import gatewise as gw
from gatewise.cli.outputs import check_is_other


def convert(file: str, output: str) -> int:
    """Write the model of one file to another one, in the format of its ending."""
    check_is_other(output, file)
    gw.save(gw.load(file), output)
    print(f"{output}: {os.path.getsize(output):,} bytes")
    return 0
