"""What goes into a store comes out of it: exactly, in one row order, through every door."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from atlas.errors import (
    ConfigError,
    InputError,
    MissingColumnError,
    StoreError,
    StudyExistsError,
)
from atlas.store import create_store, open_store, to_anndata
from loaders import MinibatchLoader, RowSource

MakeStudy = Callable[..., AnnData]


@pytest.mark.parametrize("profile", ["fast", "portable", "small"])
def test_anndata_reads_a_study_exactly(tmp_path: Path, make_study: MakeStudy, profile: str) -> None:
    adata = make_study(n=300, genes=70)
    adata.X.data[5] = 70_000  # does not fit in uint16
    adata.layers["spliced"] = adata.X * 0.5
    adata.uns["spatial"] = {"slide": {"scalefactors": {"spot": 2.5}}}
    store = create_store(tmp_path / "s.atlas")
    store.append(adata, study="one", profile=profile, keep_layers=["spliced"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = anndata.io.read_zarr(tmp_path / "s.atlas" / "studies" / "one")
    back = back[adata.obs_names].copy()
    assert (back.X != adata.X).nnz == 0
    assert back.X.dtype == np.uint32
    assert (back.layers["spliced"] != adata.layers["spliced"]).nnz == 0
    assert list(back.var_names) == list(adata.var_names)
    back.obs["lane"] = back.obs["lane"].astype(object)  # as AnnData itself does on writing
    pd.testing.assert_frame_equal(back.obs, adata.obs)
    np.testing.assert_array_equal(back.obsm["X_pca"], adata.obsm["X_pca"])
    assert back.uns["spatial"]["slide"]["scalefactors"]["spot"] == 2.5


def test_narrow_types_on_disk(tmp_path: Path, make_study: MakeStudy) -> None:
    store = create_store(tmp_path / "s.atlas")
    store.append(make_study(), study="one")
    _, indices, data = store.study("one").counts.read(0, 60)
    assert indices.dtype == np.uint16
    assert data.dtype == np.uint16


def test_one_row_order_everywhere(tmp_path: Path, make_study: MakeStudy) -> None:
    inputs = {
        "one": make_study(50, 30, seed=1, prefix="x"),
        "two": make_study(70, [f"gene{i}" for i in range(45, 10, -1)], seed=2, prefix="y"),
        "three": make_study(1, 20, seed=3, prefix="z"),
    }
    store = create_store(tmp_path / "s.atlas")
    for name, adata in inputs.items():
        store.append(adata, study=name, batch_key="batch", label_key="cell_type")
    assert isinstance(store, RowSource)
    assert store.studies == ("one", "two", "three")
    assert store.n_obs == 121
    assert store.segments == (0, 50, 120, 121)

    obs = store.obs()
    # within a study: rising blake2b-64 of (study, row name)
    for name, (a, b) in zip(inputs, [(0, 50), (50, 120), (120, 121)], strict=True):
        hashes = [
            int.from_bytes(
                hashlib.blake2b(f"{name}\0{row}".encode(), digest_size=8).digest(), "little"
            )
            for row in obs.index[a:b]
        ]
        assert hashes == sorted(hashes)
        assert set(obs.index[a:b]) == set(inputs[name].obs_names)

    wide = {}
    for name, adata in inputs.items():
        frame = pd.DataFrame(adata.X.toarray(), adata.obs_names, adata.var_names)
        wide[name] = frame.reindex(columns=store.var.index, fill_value=0)
    expected = pd.concat(wide.values()).loc[obs.index].to_numpy()
    np.testing.assert_array_equal(to_anndata(store).X.toarray(), expected)
    for minibatch in MinibatchLoader(store, minibatch_size=16, seed=3):
        np.testing.assert_array_equal(minibatch.to_scipy().toarray(), expected[minibatch.rows])
        np.testing.assert_array_equal(
            np.array(store.batches)[minibatch.obs["batch"]],
            obs["atlas_batch"].to_numpy()[minibatch.rows],
        )
    genes = ["gene40", "gene3", "gene12"]
    view = store.select(genes)
    block = view.read_rows(50, 120)
    chosen = sp.csr_matrix((block.data, block.indices, block.indptr), shape=(70, 3)).toarray()
    columns = store.var.index.get_indexer(genes)
    np.testing.assert_array_equal(chosen, expected[50:120][:, columns])
    np.testing.assert_array_equal(view.presence, [[0, 1, 1], [1, 0, 1], [0, 1, 1]])


def test_every_obs_column_survives_beside_the_codes(tmp_path: Path, make_study: MakeStudy) -> None:
    adata = make_study()
    adata.obs["study"] = "of the input"
    adata.obs.loc["cell3", "cell_type"] = np.nan
    other = make_study(prefix="other", seed=5)
    del other.obs["score"]
    store = create_store(tmp_path / "s.atlas")
    store.append(adata, study="one", batch_key=["batch", "lane"], label_key="cell_type")
    store.append(other, study="two")
    obs = store.obs()
    mine = obs.loc[adata.obs_names]
    assert (mine["study"] == "of the input").all()
    pd.testing.assert_series_equal(
        mine["cell_type"].astype(object), adata.obs["cell_type"].astype(object)
    )
    np.testing.assert_array_equal(mine["score"].astype(float), adata.obs["score"])
    assert obs.loc[other.obs_names, "score"].isna().all()
    expected = "one/" + adata.obs["batch"].astype(str) + "|" + adata.obs["lane"]
    assert list(mine["atlas_batch"]) == list(expected)
    assert set(obs.loc[other.obs_names, "atlas_batch"]) == {"two"}
    unlabeled = adata.obs["cell_type"].isna() | (adata.obs["cell_type"] == "Unknown")
    assert list(mine["atlas_label"].isna()) == list(unlabeled)
    assert obs.loc[other.obs_names, "atlas_label"].isna().all()
    assert store.labels == ("B", "T")
    assert list(store.obs(["score", "atlas_study"]).columns) == ["score", "atlas_study"]
    with pytest.raises(MissingColumnError, match=r"no such obs column\n  found: 'donor'"):
        store.obs(["donor"])


def test_codes_are_append_only_and_old_readers_keep_their_state(
    tmp_path: Path, make_study: MakeStudy
) -> None:
    store = create_store(tmp_path / "s.atlas")
    first = make_study()
    first.obs["cell_type"] = "Z"
    store.append(first, study="one", batch_key="batch", label_key="cell_type")
    before = open_store(tmp_path / "s.atlas")
    second = make_study(prefix="other", genes=40)
    second.obs["cell_type"] = "A"
    store.append(second, study="two", batch_key="batch", label_key="cell_type")
    assert store.labels == ("Z", "A")
    assert store.batches == ("one/a", "one/b", "two/a", "two/b")
    assert (before.n_obs, before.n_vars, before.labels) == (60, 30, ("Z",))
    assert len(before.obs()) == 60
    assert (store.n_obs, store.n_vars) == (120, 40)
    assert open_store(tmp_path / "s.atlas", number=2).fingerprint == before.fingerprint
    assert store.fingerprint != before.fingerprint


def test_rows_and_input_order_of_an_export(tmp_path: Path, make_study: MakeStudy) -> None:
    store = create_store(tmp_path / "s.atlas")
    one, two = make_study(prefix="x"), make_study(prefix="y", seed=1)
    store.append(one, study="one")
    store.append(two, study="two")
    both = to_anndata(store, order="input")
    assert list(both.obs_names) == [*one.obs_names, *two.obs_names]
    assert abs(both.X - sp.vstack([one.X, two.X])).nnz == 0
    assert both.X.dtype == np.float32
    assert both.X.indices.dtype == np.int32
    np.testing.assert_array_equal(both.obsm["X_pca"][:60], one.obsm["X_pca"])
    whole = to_anndata(store)
    rows = np.array([100, 3, 77])
    some = to_anndata(store, rows=rows)
    assert list(some.obs_names) == list(whole.obs_names[rows])
    np.testing.assert_array_equal(some.X.toarray(), whole.X[rows].toarray())
    mask = np.zeros(120, bool)
    mask[rows] = True
    assert set(to_anndata(store, rows=mask).obs_names) == set(some.obs_names)
    with pytest.raises(ConfigError, match="positions from 0 to 119"):
        to_anndata(store, rows=[120])


def test_same_row_names_in_two_studies_are_told_apart_and_reported(
    tmp_path: Path, make_study: MakeStudy
) -> None:
    store = create_store(tmp_path / "s.atlas")
    adata = make_study()
    assert store.append(adata, study="one").same_counts == {}
    shuffled = adata[:20, ::-1].copy()
    report = store.append(shuffled, study="two")
    filled = int((np.asarray(adata.X.sum(axis=1)).ravel()[:20] > 0).sum())
    assert report.same_counts == {"one": filled}
    assert report.same_names == {"one": 20}
    with pytest.warns(UserWarning, match="same row name"):
        export = to_anndata(store)
    assert export.obs_names.is_unique


def test_the_gene_table_grows_only_where_asked(tmp_path: Path, make_study: MakeStudy) -> None:
    first = create_store(tmp_path / "first.atlas", first=True)
    first.append(make_study(genes=20), study="one")
    first.append(make_study(genes=[f"gene{i}" for i in range(10, 40)], prefix="o"), study="two")
    assert first.n_vars == 20
    assert first.presence()[1].sum() == 10
    given = create_store(tmp_path / "given.atlas", genes=["gene5", "gene2", "gene99"])
    adata = make_study()
    given.append(adata, study="one")
    assert list(given.var.index) == ["gene5", "gene2", "gene99"]
    counts = to_anndata(given)[adata.obs_names].X.toarray()
    np.testing.assert_array_equal(counts[:, :2], adata[:, ["gene5", "gene2"]].X.toarray())
    assert not counts[:, 2].any()
    with pytest.raises(InputError, match=r"(?i)gene"):
        given.append(make_study(genes=["A", "B"], prefix="o"), study="two")
    assert given.studies == ("one",)


def test_splits_are_stable_hash_ranges(tmp_path: Path, make_study: MakeStudy) -> None:
    store = create_store(tmp_path / "s.atlas")
    store.append(make_study(400, 5), study="one")
    before = store.split(0.1, 0.2)
    names = store.obs([]).index
    held_out = {names[i] for a, b in before.validation for i in range(a, b)}
    store.append(make_study(300, 5, prefix="o"), study="two")
    after = store.split(0.1, 0.2)
    everything = sorted([*after.train, *after.validation, *after.test])
    assert [a for a, _ in everything[1:]] == [b for _, b in everything[:-1]]
    assert (everything[0][0], everything[-1][1]) == (0, 700)
    names = store.obs([]).index
    assert held_out == {names[i] for a, b in after.validation for i in range(a, b) if b <= 400}
    assert 20 <= len(held_out) <= 65
    assert store.split(0).validation == []
    with pytest.raises(ConfigError, match="out of range"):
        store.split(0.6, 0.5)


def test_more_than_one_shard_and_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atlas.store import layout

    monkeypatch.setattr(layout, "CHUNK", 64)
    monkeypatch.setattr(layout, "SHARD", 256)
    rng = np.random.default_rng(0)
    counts = sp.random(500, 40, density=0.3, random_state=rng, format="csr", dtype=np.float32)
    counts.data = np.ceil(counts.data * 9).astype(np.float32)
    adata = AnnData(X=counts, obs=pd.DataFrame(index=[f"c{i}" for i in range(500)]))
    store = create_store(tmp_path / "s.atlas")
    store.append(adata, study="one")
    assert len(list((tmp_path / "s.atlas/studies/one/X/data/c").iterdir())) == -(-counts.nnz // 256)
    back = to_anndata(store, order="input")
    assert abs(back.X - counts).nnz == 0


def test_names_and_columns_are_checked_before_anything_is_written(
    tmp_path: Path, make_study: MakeStudy
) -> None:
    store = create_store(tmp_path / "s.atlas")
    store.append(make_study(), study="one")
    files = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(StudyExistsError, match="found: one"):
        store.append(make_study(), study="one")
    with pytest.raises(ConfigError, match="cannot have this name"):
        store.append(make_study(), study="../two")
    with pytest.raises(MissingColumnError, match=r"found: 'donor'\n  expected: one of batch, lane"):
        store.append(make_study(), study="two", batch_key="donor")
    with pytest.raises(MissingColumnError, match="label"):
        store.append(make_study(), study="two", label_key="donor")
    with pytest.raises(MissingColumnError, match="no such layer to keep"):
        store.append(make_study(), study="two", keep_layers=["x"])
    missing = make_study()
    missing.obs.loc["cell1", "batch"] = np.nan
    with pytest.raises(InputError, match="Some cells have no batch"):
        store.append(missing, study="two", batch_key="batch")
    mixed = make_study()
    mixed.obs["odd"] = [1, "x"] * 30
    with pytest.raises(InputError, match="column 'odd' mixes types"):
        store.append(mixed, study="two")
    assert sorted(p for p in tmp_path.rglob("*")) == files
    with pytest.raises(StoreError, match="cannot be made here"):
        create_store(tmp_path / "s.atlas")
    with pytest.raises(StoreError, match="no such study"):
        store.study("two")
    with pytest.raises(StoreError, match=r"1 of 2 are not in the store, e\.g\. nope"):
        store.select(["gene1", "nope"])
