"""Where the time of a training goes, and whether its minibatches come too slowly."""

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from atlas.training.writing import io_errors
from loaders.stalls import Stalls

STAGES = ("waiting", "copying", "forward", "backward", "optimiser", "between")
"""What the training does with its time, one after the other; see :class:`Times`."""

_STARVED = 0.3
_JUDGED_SECONDS = 5.0


@dataclass
class Times:
    """Seconds of a training by stage.

    Attributes
    ----------
    seconds
        Of the thread that trains: waiting for a minibatch; copying it to the device, and what else
        makes inputs of it; forward and backward pass, the latter with the messages between ranks;
        optimiser and average of the weights; what lies between (logs, checkpoints, validation).
    reading, gathering
        Of the loader's threads, beside it: reading with decoding, and making minibatches.
    cells
        Training cells.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    reading: float = 0.0
    gathering: float = 0.0
    cells: int = 0

    def write(self, out: Path, *, show: bool) -> None:
        """Keep it as ``profile.json`` in the run folder, and print it to stderr if shown."""
        with io_errors("The profile cannot be written", out):
            (out / "profile.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        if show:
            print(self, file=sys.stderr)

    def __str__(self) -> str:
        whole = sum(self.seconds.values()) or 1.0
        lines = [
            f"{name:<10} {value:8.2f} s  {value / whole:5.1%}"
            for name, value in self.seconds.items()
        ]
        lines.append(
            f"in the loader's threads: reading and decoding {self.reading:.2f} s, gathering "
            f"{self.gathering:.2f} s; {self.cells / whole:,.0f} cells/s in all"
        )
        return "\n".join(lines)


class Clock:
    """Counts the stages of the steps, if asked to; always tells when the loader is too slow.

    Parameters
    ----------
    device
        Of the model; a lap waits for it, so a profiled training on a GPU is slower.
    on
        Whether to count.
    """

    def __init__(self, device: torch.device, *, on: bool) -> None:
        self.times = Times()
        self._device, self._on = device, on
        self._at = time.perf_counter()
        self._warned = False

    def lap(self, stage: str) -> None:
        """What passed since the last lap was this stage."""
        if not self._on:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.times.seconds[stage] += now - self._at
        self._at = now

    def end_epoch(self, stalls: Stalls, seconds: float, cells: int) -> None:
        """Take in what the loader counted in an epoch, and warn once where it starves the step.

        Parameters
        ----------
        stalls
            Of the loader.
        seconds, cells
            Of the epoch, without validation.
        """
        told = stalls.seconds
        self.times.reading += told["reading"]
        self.times.gathering += told["gathering"]
        self.times.cells += cells
        share = told["wait_for_minibatch"] / max(seconds, 1e-9)
        if seconds < _JUDGED_SECONDS or share < _STARVED or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"training waits for minibatches {share:.0%} of its time. If many epochs follow, train "
            "from a store of the chosen genes (--project); else copy the store to a local disk, "
            "give the process more cores, or a larger --memory where it was set; --profile shows "
            "where the time goes",
            stacklevel=2,
        )
