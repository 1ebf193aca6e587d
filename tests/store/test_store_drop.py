"""A study that is dropped: what goes, what stays, and the name that is free again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData

import atlas
from atlas import files
from atlas.cli import main
from atlas.errors import LockedError, StoreError
from atlas.store import CountStore, create_store, open_store, to_anndata
from atlas.store import manifest as manifests

MakeStudy = Callable[..., AnnData]


@pytest.fixture
def store(tmp_path: Path, make_study: MakeStudy) -> CountStore:
    store = create_store(tmp_path / "s.atlas")
    for seed, name in enumerate(("one", "two", "three")):
        adata = make_study(n=50 + 10 * seed, genes=30 + seed, seed=seed, prefix=name)
        store.append(adata, study=name, batch_key="batch", label_key="cell_type")
    z = np.random.default_rng(0).normal(size=(180, 2)).astype(np.float32)
    store.write_embedding("z", z, {})
    return store


def test_the_new_state_lacks_it_and_older_states_do_not(store: CountStore) -> None:
    whole = to_anndata(store, embedding="z")
    report = store.drop("two")
    assert (report.study, report.n_obs, report.manifest) == ("two", 60, 6)
    assert (report.kept_states, report.removed_states) == ((3, 4, 5), ())
    assert report.kept_bytes > 0 == report.freed_bytes
    assert store.studies == ("one", "three")
    rest = np.r_[0:50, 110:180]
    now = to_anndata(open_store(store.path), embedding="z")
    assert list(now.obs_names) == list(whole.obs_names[rest])
    assert abs(now.X - whole.X[rest]).nnz == 0
    np.testing.assert_array_equal(now.obsm["X_z"], whole.obsm["X_z"][rest])
    # codes are for ever
    assert store.batches == ("one/a", "one/b", "two/a", "two/b", "three/a", "three/b")
    assert set(store.obs_codes["batch"]) == {0, 1, 4, 5}
    assert set(store.obs_codes["study"]) == {0, 1}
    old = open_store(store.path, number=5)
    assert abs(to_anndata(old).X - whole.X).nnz == 0
    old.verify()
    assert atlas.verify(store.path).whole


def test_the_name_can_be_used_again(store: CountStore, make_study: MakeStudy) -> None:
    before = to_anndata(store)
    store.drop("two")
    again = make_study(n=40, genes=33, seed=9, prefix="new")
    store.append(again, study="two", batch_key="batch", label_key="cell_type")
    assert store.studies == ("one", "three", "two")
    assert store.manifest.studies[-1].path == "studies/two@000007"
    assert store.batches == ("one/a", "one/b", "two/a", "two/b", "three/a", "three/b")
    assert set(store.obs_codes["batch"][120:]) == {2, 3}
    now = to_anndata(store, order="input")
    assert abs(now.X[120:, :33] - again.X).nnz == 0
    assert abs(to_anndata(open_store(store.path, number=5)).X - before.X).nnz == 0
    store.write_embedding("z", np.zeros((160, 3), np.float32), {})
    assert store.embedding("z").shape == (160, 3)
    assert open_store(store.path, number=5).embedding("z").shape == (180, 2)
    assert atlas.verify(store.path).whole
    # and once more: the number keeps the folders apart
    store.drop("two")
    store.append(make_study(n=10, seed=3, prefix="third"), study="two")
    assert store.manifest.studies[-1].path == "studies/two@000010"
    assert atlas.verify(store.path).whole


def test_a_purge_removes_states_and_files(store: CountStore, make_study: MakeStudy) -> None:
    report = store.drop("two", purge=True)
    assert (report.removed_states, report.kept_states) == ((3, 4, 5), ())
    assert report.freed_bytes > 0 == report.kept_bytes
    assert manifests.numbers(store.path) == [1, 2, 6]
    assert not list(store.path.rglob("*two*"))
    for number in (1, 2, 6):
        open_store(store.path, number=number).verify()
    with pytest.raises(StoreError, match=r"no manifest of this number\n  found: 5"):
        open_store(store.path, number=5)
    assert store.embedding("z").shape == (120, 2)
    assert atlas.verify(store.path).whole
    store.append(make_study(n=10, prefix="new"), study="two")
    assert store.manifest.studies[-1].path == "studies/two"
    assert store.manifest.number == 7
    assert atlas.verify(store.path).whole


def test_what_was_dropped_before_can_be_purged(store: CountStore) -> None:
    store.drop("two")
    with pytest.raises(StoreError, match=r"(?s)no such study.*\[3, 4, 5\] hold it still: --purge"):
        store.drop("two")
    report = store.drop("two", purge=True)
    assert (report.n_obs, report.manifest, report.removed_states) == (0, 6, (3, 4, 5))
    assert manifests.numbers(store.path) == [1, 2, 6]
    with pytest.raises(StoreError, match=r"found: two\n  expected: one of one, three\n  path"):
        store.drop("two", purge=True)


def test_the_last_study_can_go(store: CountStore, make_study: MakeStudy) -> None:
    for name in ("one", "two", "three"):
        store.drop(name, purge=True)
    assert store.n_obs == 0
    assert store.n_vars == 32
    assert atlas.verify(store.path).whole
    store.append(make_study(prefix="x"), study="one")
    assert store.n_obs == 60


def test_a_crash_between_commit_and_purge_loses_nothing(
    store: CountStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def fail(path: Path) -> None:
            if path.name == "manifests" and len(manifests.numbers(store.path)) < 6:
                raise OSError(5, "Input/output error")
            real(path)

        real = files.sync_folder
        patch.setattr(files, "sync_folder", fail)
        with pytest.raises(StoreError, match=r"(?s)was dropped, but.*Input/output error"):
            store.drop("two", purge=True)
    assert open_store(store.path).studies == ("one", "three")
    assert atlas.verify(store.path).whole


def test_it_takes_the_lock_and_a_study_that_is_there(store: CountStore) -> None:
    with pytest.raises(StoreError, match=r"found: four\n  expected: one of one, two, three"):
        store.drop("four")
    with manifests.writer(store.path, "append something"), pytest.raises(LockedError):
        store.drop("one")
    assert store.studies == ("one", "two", "three")


def test_the_command_says_what_stays(store: CountStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.record_genes(["gene1", "gene31"], "seurat_v3", 2)  # gene31 is of study three only
    assert main(["drop", str(store.path), "three"]) == 0
    out = capsys.readouterr().out
    assert "three: 70 cells dropped, manifest 7" in out
    assert "older states hold it still (4, 5, 6)" in out
    assert "1 of the chosen genes were measured in no study" in out
    assert main(["drop", str(store.path), "two", "--purge"]) == 0
    out = capsys.readouterr().out
    assert "removed for ever: states 3, 4, 5, 6, 7, " in out
    assert main(["drop", str(store.path), "nobody"]) == 2
