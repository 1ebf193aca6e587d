"""How every side of ``bench_loader.py`` streams, touches and proves what it read.

Imported by workers in environments of their own, so it needs numpy and the standard library only. A
side is a function that begins an epoch and yields ``(data, indices, indptr)`` of each minibatch;
here it is run, the same way for all:

1. ``warm``: minibatches for a few seconds, or, where cells are to be compared, a whole epoch in
   which every row gets a fingerprint. Not timed.
2. ``epoch``: whole epochs until enough seconds have passed, timed. All data is touched: the counts
   are summed and the columns hashed (by xor, which no order of rows changes).
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Json, Phases, serve_worker

__all__ = ["Json", "Phases", "Rows", "fingerprints", "measured", "serve_worker", "versions_of"]

warnings.filterwarnings("ignore")

Rows = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
Epoch = Callable[[], Iterator[Rows]]

_ROWS_AT_A_TIME = 256  # fingerprints take 16 bytes a value on the way


def gene_weights(columns: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A well mixed number for each column (SplitMix64 of its position)."""
    z = (columns.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fingerprints(rows: Rows) -> npt.NDArray[np.uint64]:
    """A number for each row that any other count or column would change; uint64, (n_rows,).

    The sum, modulo 2⁶⁴, of count times the number of its column: the order of the columns within a
    row does not matter.
    """
    data, indices, indptr = rows
    out = np.zeros(len(indptr) - 1, np.uint64)
    for start in range(0, len(out), _ROWS_AT_A_TIME):
        bounds = np.asarray(indptr[start : start + _ROWS_AT_A_TIME + 1], np.int64)
        part = slice(bounds[0], bounds[-1])
        values = gene_weights(indices[part]) * data[part].astype(np.uint64)
        filled = np.flatnonzero(np.diff(bounds))  # reduceat knows no empty rows
        if filled.size:
            out[start + filled] = np.add.reduceat(values, bounds[filled] - bounds[0])
    return out


def touched(rows: Rows) -> tuple[float, int]:
    """The sum of the counts and a hash of the columns: every byte is read once."""
    data, indices, _ = rows
    # uint16 would be summed as uint64, several times slower; a minibatch stays far below 2³².
    wide = np.uint32 if data.dtype.kind == "u" else None
    return float(np.add.reduce(data, dtype=wide)), int(np.bitwise_xor.reduce(indices))


def measured(epoch: Epoch, arguments: Json, phases: Phases) -> Json:
    """Run a side; see the head of this file.

    Parameters
    ----------
    epoch
        Begins a new epoch and yields its minibatches.
    arguments
        ``warm_seconds``, ``seconds`` (at least so long, in whole epochs), ``limit`` (seconds after
        which a slow side is stopped in mid-epoch), ``prove`` (path of the fingerprints and of the
        sizes of the minibatches that they came in, or null)
        and ``cold`` (drop the page cache before the timed epoch, of which there is one).
    phases
        Of the worker; ``warm`` and ``epoch`` are begun here.
    """
    phases.begin("warm")
    _warm(epoch, arguments)
    if arguments["cold"]:
        drop_page_cache()
    phases.begin("epoch")
    cells, epochs, whole, total, columns = 0, 0, True, 0.0, 0
    started = time.perf_counter()
    stop = started + arguments["limit"]
    while True:
        for rows in epoch():
            part, hashed = touched(rows)
            cells += len(rows[2]) - 1
            if epochs == 0:
                total += part
                columns ^= hashed
            if time.perf_counter() > stop:
                whole = False
                break
        epochs += 1
        seconds = time.perf_counter() - started
        if not whole or arguments["cold"] or seconds >= arguments["seconds"]:
            break
    return {
        "cells": cells,
        "seconds": seconds,
        "cells_a_second": cells / seconds,
        "epochs": epochs,
        "whole": whole,
        "cells_an_epoch": cells // epochs,
        "total": total,
        "columns_hash": columns,
        "types": [str(part.dtype) for part in rows],
    }


def _warm(epoch: Epoch, arguments: Json) -> None:
    """Minibatches for some seconds, or all of an epoch with a fingerprint of every row."""
    started = time.perf_counter()
    prove = arguments["prove"]
    seconds = arguments["limit"] if prove else arguments["warm_seconds"]
    found = []
    for rows in epoch():
        if prove:
            found.append(fingerprints(rows))
        if time.perf_counter() - started > seconds:
            break
    if prove:
        np.savez(prove, prints=np.concatenate(found), sizes=[len(part) for part in found])


def drop_page_cache() -> None:
    """Forget all cached files; needs to be root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def versions_of(*names: str) -> dict[str, str]:
    """Versions of packages in this environment."""
    out = {"python": sys.version.split()[0]}
    for name in names:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    return out
