"""Updates that are refused, or fail in the middle: the atlas stays as it was."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from living_helpers import files_of, index_of, update
from workflows_helpers import study as make_study

import atlas
from atlas.errors import (
    AtlasError,
    ConfigError,
    CountsError,
    InputError,
    LockedError,
    ModelError,
    StoreError,
    StudyExistsError,
)
from atlas.store import manifest as manifests


def _log_normalised(path: Path) -> Path:
    adata = make_study(3, 200, range(60))
    adata.X = np.log1p(adata.X)
    adata.write_h5ad(path / "log.h5ad")
    return path / "log.h5ad"


def _other_genes(path: Path, n_known: int) -> Path:
    adata = make_study(3, 200, range(60))
    others = [f"ENSMUSG{i:011d}" for i in range(n_known, 60)]
    adata.var_names = [*adata.var_names[:n_known], *others]
    adata.write_h5ad(path / "mouse.h5ad")
    return path / "mouse.h5ad"


def test_bad_input_leaves_everything_as_it_was(
    living_folder: Path, living_store: Path, tmp_path: Path
) -> None:
    before = files_of(living_store)
    query = living_folder / "q.h5ad"
    with pytest.raises(StudyExistsError, match="in the store already\n  found: reference_2"):
        update(living_store, query, study="reference_2")
    with pytest.raises(CountsError):
        update(living_store, _log_normalised(tmp_path))
    with pytest.raises(InputError, match="no gene in common with the store"):
        update(living_store, _other_genes(tmp_path, 0))
    with pytest.raises(ModelError, match=r"too few of the model's genes\n  found: kang has 30%"):
        update(living_store, _other_genes(tmp_path, 18))
    with pytest.raises(StoreError, match=r"no such model\n  found: scanvi\n  expected: one of s"):
        update(living_store, query, model="scanvi")
    with pytest.raises(ConfigError, match="leaves the reference where it is"):
        update(living_store, query, strategy="all")
    with pytest.raises(ConfigError, match="no such options\n  found: epochs"):
        update(living_store, query, epochs=3)
    with pytest.raises(ConfigError, match="cannot have this name"):
        update(living_store, query, study="../kang")
    with pytest.raises(ConfigError, match="false_unknown is out of range"):
        update(living_store, query, false_unknown=1.5)
    assert files_of(living_store) == before


def test_a_second_update_is_refused_by_the_lock(living_folder: Path, living_store: Path) -> None:
    with (
        manifests.writer(living_store, "update other"),
        pytest.raises(LockedError, match=r"Another writer is at work[\s\S]*: update other"),
    ):
        update(living_store, living_folder / "q.h5ad")
    assert not list(living_store.glob(".update-*"))


def test_a_full_disk_is_an_error_and_the_same_call_goes_on(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = files_of(living_store / "manifests")
    with monkeypatch.context() as patch:
        patch.setattr("atlas.store.fork.os.link", full)
        with pytest.raises(StoreError, match="No space left"):
            update(living_store, living_folder / "q.h5ad")
    assert files_of(living_store / "manifests") == before
    assert not (living_store / "studies" / "kang").exists()
    assert update(living_store, living_folder / "q.h5ad").notes == (
        "going on with the update that was interrupted",
    )
    assert atlas.verify(living_store).whole


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.8, 0.97])
def test_a_full_disk_leaves_the_atlas_as_it_was(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """At some of the writes of an update; with room again the same call goes on or starts anew."""
    from atlas import files

    write = files.write_bytes
    left = [
        int(share * _n_writes(living_folder, living_store.with_name("counted.atlas"), monkeypatch))
    ]

    def full(*arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments, **options)

    before = {k: v for k, v in files_of(living_store).items() if not k.startswith(".update")}
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", full)
        with pytest.raises((AtlasError, OSError), match="No space left"):
            update(living_store, living_folder / "q.h5ad")
    there = {k: v for k, v in files_of(living_store).items() if not k.startswith(".update")}
    assert {k: v for k, v in there.items() if k in before} == before
    assert atlas.open_store(living_store).number == 4
    update(living_store, living_folder / "q.h5ad")
    opened = atlas.open_store(living_store)
    assert (opened.number, opened.models["scvi"]) == (5, 2)
    assert len(index_of(opened)) == 800
    assert atlas.verify(living_store).whole


def _n_writes(living_folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Calls of ``write_bytes`` in an update."""
    from atlas import files

    n, write = 0, files.write_bytes

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal n
        n += 1
        write(*arguments, **options)

    shutil.copytree(living_folder / "s.atlas", path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", counted)
        update(path, living_folder / "q.h5ad")
    return n


def test_a_batch_of_a_name_that_the_reference_has_is_another_one(
    living_folder: Path, living_store: Path
) -> None:
    with pytest.warns(UserWarning, match=r"taken for other ones.*: kang/batch_1, kang/batch_2$"):
        update(living_store, living_folder / "q.h5ad", max_epochs=1)
    opened = atlas.open_store(living_store)
    assert atlas.stored_model(opened, "scvi").batches[-2:] == ("kang/batch_1", "kang/batch_2")
