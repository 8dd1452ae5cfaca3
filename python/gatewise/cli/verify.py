"""`gatewise verify`: a model and the one that it was made from."""

from __future__ import annotations

from typing import Any

import gatewise as gw
from gatewise.cli.tables import print_table


def verify(file: str, original: str) -> int:
    """Compare a model with the one that it was made from."""
    compare: Any = getattr(gw, "verify", None)
    if compare is None:
        raise ValueError(f"gatewise {gw.__version__} cannot verify")
    found = compare(gw.load(file), original)
    windows = "not compared" if found.windows is None else f"{found.windows:.2g}"
    lines = [("sequences", f"{found.sequences:.2g}"), ("windows", windows), ("tolerance", f"{found.tolerance:.2g}")]
    print_table(("", "largest difference"), lines)
    print(f"{file}: {'the same as' if found.passed else 'differs from'} {original}")
    return 0 if found.passed else 1
