"""The folder of a run, held by one process at a time, and what identifies the run in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt

from atlas.config import TrainConfig
from atlas.errors import CheckpointError
from atlas.training.checkpoint import remove_leftovers
from atlas.training.writing import io_errors
from loaders.source import RowSource

_LOCK = ".lock"
_MAX_DIFFERENCES = 5
_MAX_RANGES = 1000

# Compared by what they resolve to (see environment.py), or without influence on the numbers.
_NOT_IDENTIFYING = (
    "device",
    "threads",
    "checkpoint_steps",
    "checkpoint_minutes",
    "memory",
    "project",
    "profile",
)


@contextmanager
def open_run(out: Path, *, resume: bool) -> Iterator[None]:
    """Hold a run folder for one process, made where it is missing and cleared of leftovers.

    Parameters
    ----------
    out
        The run folder.
    resume
        Whether it may hold a run already.

    Raises
    ------
    CheckpointError
        The folder holds something and ``resume`` is False, another process trains in it, or it
        cannot be written to.
    """
    check_run_folder(out, resume=resume)
    lock = filelock.FileLock(out / _LOCK)
    with io_errors("The run folder cannot be written to", out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise CheckpointError(
                "Another process is training in this folder",
                do="wait for it to end, or train into another folder",
                path=out,
            ) from None
    try:
        remove_leftovers(out)
        yield
    finally:
        lock.release()


def check_run_folder(out: Path, *, resume: bool) -> None:
    """Refuse a folder that holds something already, unless it is to be resumed.

    Raises
    ------
    CheckpointError
        The folder is not empty and ``resume`` is False.
    """
    if resume or not out.is_dir():
        return
    held = sorted(path.name for path in out.iterdir() if path.name != _LOCK)
    if held:
        raise CheckpointError(
            "The run folder is not empty",
            found=", ".join(held[:_MAX_DIFFERENCES])
            + (", …" if len(held) > _MAX_DIFFERENCES else ""),
            do="go on with the run in it by --resume, or train into another folder",
            path=out,
        )


def identity(
    config: TrainConfig,
    source: RowSource,
    train_rows: Sequence[tuple[int, int]],
    validation_rows: Sequence[tuple[int, int]],
    presence: npt.NDArray[np.bool_] | None,
    describe: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run is, in plain JSON: two runs with the same identity compute the same numbers.

    Parameters
    ----------
    config
        How the model is trained; fields that do not change the numbers are left out.
    source
        Rows; its fingerprint stands for their content.
    train_rows, validation_rows
        Ranges of rows.
    presence
        Which study measured which gene, or None.
    describe
        What the caller adds: the model's configuration, genes, batches.
    """
    kept = {name: value for name, value in config.to_json().items() if name not in _NOT_IDENTIFYING}
    values = {
        "train": kept,
        "source": source.fingerprint,
        "train_rows": _ranges(train_rows),
        "validation_rows": _ranges(validation_rows),
        "presence": None if presence is None else _digest(presence),
        "describe": dict(describe),
    }
    return dict(json.loads(json.dumps(values, allow_nan=False)))


def _ranges(rows: Sequence[tuple[int, int]]) -> Any:
    """Ranges as they are, or as a digest where they are too many to be read by anyone."""
    listed = [[int(start), int(stop)] for start, stop in rows]
    if len(listed) <= _MAX_RANGES:
        return listed
    digest = hashlib.sha256(np.asarray(listed, "<i8").tobytes()).hexdigest()
    return {"ranges": len(listed), "sha256": digest}


def check_same_run(recorded: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with a run under another identity.

    Raises
    ------
    CheckpointError
        They differ; the message shows each difference from both sides.
    """
    differences = list(_differences("", recorded, asked))
    if not differences:
        return
    shown = differences[:_MAX_DIFFERENCES]
    raise CheckpointError(
        "The run in this folder is not the one asked for",
        found="; ".join(
            f"{name}: {then} in the checkpoint, {now} asked for" for name, then, now in shown
        )
        + (
            f"; and {len(differences) - len(shown)} more differences"
            if differences[len(shown) :]
            else ""
        ),
        do="resume with the options and the store of the run, or train into another folder",
        path=path,
    )


def _differences(name: str, then: Any, now: Any) -> Iterator[tuple[str, str, str]]:
    """Where two JSON values differ: dotted name, value on either side."""
    if then == now:
        return
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted({*then, *now}):
            below = f"{name}.{key}" if name else key
            if key not in then or key not in now:
                yield below, _short(then.get(key, "absent")), _short(now.get(key, "absent"))
            else:
                yield from _differences(below, then[key], now[key])
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        first = next(i for i, (a, b) in enumerate(zip(then, now, strict=True)) if a != b)
        yield f"{name}[{first}]", _short(then[first]), _short(now[first])
    elif isinstance(then, list) and isinstance(now, list):
        yield name, f"{len(then)} entries", f"{len(now)} entries"
    else:
        yield name, _short(then), _short(now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _digest(presence: npt.NDArray[np.bool_]) -> str:
    packed = np.packbits(np.ascontiguousarray(presence, dtype=bool))
    return hashlib.sha256(repr(presence.shape).encode() + packed.tobytes()).hexdigest()
