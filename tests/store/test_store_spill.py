"""The out-of-core row sorter, against NumPy's and scipy's indexing."""

from __future__ import annotations

import builtins
import errno
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.store.spill import RowSorter


def random_rows(
    generator: np.random.Generator, n_rows: int, mean: int, types: tuple[Any, Any]
) -> sp.csr_matrix:
    lengths = generator.poisson(mean, n_rows)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = generator.integers(0, 60_000, indptr[-1]).astype(types[0])
    data = generator.integers(1, 60_000, indptr[-1]).astype(types[1])
    matrix = sp.csr_matrix((n_rows, 60_000), dtype=types[1])
    matrix.indptr, matrix.indices, matrix.data = indptr, indices, data
    return matrix


def feed(sorter: RowSorter, rows: Any, generator: np.random.Generator) -> None:
    start = 0
    while start < rows.shape[0]:
        stop = min(rows.shape[0], start + int(generator.integers(1, 40)))
        first, last = rows.indptr[start], rows.indptr[stop]
        sorter.append(
            rows.indptr[start : stop + 1] - first, rows.indices[first:last], rows.data[first:last]
        )
        start = stop


def expected_rows(rows: Any, destination: np.ndarray) -> Iterator[tuple[list[int], list[int]]]:
    for source in np.argsort(destination):
        inside = slice(rows.indptr[source], rows.indptr[source + 1])
        yield rows.indices[inside].tolist(), rows.data[inside].tolist()


def sorted_rows(sorter: RowSorter) -> Iterator[tuple[list[int], list[int]]]:
    for block in sorter.sorted_blocks():
        assert block.indptr[0] == 0
        assert len(block.indices) == len(block.data) == block.indptr[-1]
        for row in range(block.n_rows):
            inside = slice(block.indptr[row], block.indptr[row + 1])
            yield block.indices[inside].tolist(), block.data[inside].tolist()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_rows=st.integers(1, 300),
    mean=st.integers(0, 30),
    memory=st.sampled_from([1, 64, 500, 5_000, 10**6]),
    types=st.sampled_from([(np.int32, np.uint32), (np.uint16, np.uint16), (np.int32, np.float32)]),
)
def test_rows_come_in_the_order_of_their_destination(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    n_rows: int,
    mean: int,
    memory: int,
    types: tuple[Any, Any],
) -> None:
    folder = tmp_path_factory.mktemp("spill")
    generator = np.random.default_rng(seed)
    rows = random_rows(generator, n_rows, mean, types)
    destination = generator.permutation(n_rows)
    with RowSorter(destination, folder, memory) as sorter:
        feed(sorter, rows, generator)
        assert list(sorted_rows(sorter)) == list(expected_rows(rows, destination))
    assert list(folder.iterdir()) == []


def test_types_are_kept(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(0), 50, 20, (np.uint16, np.uint32))
    with RowSorter(np.arange(50)[::-1], tmp_path, 1_000) as sorter:
        feed(sorter, rows, np.random.default_rng(1))
        blocks = list(sorter.sorted_blocks())
    assert len(blocks) > 1
    assert {(b.indices.dtype, b.data.dtype) for b in blocks} == {
        (np.dtype(np.uint16), np.dtype(np.uint32))
    }


def test_what_fits_in_memory_touches_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a file was opened")

    rows = random_rows(np.random.default_rng(0), 100, 20, (np.int32, np.uint32))
    destination = np.random.default_rng(1).permutation(100)
    monkeypatch.setattr(builtins, "open", refuse)
    with RowSorter(destination, tmp_path, 10**6) as sorter:
        feed(sorter, rows, np.random.default_rng(2))
        result = list(sorted_rows(sorter))
    assert result == list(expected_rows(rows, destination))


def test_no_rows_give_no_blocks(tmp_path: Path) -> None:
    with RowSorter(np.zeros(0, np.int64), tmp_path) as sorter:
        assert list(sorter.sorted_blocks()) == []


@pytest.mark.parametrize("skew", [False, True])
def test_memory_stays_in_the_budget(tmp_path: Path, skew: bool) -> None:
    """Twelve times the budget goes through; with skew, the first rows are tiny, the last huge."""
    n_rows, budget = 4_000, 2 << 20
    generator = np.random.default_rng(0)
    lengths = np.full(n_rows, 760)
    if skew:
        lengths = np.concatenate([np.full(n_rows // 2, 20), np.full(n_rows // 2, 1_500)])
    entries = np.arange(lengths.max(), dtype=np.int32)
    destination = generator.permutation(n_rows)
    with RowSorter(np.arange(8)[::-1], tmp_path, 16) as sorter:  # compiles the kernel
        for _ in range(8):
            sorter.append(np.array([0, 20]), entries[:20], entries[:20].view(np.uint32))
        assert len(list(sorter.sorted_blocks())) == 8

    tracemalloc.start()
    try:
        with RowSorter(destination, tmp_path, budget) as sorter:
            for length in lengths.tolist():
                part = entries[:length]
                sorter.append(np.array([0, length]), part, part.view(np.uint32))
            assert sum(p.stat().st_size for p in tmp_path.iterdir()) > 10 * budget
            total = sum(len(block.data) for block in sorter.sorted_blocks())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == lengths.sum()
    assert peak < budget + 60 * n_rows + (64 << 10)


def test_files_are_removed_after_an_error(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(0), 100, 20, (np.int32, np.uint32))

    def fail() -> None:
        with RowSorter(np.arange(100), tmp_path, 500) as sorter:
            feed(sorter, rows, np.random.default_rng(2))
            next(sorter.sorted_blocks())
            assert len(list(tmp_path.iterdir())) == 2
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_passed_on_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(np.random.default_rng(0), 100, 20, (np.int32, np.uint32))
    real = builtins.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

    monkeypatch.setattr(builtins, "open", lambda *args, **kwargs: Full(real(*args, **kwargs)))
    with (
        pytest.raises(OSError, match="No space left"),
        RowSorter(np.arange(100), tmp_path, 500) as sorter,
    ):
        feed(sorter, rows, np.random.default_rng(2))
    assert list(tmp_path.iterdir()) == []


def test_a_shortened_file_is_noticed(tmp_path: Path) -> None:
    rows = random_rows(np.random.default_rng(0), 100, 20, (np.int32, np.uint32))
    with RowSorter(np.arange(100), tmp_path, 500) as sorter:
        feed(sorter, rows, np.random.default_rng(2))
        blocks = sorter.sorted_blocks()
        next(blocks)
        for path in tmp_path.iterdir():
            with path.open("r+b") as file:
                file.truncate(100)
        with pytest.raises(OSError, match="cut short"):
            list(blocks)


@pytest.mark.parametrize("destination", [[0, 0], [0, 2], [-1, 0]])
def test_destinations_must_be_a_permutation(tmp_path: Path, destination: list[int]) -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        RowSorter(np.array(destination), tmp_path)


def test_rows_must_match_the_destinations(tmp_path: Path) -> None:
    one = (np.array([0, 1]), np.zeros(1, np.int32), np.ones(1, np.uint32))
    with RowSorter(np.arange(2), tmp_path) as sorter:
        sorter.append(*one)
        with pytest.raises(ValueError, match="1 rows of the 2 expected"):
            next(sorter.sorted_blocks())
        with pytest.raises(ValueError, match="after rows of types"):
            sorter.append(one[0], one[1], one[2].astype(np.float32))
        sorter.append(*one)
        with pytest.raises(ValueError, match="more than the 2 rows"):
            sorter.append(*one)
