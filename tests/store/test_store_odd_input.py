"""Input that is unusual but legitimate, and requests that are not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import atlas
from atlas import files
from atlas.errors import ConfigError, CorruptStoreError, InputError, StoreError
from atlas.store import create_store, open_store, to_anndata
from atlas.store import manifest as manifests
from atlas.workflows.rows import rows_where

MakeStudy = Callable[..., AnnData]


def test_columns_of_every_type_are_kept(tmp_path: Path, make_study: MakeStudy) -> None:
    adata = make_study(n=4)
    columns = {
        "bool": [True, False, True, False],
        "maybe": [True, None, False, None],
        "nullable": pd.array([1, None, 3, 4], dtype="Int64"),
        "nullable float": pd.array([1.5, None, 3, 4], dtype="Float64"),
        "text": pd.array(["a", None, "b", "a"], dtype="string"),
        "date": pd.date_range("2026-01-01", periods=4),
        "span": pd.to_timedelta([1, 2, 3, 4], unit="D"),
        "period": pd.period_range("2026-01", periods=4, freq="M"),
        "dates": pd.Categorical(pd.date_range("2026-01-01", periods=4)),
        "small": np.arange(4, dtype=np.int8),
        "none": [None] * 4,
    }
    for name, values in columns.items():
        adata.obs[name] = values
    adata.obs.index.name = "bool"  # as a column is called
    adata.var["chromosome"] = [1, *["X"] * 29][:30]
    adata.var["chromosome"] = adata.var["chromosome"].astype(str)
    store = create_store(tmp_path / "s.atlas")
    store.append(adata, study="one")
    store.append(make_study(prefix="other"), study="two")
    obs = store.obs().loc[adata.obs_names]
    assert obs["bool"].tolist() == columns["bool"]
    assert obs["maybe"].tolist() == [True, pd.NA, False, pd.NA]
    assert obs["nullable"].tolist() == [1, pd.NA, 3, 4]
    assert list(obs["date"].astype(str)) == [f"2026-01-0{i} 00:00:00" for i in (1, 2, 3, 4)]
    assert obs["small"].tolist() == [0, 1, 2, 3]
    to_anndata(store).write_h5ad(tmp_path / "out.h5ad")
    store.verify()


def test_names_that_cannot_be_stored_are_refused_before_the_counts(
    tmp_path: Path, make_study: MakeStudy
) -> None:
    store = create_store(tmp_path / "s.atlas")
    slash = make_study()
    slash.obs["a/b"] = 1
    with pytest.raises(InputError, match="obs has columns that cannot be stored\n  found: 'a/b'"):
        store.append(slash, study="one")
    odd = make_study()
    odd.uns["spatial"] = {"image": object()}
    with pytest.raises(InputError, match="uns/spatial cannot be stored"):
        store.append(odd, study="one")
    assert open_store(store.path).studies == ()


def test_integers_with_gaps_name_the_same_labels(tmp_path: Path, make_study: MakeStudy) -> None:
    one, two = make_study(), make_study(prefix="other")
    one.obs["cluster"] = np.arange(60) % 3
    two.obs["cluster"] = [np.nan, *(np.arange(59) % 3)]
    store = create_store(tmp_path / "s.atlas")
    store.append(one, study="one", label_key="cluster", batch_key="cluster")
    store.append(two, study="two", label_key="cluster")
    assert store.labels == ("0", "1", "2")
    assert (store.obs_codes["label"] < 0).sum() == 1
    assert store.batches == ("one/0", "one/1", "one/2", "two")


def test_rows_are_chosen_by_values_of_any_type(tmp_path: Path, make_study: MakeStudy) -> None:
    adata = make_study()
    adata.obs["i"] = np.arange(60) % 4
    adata.obs["f"] = [np.nan, *(np.arange(59) % 4)]
    adata.obs["type"] = np.where(np.arange(60) % 2, "T, naive", "B")
    store = create_store(tmp_path / "s.atlas")
    store.append(adata, study="one")
    assert rows_where(store, {"i": [1]}).sum() == 15
    assert rows_where(store, "i=1,2").sum() == 30
    assert rows_where(store, "f=1").sum() == 15
    assert rows_where(store, "type=T, naive").sum() == 30
    assert rows_where(store, {"study": "one"}).all()
    assert rows_where(store, {"study": ["one"], "i": ["3"]}).sum() == 15
    with pytest.raises(ConfigError, match="No cell has this value"):
        rows_where(store, "f=nan")
    with pytest.raises(ConfigError, match="chosen by an obs column"):
        rows_where(store, 3)  # type: ignore[arg-type]


def test_repeated_rows_are_exported_as_asked(tmp_path: Path, make_study: MakeStudy) -> None:
    store = create_store(tmp_path / "s.atlas")
    store.append(make_study(), study="one")
    whole = to_anndata(store)
    rng = np.random.default_rng(0)
    for rows in (np.zeros(60, int), rng.integers(0, 60, 60)):
        with pytest.warns(UserWarning, match="row name"):
            some = to_anndata(store, rows=rows)
        np.testing.assert_array_equal(some.X.toarray(), whole.X.toarray()[rows])
        np.testing.assert_array_equal(some.obsm["X_pca"], whole.obsm["X_pca"][rows])


def test_genes_are_chosen_within_a_fixed_table(tmp_path: Path, make_study: MakeStudy) -> None:
    adata = make_study(n=200, genes=40)
    store = create_store(tmp_path / "s.atlas", genes=[f"gene{i}" for i in range(0, 40, 2)])
    store.append(adata, study="one")
    for flavour in ("seurat_v3", "dispersion"):
        genes = atlas.select_genes(store, 5, flavour=flavour)
        assert len(genes) == 5
        assert set(genes) <= set(store.var.index)
    for given in (store.var.index[:3], np.array(["gene2", "gene4"]), pd.Series(["gene8"])):
        assert store.select(given).n_vars == len(given)


def test_a_failed_ingest_never_removes_what_another_wrote(
    tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "s.atlas"
    make_study().write_h5ad(tmp_path / "one.h5ad")
    from atlas.workflows import data

    real = data.create_store

    def create_and_let_another_append(path: Path, **options: object) -> object:
        store = real(path)
        open_store(path).append(make_study(), study="another")
        return store

    monkeypatch.setattr(data, "create_store", create_and_let_another_append)
    with pytest.raises(StoreError):
        data.ingest(root, tmp_path / "one.h5ad", study="another")
    assert open_store(root).studies == ("another",)
    with pytest.raises(ConfigError, match="fixed when it is made"):
        data.ingest(root, tmp_path / "one.h5ad", study="two", first=True)


def test_a_store_can_be_made_where_a_crash_left_its_beginnings(
    tmp_path: Path, make_study: MakeStudy
) -> None:
    make_study().write_h5ad(tmp_path / "one.h5ad")
    from atlas.workflows import ingest

    root = tmp_path / "s.atlas"
    for folder in ("manifests", "genes", "studies", "parts"):
        (root / folder).mkdir(parents=True)
    (root / "genes/000001.json").write_text("{")
    (root / "manifests/.000001.json.7.partial").write_text("{")
    ingest(root, tmp_path / "one.h5ad", study="one")
    open_store(root).verify()
    (tmp_path / "empty").mkdir()
    ingest(tmp_path / "empty", tmp_path / "one.h5ad", study="one")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StoreError):
        ingest(tmp_path / "mine", tmp_path / "one.h5ad", study="one")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_what_does_not_belong_in_a_store_does_not_stop_a_writer(
    tmp_path: Path, make_study: MakeStudy
) -> None:
    store = create_store(tmp_path / "s.atlas")
    (store.path / "parts/.DS_Store").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (store.path / "studies/link").symlink_to(tmp_path / "elsewhere")
    store.append(make_study(), study="one")
    assert (tmp_path / "elsewhere").is_dir()
    with manifests.writer(store.path, "again"):
        pass


def test_a_commit_that_could_not_be_synced_did_not_happen(
    tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path / "s.atlas")
    real = files.sync_folder

    def fail_for_manifests(path: Path) -> None:
        if path.name == "manifests":
            raise OSError(5, "Input/output error")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_folder", fail_for_manifests)
        with pytest.raises(StoreError, match="the store is as it was"):
            store.append(make_study(), study="one")
    assert open_store(store.path).studies == ()
    store.append(make_study(), study="one")


def test_a_store_opened_by_a_relative_path_outlives_a_change_of_folder(
    tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = create_store("s.atlas")
    store.append(make_study(), study="one")
    os.chdir("/")
    assert len(store.obs()) == 60


def test_requests_that_make_no_sense(tmp_path: Path, make_study: MakeStudy) -> None:
    store = create_store(tmp_path / "s.atlas")
    with pytest.raises(ConfigError, match="no such profile\n  found: 'zstd'"):
        store.append(make_study(), study="one", profile="zstd")  # type: ignore[arg-type]
    for name in ("a\n", 5, "", ".hidden"):
        with pytest.raises(ConfigError, match="cannot have this name"):
            store.append(make_study(), study=name)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no dask scheduler answers"):
        store.append(make_study(), study="one", scheduler="nonsense")
    store.append(make_study(), study="one")
    (store.path / "studies/one/zarr.json").unlink()
    with pytest.raises(CorruptStoreError):
        to_anndata(open_store(store.path))
    with pytest.raises(ConfigError, match="max_epochs is out of range"):
        atlas.train(store, genes=["gene1"], max_epochs=0, out=tmp_path / "run")
