"""Rows into another order out of core: runs and stretches, against NumPy's and scipy's indexing."""

from __future__ import annotations

import errno
import os
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.store.spill import Runs, read_run, write_run


def random_rows(
    generator: np.random.Generator, n_rows: int, mean: int, types: tuple[Any, Any]
) -> sp.csr_matrix:
    lengths = generator.poisson(mean, n_rows)
    lengths[generator.random(n_rows) < 0.2] = 0
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    matrix = sp.csr_matrix((n_rows, 60_000), dtype=types[1])
    matrix.indptr = indptr
    matrix.indices = generator.integers(0, 60_000, indptr[-1]).astype(types[0])
    matrix.data = generator.integers(1, 60_000, indptr[-1]).astype(types[1])
    return matrix


def spill(folder: Path, rows: Any, destination: np.ndarray, generator: np.random.Generator) -> Runs:
    """Write runs of random lengths, in random order."""
    runs = Runs(folder, destination)
    n_rows = rows.shape[0]
    cuts = np.unique([0, *generator.integers(0, n_rows, 5), n_rows])
    for i in generator.permutation(len(cuts) - 1).tolist():
        start, stop = int(cuts[i]), int(cuts[i + 1])

        def take(order: np.ndarray, start: int = start, stop: int = stop) -> Any:
            part = rows[start:stop][order]
            return part.indptr.astype(np.int64), part.indices, part.data

        runs.add(write_run(folder, start, destination[start:stop], take, None))
    return runs


def joined(runs: Runs, size: int, types: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """All stretches one after another, each after a journey to another process."""
    indices, data = [np.empty(0, types[0])], [np.empty(0, types[1])]
    for number, stretch in enumerate(runs.stretches(size, types)):
        stretch = pickle.loads(pickle.dumps(stretch))
        assert stretch.number == number
        indptr, i, d = stretch.gather()
        assert len(i) == len(d) == stretch.size == indptr[-1]
        start = number * size
        rows = slice(stretch.first_row, stretch.first_row + stretch.n_rows + 1)
        np.testing.assert_array_equal(indptr, np.clip(runs.indptr[rows] - start, 0, stretch.size))
        assert stretch.size == size or start + stretch.size == runs.nnz
        indices.append(i)
        data.append(d)
    return np.concatenate(indices), np.concatenate(data)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_rows=st.integers(1, 300),
    mean=st.integers(0, 30),
    size=st.sampled_from([1, 7, 64, 1_000, 10**6]),
    types=st.sampled_from([("<i4", "<u4"), ("<u2", "<u2"), ("<i4", "<f4")]),
)
def test_rows_come_in_the_order_of_their_destination(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    n_rows: int,
    mean: int,
    size: int,
    types: tuple[str, str],
) -> None:
    generator = np.random.default_rng(seed)
    rows = random_rows(generator, n_rows, min(mean, 3 if size == 1 else 30), types)
    destination = generator.permutation(n_rows)
    runs = spill(tmp_path_factory.mktemp("spill"), rows, destination, generator)
    expected = rows[np.argsort(destination)]
    np.testing.assert_array_equal(runs.indptr, expected.indptr)
    assert runs.nnz == expected.nnz
    assert runs.largest == expected.data.max(initial=0)
    indices, data = joined(runs, size, types)
    np.testing.assert_array_equal(indices, expected.indices)
    np.testing.assert_array_equal(data, expected.data)
    assert (indices.dtype.str, data.dtype.str) == types


def test_runs_of_several_types_become_one(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    narrow = random_rows(generator, 20, 9, (np.uint16, np.uint16))
    wide = random_rows(generator, 20, 9, (np.uint16, np.uint32))
    wide.data[3] = 70_000
    destination = generator.permutation(40)
    runs = Runs(tmp_path, destination)
    for first, rows in ((0, narrow), (20, wide)):
        runs.add(
            write_run(
                tmp_path,
                first,
                destination[first : first + 20],
                lambda order, rows=rows: (
                    rows[order].indptr.astype(np.int64),
                    rows[order].indices,
                    rows[order].data,
                ),
                None,
            )
        )
    assert {kind.str for kind in runs.value_types} == {"<u2", "<u4"}
    both = sp.vstack([narrow.astype(np.uint32), wide]).tocsr()[np.argsort(destination)]
    indices, data = joined(runs, 50, ("<u4", "<u4"))
    found = sp.csr_matrix((data, indices, runs.indptr), shape=both.shape)
    assert abs(found.astype(np.int64) - both.astype(np.int64)).nnz == 0


def test_memory_is_that_of_one_stretch(tmp_path: Path) -> None:
    """Ten times what a stretch holds goes through."""
    n_rows, size = 4_000, 200_000
    generator = np.random.default_rng(0)
    rows = random_rows(generator, n_rows, 600, (np.uint16, np.uint16))
    runs = spill(tmp_path, rows, generator.permutation(n_rows), generator)
    assert runs.nnz > 9 * size
    del rows
    next(runs.stretches(size, ("<u2", "<u2"))).gather()  # compiles the kernel
    tracemalloc.start()
    try:
        total = sum(len(s.gather()[1]) for s in runs.stretches(size, ("<u2", "<u2")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == runs.nnz
    assert peak < 2.5 * 4 * size + 60 * n_rows + (64 << 10)


def test_a_run_is_believed_only_if_it_is_what_was_written(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(0), 30, 20, (np.uint16, np.uint16))

    def take(order: np.ndarray) -> Any:
        return rows[order].indptr.astype(np.int64), rows[order].indices, rows[order].data

    genes = np.arange(60_000, dtype=np.int32)
    written = write_run(tmp_path, 12, np.arange(30)[::-1].copy(), take, genes)
    path = tmp_path / written.run.name
    assert path.stat().st_size == written.run.size
    found = read_run(tmp_path, written.run)
    assert found is not None
    np.testing.assert_array_equal(found.lengths, written.lengths)
    np.testing.assert_array_equal(found.hashes, written.hashes)
    assert len(np.unique(found.hashes)) > 20
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"x", content[:50] + b"\1" + content[51:], b""):
        path.write_bytes(damaged)
        assert read_run(tmp_path, written.run) is None
    path.unlink()
    assert read_run(tmp_path, written.run) is None


def test_a_full_disk_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    generator = np.random.default_rng(0)
    rows = random_rows(generator, 100, 20, (np.uint16, np.uint16))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        spill(tmp_path, rows, np.arange(100), generator)


def test_a_shortened_run_is_noticed(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = random_rows(generator, 100, 20, (np.uint16, np.uint16))
    runs = spill(tmp_path, rows, np.arange(100), generator)
    for path in tmp_path.iterdir():
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OSError, match="cut short"):
        joined(runs, 10**6, ("<u2", "<u2"))


@pytest.mark.parametrize("destination", [[0, 0], [0, 2], [-1, 0]])
def test_destinations_must_be_a_permutation(tmp_path: Path, destination: list[int]) -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        Runs(tmp_path, np.array(destination))


def test_all_rows_must_be_there(tmp_path: Path) -> None:
    runs = Runs(tmp_path, np.arange(2))
    with pytest.raises(ValueError, match="0 rows of the 2 expected"):
        list(_sizes(runs))
    empty = Runs(tmp_path, np.zeros(0, np.int64))
    assert list(_sizes(empty)) == []


def _sizes(runs: Runs) -> Iterator[int]:
    return (stretch.size for stretch in runs.stretches(10, ("<u2", "<u2")))
