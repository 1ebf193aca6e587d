"""Text for a terminal, and numbers from it."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def printable(text: object) -> str:
    """A text without what a terminal would act on: names in files come from strangers, too."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """What reads a whole number of a range, as ``type`` of an option."""
    wanted = f"a whole number, {least:,} to {most:,}" if most else f"a whole number from {least:,}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {wanted}")
        return value

    return read
