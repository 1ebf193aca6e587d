"""Reading chunks: both ways give what zarr-python reads, and every fault is an error at next()."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

import atlas
from atlas.codecs import chunks, fused
from atlas.errors import CorruptStoreError
from atlas.store import layout
from atlas.store.matrix_writer import write_shard
from loaders import MinibatchLoader, SequentialLoader

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["compiled", "step by step"])
def way(request, monkeypatch):
    if request.param == "step by step":
        monkeypatch.setattr(fused, "AVAILABLE", False)
        monkeypatch.setattr(fused, "WHY_NOT", "a test says so")
    elif not fused.AVAILABLE:
        pytest.skip(fused.WHY_NOT)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(layout, "CHUNK", 64)
    monkeypatch.setattr(layout, "SHARD", 256)


@pytest.fixture
def store(tmp_path, make_study, small_chunks):
    out = atlas.create_store(tmp_path / "s.atlas")
    for i, profile in enumerate(("fast", "portable", "small")):
        genes = [f"gene{g}" for g in range(i * 5, 30 + i * 5)]
        study = make_study(80, genes, seed=i, prefix=f"{i}-")
        out.append(study, study=f"s{i}", batch_key="batch", label_key="cell_type", profile=profile)
    return out


def shards(store: atlas.CountStore, study: int = 0, name: str = "data") -> list[Path]:
    return sorted((store.path / f"studies/s{study}/X/{name}/c").iterdir())


def test_any_stretch_is_what_zarr_reads(store, way):
    rng = np.random.default_rng(0)
    for study in range(3):
        for name in ("indices", "data", "indptr"):
            folder = store.path / f"studies/s{study}/X/{name}"
            array, expected = chunks.ChunkedArray(folder), zarr.open_array(folder, mode="r")[:]
            n = len(expected)
            assert n > 64 or name == "indptr"
            cuts = [(0, n), (0, 0), (n, n), *np.sort(rng.integers(0, n + 1, (60, 2))).tolist()]
            for start, stop in [*cuts, (0, min(64, n)), (min(63, n), min(129, n))]:
                assert np.array_equal(array.read(start, stop), expected[start:stop])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["|u1", "<u2", "<u4", "<f4"])
def test_chunks_that_are_not_compressed_and_those_that_are(tmp_path, way, kind, packed):
    values = np.random.default_rng(0).integers(0, 250, 64 * 7 + 40).astype(kind)
    how = layout.Layout(kind, "fast", kind == "<u2", 64, 64 * 8, packed)
    (tmp_path / "a/c").mkdir(parents=True)
    how.create(zarr.open_group(tmp_path, mode="a"), "a", len(values))
    write_shard(tmp_path / "a/c", 0, values, how)
    file = tmp_path / "a/c/0"
    assert np.array_equal(zarr.open_array(tmp_path / "a", mode="r")[:], values)
    array = chunks.ChunkedArray(tmp_path / "a")
    cuts = np.sort(np.random.default_rng(1).integers(0, len(values) + 1, (40, 2)), axis=1)
    for start, stop in [*cuts.tolist(), (0, len(values))]:
        assert np.array_equal(array.read(start, stop), values[start:stop])
    assert np.array_equal(array.read(*cuts.T), np.concatenate([values[a:b] for a, b in cuts]))
    whole = file.read_bytes()
    index = np.frombuffer(whole[-16 * 8 - 4 : -4], "<u8").reshape(-1, 2)
    for number, (offset, length) in enumerate(index.tolist()):  # first, middle, last byte of each
        for at in (offset, offset + length // 2, offset + length - 5, offset + length - 1):
            spoilt = bytearray(whole)
            spoilt[at] ^= 16
            file.write_bytes(spoilt)
            found = chunks.ChunkedArray(tmp_path / "a")
            with pytest.raises(CorruptStoreError, match=f"another checksum in chunk {number}"):
                found.read(0, len(values))
            with pytest.raises(CorruptStoreError, match=f"another checksum in chunk {number}"):
                found.read(64 * number + 3, 64 * number + 5)
            others = found.read(0, 64 * number)
            assert np.array_equal(others, values[: 64 * number])


def test_the_way_is_said(store, way):
    text = MinibatchLoader(store).describe()
    if way == "compiled":
        assert "in one compiled call; of s2 step by step, because its profile is 'small'" in text
    else:
        assert "step by step: chunks are decoded one after the other, because a test says" in text
        assert "compiled" not in text


def test_the_way_is_said_of_tiles_and_of_one_profile(tmp_path, make_study):
    tiled = atlas.create_store(tmp_path / "t.atlas", format="tiledb")
    tiled.append(make_study(20), study="one")
    assert "one after the other, because TileDB reads it" in MinibatchLoader(tiled).describe()
    plain = atlas.create_store(tmp_path / "p.atlas")
    plain.append(make_study(20), study="one")
    plain.append(make_study(20, prefix="o"), study="two", profile="portable")
    assert plain.reading.endswith("in one compiled call") == fused.AVAILABLE


def test_rows_of_three_studies_over_chosen_genes_are_those_written(store, way):
    whole = atlas.to_anndata(store)
    genes = ["gene34", "gene7", "gene0", "gene12"]
    expected = whole[:, genes].X.toarray()
    view = store.select(genes)
    assert view.narrow
    loader = MinibatchLoader(view, 16, narrow=True, block_size=8, buffer_size=128)
    seen = []
    for minibatch in loader:
        assert minibatch.data.dtype == np.uint16
        assert np.array_equal(minibatch.to_scipy().toarray(), expected[minibatch.rows])
        seen += minibatch.rows.tolist()
    assert sorted(seen) == list(range(240))
    every = whole.X.toarray()
    for minibatch in SequentialLoader(store, 50):
        assert np.array_equal(minibatch.to_scipy().toarray(), every[minibatch.rows])
    stored = store.count_values(np.array([0, 80]), np.array([80, 160]))
    assert stored.tolist() == [int((every[:80] > 0).sum()), int((every[80:160] > 0).sum())]


def test_counts_above_16_bits_go_wide(tmp_path, make_study, way):
    study = make_study(40)
    study.X[3, 4] = 70_000
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(study, study="one")
    store.append(make_study(40, prefix="other"), study="two")
    assert not store.narrow
    expected = atlas.to_anndata(store).X.toarray()
    assert expected.max() == 70_000
    for minibatch in MinibatchLoader(store, 7):
        assert np.array_equal(minibatch.to_scipy().toarray(), expected[minibatch.rows])


def drain(loader: MinibatchLoader, into: list[list[int]]) -> None:
    for minibatch in loader:
        into.append(minibatch.rows.tolist())  # noqa: PERF401


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "A shard of the store is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "A shard of the store is damaged"),
        (lambda path: os.truncate(path, 0), "A shard of the store is damaged"),
        (flip, "another checksum in chunk"),
    ],
)
@pytest.mark.parametrize("study", [0, 1, 2])
def test_a_fault_is_an_error_at_next_and_nothing_is_lost(store, way, spoil, message, study):
    options = {"block_size": 8, "buffer_size": 64}
    expected = [m.rows.tolist() for m in MinibatchLoader(store, 16, **options)]
    path = shards(store, study)[1]
    good = path.read_bytes()
    spoil(path)
    loader = MinibatchLoader(atlas.open_store(store.path), 16, **options)
    found: list[list[int]] = []
    with pytest.raises(CorruptStoreError, match=message) as caught:
        drain(loader, found)
    assert str(path) in str(caught.value)
    assert found == expected[: loader.step]
    path.write_bytes(good)
    again = MinibatchLoader(atlas.open_store(store.path), 16, **options)
    again.load_state_dict(loader.state_dict())
    assert [m.rows.tolist() for m in again] == expected[len(found) :]


def test_a_read_error_of_the_disk_is_said(store, way, monkeypatch):
    """A folder cannot be read from: the system answers with an error, as a bad disk does."""
    folder = os.open(store.path, os.O_RDONLY)
    try:
        real = chunks.ChunkedArray._load

        def spoilt(array: chunks.ChunkedArray, path: str, length: int) -> chunks._Shard:
            shard = real(array, path, length)
            if path.endswith("X/data/c/0"):
                shard.descriptor = folder
            return shard

        monkeypatch.setattr(chunks.ChunkedArray, "_load", spoilt)
        with pytest.raises(CorruptStoreError, match=r"(?s)cannot be read.*Is a directory"):
            list(MinibatchLoader(atlas.open_store(store.path), 16))
    finally:
        os.close(folder)


def test_a_file_put_in_place_of_another_is_not_read_by_who_has_the_store_open(store, way):
    before = store.read_rows(0, 80)
    mine, other = shards(store)[0], shards(store)[1]
    replacement = mine.with_name("new")
    shutil.copy(other, replacement)
    replacement.rename(mine)
    after = store.read_rows(0, 80)
    assert np.array_equal(before.data, after.data)


@pytest.mark.parametrize("name", ["indices", "data"])
def test_a_file_of_another_study_is_told_by_whoever_opens_it(store, way, name):
    """All its checksums hold; the store was open before, and the file was not."""
    mine, other = (shards(store, i, name)[0] for i in (0, 1))
    replacement = mine.with_name("new")
    shutil.copy(other, replacement)
    replacement.rename(mine)
    study = store.studies[0]
    with pytest.raises(CorruptStoreError, match=f"(?s)not written here.*{study}/X/{name}/c/0"):
        store.read_rows(0, 80)
    with pytest.raises(CorruptStoreError, match="not written here"):
        list(MinibatchLoader(store, 16))
    report = atlas.verify(store.path)
    assert [(f.study, str(f.path)) for f in report.findings] == [(study, str(mine))]


def test_shards_of_an_earlier_version_are_read_without_their_ends_noted(store, way):
    before = store.read_rows(0, 80)
    for name in ("indices", "data"):
        file = shards(store, 0, name)[0].parents[1] / "zarr.json"
        meta = json.loads(file.read_bytes())
        del meta["attributes"]
        file.write_text(json.dumps(meta))
    after = atlas.open_store(store.path).read_rows(0, 80)
    assert np.array_equal(before.indices, after.indices)
    assert np.array_equal(before.data, after.data)


def test_a_shard_cut_short_under_an_open_store_is_an_error(store, way):
    store.read_rows(0, 80)
    path = shards(store)[0]
    os.truncate(path, 50)
    with pytest.raises(CorruptStoreError, match="A shard of the store is damaged"):
        store.read_rows(0, 80)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are not listed here")
def test_files_are_closed_again(store, way):
    held = len(list(Path("/proc/self/fd").iterdir()))
    again = atlas.open_store(store.path)
    list(SequentialLoader(again, 50))
    del again
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= held + 1


def test_chunks_in_any_order_with_gaps_are_what_zarr_reads(store, way):
    """As another writer may lay out a shard: index entries say where chunks are."""
    for name in ("indices", "data"):
        for path in shards(store, 0, name):
            old = path.read_bytes()
            n = layout.SHARD // layout.CHUNK
            index = index_of(old).copy()
            new = bytearray()
            for k in reversed(range(n)):
                offset, length = index[k].tolist()
                if offset != 2**64 - 1:
                    new += bytes(5_000)
                    index[k, 0] = len(new)
                    new += old[offset : offset + length]
            packed = index.tobytes()
            path.write_bytes(new + packed + google_crc32c.value(packed).to_bytes(4, "little"))
    counts = store.path / "studies" / store.studies[0] / "X"
    for name in ("indices", "data"):
        meta = json.loads((counts / name / "zarr.json").read_bytes())
        del meta["attributes"]["atlas_shards"]
        (counts / name / "zarr.json").write_text(json.dumps(meta))
        expected = zarr.open_array(str(counts / name), mode="r")[:]
        array = chunks.ChunkedArray(counts / name)
        assert (array.read(0, len(array)) == expected).all()
        assert (array.read(77, len(array) - 3) == expected[77:-3]).all()
    path = shards(store, 0, "data")[0]
    content = bytearray(path.read_bytes())
    content[int(index_of(content)[1, 0]) + 20] ^= 1
    path.write_bytes(content)
    array = chunks.ChunkedArray(counts / "data")
    with pytest.raises(CorruptStoreError, match="another checksum in chunk 1"):
        array.read(0, len(array))


def index_of(shard: bytes | bytearray) -> np.ndarray:
    n = layout.SHARD // layout.CHUNK
    return np.frombuffer(bytes(shard[-16 * n - 4 : -4]), "<u8").reshape(-1, 2)
