"""The index of neighbours, against brute force in float64, by parts, saved and mapped."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from atlas.errors import ConfigError, CorruptStoreError, FormatError, ModelError, OutputError
from atlas.evaluation.index import Kind, NeighborIndex, choose, lists
from atlas.evaluation.index.choice import Hardware
from atlas.evaluation.vectors import digest

KINDS: list[Kind] = ["exact", "flat", "ivf", "hnsw", "disk"]
APPROXIMATE: list[Kind] = ["ivf", "hnsw", "disk"]


def embedding(n: int = 3000, d: int = 6, seed: int = 0, offset: float = 500.0) -> Any:
    rng = np.random.default_rng(seed)
    centres = 4 * rng.standard_normal((8, d))
    values = centres[rng.integers(0, 8, n)] + rng.standard_normal((n, d)) + offset
    return values.astype(np.float32)


def truth(z: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], k: int) -> Any:
    squared = ((z[rows, None].astype(np.float64) - z[None].astype(np.float64)) ** 2).sum(-1)
    squared[np.arange(len(rows)), rows] = np.inf
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return order, np.sqrt(np.take_along_axis(squared, order, axis=1))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_those_of_brute_force_to_the_recall_that_is_said(kind: Kind) -> None:
    z = embedding()
    index = NeighborIndex.build(z, kind=kind, seed=3)
    rows = np.arange(0, 3000, 3)
    found = index.neighbours(20, rows)
    indices, distances = truth(z, rows, 20)
    share = (found.distances <= distances[:, -1:] * (1 + 1e-6)).mean()
    assert found.recall is not None
    if kind in APPROXIMATE:
        assert found.recall.n_queries == 1000
        assert found.recall.value >= 0.98
        assert share == pytest.approx(found.recall.value, abs=0.01)
        assert not (found.indices == rows[:, None]).any()
    else:
        assert (found.recall.value, found.recall.n_queries) == (1.0, 0)
        np.testing.assert_array_equal(found.indices, indices)
        np.testing.assert_allclose(found.distances, distances, rtol=1e-6)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_a_low_target_gives_a_low_recall_and_says_so(kind: Kind) -> None:
    z = embedding(d=16, n=4000)
    index = NeighborIndex.build(z, kind=kind, recall_target=0.3)
    found = index.neighbours(10)
    indices, _ = truth(z, np.arange(4000), 10)
    overlap = np.mean(
        [len(np.intersect1d(a, b)) / 10 for a, b in zip(found.indices, indices, strict=True)]
    )
    assert found.recall is not None
    assert found.recall.value == pytest.approx(overlap, abs=4 * found.recall.standard_error + 1e-9)
    better = NeighborIndex.build(z, kind=kind, recall_target=1.0)
    assert better.recall(10).value >= 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_parts_build_the_same_index_and_a_seed_the_same_answers(kind: Kind, tmp_path: Path) -> None:
    z = embedding()
    whole = NeighborIndex.build(z, kind=kind, seed=5).neighbours(15)
    for folder in (None, tmp_path):
        parts = NeighborIndex(z.shape[1], kind=kind, seed=5, folder=folder)
        for start in range(0, len(z), 700):
            parts.add(z[start : start + 700])
        assert parts.digest == digest(z)
        found = parts.neighbours(15)
        np.testing.assert_array_equal(found.indices, whole.indices)
        np.testing.assert_array_equal(found.distances, whole.distances)
        assert (found.backend, found.recall) == (whole.backend, whole.recall)


@pytest.mark.parametrize("kind", KINDS)
def test_indices_in_one_folder_do_not_meet_and_leave_nothing(kind: Kind, tmp_path: Path) -> None:
    one, other = embedding(800, seed=1), embedding(800, seed=2)
    indices = [NeighborIndex(6, kind=kind, folder=tmp_path) for _ in range(2)]
    for part in (slice(0, 500), slice(500, 800)):
        for index, z in zip(indices, (one, other), strict=True):
            index.add(z[part])
            np.testing.assert_array_equal(index.vectors, z[: part.stop])
    for index, z in zip(indices, (one, other), strict=True):
        whole = NeighborIndex.build(z, kind=kind).neighbours(5)
        np.testing.assert_array_equal(index.neighbours(5).indices, whole.indices)
    where = tmp_path if kind != "disk" else tmp_path / "index"  # lists on disk are in the folder
    saved = indices[0].save(where)
    found = NeighborIndex.load(saved, embedding=one)
    np.testing.assert_array_equal(found.neighbours(5).indices, indices[0].neighbours(5).indices)
    if kind == "disk":
        with pytest.raises(OutputError, match=r"not empty\n  found: .atlas-index-"):
            indices[1].save(tmp_path)
    del index, indices
    gc.collect()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["index"]
        if kind == "disk"
        else ["index.json", "vectors.npy"] + (["index.faiss"] if kind in ("ivf", "hnsw") else [])
    )


@pytest.mark.parametrize("kind", ["exact", "flat", "ivf", "hnsw"])
def test_rows_added_later_are_found(kind: Kind) -> None:
    z = embedding()
    index = NeighborIndex.build(z[:2000], kind=kind)
    index.neighbours(5, np.arange(3))
    index.add(z[2000:])
    assert len(index) == 3000
    assert index.digest == digest(z)
    rows = np.arange(2500, 2600)
    found = index.neighbours(10, rows)
    assert (found.distances <= truth(z, rows, 10)[1][:, -1:] * (1 + 1e-6)).mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_twins_are_ordered_by_row_and_self_is_left_out_by_id(kind: Kind) -> None:
    rng = np.random.default_rng(2)
    z = rng.integers(0, 3, size=(2000, 2)).astype(np.float32)
    index = NeighborIndex.build(z, kind=kind, recall_target=1.0)
    rows = np.arange(0, 2000, 50)
    found = index.neighbours(12, rows)
    assert np.all(found.distances == 0)
    assert not (found.indices == rows[:, None]).any()
    assert np.all(np.diff(found.indices, axis=1) > 0)
    if kind not in APPROXIMATE:
        np.testing.assert_array_equal(found.indices, truth(z, rows, 12)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_mapped_it_answers_the_same(kind: Kind, tmp_path: Path) -> None:
    z = embedding()
    index = NeighborIndex.build(z, kind=kind, seed=7)
    found = index.neighbours(10)
    index.save(tmp_path / "index")
    moved = (tmp_path / "index").rename(tmp_path / "moved")
    for mapped in (True, False):
        read = NeighborIndex.load(moved, embedding=z, mapped=mapped)
        again = read.neighbours(10)
        np.testing.assert_array_equal(again.indices, found.indices)
        assert (again.recall, again.backend) == (found.recall, found.backend)
        assert isinstance(read.vectors, np.memmap) == mapped
    about = json.loads((moved / "index.json").read_text())
    assert (about["schema"], about["version"]) == ("atlas.neighbor-index", 1)
    with pytest.raises(OutputError, match="not empty"):
        index.save(moved)
    with pytest.raises(ConfigError, match="takes no more rows"):
        NeighborIndex.load(moved).add(z[:1])


def test_lists_on_disk_are_merged_from_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = embedding()
    whole = NeighborIndex.build(z, kind="disk", recall_target=0.9, seed=1).neighbours(10)
    monkeypatch.setattr(lists, "_ADD_ROWS", 100)  # eight shards of 400 rows at most
    np.save(tmp_path / "z.npy", z)
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    parts = NeighborIndex.build(mapped, kind="disk", recall_target=0.9, seed=1, folder=tmp_path)
    found = parts.neighbours(10)
    np.testing.assert_array_equal(found.indices, whole.indices)
    assert found.recall == whole.recall
    assert not list(tmp_path.glob(".parts-*"))


def test_an_index_of_another_embedding_is_refused(tmp_path: Path) -> None:
    z = embedding(200)
    NeighborIndex.build(z, kind="exact").save(tmp_path / "index")
    other = z.copy()
    other[[0, 1]] = other[[1, 0]]
    for wrong in (other, z[:-1], z + 1):
        with pytest.raises(ConfigError, match="of another embedding"):
            NeighborIndex.load(tmp_path / "index", embedding=wrong)
    NeighborIndex.load(tmp_path / "index", embedding=np.asfortranarray(z))


@pytest.mark.parametrize("name", ["vectors.npy", "index.faiss", "lists.ivfdata"])
def test_a_file_that_is_not_as_written_is_found(name: str, tmp_path: Path) -> None:
    folder = NeighborIndex.build(embedding(), kind="disk").save(tmp_path / "index")
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptStoreError):
        NeighborIndex.load(folder)
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptStoreError, match="another length"):
        NeighborIndex.load(folder, check=False)
    path.unlink()
    with pytest.raises(CorruptStoreError, match="missing"):
        NeighborIndex.load(folder)


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no index here"):
        NeighborIndex.load(tmp_path)
    folder = NeighborIndex.build(embedding(60), kind="exact").save(tmp_path / "index")
    about = json.loads((folder / "index.json").read_text())
    for change in ({"version": 2}, {"schema": "x"}, {"centre": [0.0]}, {"kind": "tree"}):
        (folder / "index.json").write_text(json.dumps(about | change))
        with pytest.raises(FormatError):
            NeighborIndex.load(folder)
    del about["seed"]
    (folder / "index.json").write_text(json.dumps(about))
    with pytest.raises(FormatError, match=r"lacks a field(.|\n)*seed"):
        NeighborIndex.load(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(CorruptStoreError, match="not JSON"):
        NeighborIndex.load(folder)


def test_bad_rows_and_queries_are_refused() -> None:
    index = NeighborIndex(3)
    with pytest.raises(ConfigError, match="holds no rows"):
        index.neighbours(1)
    with pytest.raises(ConfigError, match="do not fit the index"):
        index.add(np.zeros((2, 4), dtype=np.float32))
    with pytest.raises(ModelError, match="not finite"):
        index.add(np.full((2, 3), np.nan, dtype=np.float32))
    index.add(np.zeros((4, 3), dtype=np.float32))
    with pytest.raises(ConfigError, match="1 to 3, the cells that can be a neighbour"):
        index.neighbours(4)
    with pytest.raises(ConfigError, match="recall_target"):
        NeighborIndex(3, recall_target=0)
    assert index.neighbours(3).indices.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


HERE = Hardware(2, 24 * 2**30, True, 0, 0)


@pytest.mark.parametrize(
    ("n", "queries", "hardware", "kind", "device"),
    [
        (100_000, 100_000, HERE, "flat", "cpu"),
        (1_000_000, 5_000, HERE, "flat", "cpu"),
        (1_000_000, 1_000_000, HERE, "ivf", "cpu"),
        (400_000_000, 400_000_000, HERE, "disk", "cpu"),
        (1_000_000, 1_000_000, Hardware(2, 24 * 2**30, False, 0, 0), "exact", "cpu"),
        (1_000_000, 1_000_000, Hardware(2, 24 * 2**30, True, 0, 1), "exact", "cuda"),
        (1_000_000, 1_000_000, Hardware(2, 24 * 2**30, True, 1, 1), "flat", "cuda"),
        (10_000_000, 10_000_000, Hardware(2, 24 * 2**30, True, 1, 1), "ivf", "cuda"),
    ],
)
def test_the_choice(n: int, queries: int, hardware: Hardware, kind: str, device: str) -> None:
    choice = choose(n, 10, queries, hardware=hardware)
    assert (choice.kind, choice.device) == (kind, device)
    assert choice.why


def test_what_is_not_there_cannot_be_chosen_by_name() -> None:
    with pytest.raises(ConfigError, match="needs FAISS"):
        choose(10, 2, 10, kind="ivf", hardware=Hardware(2, 2**30, False, 0, 1))
    with pytest.raises(ConfigError, match="cannot be searched on a GPU"):
        choose(10, 2, 10, kind="hnsw", device="cuda", hardware=Hardware(2, 2**30, True, 1, 1))
    with pytest.raises(ConfigError, match="no such index"):
        choose(10, 2, 10, kind="tree", hardware=HERE)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["exact", "flat", "ivf"])
def test_on_a_gpu(kind: Kind) -> None:
    hardware = Hardware.here()
    if not (hardware.torch_gpus if kind == "exact" else hardware.faiss_gpus):
        pytest.skip("no GPU that this kind can use")
    z = embedding()
    found = NeighborIndex.build(z, kind=kind, device="cuda").neighbours(20)
    assert "GPU" in found.backend or "cuda" in found.backend
    assert found.recall is not None
    share = (found.distances <= truth(z, np.arange(3000), 20)[1][:, -1:] * (1 + 1e-6)).mean()
    assert share == pytest.approx(found.recall.value, abs=0.01)
