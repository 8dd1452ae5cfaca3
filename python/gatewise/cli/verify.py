"""`gatewise verify`: compare a model with the one that it was made from."""

from __future__ import annotations

import gatewise as gw
from gatewise.cli.tables import print_table


def verify(file: str, original: str) -> int:
    """Print the largest differences; the exit status is 1 if they are too large."""
    result = gw.verify(gw.load(file), original)
    windows = "not compared" if result.windows is None else f"{result.windows:.2g}"
    lines = [("sequences", f"{result.sequences:.2g}"), ("windows", windows), ("tolerance", f"{result.tolerance:.2g}")]
    print_table(("", "largest difference"), lines)
    print(f"{file}: {'the same as' if result.passed else 'differs from'} {original}")
    return 0 if result.passed else 1
