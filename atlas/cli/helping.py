"""What --help says of options, from the docstrings of the configurations."""

from __future__ import annotations

import argparse
import inspect
import re
from typing import Any

from atlas.config import ARCHITECTURES


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the default of an option where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        flag = isinstance(action, argparse._StoreTrueAction)
        if flag or action.default is None or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


def architecture_help(name: str, models: list[str]) -> str:
    """What a field is and its default, apart for models of which it is something else."""
    told: dict[str, dict[str, list[str]]] = {}
    for model in models:
        kind = ARCHITECTURES[model]
        text, default = field_help(kind)[name], kind.__dataclass_fields__[name].default
        told.setdefault(text.removesuffix("."), {}).setdefault(str(default), []).append(model)
    if len(told) == 1:
        ((text, defaults),) = told.items()
        values = "; ".join(f"{', '.join(those)}: {value}" for value, those in defaults.items())
        return f"{text} ({values})"
    return " ".join(
        f"{', '.join(those)}: {text} ({value})."
        for text, defaults in told.items()
        for value, those in defaults.items()
    )


def field_help(kind: type[Any]) -> dict[str, str]:
    """What the docstrings of a configuration, and of what it extends, say of each field."""
    kinds = {other.__name__: other for other in ARCHITECTURES.values()}
    out = {}
    for one in reversed(kind.__mro__):
        _, _, attributes = inspect.cleandoc(one.__doc__ or "").partition("Attributes\n----------\n")
        for block in re.split(r"\n(?=\S)", attributes):
            names, _, text = block.partition("\n")
            text = " ".join(text.replace("``", "").replace("%", "%%").split())
            other = re.fullmatch(r"As in :class:`(\w+)`\.", text)
            for name in names.split(", "):
                out[name] = field_help(kinds[other[1]])[name] if other else text
    return out
