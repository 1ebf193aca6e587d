"""The index of neighbours that is kept with a model's embedding, and grows with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from living_helpers import index_of, living_atlas, update

import atlas
from atlas.errors import (
    CorruptStoreError,
    StoreError,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``s.atlas`` with a model kept, its run, and ``q.h5ad``."""
    return living_atlas(tmp_path_factory.mktemp("living"))


@pytest.fixture(scope="module")
def updated(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store after one update; tests do not write to it."""
    path = tmp_path_factory.mktemp("updated") / "s.atlas"
    shutil.copytree(made / "s.atlas", path)
    update(path, made / "q.h5ad", false_unknown=None)
    return path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the store to write to."""
    return Path(shutil.copytree(made / "s.atlas", tmp_path / "s.atlas"))


def test_the_index_grows_by_the_new_cells_and_is_named_with_the_embedding(
    made: Path, updated: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = atlas.open_store(made / "s.atlas"), atlas.open_store(updated)
    assert len(index_of(before)) == 600
    assert len(index_of(after)) == 800
    values = json.loads((updated / "manifests" / "000005.json").read_bytes())
    named = values["embeddings"]["scvi"]["index"]
    assert named["path"] == "parts/.indexes/scvi-000005"
    assert values["models"]["scvi"]["version"] == 2
    assert values["studies"][2]["parts"]["embedding:scvi"]["path"].endswith("-000005")
    # its answers are those of all pairs in float64
    z = after.embedding("scvi").astype(np.float64)
    rows = np.arange(0, 800, 50)
    distance = np.linalg.norm(z[rows][:, None] - z, axis=-1)
    distance[np.arange(len(rows)), rows] = np.inf
    found = index_of(after).neighbours(10, rows)
    np.testing.assert_array_equal(found.indices, np.argsort(distance, axis=1)[:, :10])

    added = []
    add = atlas.NeighborIndex.add

    def counted(index: atlas.NeighborIndex, rows: Any) -> None:
        added.append((len(index), len(rows)))
        add(index, rows)

    monkeypatch.setattr(atlas.NeighborIndex, "add", counted)
    update(store, made / "q.h5ad")
    assert added == [(600, 200)]


def test_an_approximate_index_gives_labels_too(
    made: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atlas.workflows import indexing

    build = atlas.NeighborIndex.build
    monkeypatch.setattr(
        indexing.NeighborIndex, "build", lambda z, **options: build(z, kind="ivf", **options)
    )
    opened = atlas.open_store(store)
    opened.write_embedding("scvi", opened.embedding("scvi"), {})
    assert opened.index_folder("scvi") is None  # of the rows before
    atlas.keep(opened, made / "run", "again", device="cpu")
    monkeypatch.undo()
    update(store, made / "q.h5ad", model="again")
    opened = atlas.open_store(store)
    folder = opened.index_folder("again")
    index = atlas.NeighborIndex.load(folder, embedding=opened.embedding("again"))
    assert index.choice.kind == "ivf"
    assert len(index) == 800
    new = opened.obs_codes["study"] == 2
    asked = {"embedding": "again", "reference": ~new, "query": new, "name": None}
    by_index = atlas.transfer_labels(opened, **asked, false_unknown=0.05)
    exactly = atlas.transfer_labels(opened, **asked, false_unknown=0.05, backend="torch")
    assert "ivf" in by_index.backend.lower()
    kept = opened.obs()["again_label"][new].tolist()
    assert kept == by_index.table["transferred"].tolist()
    assert (by_index.table["transferred"] == exactly.table["transferred"]).mean() > 0.95


def test_an_index_that_is_not_of_the_embedding_is_refused(
    made: Path, updated: Path, store: Path, tmp_path: Path
) -> None:
    # a state that names the index of the state before: what no command writes
    changed = Path(shutil.copytree(updated, tmp_path / "changed.atlas"))
    path = changed / "manifests" / "000005.json"
    values = json.loads(path.read_bytes())
    old = json.loads((changed / "manifests" / "000004.json").read_bytes())
    values["embeddings"]["scvi"]["index"] = old["embeddings"]["scvi"]["index"]
    path.write_text(json.dumps(values))
    opened = atlas.open_store(changed)
    for call in (
        lambda: atlas.transfer_labels(opened, embedding="scvi", reference="study=reference_1"),
        lambda: update(changed, made / "q.h5ad", study="another"),
    ):
        with pytest.raises(
            StoreError,
            match=r"changed since the index of 'scvi' was built\n  found: an index of 600 × 3",
        ):
            call()
    assert atlas.open_store(changed).number == 5
    # damaged files are refused, and found by verify
    damaged = store / "parts" / ".indexes" / "scvi-000004" / "vectors.npy"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="A file of the index of 'scvi' is not what"):
        atlas.transfer_labels(
            atlas.open_store(store), embedding="scvi", reference="study=reference_1"
        )
    (finding,) = atlas.verify(store).findings
    assert finding.path == str(damaged)


def test_a_study_that_is_dropped_leaves_no_row_in_an_index(made: Path, store: Path) -> None:
    opened = atlas.open_store(store)
    opened.drop("reference_2", purge=True)
    assert opened.index_folder("scvi") is None
    assert not list(store.glob("parts/.indexes/*"))
    report = update(store, made / "q.h5ad")  # without it: the index is built anew
    assert report.n_obs == 200
    assert len(index_of(atlas.open_store(store))) == 500
