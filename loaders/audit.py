"""Did this epoch see every row once, how well were rows mixed, and where did the time go?"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loaders.errors import LoaderError
from loaders.loader import MinibatchLoader
from loaders.selection import rows_of

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Audit:
    """What one epoch of one rank was like.

    Attributes
    ----------
    epoch
        Its number.
    rows, distinct_rows, missing_rows
        Rows handed out; different ones among them; rows of the selection that did not come, and
        that are not of another rank, of an earlier step or dropped.
    dropped_rows
        Rows that ``drop_last`` leaves out of the epoch, over all ranks.
    each_once
        Whether every row that was to come came exactly once. None where rows are drawn by weight.
    diversity
        For each obs code the mean entropy of its values in a minibatch, as a share of what
        minibatches of the same sizes have when the rows are shuffled ideally.
    cells_per_second, seconds
        Of the epoch, with nothing done to the minibatches.
    stalls
        Seconds by stage: see :class:`loaders.stalls.Stalls`.
    window_bytes
        Bytes of open windows at the most, as counted against the budget.
    peak_bytes
        Largest private memory above that before the epoch; where the system does not tell, growth
        of the largest resident set.
    """

    epoch: int
    rows: int
    distinct_rows: int
    missing_rows: int
    dropped_rows: int
    each_once: bool | None
    diversity: Mapping[str, float]
    cells_per_second: float
    seconds: float
    stalls: Mapping[str, float]
    window_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        once = {True: "each once", False: "NOT each once", None: "drawn by weight"}[self.each_once]
        lines = [
            f"epoch {self.epoch}: {self.rows:,} rows, {self.distinct_rows:,} different, "
            f"{self.missing_rows:,} missing, {self.dropped_rows:,} dropped: {once}",
            f"{self.cells_per_second:,.0f} cells/s, {self.seconds:.2f} s; "
            f"memory {self.peak_bytes / 1e6:,.0f} MB, of it windows {self.window_bytes / 1e6:,.0f}",
            "diversity of minibatches, share of an ideal shuffle's: "
            + ", ".join(f"{name} {share:.3f}" for name, share in self.diversity.items()),
            "seconds: " + ", ".join(f"{stage} {s:.2f}" for stage, s in self.stalls.items()),
        ]
        return "\n".join(lines)


def audit(loader: MinibatchLoader, *, seed: int = 0) -> Audit:
    """Run the rest of the loader's epoch and look at what came: is it all that was chosen?

    Parameters
    ----------
    loader
        At the beginning of an epoch, or anywhere in it: then only the rest is judged. Where nothing
        of it is left, the next epoch is.
    seed
        Of the ideal shuffle that diversity is compared with.
    """
    if not isinstance(loader, MinibatchLoader):
        raise LoaderError(
            "only a shuffling loader can be audited",
            found=type(loader).__name__,
            expected="a MinibatchLoader",
            do="audit(MinibatchLoader(source, minibatch_size))",
        )
    if loader.step == len(loader):
        loader.skip_to_epoch(loader.epoch + 1)
    epoch, plan, chosen = loader.epoch, loader.plan, loader.selection
    others = [loader.plan_of(rank) for rank in range(plan.world_size) if rank != plan.rank]
    elsewhere = [np.empty(0, np.int64), *islice(plan.minibatches(), loader.step)]
    elsewhere += [rows for other in others for rows in other.minibatches()]
    expected = np.setdiff1d(rows_of(chosen.starts, chosen.stops), np.concatenate(elsewhere))
    drawn = plan.settings["weights"] != "none"
    n_rows = plan.n_rows if drawn else chosen.n_rows
    dropped = n_rows % plan.minibatch_size if plan.drop_last else 0
    parts, sizes = [], []
    with _PeakMemory() as peak:
        began = time.perf_counter()
        for minibatch in loader:
            parts.append(minibatch.rows)
            sizes.append(minibatch.n_rows)
        seconds = time.perf_counter() - began
    seen = np.concatenate(parts)
    distinct = np.unique(seen)
    missing = len(np.setdiff1d(expected, distinct)) - (0 if drawn else dropped)
    once = len(distinct) == len(seen) and not missing and np.isin(distinct, expected).all()
    codes = loader.source.obs_codes
    return Audit(
        epoch=epoch,
        rows=len(seen),
        distinct_rows=len(distinct),
        missing_rows=missing,
        dropped_rows=dropped,
        each_once=None if drawn else bool(once),
        diversity={name: diversity(own[seen], sizes, seed) for name, own in codes.items()},
        cells_per_second=len(seen) / seconds,
        seconds=seconds,
        stalls=dict(loader.stalls.seconds),
        window_bytes=loader.stalls.window_bytes,
        peak_bytes=peak.above,
    )


def diversity(codes: npt.NDArray[np.int32], sizes: list[int], seed: int = 0) -> float:
    """Mean entropy of the codes in minibatches, as a share of that after an ideal shuffle.

    Parameters
    ----------
    codes
        Code of each row in the order in which rows came, int32 (n_rows,).
    sizes
        Rows of each minibatch.
    seed
        Of the shuffle.

    Returns
    -------
    1 where all codes are the same: nothing could be mixed better.
    """
    _, values = np.unique(codes, return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(values)
    minibatch = np.repeat(np.arange(len(sizes)), sizes)
    ideal = _mean_entropy(shuffled, minibatch, sizes)
    return _mean_entropy(values, minibatch, sizes) / ideal if ideal > 0 else 1.0


def _mean_entropy(
    values: npt.NDArray[np.int64], minibatch: npt.NDArray[np.int64], sizes: list[int]
) -> float:
    n_values = int(values.max()) + 1
    pairs, counts = np.unique(minibatch * n_values + values, return_counts=True)
    rows = np.asarray(sizes)[pairs // n_values]
    share = counts / rows
    return float(-(share * np.log(share)).sum() / len(sizes))


class _PeakMemory:
    """Watches this process's private memory while the body runs."""

    def __enter__(self) -> _PeakMemory:
        self._start = self._peak = _private_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loaders-audit", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def above(self) -> int:
        """Peak above the start, bytes."""
        return self._peak - self._start

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, _private_bytes())


def _private_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["RssAnon"].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
