"""Checkpoints: all that a training needs to go on, never half of it whatever crashes.

A run folder holds ``checkpoints/NNNNNNNN/``, of which the highest number is the latest::

    weights.safetensors      parameters and buffers of the model
    optimizer.safetensors    Adam's moments and step counts, "<moment>/<parameter>"
    state.safetensors        the random generator, the loss sums of the epoch in progress
    average.safetensors      moving average of the weights, unless it is turned off
    best.safetensors         weights of the best epoch, with early stopping only
    checkpoint.json          everything else, with the SHA-256 of each file and of itself

A checkpoint is written as a hidden sibling, every file and the folder synced, then renamed; only
then is the one before it removed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema
import safetensors
import safetensors.torch
from torch import Tensor

from atlas import files
from atlas.errors import CheckpointError
from atlas.training.environment import Environment
from atlas.training.history import History
from atlas.training.writing import io_errors

SCHEMA_NAME = "atlas-checkpoint"
VERSION = 2
FOLDER = "checkpoints"
_DOCUMENT = "checkpoint.json"
_RESTART = "restore the run folder from a copy, or train anew into another folder"

_count = {"type": "integer", "minimum": 0}
_number = {"type": "number"}
_text = {"type": "string"}
_digest = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


_SCHEMA = _object(
    {
        "schema": {"const": SCHEMA_NAME},
        "version": {"const": VERSION},
        "files": _object(
            dict.fromkeys(("weights", "optimizer", "state", "average", "best"), _digest),
            ("average", "best"),
        ),
        "progress": _object(
            {
                "step": _count,
                "finished": {"type": "boolean"},
                "epoch_cells": _count,
                "epoch_seconds": {"type": "number", "minimum": 0},
            }
        ),
        "loader": {"type": "object"},
        "history": {
            "type": "array",
            "items": _object(
                {
                    "epoch": _count,
                    "step": _count,
                    "train_loss": _number,
                    "reconstruction_loss": _number,
                    "kl": _number,
                    "penalty": _number,
                    "kl_weight": _number,
                    "validation_bound": {"type": ["number", "null"]},
                    "seconds": _number,
                    "cells_per_second": _number,
                }
            ),
        },
        "run": {"type": "object"},
        "environment": _object(
            {
                "torch": _text,
                "numpy": _text,
                "atlas": _text,
                "python": _text,
                "processor": _text,
                "device": _text,
                "threads": {"type": "integer", "minimum": 1},
                "ranks": {"type": "integer", "minimum": 1},
            },
            ("ranks",),
        ),
        "sha256": _digest,
    }
)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training has come.

    Attributes
    ----------
    step
        Steps done since training began.
    finished
        Whether there is nothing left to do.
    epoch_cells, epoch_seconds
        Training cells seen and wall time spent in the epoch in progress.
    """

    step: int
    finished: bool
    epoch_cells: int
    epoch_seconds: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a training between two steps; all tensors on the CPU.

    Attributes
    ----------
    weights
        Parameters and buffers of the model.
    optimizer
        State of Adam by "<moment>/<parameter>".
    state
        ``generator``: uint8, the state of the random generator; ``sums``: float64 (4,), the
        objective, reconstruction loss and KL divergence summed over the cells of the epoch.
    average
        Moving average of the weights; None where it is turned off.
    best
        Weights of the best epoch; None without early stopping or before the first validation.
    progress, history
        How far training has come, and what happened.
    loader
        Position of the loader, as it gave it.
    run
        What identifies the run: see :func:`atlas.training.run.identity`.
    environment
        What the numbers were computed with.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    best: Mapping[str, Tensor] | None
    progress: Progress
    history: History
    loader: Mapping[str, Any]
    run: Mapping[str, Any]
    environment: Environment


def save_checkpoint(out: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into a run folder and remove those before it.

    Returns
    -------
    Path
        The folder of the checkpoint.

    Raises
    ------
    CheckpointError
        A write failed; the checkpoint before this one is untouched.
    """
    folder = out / FOLDER
    earlier = _complete(folder)
    number = int(earlier[-1].name) + 1 if earlier else 1
    path = folder / f"{number:08d}"
    partial = folder / f".{path.name}.partial"
    with io_errors("A checkpoint could not be written", path):
        try:
            partial.mkdir(parents=True)
            _write_parts(partial, checkpoint)
            files.sync_folder(partial)
            partial.rename(path)
            files.sync_folder(folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for old in earlier:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_checkpoint(out: Path) -> Checkpoint | None:
    """Read the latest checkpoint of a run folder; None where there is none.

    Raises
    ------
    CheckpointError
        A file is missing, truncated or changed, or was written by a newer version.
    """
    complete = _complete(out / FOLDER)
    if not complete:
        return None
    folder = complete[-1]
    document = _read_document(folder / _DOCUMENT)
    parts = {
        name: _read_tensors(folder / f"{name}.safetensors", digest)
        for name, digest in document["files"].items()
    }
    return Checkpoint(
        weights=parts["weights"],
        optimizer=parts["optimizer"],
        state=parts["state"],
        average=parts.get("average"),
        best=parts.get("best"),
        progress=Progress(**document["progress"]),
        history=History.from_json(document["history"]),
        loader=document["loader"],
        run=document["run"],
        environment=Environment(**document["environment"]),
    )


def remove_leftovers(out: Path) -> None:
    """Remove what a crash left in a run folder: half-written and superseded checkpoints."""
    folder = out / FOLDER
    superseded = _complete(folder)[:-1]
    for path in (*folder.glob(".*.partial"), *superseded):
        shutil.rmtree(path, ignore_errors=True)
    for path in out.glob(".*.partial"):
        with suppress(OSError):
            path.unlink()


def _complete(folder: Path) -> list[Path]:
    """The checkpoints that were renamed into place, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def _write_parts(folder: Path, checkpoint: Checkpoint) -> None:
    parts = {
        "weights": checkpoint.weights,
        "optimizer": checkpoint.optimizer,
        "state": checkpoint.state,
    }
    if checkpoint.average is not None:
        parts["average"] = checkpoint.average
    if checkpoint.best is not None:
        parts["best"] = checkpoint.best
    digests = {}
    for name, tensors in parts.items():
        data = safetensors.torch.save(dict(tensors))
        files.write_bytes(folder / f"{name}.safetensors", data)
        digests[name] = hashlib.sha256(data).hexdigest()
    document = {
        "schema": SCHEMA_NAME,
        "version": VERSION,
        "files": digests,
        "progress": asdict(checkpoint.progress),
        "loader": dict(checkpoint.loader),
        "history": checkpoint.history.to_json(),
        "run": dict(checkpoint.run),
        "environment": asdict(checkpoint.environment),
    }
    document["sha256"] = _digest_of(document)
    files.write_bytes(folder / _DOCUMENT, json.dumps(document, indent=1, allow_nan=False).encode())


def _digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of a document's values, whatever their spacing and order."""
    canonical = json.dumps(document, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read(path))
    except ValueError as error:
        raise CheckpointError(
            "A checkpoint is not readable JSON", found=error, do=_RESTART, path=path
        ) from None
    head = (document.get("schema"), document.get("version")) if isinstance(document, dict) else None
    if head != (SCHEMA_NAME, VERSION):
        raise CheckpointError(
            "A checkpoint is in a format that this version does not read",
            found=head,
            expected=(SCHEMA_NAME, VERSION),
            do="use the version of atlas that wrote it, or train anew into another folder",
            path=path,
        )
    try:
        jsonschema.validate(document, _SCHEMA)
    except jsonschema.ValidationError as error:
        raise CheckpointError(
            "A checkpoint does not follow its schema",
            found=f"{error.json_path}: {error.message}",
            do=_RESTART,
            path=path,
        ) from None
    recorded = document.pop("sha256")
    _check_digest(path, _digest_of(document), recorded)
    return dict(document)


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    data = _read(path)
    _check_digest(path, hashlib.sha256(data).hexdigest(), digest)
    return safetensors.torch.load(data)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            "A file of a checkpoint cannot be read",
            found=error.strerror or str(error),
            do=_RESTART,
            path=path,
        ) from None


def _check_digest(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise CheckpointError(
            "A file of a checkpoint is not what was written",
            found=f"SHA-256 {found[:16]}…",
            expected=f"SHA-256 {expected[:16]}…",
            do=_RESTART,
            path=path,
        )
