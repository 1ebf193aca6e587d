"""No unit of an embedding breaks search and votes: powers of two, beside brute force in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas.errors import ConfigError, ModelError
from atlas.evaluation.calibration import leave_out
from atlas.evaluation.codes import Categories
from atlas.evaluation.exact import import_faiss
from atlas.evaluation.frame import Frame
from atlas.evaluation.index import Kind, NeighborIndex
from atlas.evaluation.index.among import Among
from atlas.evaluation.index.arrays import ListArrays
from atlas.evaluation.kernels import kernel_weights
from atlas.evaluation.knn_labels import Answer, KnnLabels
from atlas.evaluation.labels import label_accuracy
from atlas.evaluation.neighbours import Backend, distances_of, nearest
from atlas.models import LabelTree

TREE = LabelTree.make(
    ["B", "CD4", "CD8", "Mono"],
    {"B": "lymphoid", "T": "lymphoid", "CD4": "T", "CD8": "T", "Mono": "myeloid"},
)
N, K = 900, 12
POWERS = (-128, -126, -110, -96, -80, -63, -33, -32, 31, 32, 59, 60, 64, 96, 123)
BACKENDS: list[Backend] = ["torch", *(["faiss"] if import_faiss() else [])]
KINDS: list[Kind] = ["exact", *(["flat", "ivf", "hnsw", "disk"] if import_faiss() else [])]


def cells(seed: int, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Cells of four types: multiples of 2^-12 below 2^5, which have all powers in ``POWERS``."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])
    centres = np.random.default_rng(99).standard_normal((4, 5)) * 1.5
    z = centres[codes] + rng.standard_normal((n, 5))
    return (np.round(z * 2**12) / 2**12).astype(np.float32), np.array(TREE.leaves)[codes]


Z, NODES = cells(0)
QUERIES, _ = cells(1, 100)
GROUPS = Categories(np.arange(N) % 3, ("a", "b", "c"))


def times(values: np.ndarray, power: int) -> np.ndarray:
    out = np.ldexp(values, power)
    assert out.dtype == np.float32
    assert np.array_equal(np.ldexp(out.astype(np.float64), -power), values)  # none is rounded
    return out


def brute(z: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest rows, and distances, of values that float64 holds the squares of."""
    squared = ((queries[:, None].astype(np.float64) - z.astype(np.float64)) ** 2).sum(axis=-1)
    near = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return near, np.sqrt(np.take_along_axis(squared, near, axis=1))


def by_backend(backend: Backend) -> Callable[[np.ndarray, np.ndarray], Answer]:
    return lambda z, queries: KnnLabels(z, NODES, TREE, k=K, backend=backend).ask(queries)


def by_index(kind: Kind, among: bool) -> Callable[[np.ndarray, np.ndarray], Answer]:
    def ask(z: np.ndarray, queries: np.ndarray) -> Answer:
        index = NeighborIndex.build(z, kind=kind, device="cpu")
        assert index.recall(K).value > 0.95
        rows = np.arange(N if not among else N // 2, dtype=np.int64)
        search = Among(index, rows).search if among else index.search
        return KnnLabels(z[rows], NODES[rows], TREE, k=K, search=search).ask(queries)

    return ask


ASKED = {
    **{f"nearest, {name}": by_backend(name) for name in BACKENDS},
    **{kind: by_index(kind, False) for kind in KINDS},
    **{f"among, {kind}": by_index(kind, True) for kind in KINDS},
}
AT_ONE = {name: ask(Z, QUERIES) for name, ask in ASKED.items()}


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_and_distances_are_those_of_brute_force(backend: Backend, power: int) -> None:
    found = nearest(times(Z, power), times(QUERIES, power), K, backend=backend)
    near, distances = brute(Z, QUERIES, K)
    np.testing.assert_array_equal(found.indices, near)
    # with the digits of float32
    np.testing.assert_array_equal(
        found.distances, np.ldexp(distances.astype(np.float32).astype(np.float64), power)
    )
    weights = np.exp(-(distances**2) / (2 * (distances**2).mean(axis=1, keepdims=True)))
    np.testing.assert_allclose(
        kernel_weights(found.distances), weights / weights.sum(axis=1, keepdims=True), rtol=1e-6
    )


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", ASKED)
def test_votes_and_probabilities_are_the_same_bits_in_any_unit(name: str, power: int) -> None:
    found = ASKED[name](times(Z, power), times(QUERIES, power))
    expected = AT_ONE[name]
    for field in ("path", "probability", "leaves", "label", "uncertainty"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    np.testing.assert_allclose(found.distance, expected.distance, atol=1e-9)
    assert (expected.uncertainty > 0.2).any()


@pytest.mark.parametrize("power", [-126, -80, 60, 123])
def test_calibration_is_the_same_in_any_unit(power: int) -> None:
    one, other = (leave_out(z, NODES, GROUPS, TREE, k=K) for z in (Z, times(Z, power)))
    np.testing.assert_array_equal(one.answer.leaves, other.answer.leaves)
    np.testing.assert_array_equal(one.set_rule(0.9, True).most, other.set_rule(0.9, True).most)
    a, b = one.unknown_rule(0.1), other.unknown_rule(0.1)
    assert a.uncertainty_above == b.uncertainty_above
    assert a.distance_above == pytest.approx(b.distance_above, abs=1e-9)


@pytest.mark.parametrize("power", [-126, -80, 60])
def test_the_plain_vote_is_the_same_in_any_unit(power: int) -> None:
    labels = Categories(np.searchsorted(TREE.leaves, NODES), ("B", "CD4", "CD8", "Mono"))
    one, other = (label_accuracy(z, labels, k=K) for z in (Z, times(Z, power)))
    np.testing.assert_array_equal(one.predicted, other.predicted)


@pytest.mark.parametrize("power", [-149, -140, -100, -60])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_close_crowd_within_an_embedding_of_ordinary_scale(backend: Backend, power: int) -> None:
    """Its squares underflow in a float32 search, and at last its distances as float32 too."""
    z = np.concatenate([Z, np.round(Z * 2**6)]).astype(np.float32)
    z[N:] = np.ldexp(z[N:], power)
    queries = np.ldexp(np.round(QUERIES * 2**6), power).astype(np.float32)
    z = np.concatenate([z, -z])  # so that the centre is in the crowd
    found = nearest(z, queries, K, backend=backend)
    near, distances = brute(z, queries, K)
    np.testing.assert_array_equal(found.indices, near)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-7)
    weights = np.exp(-0.5 * distances**2 / (distances**2).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(
        kernel_weights(found.distances), weights / weights.sum(axis=1, keepdims=True), rtol=1e-6
    )


@pytest.mark.parametrize("kind", [*BACKENDS, *KINDS])
@pytest.mark.parametrize("far", [2.0**-80, 1.0, 2.0**40, 2.0**60, 2.0**120])
def test_queries_of_another_scale_than_the_reference(kind: Any, far: float) -> None:
    z = times(Z, -100)
    queries = (QUERIES * np.float32(far)).astype(np.float32)
    queries[:50] = times(QUERIES[:50], -100)
    if kind in ("torch", "faiss"):
        found = nearest(z, queries, K, backend=kind)
    else:
        found = NeighborIndex.build(z, kind=kind, device="cpu").search(queries, K)
    near, distances = brute(z, queries, K)
    right = (found.distances <= distances[:, -1:] * (1 + 1e-6)).mean(axis=1)
    if kind in ("ivf", "hnsw", "disk"):
        assert right[:50].mean() > 0.95
        if far >= 2.0**-40:  # exactly, as there all rows are at one place for the lists
            np.testing.assert_array_equal(found.indices[50:], near[50:])
    else:
        np.testing.assert_array_equal(found.indices, near)
    np.testing.assert_allclose(found.distances[:50], distances[:50], rtol=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_finite_values_are_searched(backend: Backend) -> None:
    most = np.finfo(np.float32).max
    z = np.array([[most, -most], [-most, most], [0, 0], [most, most]], np.float32)
    found = nearest(z, z, 3, np.arange(4), backend=backend)
    near, distances = brute(z, z, 4)
    np.testing.assert_array_equal(found.indices, near[:, 1:])
    np.testing.assert_allclose(found.distances, distances[:, 1:], rtol=1e-6)
    for bad in (np.inf, np.nan):
        z[1, 0] = bad
        with pytest.raises(ModelError, match=r"not finite.*\n  found: 1 of 8 values.* row 1\n"):
            nearest(z, z, 3, backend=backend)


def test_distances_have_the_digits_of_float32_and_the_range_of_float64() -> None:
    exact = np.random.default_rng(0).gamma(2.0, 1.0, (50, 7))
    ordinary = distances_of(exact**2)
    np.testing.assert_array_equal(ordinary, np.sqrt(exact**2).astype(np.float32))
    for power in (-170, -149, 140):
        scaled = distances_of(np.ldexp(exact**2, 2 * power))
        np.testing.assert_array_equal(scaled, np.ldexp(ordinary, power))
    assert distances_of(np.zeros((1, 2))).tolist() == [[0, 0]]


@pytest.mark.parametrize("reach", [2.0**-149, 2.0**-97, 2.0**-33, 0.99, 5e8, 1e18, 2.0**127])
def test_the_farthest_coordinate_is_of_ordinary_size_in_the_frame(reach: float) -> None:
    rows = np.array([[0, 0], [reach, 0], [-reach, 0]], np.float32)
    frame = Frame.of(rows)
    assert 2.0**-32 <= np.abs(frame.points(rows)).max() < 2.0**32
    assert frame.exponent % 64 == 0
    assert (frame.exponent == 0) == (2.0**-32 <= reach < 2.0**32)
    # as of all rows at once, whichever came first
    first = Frame.of(rows[:1], frame.centre)
    assert first.with_rows(rows[1:]).exponent == frame.exponent
    assert frame.with_rows(rows[:1]).exponent == frame.exponent


@pytest.mark.skipif(import_faiss() is None, reason="an approximate index needs FAISS")
def test_an_index_of_an_odd_scale_is_kept_and_shared(tmp_path: Path) -> None:
    z = times(Z, -100)
    index = NeighborIndex.build(z, kind="ivf", device="cpu")
    expected = index.search(times(QUERIES, -100), K)
    index.save(tmp_path / "index")
    loaded = NeighborIndex.load(tmp_path / "index", embedding=z)
    arrays = ListArrays.of(index)
    assert arrays is not None
    for other in (loaded, arrays.index(z, device="cpu")):
        found = other.search(times(QUERIES, -100), K)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.distances, expected.distances)
    with pytest.raises(ConfigError, match="arrays of the index are not those of an index of this"):
        arrays.check(Z)
    # one that was kept before there was an exponent has none
    about = tmp_path / "index" / "index.json"
    values = json.loads(about.read_text())
    assert values.pop("exponent") == -128
    about.write_text(json.dumps(values))
    assert NeighborIndex.load(tmp_path / "index")._frame.exponent == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "disk"])  # takes no more rows
def test_rows_of_another_scale_can_be_added(kind: Kind) -> None:
    small, large = times(Z[:400], -100), times(Z[400:], 90)
    index = NeighborIndex(5, kind=kind, device="cpu")
    index.add(small)
    near = brute(small, times(QUERIES, -100), 1)[0]
    assert (index.search(times(QUERIES, -100), 1).indices == near).mean() > 0.95
    index.add(large)
    assert len(index) == N
    queries = times(QUERIES, 90)
    found = index.search(queries, K)
    farthest = brute(large, queries, K)[1][:, -1:]
    assert (found.distances <= farthest * (1 + 1e-6)).mean() > 0.95
    if (arrays := ListArrays.of(index) if kind == "ivf" else None) is not None:
        same = arrays.index(index.vectors, device="cpu").search(queries, K)
        np.testing.assert_array_equal(same.indices, found.indices)


def test_digits_that_float32_has_lost_are_refused() -> None:
    """Multiples of the least float32 tell cells apart no more, and so it is said."""
    lost = np.ldexp(Z, -140)
    assert len(np.unique(lost)) < len(np.unique(Z)) / 1.5
    found = r"found: values at most \S+e-4[12] apart\n  expected: .* 1\.18e-38 apart .*\n .*unit"
    with pytest.raises(ModelError, match=rf"small that float32 has lost their digits\n  {found}"):
        KnnLabels(lost, NODES, TREE, k=K)
    one = np.tile(Z[:1], (30, 1))
    with pytest.raises(ModelError, match=r"all cells at one place.*\n  found: 30 equal rows\n"):
        KnnLabels(one, NODES[:30], TREE, k=K)
