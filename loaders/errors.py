"""The one error that the loaders raise on purpose."""

from __future__ import annotations

from operator import index


class LoaderError(Exception):
    """What was wrong, what was found, what was expected, and what to do.

    Parameters
    ----------
    what
        What is wrong, in one sentence without a full stop.
    found
        What was found.
    expected
        What was expected in its place.
    do
        What the user can do about it.
    """

    def __init__(
        self, what: str, *, found: object = None, expected: object = None, do: str | None = None
    ) -> None:
        self.what = what
        self.found = found
        self.expected = expected
        self.do = do
        parts = [what]
        if found is not None:
            parts.append(f"found: {found}")
        if expected is not None:
            parts.append(f"expected: {expected}")
        if do is not None:
            parts.append(f"what to do: {do}")
        super().__init__("\n  ".join(parts))


def whole_number(name: str, value: int, expected: str = "a whole number") -> int:
    """The value as a Python ``int``. True and False are no numbers here."""
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise LoaderError(
        f"{name} is no whole number", found=repr(value), expected=expected, do="give an int"
    )


def at_least_one(name: str, value: int) -> int:
    """The value as a Python ``int``, which must be at least 1."""
    number = whole_number(name, value, "a whole number of at least 1")
    if number < 1:
        raise LoaderError(
            f"{name} is out of range", found=number, expected="at least 1", do=f"raise {name}"
        )
    return number
