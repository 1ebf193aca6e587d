"""A stranger, without the reference's counts: fetch, map a query study, label it, share that."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

import atlas
from atlas.cli import main
from atlas.errors import ConfigError, MissingColumnError, ModelError
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


@pytest.fixture(scope="module")
def stranger(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``package``, and ``query.atlas`` with the embedding of a query mapped onto it."""
    home = tmp_path_factory.mktemp("stranger")
    atlas.share(atlas.open_store(reference / "ref.atlas"), reference / "scvi", home / "p.zip")
    package = atlas.fetch(home / "p.zip", home / "package")
    query = anndata.read_h5ad(reference / "study_3.h5ad")
    store = atlas.create_store(home / "query.atlas")
    store.append(query, study="study_3", batch_key="batch", label_key="cell_type")
    mapped = atlas.extend_reference(package.model, store, out=home / "mapped", **_TRAINING)
    atlas.embed(mapped, store, device="cpu")
    return home


def test_a_package_votes_as_its_owners_cells_would(
    reference: Path, stranger: Path, tmp_path: Path
) -> None:
    """The owner of the counts, with reference and query in one store, gets the same labels."""
    package = atlas.load_package(stranger / "package")
    store = atlas.open_store(stranger / "query.atlas")
    options = {"embedding": "scvi", "k": 20, "false_unknown": 0.1, "sets": 0.9}
    found = atlas.transfer_labels(store, reference=package, name=None, **options)
    assert len(found.table) == store.n_obs
    assert found.score is not None
    assert found.score.accuracy is not None
    assert found.score.accuracy.accuracy > 0.85  # Unknown counts as wrong

    path = shutil.copytree(reference / "ref.atlas", tmp_path / "whole.atlas")
    whole = atlas.open_store(path)
    query = anndata.read_h5ad(reference / "study_3.h5ad")
    whole.append(query, study="study_3", batch_key="batch", label_key="cell_type")
    atlas.embed(atlas.load_model(stranger / "mapped"), whole, device="cpu")
    new = whole.obs_codes["study"] == whole.studies.index("study_3")
    theirs = atlas.transfer_labels(whole, reference=~new, query=new, name=None, **options)
    assert found.table.index.tolist() == theirs.table.index.tolist()
    for column in found.table:
        assert found.table[column].tolist() == theirs.table[column].tolist(), column
    assert found.rule == theirs.rule
    assert [fold.name for fold in found.folds] == list(package.studies.names)


def test_a_package_votes_where_its_extended_model_was_extended_again(
    reference: Path, stranger: Path, tmp_path: Path
) -> None:
    mapped = atlas.load_model(stranger / "mapped")
    atlas.share(atlas.open_store(stranger / "query.atlas"), mapped, tmp_path / "second")
    second = atlas.load_package(tmp_path / "second")
    store = atlas.create_store(tmp_path / "late.atlas")
    late = anndata.read_h5ad(reference / "study_3.h5ad")
    store.append(late, study="late", batch_key="batch", label_key="cell_type")
    training = {**_TRAINING, "max_epochs": 3}
    again = atlas.extend_reference(second.model, store, out=tmp_path / "again", **training)
    atlas.embed(again, store, device="cpu")
    first = atlas.load_package(stranger / "package")
    found = atlas.transfer_labels(store, embedding="scvi", reference=first, k=20, name=None)
    assert found.score is not None
    assert found.score.accuracy is not None
    assert found.score.accuracy.accuracy > 0.8


def test_a_package_in_the_command(
    stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(stranger / "query.atlas", tmp_path / "query.atlas")
    command = ["transfer-labels", str(path), "--embedding", "scvi", "--k", "20"]
    package = ["--package", str(stranger / "package")]
    assert main([*command, *package, "--name", "theirs"]) == 0
    assert "cells labelled by" in capsys.readouterr().out
    kept = atlas.open_store(path).obs()["theirs"]
    assert kept.notna().all()
    assert main([*command, "--package", str(tmp_path / "none")]) == 2
    assert "There is no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, *package, "--reference", "study=study_3"])


def test_cells_of_a_package_do_not_vote_in_another_space(
    reference: Path, stranger: Path, tmp_path: Path
) -> None:
    package = atlas.load_package(stranger / "package")
    path = shutil.copytree(stranger / "query.atlas", tmp_path / "query.atlas")
    store = atlas.open_store(path)
    ask = {"reference": package, "k": 20, "name": None}
    z = store.embedding("scvi")
    store.write_embedding("narrow", z[:, :2], {})
    with pytest.raises(ModelError, match=r"do not lie in the embedding 'narrow'\n  found: 2 dim"):
        atlas.transfer_labels(store, embedding="narrow", **ask)
    moved = atlas.extend_reference(
        package.model, store, out=tmp_path / "all", strategy="all", **{**_TRAINING, "max_epochs": 1}
    )
    atlas.embed(moved, store, name="moved", device="cpu")
    with pytest.raises(ModelError, match=r"found: a surgery that moved the reference \(strategy a"):
        atlas.transfer_labels(store, embedding="moved", **ask)
    other = atlas.train(
        store, "scvi", out=tmp_path / "other", genes=list(package.model.genes)[:20],
        n_latent=z.shape[1], **{**_TRAINING, "max_epochs": 1},
    )  # fmt: skip
    atlas.embed(other, store, name="other", device="cpu")
    with pytest.raises(ModelError, match="found: an embedding by a model that does not come from"):
        atlas.transfer_labels(store, embedding="other", **ask)
    with pytest.raises(ConfigError, match="found: misfit with a package as the reference"):
        atlas.transfer_labels(store, embedding="scvi", misfit=True, **ask)
    none = np.zeros(store.n_obs, bool)
    with pytest.raises(ConfigError, match="There is no cell in the query"):
        atlas.transfer_labels(store, embedding="scvi", query=none, **ask)
    with pytest.raises(ConfigError, match="A package has labels of its own"):
        atlas.transfer_labels(store, embedding="scvi", label_key="cell_type", **ask)
    with pytest.raises(MissingColumnError, match="no column 'donor' to calibrate by"):
        atlas.transfer_labels(store, embedding="scvi", sets=0.9, calibrate_by="donor", **ask)
