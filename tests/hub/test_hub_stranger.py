"""A stranger, without the reference's counts: fetch, map a query study, label it, share that."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

import atlas
from atlas.evaluation.labels import majority_vote, weighted_vote
from atlas.evaluation.neighbours import nearest

_TRAINING = {"max_epochs": 15, "lr": 1e-2, "minibatch_size": 64, "threads": 1, "device": "cpu"}


@pytest.mark.parametrize("name", ["scvi", "scanvi"])
def test_a_stranger_maps_and_labels(reference: Path, tmp_path: Path, name: str) -> None:
    atlas.share(atlas.open_store(reference / "ref.atlas"), reference / name, tmp_path / "p.tar.gz")
    home = tmp_path / "elsewhere"
    home.mkdir()
    package = atlas.fetch(tmp_path / "p.tar.gz", home / "reference")
    assert package.labels is not None

    query = anndata.read_h5ad(reference / "study_3.h5ad")
    truth = query.obs["cell_type"].astype(str)
    query.obs["cell_type"] = "Unknown"
    store = atlas.create_store(home / "query.atlas")
    store.append(query, study="study_3", batch_key="batch", label_key="cell_type")
    mapped = atlas.extend_reference(
        package.model, store, ["study_3"], out=home / "mapped", **_TRAINING
    )
    z = atlas.embed(mapped, store, device="cpu")

    # the space is the reference's: its owner finds its cells where the package has them
    theirs = atlas.embed(mapped, atlas.open_store(reference / "ref.atlas"), name=None, device="cpu")
    np.testing.assert_array_equal(theirs, package.embedding)

    labeled = package.labels.codes >= 0
    codes, names = package.labels.codes[labeled], package.labels.names
    found = nearest(package.embedding[labeled], z, 15)
    votes = codes[found.indices]
    weighted = weighted_vote(votes, found.distances, len(names))
    plain = majority_vote(votes, len(names))
    peer = KNeighborsClassifier(15).fit(package.embedding[labeled], codes)
    ties = np.sort(peer.predict_proba(z), axis=1)
    clear = ties[:, -1] - ties[:, -2] > 0.1
    np.testing.assert_array_equal(plain.codes[clear], peer.predict(z)[clear])
    asked = truth.loc[store.obs().index].to_numpy()
    known = asked != "Unknown"
    for vote in (plain, weighted):
        right = np.array([*names, "?"], object)[vote.codes] == asked
        assert right[known].mean() > 0.95
    if name == "scanvi":
        said = atlas.label(mapped, store, name=None, device="cpu").table[name].astype(str)
        assert (said.to_numpy() == asked)[known].mean() > 0.9

    # and what came of it can be shared in its turn
    atlas.share(store, mapped, home / "mapped.zip")
    again = atlas.fetch(home / "mapped.zip", home / "again")
    assert again.studies.names == ("study_3",)
    assert again.labels is None
    assert again.model.surgery == mapped.surgery
    np.testing.assert_array_equal(again.embedding, z)
    assert str(tmp_path).encode() not in (home / "again" / "model" / "model.json").read_bytes()


def test_a_query_without_some_genes_is_shared_with_its_counts(
    reference: Path, tmp_path: Path
) -> None:
    query = anndata.read_h5ad(reference / "study_3.h5ad")
    model = atlas.load_model(reference / "scvi")
    gone = set(model.genes[::10])
    query = query[:, [gene for gene in query.var_names if gene not in gone]].copy()
    store = atlas.create_store(tmp_path / "query.atlas")
    store.append(query, study="study_3", batch_key="batch", label_key="cell_type")
    training = {**_TRAINING, "max_epochs": 1}
    mapped = atlas.extend_reference(model, store, out=tmp_path / "mapped", **training)
    atlas.embed(mapped, store, device="cpu")
    atlas.share(store, mapped, tmp_path / "p", counts=True)
    counts = atlas.load_package(tmp_path / "p").counts()
    assert counts is not None
    table = query.to_df().loc[store.obs().index]
    for i, gene in enumerate(mapped.genes):
        expected = 0 if gene in gone else table[gene].to_numpy()
        np.testing.assert_array_equal(counts[:, i].toarray()[:, 0], expected)
