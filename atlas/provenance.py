"""How something was made: the command and the versions, for manifests, models and reports."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import version
from pathlib import Path


def command() -> str:
    """The command that runs, as it could be typed again."""
    return shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of Python and of what reads, writes and computes."""
    names = ("atlas-trainer", "torch", "numpy", "scipy", "anndata", "zarr")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}
