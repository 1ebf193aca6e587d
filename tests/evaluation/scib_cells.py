"""The cells on which scib-metrics was run, for `scib_reference.json`; and how to run it again.

python tests/evaluation/scib_cells.py cells.npz
PEER/bin/python benchmarks/peers/scib_side.py cells.npz tests/evaluation/scib_reference.json
PEER/bin/python benchmarks/peers/scib_side.py cells.npz tables.json benchmarker

The tables, of the last command, stand in the same file.
"""

from __future__ import annotations

import functools
import sys

import numpy as np
import numpy.typing as npt

from atlas.evaluation.codes import Categories
from atlas.evaluation.measures import evaluate_embedding
from atlas.evaluation.metrics import Metrics


def scib_cells() -> dict[str, npt.NDArray[np.generic]]:
    """1,200 cells of 5 labels in 3 uneven batches, two labels in one batch only."""
    rng = np.random.default_rng(20261126)
    n = 1200
    labels = rng.choice(5, n, p=[0.4, 0.25, 0.2, 0.1, 0.05])
    batches = rng.choice(3, n, p=[0.5, 0.35, 0.15])
    batches[labels == 3] = 0
    centres = 2.2 * rng.standard_normal((5, 6))
    shifts = 1.1 * rng.standard_normal((3, 6))
    noise = rng.standard_normal((n, 6))
    before = (centres[labels] + shifts[batches] + noise).astype(np.float32)
    z = (centres[labels] + 0.3 * shifts[batches] + noise).astype(np.float32)
    exact = z.astype(np.float64)
    distance = np.sqrt(((exact[:, None] - exact[None]) ** 2).sum(-1))
    np.fill_diagonal(distance, -1)
    indices = np.argsort(distance, axis=1, kind="stable")[:, :90]
    distances = np.maximum(np.take_along_axis(distance, indices, axis=1), 0).astype(np.float32)
    return {
        "z": z,
        "before": before,
        "labels": labels,
        "batches": batches,
        "indices": indices,
        "distances": distances,
    }


@functools.cache
def measured_cells() -> Metrics:
    """What we measure on them."""
    cells = scib_cells()
    return evaluate_embedding(
        cells["z"],
        Categories(cells["batches"], "xyz"),
        Categories(cells["labels"], "abcde"),
        before=cells["before"],
    )


if __name__ == "__main__":
    np.savez(sys.argv[1], **scib_cells())
