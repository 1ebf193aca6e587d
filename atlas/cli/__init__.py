"""The command line: parse, call a workflow, print. Errors of Atlas end with code 2."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from atlas.cli.parser import build_parser
from atlas.cli.text import printable
from atlas.errors import AtlasError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = build_parser().parse_args(arguments)
    warnings.showwarning = _print_warning
    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return run(options) or 0
    except KeyboardInterrupt as interrupt:
        print(f"\natlas: interrupted {interrupt}".rstrip(), file=sys.stderr)
        return 130
    except AtlasError as error:
        print(f"atlas: {printable(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        from loaders import LoaderError  # the loader knows nothing of Atlas and has its own error

        if not isinstance(error, OSError | LoaderError):
            raise
        print(f"atlas: {printable(error)}", file=sys.stderr)
        return 2


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {printable(message)}", file=sys.stderr)
