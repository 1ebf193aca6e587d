"""What options of a store have to be."""

from __future__ import annotations

import re

from atlas.errors import ConfigError
from loaders.errors import LoaderError
from loaders.memory import parse_bytes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str, what: str) -> None:
    """Names of studies and embeddings are names of folders too."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"The {what} cannot have this name",
            found=repr(name),
            expected="1 to 100 letters, digits and ._- , starting with a letter or digit",
        )


def bytes_of(name: str, size: str | int) -> int:
    """Bytes of an option, given as a number or as a text such as ``512MB``."""
    try:
        return parse_bytes(size)
    except LoaderError as error:
        raise ConfigError(
            f"{name} is no number of bytes",
            found=repr(size),
            expected="a number of bytes, or a text such as 512MB or 2GiB",
        ) from error
