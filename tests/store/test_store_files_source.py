"""Files of counts opened like a store: the same cells, trained as they are."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import atlas
from atlas.errors import (
    ConfigError,
    CorruptStoreError,
    CountsError,
    InputError,
    MissingColumnError,
    StoreError,
)
from loaders import MinibatchLoader


@pytest.fixture
def files(tmp_path: Path, real_data) -> list[Path]:
    """Real counts in three files: CSR, dense in chunks, and with genes in another order."""
    whole = ad.read_h5ad(real_data("pbmc_4batch_3study.h5ad"))[::15, 100:300].copy()
    parts = [whole[:300].copy(), whole[300:500].copy(), whole[500:, ::-1].copy()]
    paths = [tmp_path / f"part{i}.h5ad" for i in range(3)]
    for part, path in zip(parts, paths, strict=True):
        part.write_h5ad(path)
    parts[1].X = parts[1].X.toarray()
    parts[1].write_h5ad(paths[1], compression="gzip")
    return paths


def opened(files: list[Path]) -> atlas.store.FilesSource:
    return atlas.open_files(files, batch_key="batch", label_key="cell_type")


def test_the_cells_of_the_files(files):
    source = opened(files)
    adatas = [ad.read_h5ad(path) for path in files]
    expected = ad.concat(adatas)[:, list(source.gene_table.names)]
    rows = [
        source.read_rows(a, b) for a, b in zip(source.segments, source.segments[1:], strict=False)
    ]
    found = sp.vstack(
        [sp.csr_matrix((r.data, r.indices, r.indptr), (r.n_rows, source.n_vars)) for r in rows]
    )
    assert (found != sp.csr_matrix(expected.X)).nnz == 0
    assert source.studies == ("part0", "part1", "part2")
    names = np.array(source.batches, object)[source.obs_codes["batch"]]
    texts = [f"part{i}/{b}" for i, a in enumerate(adatas) for b in a.obs["batch"]]
    assert names.tolist() == texts
    labels = np.array([*source.labels, "Unknown"], object)[source.obs_codes["label"]]
    assert labels.tolist() == expected.obs["cell_type"].astype(str).tolist()
    assert source.obs(["batch"]).index.tolist() == list(expected.obs_names)
    assert "3 times as long as from a store" in MinibatchLoader(source, 32).describe()


def test_that_it_is_slower_is_said(files):
    with pytest.warns(UserWarning, match=r"part0.h5ad … is read from files .* 3 times as long"):
        opened(files)


def test_genes_are_chosen(files):
    source = opened(files)
    genes = list(source.gene_table.names[[5, 150, 2][0] : 60 : 7])
    view = source.select(genes)
    block = view.read_rows(0, 50)
    expected = ad.read_h5ad(files[0])[:50, genes].X
    found = sp.csr_matrix((block.data, block.indices, block.indptr), (50, len(genes)))
    assert (found != expected).nnz == 0
    assert view.fingerprint != source.fingerprint
    for wrong in ([], ["nothing"], [genes[0], genes[0]]):
        with pytest.raises(StoreError, match="cannot be selected"):
            source.select(wrong)


def test_training_on_files(files, tmp_path):
    source = opened(files)
    genes = list(source.gene_table.names)
    options = {"n_hidden": 16, "n_latent": 4, "n_layers": 1, "device": "cpu"}
    model = atlas.train(source, genes=genes, out=tmp_path / "run", max_epochs=2, **options)
    z = atlas.embed(model, source, name=None)
    assert z.shape == (source.n_obs, 4)
    # one store with the same studies and batches gives the same embedding of each cell
    store = atlas.create_store(tmp_path / "store")
    for i, path in enumerate(files):
        store.append(path, study=f"part{i}", batch_key="batch", label_key="cell_type")
    ours = atlas.embed(model, store, name=None)
    order = np.lexsort((store.index_array("input_position"), store.obs_codes["study"]))
    np.testing.assert_allclose(z, ours[order], atol=1e-5)
    held_out = atlas.train(
        source, genes=genes, out=tmp_path / "held", max_epochs=1, hold_out="batch=pbmc3k", **options
    )
    assert held_out.batches == source.batches


def test_wrong_use(files, tmp_path):
    source = opened(files)
    genes = list(source.gene_table.names)
    with pytest.raises(ConfigError, match="No genes are chosen"):
        atlas.train(source, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="Only a store can be projected"):
        atlas.train(source, genes=genes, out=tmp_path / "run", project=True)
    model = atlas.train(
        source, genes=genes, out=tmp_path / "run", max_epochs=1, n_hidden=8, device="cpu"
    )
    with pytest.raises(ConfigError, match="Only a store keeps what"):
        atlas.embed(model, source)
    with pytest.raises(MissingColumnError, match="no obs column for the batch"):
        atlas.open_files(files, batch_key="nowhere")
    with pytest.raises(InputError, match="No file was given"):
        atlas.open_files([])
    with pytest.raises(InputError, match="does not exist"):
        atlas.open_files(tmp_path / "nothing.h5ad")
    with pytest.raises(ConfigError, match="A store has its layers, batches and labels already"):
        atlas.open_store(tmp_path / "store", batch_key="batch")  # type: ignore[call-overload]


def test_counts_by_column_are_refused(files, tmp_path):
    adata = ad.read_h5ad(files[0])
    adata.X = sp.csc_matrix(adata.X)
    adata.write_h5ad(tmp_path / "columns.h5ad")
    with pytest.raises(InputError, match=r"only be read in order\n(.*\n)*.*atlas ingest"):
        atlas.open_files(tmp_path / "columns.h5ad")


def test_a_file_that_changes_or_holds_no_counts(files, tmp_path):
    source = opened(files)
    source.read_rows(0, 5)
    other = ad.read_h5ad(files[2])
    other.X.data[0] += 7
    other.write_h5ad(tmp_path / "other.h5ad")
    (tmp_path / "other.h5ad").replace(files[2])
    with pytest.raises(CorruptStoreError, match="replaced or changed"):
        list(MinibatchLoader(source, 32))
    adata = ad.read_h5ad(files[0])
    adata.X = adata.X.astype(np.float32) * 0.5
    adata.write_h5ad(tmp_path / "halves.h5ad")
    with pytest.raises(CountsError, match="fractions"):
        list(MinibatchLoader(atlas.open_files(tmp_path / "halves.h5ad"), 32))
