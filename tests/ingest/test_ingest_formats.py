"""Folders of 10x, loom, Visium and tables in text, against scanpy's and anndata's readers."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.io
import scipy.sparse as sp
from ingest_helpers import assert_same, random_counts, read_counts, write_tenx_v3

import atlas
from atlas.errors import ConfigError, InputError, MissingColumnError
from atlas.ingest import open_counts

GENES = "Gene Expression"
MEMORIES = [1_000, 1 << 20]


def write_mtx(
    folder: Path, counts: sp.spmatrix, *, old: bool = False, order: str = "cells"
) -> Path:
    """As Cell Ranger does (``old``: 2); entries by cell, by gene, or shuffled."""
    folder.mkdir()
    entries = sp.coo_matrix(counts.T)  # features × barcodes
    keys = {
        "cells": np.lexsort((entries.row, entries.col)),
        "genes": np.lexsort((entries.col, entries.row)),
        "shuffled": np.random.default_rng(0).permutation(entries.nnz),
    }[order]
    entries = sp.coo_matrix(
        (entries.data[keys].astype(int), (entries.row[keys], entries.col[keys])), entries.shape
    )
    scipy.io.mmwrite(folder / "matrix.mtx", entries, comment="made by a test", field="integer")
    n_cells, n_genes = counts.shape
    lines = [f"ENSG{g}\tgene{g}" + ("" if old else f"\t{GENES}") for g in range(n_genes)]
    (folder / ("genes.tsv" if old else "features.tsv")).write_text("\n".join(lines) + "\n")
    (folder / "barcodes.tsv").write_text("".join(f"BC{c}-1\n" for c in range(n_cells)))
    if not old:
        for path in list(folder.iterdir()):
            with gzip.open(f"{path}.gz", "wb") as file:
                file.write(path.read_bytes())
            path.unlink()
    return folder


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("order", ["cells", "genes", "shuffled"])
@pytest.mark.parametrize("old", [False, True])
def test_mtx_as_scanpy_reads_it(tmp_path, memory, order, old):
    counts = random_counts(0, 37, 11).tolil()
    counts[[0, 8, 36]] = 0  # cells without an entry
    folder = write_mtx(tmp_path / "m", counts.tocsr(), old=old, order=order)
    expected = scanpy.read_10x_mtx(folder)
    with open_counts(folder, memory=memory) as source:
        assert_same(read_counts(source), expected.X)
        assert list(source.obs.index) == list(expected.obs_names)
        assert list(source.var.index) == list(expected.var_names)
        assert source.var["gene_ids"].tolist() == expected.var["gene_ids"].tolist()
        for rows in (1, 5, 100):
            blocks = list(source.blocks(rows))
            assert max(block.n_rows for block in blocks) <= rows
            assert sum(block.n_rows for block in blocks) == 37


def test_mtx_of_real_counts_becomes_the_store_of_the_h5ad(tmp_path, real_data):
    adata = ad.read_h5ad(real_data("pbmc3k.h5ad"))[:500].copy()
    adata.obs_names = [f"BC{i}-1" for i in range(500)]
    folder = write_mtx(tmp_path / "m", adata.X)
    store = atlas.create_store(tmp_path / "store")
    report = store.append(folder, study="pbmc", memory="128MB")
    assert report.nnz == (adata.X != 0).sum()
    back = atlas.to_anndata(store, order="input")
    assert (back.X != adata.X).nnz == 0


def test_feature_types_of_mtx(tmp_path):
    folder = write_mtx(tmp_path / "m", random_counts(1, 20, 6))
    with gzip.open(folder / "features.tsv.gz", "wt") as file:
        kinds = [GENES, "Antibody Capture"] * 3
        file.writelines(f"id{g}\tgene{g}\t{kind}\n" for g, kind in enumerate(kinds))
    expected = scanpy.read_10x_mtx(folder)
    with open_counts(folder) as source:
        assert_same(read_counts(source), expected.X)
        assert "3 Antibody Capture" in source.notes[0]
    with pytest.raises(InputError, match="no features of type 'CRISPR'"):
        open_counts(folder, feature_type="CRISPR")


def edit(folder: Path, change: Callable[[list[str]], list[str]]) -> None:
    path = folder / "matrix.mtx"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def sizes_line(lines: list[str]) -> int:
    return next(i for i, line in enumerate(lines) if not line.startswith("%"))


def fewer(lines: list[str]) -> list[str]:
    return lines[:-2]


def out_of_range(lines: list[str]) -> list[str]:
    return [*lines[:-1], "99 1 3"]


def text(lines: list[str]) -> list[str]:
    return [*lines[:-1], "1 one 3"]


def negative(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1].rsplit(" ", 1)[0] + " -4"]


def no_header(lines: list[str]) -> list[str]:
    return lines[sizes_line(lines) :]


def other_size(lines: list[str]) -> list[str]:
    at = sizes_line(lines)
    n_genes, n_cells, n = lines[at].split()
    return [*lines[:at], f"{n_genes} {int(n_cells) + 1} {n}", *lines[at + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fewer, r"does not hold the entries that its header says\n.*found: \d+ entries"),
        (out_of_range, r"out of range\n.*feature 99 in line \d+"),
        (text, "cannot be read"),
        (negative, "holds negative values"),
        (no_header, "not a matrix that can be read"),
        (other_size, r"disagree\n.*found: 20 lines for 21 barcodes"),
    ],
)
def test_mtx_that_is_damaged(tmp_path, change, message):
    folder = write_mtx(tmp_path / "m", random_counts(1, 20, 6), old=True)
    edit(folder, change)
    store = atlas.create_store(tmp_path / "store")
    with pytest.raises(InputError, match=message):
        store.append(folder, study="one")
    assert store.studies == ()
    assert list((tmp_path / "store" / "studies").iterdir()) == []


def test_mtx_sorted_at_first_only(tmp_path, monkeypatch):
    folder = write_mtx(tmp_path / "m", random_counts(1, 200, 6), old=True)
    edit(folder, lambda lines: [*lines[:-2], lines[-1], lines[sizes_line(lines) + 1]])
    monkeypatch.setattr(atlas.ingest.mtx, "_HEAD", 50)
    last = len((folder / "matrix.mtx").read_text().splitlines())
    with (
        pytest.raises(InputError, match=rf"not further on\n.*in line {last}"),
        open_counts(folder) as source,
    ):
        read_counts(source)


def test_mtx_that_is_cut_short(tmp_path):
    folder = write_mtx(tmp_path / "m", random_counts(1, 200, 30))
    path = folder / "matrix.mtx.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"matrix.mtx.gz cannot be read\n.*EOFError"):
        read_counts(open_counts(folder))
    (folder / "barcodes.tsv.gz").unlink()
    with pytest.raises(InputError, match="not a complete 10x folder"):
        open_counts(folder)
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="a folder that cannot be read"):
        open_counts(tmp_path / "void")


# --- loom ----------------------------------------------------------------------------------------


def write_loom(
    path: Path, counts: sp.spmatrix, chunks: tuple[int, int] | None = (5, 7)
) -> ad.AnnData:
    n_cells, n_genes = counts.shape
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=counts.toarray().T, chunks=chunks)
        file.create_dataset("layers/spliced", data=2 * counts.toarray().T, chunks=chunks)
        cells, genes = file.create_group("col_attrs"), file.create_group("row_attrs")
        cells["CellID"] = [f"c{i}" for i in range(n_cells)]
        cells["cluster"] = [f"k{i % 3}" for i in range(n_cells)]
        cells["age"] = np.arange(n_cells)
        genes["Gene"] = [f"gene{i}" for i in range(n_genes)]
        genes["Accession"] = [f"ENSG{i}" for i in range(n_genes)]
    return ad.AnnData(counts)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("chunks", [(5, 7), (12, 40), None])
def test_loom(tmp_path, memory, chunks):
    counts = random_counts(3, 40, 12)
    write_loom(tmp_path / "x.loom", counts, chunks)
    for layer, factor in ((None, 1), ("spliced", 2)):
        with open_counts(tmp_path / "x.loom", memory=memory, layer=layer) as source:
            assert_same(read_counts(source), factor * counts)
            assert source.obs.index.tolist() == [f"c{i}" for i in range(40)]
            assert source.obs["age"].tolist() == list(range(40))
            assert source.obs["cluster"].tolist() == [f"k{i % 3}" for i in range(40)]
            assert source.var.index.tolist() == [f"gene{i}" for i in range(12)]
            assert source.var["gene_ids"].tolist() == [f"ENSG{i}" for i in range(12)]


def test_loom_that_is_wrong(tmp_path):
    path = tmp_path / "x.loom"
    write_loom(path, random_counts(3, 40, 12))
    with pytest.raises(MissingColumnError, match="no layer 'ambiguous'"):
        open_counts(path, layer="ambiguous")
    with pytest.raises(InputError, match="neither layers nor raw"):
        open_counts(path, use_raw=True)
    with h5py.File(path, "a") as file:
        file["col_attrs/short"] = [1, 2]
    with pytest.raises(InputError, match=r"attribute of another length\n.*2 values of /col_attrs"):
        open_counts(path)
    with h5py.File(path, "a") as file:
        del file["col_attrs/short"], file["col_attrs/CellID"]
    with pytest.raises(InputError, match=r"does not name its cells\n.*age, cluster"):
        open_counts(path)


# --- Visium --------------------------------------------------------------------------------------


def write_visium(folder: Path, counts: sp.spmatrix, *, header: bool, mtx: bool = False) -> Path:
    outs = folder / "outs"
    (outs / "spatial").mkdir(parents=True)
    n = counts.shape[0]
    if mtx:
        write_mtx(outs / "filtered_feature_bc_matrix", counts)
        barcodes = [f"BC{i}-1" for i in range(n)]
    else:
        path = outs / "filtered_feature_bc_matrix.h5"
        write_tenx_v3(path, counts, [GENES] * counts.shape[1])
        barcodes = list(scanpy.read_10x_h5(path).obs_names)
    table = pd.DataFrame(
        {
            "in_tissue": np.arange(n) % 2,
            "array_row": np.arange(n) // 5,
            "array_col": np.arange(n) % 5,
            "pxl_row_in_fullres": np.arange(n) * 10,
            "pxl_col_in_fullres": np.arange(n) * 7,
        },
        index=pd.Index(barcodes, name="barcode"),
    )[::-1]  # in another order than the counts
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    table.to_csv(outs / "spatial" / name, header=header)
    scales = {"spot_diameter_fullres": 89.5, "tissue_hires_scalef": 0.17}
    (outs / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    return folder


@pytest.mark.parametrize(("header", "mtx"), [(True, False), (False, False), (True, True)])
def test_visium(tmp_path, header, mtx):
    counts = random_counts(4, 30, 7)
    folder = write_visium(tmp_path / "slice", counts, header=header, mtx=mtx)
    for given in (folder, folder / "outs"):
        with open_counts(given) as source:
            assert_same(read_counts(source), counts)
            assert source.obs["in_tissue"].tolist() == [i % 2 for i in range(30)]
            assert source.obs["array_row"].tolist() == [i // 5 for i in range(30)]
            # x, y in pixels: scanpy.read_visium takes columns before rows
            assert source.obsm["spatial"].tolist() == [[7 * i, 10 * i] for i in range(30)]
            scales = source.uns["spatial"]["slice"]["scalefactors"]
            assert scales == {"spot_diameter_fullres": 89.5, "tissue_hires_scalef": 0.17}
            assert any("images are not kept" in note for note in source.notes)
    store = atlas.create_store(tmp_path / "store")
    store.append(folder, study="slice")
    back = atlas.to_anndata(store, order="input")
    assert np.asarray(back.obsm["spatial"]).tolist() == [[7 * i, 10 * i] for i in range(30)]


def test_visium_that_is_wrong(tmp_path):
    folder = write_visium(tmp_path / "slice", random_counts(4, 30, 7), header=True)
    positions = folder / "outs" / "spatial" / "tissue_positions.csv"
    lines = positions.read_text().splitlines()
    positions.write_text("\n".join(lines[:-2]))
    with pytest.raises(InputError, match=r"barcodes without a position\n.*2 of 30"):
        open_counts(folder)
    positions.unlink()
    with pytest.raises(InputError, match="has no positions"):
        open_counts(folder)
    (folder / "outs" / "filtered_feature_bc_matrix.h5").unlink()
    with pytest.raises(InputError, match="has no counts"):
        open_counts(folder)


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz", "x.txt"])
def test_tables_in_text(tmp_path, memory, transpose, name):
    counts = random_counts(5, 23, 9)
    frame = pd.DataFrame(
        counts.toarray().astype(int),
        index=[f"c{i}" for i in range(23)],
        columns=[f"gene{i}" for i in range(9)],
    )
    table = frame.T if transpose else frame
    table.to_csv(tmp_path / name, sep="," if "csv" in name else "\t")
    with open_counts(tmp_path / name, memory=memory, transpose=transpose) as source:
        assert_same(read_counts(source), counts)
        assert source.obs.index.tolist() == frame.index.tolist()
        assert source.var.index.tolist() == frame.columns.tolist()
        assert "207 numbers" in source.notes[0]


def test_a_table_as_r_writes_it(tmp_path):
    (tmp_path / "x.txt").write_text('"g1" "g2"\n"a" 1 0\n"b" 0 3\n')
    with open_counts(tmp_path / "x.txt") as source:
        assert read_counts(source).toarray().tolist() == [[1, 0], [0, 3]]
        assert source.var.index.tolist() == ["g1", "g2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (",g1,g2\na,1,2\nb,1,2,3\n", "cannot be read as a table"),
        (",g1,g2\na,1,2\nb,1\n", r"no number\n.*'' in line 3, column 'g2'"),
        (",g1,kind\na,1,T\n", r"no number\n.*'T' in line 2, column 'kind'"),
        (",g1,g2\na,1,-2\n", "negative values"),
        (",g1,g2\na,1,2.5\n", r"fractions(.*\n)*.*--round"),
        ("1,0,0\n0,2,1\n", "no line of names"),
        ("nothing\n", "not a table of counts"),
        ("", "is empty"),
        (",g1,g2\na,1,2\na,1,2\n", "row names .* are not unique"),
    ],
)
def test_tables_that_are_wrong(tmp_path, content, message):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_counts(open_counts(tmp_path / "x.csv"))


def test_only_tables_are_transposed(tmp_path):
    folder = write_mtx(tmp_path / "m", random_counts(1, 20, 6))
    with pytest.raises(ConfigError, match="Only a table in text can be transposed"):
        open_counts(folder, transpose=True)


# --- gene lengths --------------------------------------------------------------------------------


def test_counts_by_gene_length(tmp_path):
    """Online Methods of scANVI: over the relative length, integer part."""
    rng = np.random.default_rng(6)
    adata = ad.AnnData(sp.csr_matrix(rng.poisson(40, (50, 8)).astype(np.float32)))
    adata.var_names = [f"gene{i}" for i in range(8)]
    adata.var["gene_ids"] = [f"ENSG{i}" for i in range(8)]
    lengths = rng.integers(300, 9000, 8)
    names = [f"gene{i}" if i % 2 else f"ENSG{i}" for i in range(8)]
    table = tmp_path / "lengths.tsv"
    table.write_text(
        "gene\tlength\n" + "".join(f"{n}\t{k}\n" for n, k in zip(names, lengths, strict=True))
    )
    expected = np.trunc(adata.X.toarray().astype(np.float64) / (lengths / lengths.mean()))
    adata.write_h5ad(tmp_path / "x.h5ad")
    for source in (adata, tmp_path / "x.h5ad"):
        store = atlas.create_store(tmp_path / f"store-{isinstance(source, Path)}")
        store.append(source, study="ss2", gene_lengths=table)
        back = atlas.to_anndata(store, order="input")
        assert (back.X.toarray() == expected).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("gene0,100\n", r"no length in .*\n.*2 of 3, e.g. gene1, gene2"),
        ("gene0,100\ngene0,200\n", "more than one length"),
        ("gene0,100\ngene1,-5\ngene2,1\n", r"no length above 0\n.*gene1"),
        ("gene0\ngene1\n", "not a table of gene lengths"),
    ],
)
def test_lengths_that_are_wrong(tmp_path, content, message):
    adata = ad.AnnData(sp.csr_matrix(np.eye(3, dtype=np.float32)))
    adata.var_names = [f"gene{i}" for i in range(3)]
    (tmp_path / "lengths.csv").write_text(content)
    store = atlas.create_store(tmp_path / "store")
    with pytest.raises(InputError, match=message):
        store.append(adata, study="one", gene_lengths=tmp_path / "lengths.csv")
    assert store.studies == ()


def test_an_interrupted_ingest_of_a_folder_goes_on(tmp_path, monkeypatch):
    from atlas.store import study_tasks

    folder = write_mtx(tmp_path / "m", random_counts(1, 300, 20))
    store = atlas.create_store(tmp_path / "store")
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(study_tasks, "write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.append(folder, study="one")
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "store", again)
    assert "going on" in str(store.append(folder, study="one").notes)
    (folder / "barcodes.tsv.gz").touch()  # another file of the folder has changed
    assert "not gone on with" in str(atlas.open_store(again).append(folder, study="one").notes)
