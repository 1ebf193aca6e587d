"""Statistics from values that were counted are, bit for bit, those of two passes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.sparse as sp

from atlas.store import tally
from atlas.store.statistics import gene_statistics, statistics_of_sums
from atlas.store.tally import Tally, affordable_width


def _both(counts: sp.csr_matrix, codes: np.ndarray, width: int, threads: int = 2) -> None:
    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = counts[start:stop]
        return part.indptr.astype(np.int64), part.indices, part.data

    n_batches = int(codes.max()) + 1
    tallies = [Tally(n_batches, counts.shape[1], width) for _ in range(threads)]
    for i, start in enumerate(range(0, counts.shape[0], 37)):
        stop = min(start + 37, counts.shape[0])
        tallies[i % threads].add(*read(start, stop), codes[start:stop])
    expected = gene_statistics(read, *counts.shape, codes).to_arrays()
    cells = np.bincount(codes)
    found = statistics_of_sums(cells, functools.partial(tally.sums, tallies)).to_arrays()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("scale", [0.5, 20, 5_000])
def test_the_same_bits(width: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_MOST", 10_000)
    generator = np.random.default_rng(0)
    counts = generator.poisson(generator.gamma(0.3, scale, 40), (500, 40))
    counts[3, 5] = 2**26 - 1  # beyond, squares are no longer exact
    codes = generator.integers(0, 3, 500).astype(np.int32)
    _both(sp.csr_matrix(counts.astype(np.uint32)), codes, width)


def test_counting_is_given_up_where_values_are_too_diverse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tally, "_MOST", 100)
    one = Tally(1, 10, 16)
    indptr, columns = np.array([0, 10]), np.arange(10, dtype=np.uint16)
    for i in range(30):
        values = (np.arange(10) + 16 + 10 * i).astype(np.uint16)
        one.add(indptr, columns, values, np.zeros(1, np.int32))
    assert one.given_up


def test_the_table_fits_the_memory() -> None:
    assert affordable_width(2, 20_000, 64 << 20) == 64
    assert affordable_width(20, 20_000, 64 << 20) == 32
    assert affordable_width(200, 20_000, 64 << 20) is None
    assert Tally(2, 20_000, 64).nbytes <= 64 << 20
