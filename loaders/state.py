"""Where a loader stands, and in which order of which rows: saved, restored, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from loaders.errors import LoaderError

# Raised when the order of rows changes for the same settings, or the fields of the state do.
VERSION: Final = 3

_FIELDS: Final = ("version", "epoch", "step", "fingerprint")

Fingerprint = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two minibatches.

    Attributes
    ----------
    epoch
        From 0.
    step
        Minibatches of the epoch that were handed out.
    """

    epoch: int = 0
    step: int = 0


def save(position: Position, fingerprint: Fingerprint) -> dict[str, Any]:
    """A position as JSON values, with what it is a position in."""
    return {
        "version": VERSION,
        "epoch": position.epoch,
        "step": position.step,
        "fingerprint": dict(fingerprint),
    }


def restore(state: Mapping[str, Any], fingerprint: Fingerprint, n_steps: int) -> Position:
    """The inverse of :func:`save`.

    Parameters
    ----------
    state
        What :func:`save` gave.
    fingerprint
        Of the loader that is to go on.
    n_steps
        Its number of minibatches in an epoch.

    Raises
    ------
    LoaderError
        Not a state, or one of another version, source or settings.
    """
    known = isinstance(state, Mapping) and set(state) == set(_FIELDS)
    if not known or not isinstance(state["fingerprint"], Mapping):
        fields = ", ".join(map(str, state)) if isinstance(state, Mapping) else ""
        raise LoaderError(
            "this is no state of a loader",
            found=f"fields {fields or 'none'}" if isinstance(state, Mapping) else repr(state)[:80],
            expected=f"a dict with the fields {', '.join(_FIELDS)}",
            do="give what state_dict() of a loader gave",
        )
    if state["version"] != VERSION:
        raise LoaderError(
            "the state was saved by another version of the loader",
            found=f"version {state['version']}",
            expected=f"version {VERSION}",
            do="go on with the version that saved it, or start anew",
        )
    _check_fingerprint(state["fingerprint"], fingerprint)
    epoch, step = state["epoch"], state["step"]
    if not (isinstance(epoch, int) and isinstance(step, int) and 0 <= epoch < 2**64):
        raise LoaderError(
            "the state has no valid position",
            found=f"epoch {epoch!r}, step {step!r}",
            expected="two numbers from 0",
        )
    if not 0 <= step <= n_steps:
        raise LoaderError(
            "the state lies outside of an epoch", found=f"step {step}", expected=f"0 to {n_steps}"
        )
    return Position(epoch, step)


def _check_fingerprint(saved: Fingerprint, own: Fingerprint) -> None:
    names = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if names:
        raise LoaderError(
            "the state was saved with another source or other settings",
            found=", ".join(f"{name}={saved.get(name)!r}" for name in names),
            expected=", ".join(f"{name}={own.get(name)!r}" for name in names),
            do="make the loader with the source and settings of the state, or start anew",
        )
