"""Updates of stores and files that look other than they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from living_helpers import KEYS, SMALL, files_of, train_small, update
from workflows_helpers import study as make_study

import atlas
from atlas.errors import ConfigError, ModelError, StudyExistsError
from atlas.workflows import living


def test_an_embedding_by_another_model_is_not_added_to(
    living_folder: Path, living_store: Path, tmp_path: Path
) -> None:
    store = atlas.open_store(living_store)
    other = train_small(store, tmp_path / "other", seed=5)
    atlas.embed(atlas.load_model(other), store, name="scvi", device="cpu")
    before = files_of(living_store)
    with pytest.raises(ModelError, match="The embedding 'scvi' is not of the model 'scvi' that is"):
        update(living_store, living_folder / "q.h5ad")
    assert files_of(living_store) == before

    # the advice of the error, and then the rows are the kept model's
    store = atlas.open_store(living_store)
    kept = atlas.load_model(store.model_folder("scvi"))
    atlas.embed(kept, store, name="scvi", device="cpu")
    update(living_store, living_folder / "q.h5ad")
    store = atlas.open_store(living_store)
    expected = atlas.embed(atlas.stored_model(store, "scvi"), store, name=None, device="cpu")
    np.testing.assert_array_equal(store.embedding("scvi"), expected)


def test_keep_does_not_leave_rows_by_another_model(
    living_folder: Path, living_store: Path, tmp_path: Path
) -> None:
    store = atlas.open_store(living_store)
    kept = store.model_folder("scvi")
    store.append(living_folder / "q.h5ad", study="kang", **KEYS)
    extended = atlas.extend_reference(kept, store, out=tmp_path / "run", max_epochs=2, **SMALL)
    atlas.embed(
        atlas.load_model(train_small(store, tmp_path / "other")), store, name="scvi", device="cpu"
    )
    assert atlas.keep(store, tmp_path / "run", device="cpu") == 2
    store = atlas.open_store(living_store)
    expected = atlas.embed(extended, store, name=None, device="cpu")
    np.testing.assert_array_equal(store.embedding("scvi"), expected)


def test_labels_that_came_with_the_file_are_not_taken_for_transferred_ones(
    living_store: Path,
) -> None:
    query = make_study(3, 200, range(60))
    query.obs["scvi_label"] = "FROM_ELSEWHERE"
    before = files_of(living_store)
    with pytest.raises(ConfigError, match="'scvi_label' already, and it holds no transferred"):
        update(living_store, query)
    assert files_of(living_store) == before
    query.obs["scvi_label_uncertainty"] = query.obs["scvi_label_distance"] = 0.0
    report = update(living_store, query)
    assert sum(report.labels.values()) == 200
    assert "FROM_ELSEWHERE" not in report.labels
    kang = atlas.open_store(living_store).study("kang").obs()
    assert "FROM_ELSEWHERE" not in set(kang["scvi_label"].astype(str))
    assert (kang["scvi_label_distance"] != 0).any()


def test_a_study_ingested_by_hand_is_no_update(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("stopped here")

    query = living_folder / "q.h5ad"
    with monkeypatch.context() as patched:
        patched.setattr(living, "_extend", fail)
        with pytest.raises(RuntimeError, match="stopped here"):
            update(living_store, query)
    atlas.open_store(living_store).append(query, study="kang", **KEYS)
    with pytest.raises(StudyExistsError, match="in the store already"):
        update(living_store, query)


@pytest.mark.parametrize("values", [("one", "one"), ("one", None)])
def test_studies_are_left_out_whatever_a_column_of_that_name_says(
    tmp_path: Path, values: tuple[str | None, ...]
) -> None:
    store = atlas.create_store(tmp_path / "s.atlas")
    for i, value in enumerate(values, 1):
        cells = make_study(i, 300, range(60))
        if value is not None:
            cells.obs["study"] = value
        store.append(cells, study=f"reference_{i}", **KEYS)
    atlas.keep(store, train_small(store, tmp_path / "run"), device="cpu")
    report = update(store.path, make_study(3, 200, range(60)))
    assert sum(report.labels.values()) == 200


def test_a_kill_before_the_lineage_is_written_leaves_no_path_of_the_fork(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(living, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            update(living_store, living_folder / "q.h5ad")
    update(living_store, living_folder / "q.h5ad")
    training = atlas.stored_model(atlas.open_store(living_store), "scvi").training
    assert training["store"] == str(living_store)
