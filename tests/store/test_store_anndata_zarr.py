"""AnnData in Zarr as others write it: the same counts as anndata reads, and no silent zeros."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import google_crc32c
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from anndata import AnnData

import atlas
from atlas.errors import (
    CorruptStoreError,
    CountsError,
    InputError,
    MissingColumnError,
)
from atlas.store import FilesSource, create_store, open_files
from loaders import MinibatchLoader, RowBlock, RowSource

MakeStudy = Callable[..., AnnData]


@pytest.fixture
def adata(make_study: MakeStudy) -> AnnData:
    adata = make_study(n=90, genes=40)
    adata.layers["raw"] = adata.X.copy()
    return adata


def _write(adata: AnnData, path: Path, layout: str) -> Path:
    """Write with anndata, then X again in another layout."""
    version = 2 if layout == "v2" else 3
    if layout == "dense":
        adata = adata.copy()
        adata.X = adata.X.toarray()
    if layout == "float64, int64":
        adata = adata.copy()
        adata.X = adata.X.astype(np.float64)
        adata.X.indices = adata.X.indices.astype(np.int64)
        adata.X.indptr = adata.X.indptr.astype(np.int64)
    with (
        warnings.catch_warnings(),
        anndata.settings.override(zarr_write_format=version, auto_shard_zarr_v3=False),
    ):
        warnings.simplefilter("ignore")
        adata.write_zarr(path)
    options: dict[str, Any] = {
        "sharded": {"chunks": (16,), "shards": (128,)},
        "index at the start": {
            "shards": {"shape": (128,), "index_location": "start"},
            "chunks": (16,),
        },
        "small chunks": {"chunks": (16,)},
    }.get(layout, {})
    if options:
        group = zarr.open_group(path, mode="r+", use_consolidated=False)
        for name in ("indices", "data"):
            values = group[f"X/{name}"][:]
            del group[f"X/{name}"]
            group["X"].create_array(name, data=values, **options)
    if layout == "consolidated" or options:
        zarr.consolidate_metadata(path)
    return path


LAYOUTS = (
    "v2",
    "v3",
    "float64, int64",
    "consolidated",
    "sharded",
    "index at the start",
    "small chunks",
    "dense",
)


def _matrix(block: RowBlock, n_vars: int) -> np.ndarray:
    shape = (block.n_rows, n_vars)
    return sp.csr_matrix((block.data, block.indices, block.indptr), shape).toarray()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_that_anndata_reads(adata: AnnData, tmp_path: Path, layout: str) -> None:
    path = _write(adata, tmp_path / "a.zarr", layout)
    source = atlas.open_files(path, batch_key="batch", label_key="cell_type")
    assert isinstance(source, RowSource)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = anndata.io.read_zarr(path)
    x = expected.X if isinstance(expected.X, np.ndarray) else expected.X.toarray()
    assert (source.n_obs, source.n_vars, source.segments) == (90, 40, (0, 90))
    block = source.read_rows(0, 90)
    assert (block.indices.dtype, block.data.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(_matrix(block, 40), x)
    for start, stop in ((0, 1), (13, 57), (89, 90), (20, 20)):
        np.testing.assert_array_equal(_matrix(source.read_rows(start, stop), 40), x[start:stop])
    values = source.count_values(np.array([0, 13]), np.array([90, 57]))
    assert (values >= [(x > 0).sum(), (x[13:57] > 0).sum()]).all()
    genes = ["gene31", "gene2", "gene17"]
    some = open_files(path).select(genes)
    np.testing.assert_array_equal(
        _matrix(some.read_rows(5, 70), 3), x[5:70][:, expected.var_names.get_indexer(genes)]
    )
    assert [source.batches[code] for code in source.obs_codes["batch"]] == [
        f"a/{batch}" for batch in adata.obs["batch"]
    ]
    labels = np.array([*source.labels, "Unknown"])[source.obs_codes["label"]]
    assert list(labels) == list(adata.obs["cell_type"])
    assert set(source.labels) == {"B", "T"}
    assert "generic: through zarr-python, because X" in source.reading
    with pytest.raises(IndexError):
        source.read_rows(80, 91)


@pytest.mark.parametrize("profile", ["fast", "portable", "small"])
def test_a_study_of_a_store_goes_the_fast_path(
    adata: AnnData, tmp_path: Path, profile: str
) -> None:
    store = create_store(tmp_path / "s.atlas")
    store.append(adata, study="one", profile=profile)
    source = open_files(tmp_path / "s.atlas/studies/one")
    assert "fast: chunks decoded by Atlas's own kernels" in source.reading
    assert source.narrow
    block = source.read_rows(0, 90)
    assert (block.indices.dtype, block.data.dtype) == (np.uint16, np.uint16)
    wide = store.read_rows(0, 90)
    np.testing.assert_array_equal(_matrix(block, 40), _matrix(wide, 40))


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ("v2", "X/indices is Zarr v2"),
        ("v3", "X/indices has codecs bytes, zstd and no shards"),
        ("sharded", "X/indices has codecs bytes, zstd"),
        ("index at the start", "X/indices has shards of another layout"),
        ("dense", "X is dense"),
    ],
)
def test_it_says_why_it_is_slow(adata: AnnData, tmp_path: Path, layout: str, why: str) -> None:
    source = open_files(_write(adata, tmp_path / "a.zarr", layout))
    assert f"generic: through zarr-python, because {why}; 8 times as long" in source.reading
    assert not source.narrow


def test_deltas_of_another_type_go_the_generic_path(adata: AnnData, tmp_path: Path) -> None:
    store = create_store(tmp_path / "s.atlas")
    store.append(adata, study="one")
    folder = tmp_path / "s.atlas/studies/one"
    meta = folder / "X/indices/zarr.json"
    values = json.loads(meta.read_text())
    codecs = values["codecs"][0]["configuration"]["codecs"]
    assert codecs[0]["name"] == "numcodecs.delta"
    codecs[0]["configuration"] = {"dtype": "<u2", "astype": "<u4"}
    meta.write_text(json.dumps(values))
    assert "X/indices has deltas of another type" in open_files(folder).reading


@pytest.mark.parametrize("layout", ["v2", "v3", "sharded", "small chunks", "dense"])
@pytest.mark.parametrize("array", ["indices", "data", "indptr"])
def test_an_absent_chunk_is_an_error(
    adata: AnnData, tmp_path: Path, layout: str, array: str
) -> None:
    path = _write(adata, tmp_path / "a.zarr", layout)
    folder = path / "X" if layout == "dense" else path / "X" / array
    chunk = next(p for p in sorted(folder.rglob("*")) if p.is_file() and p.name.isdigit())
    chunk.unlink()
    with pytest.raises(CorruptStoreError, match=r"(?s)chunk of the array is absent.*path: .*X"):
        open_files(path).read_rows(0, 90)


@pytest.mark.parametrize("layout", ["sharded", "index at the start"])
def test_a_chunk_absent_from_a_shard_is_an_error(
    adata: AnnData, tmp_path: Path, layout: str
) -> None:
    path = _write(adata, tmp_path / "a.zarr", layout)
    shard = path / "X/data/c/1"
    content = bytearray(shard.read_bytes())
    length = 8 * 16
    at = 0 if layout == "index at the start" else len(content) - length - 4
    index = bytearray(content[at : at + length])
    index[3 * 16 : 4 * 16] = b"\xff" * 16
    content[at : at + length] = index
    content[at + length : at + length + 4] = google_crc32c.value(bytes(index)).to_bytes(4, "little")
    shard.write_bytes(content)
    source = open_files(path)
    indptr = adata.X.indptr
    lost = range(128 + 3 * 16, 128 + 4 * 16)
    n_bad = 0
    for row in range(90):
        touches = indptr[row] < lost.stop and indptr[row + 1] > lost.start
        if touches:
            n_bad += 1
            with pytest.raises(CorruptStoreError, match=r"(?s)absent.*data/c/1"):
                source.read_rows(row, row + 1)
        else:
            source.read_rows(row, row + 1)
    assert n_bad >= 1


def test_a_file_lost_while_open_is_an_error(adata: AnnData, tmp_path: Path) -> None:
    path = _write(adata, tmp_path / "a.zarr", "small chunks")
    source = open_files(path)
    source.read_rows(0, 90)
    (path / "X/indices/c/2").unlink()
    with pytest.raises(CorruptStoreError, match="replaced or changed"):
        source.read_rows(0, 90)


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan, np.inf])
def test_values_that_are_no_counts_name_the_file(
    adata: AnnData, tmp_path: Path, value: float
) -> None:
    adata.X.data[100] = value
    row = int(np.searchsorted(adata.X.indptr, 100, side="right")) - 1
    source = open_files(_write(adata, tmp_path / "a.zarr", "v3"))
    source.read_rows(0, row)
    with pytest.raises(CountsError, match=rf"(?s)at row cell{row}.*path: .*a.zarr"):
        source.read_rows(0, 90)
    np.testing.assert_array_equal(
        _matrix(open_files(source.path, layer="raw").read_rows(0, 90), 40),
        adata.layers["raw"].toarray(),
    )


def test_unsorted_and_repeated_columns_are_put_in_order(tmp_path: Path) -> None:
    matrix = sp.csr_matrix(
        (np.array([1, 200, 100, 4], np.uint8), np.array([3, 1, 1, 0]), np.array([0, 3, 4])), (2, 4)
    )
    path = _write(AnnData(X=matrix), tmp_path / "a.zarr", "v3")
    block = open_files(path).read_rows(0, 2)
    np.testing.assert_array_equal(_matrix(block, 4), [[0, 300, 0, 1], [4, 0, 0, 0]])
    np.testing.assert_array_equal(block.indices, [1, 3, 0])


def test_columns_out_of_range_are_an_error(adata: AnnData, tmp_path: Path) -> None:
    path = _write(adata, tmp_path / "a.zarr", "v3")
    zarr.open_array(path / "X/indices", mode="r+")[50] = 40
    with pytest.raises(InputError, match=r"X is not a valid sparse matrix\n  found: index 40"):
        open_files(path).read_rows(0, 90)


def test_what_cannot_be_opened(adata: AnnData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_files(tmp_path / "nowhere")
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    with pytest.raises(InputError, match="a Zarr group of another kind"):
        open_files(tmp_path / "other.zarr")
    path = _write(adata, tmp_path / "a.zarr", "v3")
    for options, error, message in (
        ({"layer": "spliced"}, MissingColumnError, "has no layer 'spliced'\n  found: 'raw'"),
        ({"batch_key": "donor"}, MissingColumnError, "one of batch, lane, cell_type, score"),
    ):
        with pytest.raises(error, match=message):
            open_files(path, **options)  # type: ignore[arg-type]
    adata.X = adata.X.tocsc()
    path = _write(adata, tmp_path / "csc.zarr", "v3")
    with pytest.raises(InputError, match=r"(?s)only be read in order.*do: ingest it"):
        open_files(path)
    path = _write(adata, tmp_path / "parts.zarr", "v3")
    del zarr.open_group(path, mode="r+", use_consolidated=False)["X/indptr"]
    zarr.consolidate_metadata(path)
    with pytest.raises(InputError, match="found: a sparse matrix without indptr"):
        open_files(path)
    adata.obs["batch"] = adata.obs["batch"].where(adata.obs["lane"] == "0")
    path = _write(adata, tmp_path / "gaps.zarr", "v3")
    with pytest.raises(InputError, match="Some cells have no batch"):
        open_files(path, layer="raw", batch_key="batch")


def _chosen(source: FilesSource, genes: list[str] | None) -> FilesSource:
    return source if genes is None else source.select(genes)


def test_the_fingerprint_follows_the_content(adata: AnnData, tmp_path: Path) -> None:
    def fingerprint(
        change: Callable[[AnnData], None] | None = None,
        genes: list[str] | None = None,
        **options: Any,
    ) -> str:
        changed = adata.copy()
        if change is not None:
            change(changed)
        path = tmp_path / "a.zarr"
        shutil.rmtree(path, ignore_errors=True)
        return _chosen(open_files(_write(changed, path, "v3"), **options), genes).fingerprint

    def count(a: AnnData) -> None:
        a.X.data[7] += 1

    def name(a: AnnData) -> None:
        a.obs_names = ["x", *a.obs_names[1:]]

    def gene(a: AnnData) -> None:
        a.var_names = ["x", *a.var_names[1:]]

    same = fingerprint()
    assert fingerprint() == same
    others = [
        fingerprint(count),
        fingerprint(name),
        fingerprint(gene),
        fingerprint(batch_key="batch"),
        fingerprint(genes=["gene1", "gene2"]),
        fingerprint(genes=["gene2", "gene1"]),
    ]
    assert len({same, *others}) == 7


def test_loading_from_several_threads(adata: AnnData, tmp_path: Path) -> None:
    source = open_files(_write(adata, tmp_path / "a.zarr", "sharded"), batch_key="batch")
    expected = adata.X.toarray()
    seen = np.zeros(90, int)
    for minibatch in MinibatchLoader(source, 16, seed=1, threads=2):
        np.testing.assert_array_equal(minibatch.to_scipy().toarray(), expected[minibatch.rows])
        seen[minibatch.rows] += 1
    assert (seen == 1).all()
    wrong: list[int] = []

    def read(source: FilesSource) -> None:
        for row in range(0, 90, 3):
            if (_matrix(source.read_rows(row, row + 3), 40) != expected[row : row + 3]).any():
                wrong.append(row)  # noqa: PERF401

    threads = [threading.Thread(target=read, args=(source,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("layout", ["v2", "sharded", "dense", "csc"])
def test_ingest_of_a_folder(adata: AnnData, tmp_path: Path, layout: str) -> None:
    given = adata.copy()
    if layout == "csc":
        given.X = given.X.tocsc()
    path = _write(given, tmp_path / "a.zarr", layout)
    store, other = create_store(tmp_path / "s"), create_store(tmp_path / "t")
    store.append(path, study="one", batch_key="batch", keep_layers=["raw"])
    other.append(adata, study="one", batch_key="batch", keep_layers=["raw"])
    found, expected = (atlas.to_anndata(s, order="input") for s in (store, other))
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
    assert found.obs.equals(expected.obs)
    rows = [s.study("one").layer("raw").read(0, 90)[2] for s in (store, other)]
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chunk_put_in_place_of_another_is_told(
    adata: AnnData, tmp_path: Path, layout: str
) -> None:
    source = open_files(_write(adata, tmp_path / "a.zarr", layout))
    source.read_rows(0, 90)
    values = tmp_path / "a.zarr" / ("X" if layout == "dense" else "X/data")
    chunk = max((p for p in values.rglob("*") if p.name[0].isdigit() and p.is_file()), key=str)
    replacement = chunk.with_name("new")
    shutil.copy(chunk, replacement)
    replacement.replace(chunk)
    with pytest.raises(CorruptStoreError, match="replaced or changed"):
        source.read_rows(0, 90)
