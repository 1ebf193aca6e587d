"""SOMA experiments: what tiledbsoma itself reads, as a source and ingested."""

from __future__ import annotations

import pickle
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

import atlas
from atlas.cli import main
from atlas.errors import AtlasError, ConfigError, CountsError, InputError, MissingColumnError
from atlas.ingest import soma_matrix
from loaders import MinibatchLoader, TorchDataset

soma = pytest.importorskip("tiledbsoma", reason="the extra soma is not installed")
import tiledbsoma.io  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of tiledbsoma.io


@pytest.fixture(scope="module")
def cells(real_data) -> ad.AnnData:
    """Real counts, with an embedding."""
    adata = ad.read_h5ad(real_data("pbmc_4batch_3study.h5ad"))[::20, 200:500].copy()
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(adata.n_obs, 5))
    return adata


@pytest.fixture(scope="module")
def experiment(cells, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("soma") / "experiment"
    tiledbsoma.io.from_anndata(str(path), cells.copy(), measurement_name="RNA")
    return path


def opened(experiment: Path, **options: str) -> atlas.store.FilesSource:
    keys = {"batch_key": "batch", "label_key": "cell_type"}
    return atlas.open_store(experiment, measurement="RNA", **keys, **options)


def matrix(source: atlas.store.FilesSource, start: int = 0, stop: int | None = None) -> np.ndarray:
    block = source.read_rows(start, source.n_obs if stop is None else stop)
    shape = (block.n_rows, source.n_vars)
    return sp.csr_matrix((block.data, block.indices, block.indptr), shape).toarray()


def test_rows_are_those_of_tiledbsoma(experiment, cells):
    source = opened(experiment)
    assert source.obs().index.tolist() == cells.obs_names.tolist()
    assert list(source.gene_table.names) == cells.var_names.tolist()
    np.testing.assert_array_equal(matrix(source), cells.X.toarray())
    some = [3, 40, 41, 300], [5, 40, 90, 301]
    block = source.read_rows(*map(np.array, some))
    rows = np.concatenate([np.arange(a, b) for a, b in zip(*some, strict=True)])
    found = sp.csr_matrix((block.data, block.indices, block.indptr), (len(rows), source.n_vars))
    assert (found != sp.csr_matrix(cells.X)[rows]).nnz == 0
    batches = [source.batches[code] for code in source.obs_codes["batch"]]
    assert batches == [f"experiment/{batch}" for batch in cells.obs["batch"]]
    assert "through tiledbsoma" in MinibatchLoader(source, 32).describe()


def test_a_filter_of_obs(experiment):
    condition = "batch == 'pbmc3k' and cell_type != 'Unknown'"
    source = opened(experiment, obs_filter=condition)
    with soma.Experiment.open(str(experiment)) as there:
        query = there.axis_query("RNA", obs_query=soma.AxisQuery(value_filter=condition))
        expected = query.to_anndata("data")
    assert 0 < source.n_obs < 1000
    assert source.obs().index.tolist() == expected.obs_names.tolist()
    np.testing.assert_array_equal(matrix(source), expected.X.toarray())
    orders = []
    loader = MinibatchLoader(source, 16, block_size=8, buffer_size=64)
    for _ in range(3):
        rows = [minibatch.rows for minibatch in loader]
        assert sorted(np.concatenate(rows)) == list(range(source.n_obs))
        orders.append(tuple(np.concatenate(rows)))
    assert len(set(orders)) == 3


def test_ingest_is_that_of_the_file(experiment, cells, tmp_path, capsys):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    command = ["--study", "s", "--batch-key", "batch", "--label-key", "cell_type"]
    soma_options = ["--measurement", "RNA", "--obs-filter", "batch == 'pbmc3k'"]
    assert main(["ingest", str(tmp_path / "a"), str(experiment), *command, *soma_options]) == 0
    store = atlas.open_store(tmp_path / "a")
    found = atlas.to_anndata(store, order="input")
    expected = cells[cells.obs["batch"] == "pbmc3k"]
    assert found.obs_names.tolist() == expected.obs_names.tolist()
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
    np.testing.assert_allclose(found.obsm["X_pca"], expected.obsm["X_pca"])
    other = atlas.create_store(tmp_path / "b")
    other.append(expected.copy(), study="s", batch_key="batch", label_key="cell_type")
    assert store.fingerprint != ""
    np.testing.assert_array_equal(store.index_array("row_hash"), other.index_array("row_hash"))


def test_training_and_choice_of_genes(experiment, cells, tmp_path):
    source = opened(experiment)
    store = atlas.create_store(tmp_path / "store")
    store.append(cells.copy(), study="experiment", batch_key="batch", label_key="cell_type")
    genes = atlas.select_genes(source, n=60)
    assert genes == atlas.select_genes(store, n=60)
    options = {"n_hidden": 16, "n_latent": 4, "device": "cpu", "max_epochs": 1}
    model = atlas.train(source, genes=genes, out=tmp_path / "run", **options)
    z, ours = (atlas.embed(model, s, name=None) for s in (source, store))
    order = np.argsort(store.index_array("input_position"))
    np.testing.assert_allclose(z, ours[order], atol=1e-5)


def test_without_the_package(experiment, monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(soma_matrix, "import_module", absent)
    with pytest.raises(ConfigError, match=r"need the package tiledbsoma(.*\n)*.*\[soma\]"):
        opened(experiment)


def test_chosen_genes_share_what_is_open(experiment, monkeypatch):
    source = opened(experiment)
    starts = np.arange(source.n_obs)
    lengths = source.count_values(starts, starts + 1)
    assert lengths.sum() > 0

    def again(*_: object) -> None:
        raise AssertionError("values are counted again")

    monkeypatch.setattr(soma_matrix.SomaMatrix, "_tables", again)
    view = source.select(list(source.gene_table.names[5:9]))
    np.testing.assert_array_equal(view.count_values(starts, starts + 1), lengths)
    assert (view.n_vars, source.n_vars) == (4, 300)
    assert view.fingerprint != source.fingerprint


def test_workers_forked_and_pickled(experiment):
    from torch.utils.data import DataLoader

    source = opened(experiment)
    source.read_rows(0, 10)
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    loader = MinibatchLoader(source, 64)
    loaded = DataLoader(TorchDataset(loader), batch_size=None, num_workers=1)
    assert sum(len(minibatch["rows"]) for minibatch in loaded) == source.n_obs


def _census(path: Path, cells: ad.AnnData, nnz: np.ndarray) -> Path:
    """As CELLxGENE Census: no names of cells, gene symbols beside ids, raw and normalized."""
    n, genes = cells.shape
    adata = ad.AnnData(
        sp.csr_matrix(cells.X, dtype=np.float32),
        pd.DataFrame({"tissue": np.where(np.arange(n) % 3, "lung", "blood"), "nnz": nnz}),
        pd.DataFrame(
            {
                "feature_id": [f"ENSG{i:011d}" for i in range(genes)],
                "feature_name": cells.var_names.to_numpy(),
            }
        ),
    )
    adata.obs_names, adata.var_names = ([str(i) for i in range(k)] for k in (n, genes))
    tiledbsoma.io.from_anndata(
        str(path),
        adata,
        measurement_name="RNA",
        X_layer_name="raw",
        obs_id_name="cell",
        var_id_name="feature",
    )
    with soma.Experiment.open(str(path), "w") as there:
        entries = sp.coo_matrix(adata.X)
        layer = there.ms["RNA"].X.add_new_sparse_ndarray(
            "normalized", type=pa.float32(), shape=adata.shape
        )
        layer.write(
            pa.table(
                {
                    "soma_dim_0": entries.row.astype(np.int64),
                    "soma_dim_1": entries.col.astype(np.int64),
                    "soma_data": entries.data / 3,
                }
            )
        )
    return path


def test_what_census_publishes(cells, tmp_path, capsys):
    nnz = np.diff(sp.csr_matrix(cells.X).indptr)
    path = _census(tmp_path / "census", cells, nnz)
    source = atlas.open_store(path, measurement="RNA", obs_filter="tissue == 'lung'")
    lung = np.arange(cells.n_obs) % 3 != 0
    np.testing.assert_array_equal(matrix(source), cells.X[lung].toarray())
    assert source.gene_table.ids[7] == "ENSG00000000007"
    assert source.gene_table.names[7] == cells.var_names[7]
    starts = np.arange(source.n_obs)
    np.testing.assert_array_equal(source.count_values(starts, starts + 1), nnz[lung])
    normalized = atlas.open_store(path, measurement="RNA", layer="normalized")
    with pytest.raises(CountsError, match=r"X\['normalized'\].*holds fractions(.*\n)*.*raw"):
        normalized.read_rows(0, 50)
    # said to hold less, of a row that is not looked at when it is opened
    wrong = nnz.copy()
    wrong[cells.n_obs // 2 + 1] = 1
    path = _census(tmp_path / "wrong", cells, wrong)
    with pytest.raises(InputError, match=r"more values than obs\['nnz'\] says"):
        matrix(atlas.open_store(path, measurement="RNA"))
    # and where it is wrong throughout, values are counted
    path = _census(tmp_path / "other", cells, nnz + 5)
    source = atlas.open_store(path, measurement="RNA")
    starts = np.arange(source.n_obs)
    np.testing.assert_array_equal(source.count_values(starts, starts + 1), nnz)


def test_what_is_written_later_does_not_show(cells, tmp_path):
    path = tmp_path / "experiment"
    tiledbsoma.io.from_anndata(str(path), cells.copy(), measurement_name="RNA")
    source = opened(path)
    with soma.Experiment.open(str(path), "w") as there:
        values = {"soma_dim_0": [0], "soma_dim_1": [0], "soma_data": [77.0]}
        there.ms["RNA"].X["data"].write(
            pa.table(
                {name: pa.array(v, pa.int64()) for name, v in list(values.items())[:2]}
                | {"soma_data": pa.array([77.0], pa.float32())}
            )
        )
    np.testing.assert_array_equal(matrix(source), cells.X.toarray())
    assert matrix(opened(path))[0, 0] == 77


def test_wrong_use(experiment, cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    two = tmp_path / "two"
    tiledbsoma.io.from_anndata(str(two), cells.copy(), measurement_name="RNA")
    with soma.Experiment.open(str(two), "w") as there:
        there.ms.add_new_collection("ATAC", soma.Measurement)
    dense = tmp_path / "dense"
    tiledbsoma.io.from_anndata(
        str(dense), cells.copy(), measurement_name="RNA", X_kind=soma.DenseNDArray
    )
    other = tmp_path / "group"
    soma.Collection.create(str(other)).close()
    cases: list[tuple[Path, dict[str, object], type[AtlasError], str]] = [
        (two, {}, InputError, r"measurement is not given(.*\n)*.*'ATAC', 'RNA'"),
        (experiment, {"measurement": "rna"}, InputError, r"no such measurement(.*\n)*.*'RNA'"),
        (experiment, {"obs_filter": "tissue = lung"}, InputError, "filter of obs cannot be used"),
        (experiment, {"obs_filter": "nowhere == 'x'"}, InputError, "columns of obs: .*batch"),
        (experiment, {"obs_filter": "batch == 'x'"}, InputError, "keeps no cell"),
        (experiment, {"layer": "raw"}, MissingColumnError, "no layer 'raw'"),
        (experiment, {"batch_key": "x"}, MissingColumnError, "no obs column for the batch"),
        (dense, {}, InputError, "is dense"),
        (other, {"measurement": "RNA"}, InputError, "cannot be opened as a SOMA experiment"),
        (tmp_path / "cells.h5ad", {"measurement": "RNA"}, ConfigError, "Only a SOMA experiment"),
    ]
    for path, options, error, message in cases:
        with pytest.raises(error, match=message):
            atlas.open_store(path, **options)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="no states by number"):
        atlas.open_store(experiment, measurement="RNA", number=2)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="cannot be opened as a SOMA experiment"):
        atlas.open_store("s3://no-such-bucket-of-atlas/x", measurement="RNA")
    with pytest.raises(InputError, match="a SOMA experiment, which has no raw"):
        atlas.create_store(tmp_path / "s").append(experiment, study="a", use_raw=True)


def test_an_experiment_by_uri(object_store, experiment, cells, monkeypatch, tmp_path):
    where = {
        "ENDPOINT_OVERRIDE": f"127.0.0.1:{object_store.port}",
        "SCHEME": "http",
        "USE_VIRTUAL_ADDRESSING": "false",
        "REGION": "us-east-1",
    }
    for name, value in where.items():
        monkeypatch.setenv(f"TILEDB_VFS_S3_{name}", value)
    uri = object_store.upload(experiment, "soma")
    source = opened(uri, obs_filter="batch == 'pbmc3k'")
    expected = cells[cells.obs["batch"] == "pbmc3k"].X.toarray()
    np.testing.assert_array_equal(matrix(source), expected)
    store = atlas.create_store(tmp_path / "store")
    store.append(uri, study="s", measurement="RNA", obs_filter="batch == 'pbmc3k'")
    assert store.n_obs == len(expected)


def test_tiles_are_not_merged_before_reading(experiment):
    """That merge can outlive its query, and the process dies (TileDB, pull request 5723)."""
    context = soma_matrix.Opened(experiment, str(experiment)).experiment.context
    setting = "sm.query.sparse_global_order.preprocess_tile_merge"
    assert context.tiledb_config[setting] == "0"
