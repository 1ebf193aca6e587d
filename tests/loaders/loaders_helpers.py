"""Small sources, also ones that fail or wait, for the tests of the loaders."""

import threading
from functools import cache

import numpy as np
from scipy.sparse import csr_matrix

from loaders import ArraySource, RowBlock
from loaders.source import as_ranges


@cache
def counts(n_obs: int, n_vars: int = 40, seed: int = 0) -> csr_matrix:
    """Sparse counts; about one row in ten is empty, and the last columns never occur."""
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.3, size=(n_obs, n_vars)).astype(np.float32)
    dense[rng.random(n_obs) < 0.1] = 0
    dense[:, -3:] = 0
    return csr_matrix(dense)


def source(
    n_obs: int = 500,
    segments: tuple[int, ...] | None = (0, 37, 38, 260, 260, 500),
    n_vars: int = 40,
    seed: int = 0,
) -> ArraySource:
    """Five studies by default, one of a single row and one of none."""
    codes = {"batch": np.arange(n_obs) * 7 % 11, "label": np.arange(n_obs) % 5 - 1}
    return ArraySource(counts(n_obs, n_vars, seed), codes, segments)


class Recording(ArraySource):
    """Remembers what was read, and calls ``before(n, start)`` ahead of the n-th read, from 1."""

    def __init__(self, *args, before=lambda n, start: None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.reads: list[tuple[int, int]] = []
        self.before = before
        self._lock = threading.Lock()

    def read_rows(self, starts, stops) -> RowBlock:
        starts, stops = as_ranges(starts, stops)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            with self._lock:
                self.reads.append((start, stop))
                n = len(self.reads)
            self.before(n, start)
        return super().read_rows(starts, stops)

    @property
    def rows_read(self) -> int:
        return sum(stop - start for start, stop in self.reads)


def loader_threads() -> list[str]:
    """Names of the threads of loaders that are alive."""
    return [t.name for t in threading.enumerate() if t.name.startswith("loaders-")]
