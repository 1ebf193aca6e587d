"""The index of neighbours that is kept with a model's embedding, and grows with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from living_helpers import index_of, update

import atlas
from atlas.errors import (
    CorruptStoreError,
    StoreError,
)


def test_the_index_grows_by_the_new_cells_and_is_named_with_the_embedding(
    living_folder: Path, updated_atlas: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = atlas.open_store(living_folder / "s.atlas"), atlas.open_store(updated_atlas)
    assert len(index_of(before)) == 600
    assert len(index_of(after)) == 800
    values = json.loads((updated_atlas / "manifests" / "000005.json").read_bytes())
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
    update(living_store, living_folder / "q.h5ad")
    assert added == [(600, 200)]


def test_an_approximate_index_gives_labels_too(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atlas.workflows import indexing

    build = atlas.NeighborIndex.build
    monkeypatch.setattr(
        indexing.NeighborIndex, "build", lambda z, **options: build(z, kind="ivf", **options)
    )
    opened = atlas.open_store(living_store)
    opened.write_embedding("scvi", opened.embedding("scvi"), {})
    assert opened.index_folder("scvi") is None  # of the rows before
    atlas.keep(opened, living_folder / "run", "again", device="cpu")
    monkeypatch.undo()
    update(living_store, living_folder / "q.h5ad", model="again")
    opened = atlas.open_store(living_store)
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
    living_folder: Path, updated_atlas: Path, living_store: Path, tmp_path: Path
) -> None:
    # a state that names the index of the state before: what no command writes
    changed = Path(shutil.copytree(updated_atlas, tmp_path / "changed.atlas"))
    path = changed / "manifests" / "000005.json"
    values = json.loads(path.read_bytes())
    old = json.loads((changed / "manifests" / "000004.json").read_bytes())
    values["embeddings"]["scvi"]["index"] = old["embeddings"]["scvi"]["index"]
    path.write_text(json.dumps(values))
    opened = atlas.open_store(changed)
    for call in (
        lambda: atlas.transfer_labels(opened, embedding="scvi", reference="study=reference_1"),
        lambda: update(changed, living_folder / "q.h5ad", study="another"),
    ):
        with pytest.raises(
            StoreError,
            match=r"changed since the index of 'scvi' was built\n  found: an index of 600 × 3",
        ):
            call()
    assert atlas.open_store(changed).number == 5
    # damaged files are refused, and found by verify
    damaged = living_store / "parts" / ".indexes" / "scvi-000004" / "vectors.npy"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="A file of the index of 'scvi' is not what"):
        atlas.transfer_labels(
            atlas.open_store(living_store), embedding="scvi", reference="study=reference_1"
        )
    (finding,) = atlas.verify(living_store).findings
    assert finding.path == str(damaged)


def test_a_study_that_is_dropped_leaves_no_row_in_an_index(
    living_folder: Path, living_store: Path
) -> None:
    opened = atlas.open_store(living_store)
    opened.drop("reference_2", purge=True)
    assert opened.index_folder("scvi") is None
    assert not list(living_store.glob("parts/.indexes/*"))
    report = update(living_store, living_folder / "q.h5ad")  # without it: the index is built anew
    assert report.n_obs == 200
    assert len(index_of(atlas.open_store(living_store))) == 500
