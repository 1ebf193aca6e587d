"""Text for a terminal."""

from __future__ import annotations


def printable(text: object) -> str:
    """A text without what a terminal would act on: names in files come from strangers, too."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )
