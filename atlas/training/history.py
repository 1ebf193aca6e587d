"""What happened in each epoch, in memory and as a JSONL log."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from atlas.files import replace_bytes
from atlas.training.writing import io_errors

LOG_NAME = "log.jsonl"


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch of training.

    Attributes
    ----------
    epoch
        Epochs completed, so the first record has 1.
    step
        Steps completed since training began.
    train_loss
        The objective at the KL weights in force, mean over the cells of the epoch, in nats.
    reconstruction_loss, kl
        Its two parts, unweighted, means over the same cells, in nats.
    penalty
        What the objective holds besides, with its weight: classification, discrepancy of batches,
        adversary; mean, 0 for a model without.
    kl_weight
        Of the last step of the epoch.
    validation_bound
        Mean over the held-out cells of ``reconstruction_loss + kl`` at KL weight 1, in nats: the
        negative evidence lower bound, so lower is better. None where no cells are held out.
    seconds
        Wall time of the epoch's steps, without validation, checkpoints and interruptions.
    cells_per_second
        Training cells by those seconds.
    """

    epoch: int
    step: int
    train_loss: float
    reconstruction_loss: float
    kl: float
    penalty: float
    kl_weight: float
    validation_bound: float | None
    seconds: float
    cells_per_second: float


@dataclass(frozen=True, slots=True)
class History:
    """All epochs of a training, in order."""

    records: tuple[EpochRecord, ...] = ()

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the lowest validation bound, or the first of equals; None without any."""
        bounds = {
            record.epoch: record.validation_bound
            for record in self.records
            if record.validation_bound is not None
        }
        return min(bounds, key=lambda epoch: bounds[epoch]) if bounds else None

    def append(self, record: EpochRecord) -> History:
        """A history with one more epoch."""
        return History((*self.records, record))

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON values, one object an epoch."""
        return [dataclasses.asdict(record) for record in self.records]

    @classmethod
    def from_json(cls, records: Sequence[dict[str, Any]]) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls(tuple(EpochRecord(**record) for record in records))


def write_log(folder: Path, history: History) -> None:
    """Make ``log.jsonl`` in ``folder`` hold exactly ``history``, one JSON object a line.

    The log is replaced whole, so that it is never torn and, after a resume, has no epoch twice.

    Raises
    ------
    CheckpointError
        The write failed; the log is as it was.
    """
    path = folder / LOG_NAME
    lines = [json.dumps(record, allow_nan=False) + "\n" for record in history.to_json()]
    with io_errors("The training log could not be written", path):
        replace_bytes(path, "".join(lines).encode())
