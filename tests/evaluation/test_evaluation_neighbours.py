"""Exact neighbours, against brute force in float64 and across backends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.errors import ConfigError, ModelError
from atlas.evaluation import exact, neighbours
from atlas.evaluation.frame import Frame
from atlas.evaluation.neighbours import Backend, Neighbours, nearest, recall_of

BACKENDS: list[Backend] = ["faiss", "torch"]


def brute_force(
    database: npt.NDArray[np.float32],
    queries: npt.NDArray[np.float32],
    k: int,
    ids: npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    difference = queries[:, None, :].astype(np.float64) - database[None].astype(np.float64)
    squared = (difference**2).sum(-1)
    for query, own in enumerate([] if ids is None else ids):
        if own >= 0:
            squared[query, own] = np.inf
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return order, np.sqrt(np.take_along_axis(squared, order, axis=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("d", [1, 2, 10, 64])
def test_equals_brute_force_in_float64(backend: Backend, offset: float, d: int) -> None:
    rng = np.random.default_rng(d)
    database = (rng.standard_normal((1500, d)) + offset).astype(np.float32)
    ids = rng.permutation(1500)[:60]
    found = nearest(database, database[ids], 25, ids, backend=backend)
    indices, distances = brute_force(database, database[ids], 25, ids)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-6)
    assert found.indices.dtype == np.int64
    np.testing.assert_array_equal(found.distances, distances.astype(np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_duplicates_are_ordered_by_row(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    grid = rng.integers(0, 3, size=(2000, 2)).astype(np.float32)  # nine places, 2,000 cells
    ids = np.arange(0, 2000, 7)
    found = nearest(grid, grid[ids], 30, ids, backend=backend)
    np.testing.assert_array_equal(found.indices, brute_force(grid, grid[ids], 30, ids)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_self_is_left_out_by_id_and_a_twin_is_not(backend: Backend) -> None:
    database = np.random.default_rng(1).standard_normal((50, 3)).astype(np.float32)
    database[7] = database[3]
    found = nearest(database, database[[3, 7, 3]], 1, np.array([3, 7, -1]), backend=backend)
    assert found.indices.tolist() == [[7], [3], [3]]
    assert found.distances.tolist() == [[0.0], [0.0], [0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outlier_and_a_constant_embedding(backend: Backend) -> None:
    rng = np.random.default_rng(2)
    database = rng.standard_normal((400, 5)).astype(np.float32)
    database[0] = 1e9
    found = nearest(database, database, 5, np.arange(400), backend=backend)
    np.testing.assert_array_equal(
        found.indices, brute_force(database, database, 5, np.arange(400))[0]
    )
    same = np.full((100, 4), 2.5, dtype=np.float32)
    found = nearest(same, same[:2], 3, np.arange(2), backend=backend)
    assert found.indices.tolist() == [[1, 2, 3], [0, 2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_the_others_can_be_asked_for(backend: Backend) -> None:
    database = np.random.default_rng(3).standard_normal((12, 2)).astype(np.float32)
    found = nearest(database, database, 11, np.arange(12), backend=backend)
    np.testing.assert_array_equal(
        found.indices, brute_force(database, database, 11, np.arange(12))[0]
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 120),
    d=st.integers(1, 6),
    places=st.integers(1, 5),
    offset=st.sampled_from([0.0, 7.0, -3e4]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_backends_agree_exactly(
    n: int, d: int, places: int, offset: float, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    database = (rng.integers(0, places, size=(n, d)) * 0.1 + offset).astype(np.float32)
    k = data.draw(st.integers(1, n - 1))
    ids = np.arange(n)
    ours = nearest(database, database, k, ids, backend="faiss")
    theirs = nearest(database, database, k, ids, backend="torch")
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    np.testing.assert_array_equal(ours.distances, theirs.distances)
    np.testing.assert_array_equal(ours.indices, brute_force(database, database, k, ids)[0])


def test_torch_tiles_cover_a_database_larger_than_one_tile() -> None:
    rng = np.random.default_rng(4)
    database = rng.standard_normal((40_000, 4)).astype(np.float32)
    queries = rng.standard_normal((20, 4)).astype(np.float32)
    found = nearest(database, queries, 10, backend="torch")
    np.testing.assert_array_equal(found.indices, brute_force(database, queries, 10)[0])


def test_torch_searches_in_full_precision_and_restores_the_setting() -> None:
    rng = np.random.default_rng(5)
    database = rng.standard_normal((2000, 8)).astype(np.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = nearest(database, database[:50], 10, backend="torch")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(found.indices, brute_force(database, database[:50], 10)[0])


def test_falls_back_to_torch_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "import_faiss", lambda: None)
    database = np.random.default_rng(6).standard_normal((30, 2)).astype(np.float32)
    assert nearest(database, database, 3).backend.startswith("torch")
    with pytest.raises(ConfigError, match="FAISS is asked for and not installed"):
        nearest(database, database, 3, backend="faiss")


def test_the_backend_is_stated_and_the_first_neighbours_can_be_taken() -> None:
    database = np.random.default_rng(7).standard_normal((30, 2)).astype(np.float32)
    found = nearest(database, database, 9, np.arange(30))
    assert found.backend.startswith("faiss flat")
    fewer = nearest(database, database, 4, np.arange(30))
    np.testing.assert_array_equal(found.first(4).indices, fewer.indices)
    with pytest.raises(ConfigError, match="1 to the 9 neighbours searched"):
        found.first(10)


@pytest.mark.parametrize("k", [0, 10])
def test_k_out_of_range_is_refused(k: int) -> None:
    database = np.zeros((10, 2), dtype=np.float32)
    with pytest.raises(ConfigError, match="1 to 9, the cells that can be a neighbour"):
        nearest(database, database, k, np.arange(10))


def test_values_that_are_not_finite_are_refused() -> None:
    database = np.zeros((10, 2), dtype=np.float32)
    database[3, 1] = np.nan
    database[4, 0] = np.inf
    with pytest.raises(ModelError, match=r"not finite.*\n.*2 of 20 values"):
        nearest(database, np.zeros((1, 2), dtype=np.float32), 2)


def test_shapes_and_ids_that_do_not_fit_are_refused() -> None:
    database = np.zeros((10, 2), dtype=np.float32)
    with pytest.raises(ConfigError, match="do not lie in one space"):
        nearest(database, np.zeros((1, 3), dtype=np.float32), 2)
    with pytest.raises(ConfigError, match="query_ids do not name rows"):
        nearest(database, database, 2, np.arange(1, 11))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_mapped_database_is_read_as_it_is(backend: Backend, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    values = (rng.standard_normal((3000, 5)) + 40).astype(np.float32)
    np.save(tmp_path / "z.npy", values)
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    ids = rng.permutation(3000)[:40]
    ours = nearest(mapped, mapped[ids], 20, ids, backend=backend)
    np.testing.assert_array_equal(ours.indices, brute_force(values, values[ids], 20, ids)[0])


@pytest.mark.parametrize("kernel", ["faiss", "torch"])
@pytest.mark.parametrize("n_devices", [1, 3, 9])
def test_tiles_are_merged(
    kernel: exact.Kernel, n_devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as over several GPUs, of which there is none here: each searches tiles of its own
    monkeypatch.setattr(exact, "_devices", lambda kernel, device: ["cpu"] * n_devices)
    monkeypatch.setitem(exact._TILE_ROWS, (kernel, "cpu"), 300)
    monkeypatch.setattr(exact, "_QUERY_BLOCK", 17)
    rng = np.random.default_rng(9)
    database = rng.standard_normal((1000, 3)).astype(np.float32)
    ids = np.arange(50)
    indices, squared = exact.search_exactly(
        database, database[:50], 30, ids, frame=Frame(np.zeros(3)), kernel=kernel, device="cpu"
    )
    rows, distances = brute_force(database, database[:50], 30, ids)
    np.testing.assert_array_equal(indices, rows)
    np.testing.assert_allclose(np.sqrt(squared), distances, rtol=1e-12)


def test_recall_counts_rows_as_near_as_the_true_ones() -> None:
    distances = np.array([[1, 2, 2, 5]], dtype=np.float32)
    exact_ones = Neighbours(np.arange(4)[None], np.array([[1, 2, 2, 2]], dtype=np.float32), "x")
    assert recall_of(Neighbours(np.arange(4)[None] + 3, distances, "x"), exact_ones).value == 0.75
