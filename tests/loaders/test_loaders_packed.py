"""Records hold the same rows in fewer bytes, through the loader as well."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders_helpers import counts
from scipy.sparse import csr_matrix

from loaders import ArraySource, LoaderError, MinibatchLoader, RowBlock, SequentialLoader
from loaders.packed import PackedBlock, is_packed, packed
from loaders.selection import rows_of
from loaders.source import as_ranges

NUMBERS = st.one_of(st.integers(1, 5), st.integers(250, 260), st.integers(1, 2**16 - 1))
ROW = st.dictionaries(NUMBERS.map(lambda n: n - 1), NUMBERS, max_size=30)


def block_of(rows: list[list[tuple[int, int]]]) -> RowBlock:
    """A narrow block of rows, each a list of columns and counts."""
    flat = [pair for row in rows for pair in row]
    return RowBlock(
        np.cumsum([0, *map(len, rows)]),
        np.array([column for column, _ in flat], np.uint16),
        np.array([count for _, count in flat], np.uint16),
    )


def same(a: RowBlock, b: RowBlock) -> None:
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype


def pack(block: RowBlock) -> PackedBlock:
    return packed(block.indptr, block.indices, block.data)


@settings(max_examples=300, deadline=None)
@given(st.lists(ROW, max_size=6), st.booleans(), st.data())
def test_what_is_packed_comes_back(rows, rising, data):
    block = block_of([sorted(row.items(), reverse=not rising) for row in rows])
    records = pack(block)
    same(records.unpacked(), block)
    assert (np.diff(records.offsets) <= 4 * np.diff(block.indptr)).all()
    if rows:
        chosen = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1))), np.int64)
        same(records.take(chosen).unpacked(), block.take(chosen))


def test_a_record_byte_by_byte():
    row = pack(block_of([[(3, 1), (7, 300), (520, 9), (521, 2), (522, 1)]]))
    steps, low = [3, 4, 513 - 2 * 256, 1, 1], [1, 300 - 256, 9, 2, 1]
    assert row.records.tolist() == [*steps, *low, 2, 2, 0, 0, 1, 6, 0, 0]
    falling = pack(block_of([[(9, 1), (4, 2)]]))
    assert falling.records.tolist() == [9, 0, 4, 0, 1, 0, 2, 0]
    large = pack(block_of([[(256, 256)]]))
    assert large.records.tolist() == [0, 1, 0, 1]


class Packed(ArraySource):
    """Gives packed rows to the loader, after a change where one is given."""

    change = staticmethod(lambda block: block)

    def read_packed(self, starts, stops) -> PackedBlock:
        block = self.read_rows(*as_ranges(starts, stops))
        return self.change(packed(block.indptr, block.indices, block.data))


def matrix(n_obs: int = 500) -> csr_matrix:
    """Counts of which some need two bytes, and columns far apart."""
    rng = np.random.default_rng(1)
    spread = csr_matrix((n_obs, 3_000), dtype=np.float32).tolil()
    spread[:, np.sort(rng.choice(3_000, 40, replace=False))] = counts(n_obs)
    spread = spread.tocsr()
    spread.data[rng.random(spread.nnz) < 0.1] += 700
    return spread


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"rows": np.arange(500) % 7 == 0},
        {"weights": 1.0 + np.arange(500) % 9},
        {"weights": np.where(np.arange(500) == 3, 90.0, 1.0)},
    ],
)
def test_a_loader_gives_the_same_minibatches(choice, narrow):
    segments = (0, 37, 38, 260, 500)
    plain, dense = (kind(matrix(), {}, segments, narrow=True) for kind in (ArraySource, Packed))
    options = {"minibatch_size": 16, "block_size": 32, "buffer_size": 256, "narrow": narrow}
    pairs = zip(
        MinibatchLoader(plain, **options, **choice),
        MinibatchLoader(dense, **options, **choice),
        strict=True,
    )
    for a, b in pairs:
        for name in ("rows", "indptr", "indices", "data"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            assert getattr(a, name).dtype == getattr(b, name).dtype
    if "weights" not in choice:
        in_order = (SequentialLoader(source, 50, **choice) for source in (plain, dense))
        for a, b in zip(*in_order, strict=True):
            assert (a.to_scipy() != b.to_scipy()).nnz == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: PackedBlock(b.indptr, b.offsets.astype(np.int32), b.records), "another type"),
        (lambda b: PackedBlock(b.indptr, b.offsets, b.records.astype(np.uint16)), "another type"),
        (lambda b: PackedBlock(b.indptr, b.offsets, b.records[:-1]), "do not fit"),
        (lambda b: PackedBlock(b.indptr, b.offsets[:-1], b.records), "do not fit"),
        (lambda b: PackedBlock(b.indptr[:-1], b.offsets, b.records), "do not fit"),
        (lambda b: PackedBlock(b.indptr + 1, b.offsets, b.records), "do not fit"),
        (lambda b: PackedBlock(b.indptr * 2, b.offsets, b.records), "do not fit"),
        (lambda b: PackedBlock(b.indptr // 4, b.offsets, b.records), "do not fit"),
        (lambda b: PackedBlock(b.indptr, b.offsets[::-1].copy(), b.records), "do not fit"),
        (lambda b: PackedBlock(b.indptr, b.offsets, b.records | 128), "do not fit"),
        (lambda b: b.unpacked().widened(), "another type"),
    ],
)
def test_records_that_break_their_promise_are_refused(change, message):
    source = Packed(matrix(), narrow=True)
    source.change = change
    with pytest.raises(LoaderError, match=message):
        list(MinibatchLoader(source, 10))


SIX = [3] * 6 + [7] * 6
"""Record of six values, columns 3 to 18."""


@pytest.mark.parametrize(
    ("indptr", "record"),
    [
        ([0, 6], [*SIX, 255, 1, 0, 0, 1, 2, 0, 0]),  # columns of 65,536 and above
        ([0, 6], [*SIX, 1, 2, 0, 0, 1, 2, 0, 0]),  # two patches for one place
        ([0, 6], [*SIX, 1, 3, 0, 0, 1, 2, 0, 0]),  # in another order
        ([0, 6], [*SIX, 1, 12, 0, 0]),  # of a place that is not there
        ([0, 2**62, -(2**63), -(2**62), 0], []),  # four times these are 0 in 64 bits
    ],
)
def test_a_record_that_does_not_follow_the_format_is_told(indptr, record):
    offsets = np.zeros(len(indptr), np.int64)
    offsets[1:] = len(record)
    block = PackedBlock(np.array(indptr, np.int64), offsets, np.array(record, np.uint8))
    with pytest.raises(LoaderError, match="no records"):
        block.unpacked()
    right = np.array([*SIX, 255, 1, 0, 0], np.uint8)
    assert is_packed(PackedBlock(np.array([0, 6]), np.array([0, 16]), right))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("n_vars", [30, 2**16 + 10])
def test_a_column_that_two_bytes_do_not_hold_is_told_with_its_row_and_minibatch(narrow, n_vars):
    class Source(ArraySource):
        def read_packed(self, starts, stops):
            wrong = [255, 1, 0, 0, 1, 2, 0, 0]
            rows = rows_of(starts, stops)
            records = [[*SIX, *(wrong if row == 317 else [])] for row in rows.tolist()]
            ends = np.cumsum([0, *map(len, records)])
            indptr = 6 * np.arange(len(records) + 1)
            return PackedBlock(indptr, ends, np.array([n for r in records for n in r], np.uint8))

    Source.n_vars = n_vars
    source = Source(csr_matrix((500, 30), dtype=np.float32), {}, narrow=True)
    loader = MinibatchLoader(source, 5, narrow=narrow, block_size=32, buffer_size=256)
    concerned = next(i for i, rows in enumerate(loader.plan.minibatches()) if 317 in rows)
    with pytest.raises(LoaderError, match=r"(?s)column out of range for row 317\b"):
        list(loader)
    assert loader.step == concerned
    assert concerned > 0


def test_records_up_to_the_last_column_are_right():
    block = block_of([[(65_534, 7), (65_535, 65_535)]])
    assert is_packed(pack(block))
    same(pack(block).unpacked(), block)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_source_without_columns_gives_empty_rows(narrow):
    source = ArraySource(np.zeros((10, 0)), {}, narrow=True)
    for loader in (MinibatchLoader(source, 5, narrow=narrow), SequentialLoader(source, 5)):
        assert [m.to_scipy().shape for m in loader] == [(5, 0), (5, 0)]


def test_columns_out_of_range_are_refused():
    source = Packed(counts(500), narrow=True)
    source.change = lambda b: PackedBlock(b.indptr, b.offsets, b.records | 64)
    with pytest.raises(LoaderError, match=r"(?s)column out of range for row.*expected: 0 to 39"):
        list(MinibatchLoader(source, 10))
