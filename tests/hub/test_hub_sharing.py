"""What goes out with a reference, what does not, and what a stranger makes of it."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import safetensors.numpy
import torch
from hub_helpers import failing

import atlas
from atlas.errors import (
    AtlasError,
    ConfigError,
    MissingColumnError,
    ModelError,
    OutputError,
    PackageError,
    StoreError,
)
from atlas.hub import sharing
from atlas.workflows import prepare_share

Listing = Callable[[Path], set[str]]


def _store(reference: Path) -> atlas.CountStore:
    return atlas.open_store(reference / "ref.atlas")


@pytest.mark.parametrize("kind", ["", ".tar.gz", ".tgz", ".zip"])
@pytest.mark.parametrize("name", ["scvi", "scanvi"])
def test_what_was_shared_comes_back(
    reference: Path, tmp_path: Path, name: str, kind: str, listing: Listing
) -> None:
    store = _store(reference)
    shared = atlas.share(
        store,
        reference / name,
        tmp_path / f"out{kind}",
        title="Blood",
        licence="CC-BY-4.0",
        citation="Us, 2025",
    )
    assert listing(tmp_path) >= {f"out{kind}"}
    assert not any(path.startswith(".") for path in listing(tmp_path))
    digest = shared.path if kind else shared.path / "package.json"
    assert shared.sha256 == hashlib.sha256(digest.read_bytes()).hexdigest()
    package = atlas.fetch(shared.path, tmp_path / "in", sha256=shared.sha256)
    assert package.folder == tmp_path / "in"
    assert not any(path.startswith(".") for path in listing(tmp_path))
    assert (package.about.title, package.about.licence) == ("Blood", "CC-BY-4.0")
    assert package.about.citation == "Us, 2025"
    model = atlas.load_model(reference / name)
    assert (package.model.genes, package.model.batches) == (model.genes, model.batches)
    for key, value in model.module.state_dict().items():
        assert torch.equal(package.model.module.state_dict()[key], value)
    np.testing.assert_array_equal(package.embedding, store.embedding(name))
    obs = store.obs()
    for found, column in (
        (package.studies, "atlas_study"),
        (package.batches, "atlas_batch"),
        (package.labels, "cell_type"),
    ):
        assert found is not None
        names = [*found.names, "Unknown"]  # -1 is the last
        assert [names[i] for i in found.codes] == obs[column].astype(str).to_list()
    assert package.obs.shape == (store.n_obs, 0)
    assert package.counts() is None
    again = atlas.load_package(tmp_path / "in")
    np.testing.assert_array_equal(again.embedding, package.embedding)


def test_what_python_reads_of_an_archive_is_the_folder(reference: Path, tmp_path: Path) -> None:
    """tarfile and zipfile, which we did not write, find the same files in our archives."""
    shipment = prepare_share(_store(reference), reference / "scvi")
    for kind in ("", ".tar.gz", ".zip"):
        shipment.write(tmp_path / f"p{kind}")
    with tarfile.open(tmp_path / "p.tar.gz") as archive:
        archive.extractall(tmp_path / "t", filter="data")
        assert {m.uname for m in archive.getmembers()} == {""}
        assert {m.mtime for m in archive.getmembers()} == {0}
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "z")
    for path in (p for p in (tmp_path / "p").rglob("*") if p.is_file()):
        name = path.relative_to(tmp_path / "p")
        if name.name != "package.json":  # which has the time
            assert (tmp_path / "t" / name).read_bytes() == path.read_bytes()
            assert (tmp_path / "z" / name).read_bytes() == path.read_bytes()
    for other in ("t", "z"):
        assert atlas.load_package(tmp_path / other).n_obs == len(shipment.embedding)


def test_nothing_else_leaves(reference: Path, package: Path) -> None:
    """No donor, no name of a cell, no path, no command; every file is declared."""
    store = _store(reference)
    content = b"".join(p.read_bytes() for p in sorted(package.rglob("*")) if p.is_file())
    for secret in (str(reference), str(package.parent), "Jane-Doe", "John-Roe", "ref.atlas"):
        assert secret.encode() not in content
    for name in store.obs().index[:50]:
        assert str(name).encode() not in content
    for column in ("donor", "mito", "fine"):
        assert f'"{column}"'.encode() not in content
    training = json.loads((package / "model" / "model.json").read_bytes())["training"]
    assert set(training) == {"config", "history", "manifest", "versions"}
    declared = json.loads((package / "package.json").read_bytes())["parts"]
    there = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
    assert there == {"package.json", *declared}
    tensors = safetensors.numpy.load_file(package / "reference.safetensors")
    assert set(tensors) == {"embedding", "study", "batch", "label"}


def test_what_training_says_is_public_at_every_depth() -> None:
    inner = {"config": {"lr": 1}, "store": "/home/jane/x.atlas", "command": "atlas train /home"}
    imported = {"imported": {"model": "SCVI", "from": "/home/jane/model.pt"}}
    said = sharing.public_training({**inner, "reference": {**inner, **imported}, "novelty": "/x"})
    assert said == {
        "config": {"lr": 1},
        "reference": {"config": {"lr": 1}, "imported": {"model": "SCVI"}},
    }


def test_named_columns_and_counts_leave(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "COUNT_ROWS", 1)  # parts of one minibatch
    store = _store(reference)
    columns = ["donor", "age", "mito"]
    options: dict[str, Any] = {"obs_columns": columns, "counts": True, "label_key": "fine"}
    listing = dict(prepare_share(store, reference / "scvi", **options).listing())
    assert "Jane-Doe-1, Jane-Doe-2" in listing["obs column donor"]
    assert listing["obs column age"].endswith("numbers")
    assert listing["counts"] == "of 50 genes, of each cell"
    assert listing["labels"].startswith("obs column fine: ")
    atlas.share(store, reference / "scvi", tmp_path / "p.zip", **options)
    package = atlas.fetch(tmp_path / "p.zip", tmp_path / "p")
    obs = store.obs()
    assert list(package.obs) == columns
    assert package.obs["donor"].astype(str).to_list() == obs["donor"].astype(str).to_list()
    np.testing.assert_array_equal(package.obs["age"], obs["age"])
    np.testing.assert_array_equal(package.obs["mito"], obs["mito"])
    assert package.labels is not None
    named = [package.labels.names[i] for i in package.labels.codes]
    assert named == obs["fine"].astype(str).to_list()
    counts = package.counts()
    assert counts is not None
    by_name = {
        f"{i}:{name}": row
        for i in (1, 2)
        for name, row in _rows(reference / f"study_{i}.h5ad", package.model.genes)
    }
    studies = obs["atlas_study"].astype(str).str.removeprefix("study_")
    expected = np.stack(
        [by_name[f"{s}:{name}"] for s, name in zip(studies, obs.index, strict=True)]
    )
    np.testing.assert_array_equal(counts.toarray(), expected)


def _rows(path: Path, genes: tuple[str, ...]) -> list[tuple[str, np.ndarray]]:
    table = anndata.read_h5ad(path)[:, list(genes)].to_df()
    return list(zip(table.index, table.to_numpy(), strict=True))


def test_the_listing_names_what_the_model_knows(reference: Path, tmp_path: Path) -> None:
    store = _store(reference)
    model = atlas.train(
        store,
        "scvi",
        genes=store.genes,
        out=tmp_path / "run",
        max_epochs=1,
        n_hidden=8,
        categorical_covariates=["donor"],
        continuous_covariates=["age"],
        device="cpu",
    )
    atlas.embed(model, store, name="donors", device="cpu")
    listing = dict(prepare_share(store, model, embedding="donors").listing())
    assert "donor 1 of the reference, donor 2 of the reference" in listing["covariate donor"]
    assert listing["covariate age"] == "of the model, the name alone"
    assert listing["batches"] == ", ".join(model.batches)
    assert listing["counts"] == "none"
    assert listing["index"] == "none: no index is kept with the embedding"
    assert listing["licence"].startswith("none: others may not")
    assert not any(name.startswith("obs column") for name in listing)


def test_a_study_that_the_model_does_not_know_stays(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference / "ref.atlas", tmp_path / "s.atlas")
    store = atlas.open_store(tmp_path / "s.atlas")
    before = store.embedding("scvi")
    store.append(
        reference / "study_3.h5ad", study="secret", batch_key="batch", label_key="cell_type"
    )
    atlas.share(store, reference / "scvi", tmp_path / "p")
    package = atlas.load_package(tmp_path / "p")
    assert package.studies.names == ("study_1", "study_2")
    np.testing.assert_array_equal(package.embedding, before)
    assert b"secret" not in (tmp_path / "p" / "package.json").read_bytes()


def test_the_card(reference: Path, tmp_path: Path) -> None:
    description = "Cells of *blood*."
    title = "A | B\n# C"
    atlas.share(
        _store(reference), reference / "scvi", tmp_path / "p", title=title, description=description
    )
    card = atlas.load_package(tmp_path / "p").card
    assert card.startswith("# A \\| B \\# C\n\nCells of *blood*.\n")
    obs = _store(reference).obs()
    for name, n in obs["cell_type"].value_counts().items():
        written = "none" if name == "Unknown" else str(name).replace("_", "\\_")
        assert f"| {written} | {n} |" in card
    assert "scvi, 50 genes, 4 dimensions" in card
    assert "10 epochs, negative bound" in card
    assert "Licence: none was given" in card


def test_a_model_whose_training_says_odd_things(reference: Path, tmp_path: Path) -> None:
    """It may have come from a stranger, and is shared again."""
    model = atlas.load_model(reference / "scvi")
    training = {"history": ["x"], "versions": 3, "reference": "y", "imported": []}
    odd = dataclasses.replace(model, training=training)
    atlas.share(_store(reference), odd, tmp_path / "p")
    assert "Training: not recorded" in atlas.load_package(tmp_path / "p").card


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"embedding": "pca"}, StoreError, ["no such embedding", "pca"]),
        ({"embedding": "scanvi"}, ModelError, ["'scanvi' is not of this model"]),
        ({"embedding": "wide"}, ModelError, ["'wide' is not of this model", "7 dimensions"]),
        ({"embedding": "nudged"}, ModelError, ["'nudged' is not of this model"]),
        ({"obs_columns": ["sex"]}, MissingColumnError, ["no such obs column", "sex"]),
        ({"label_key": "sex"}, MissingColumnError, ["no such obs column", "sex"]),
        ({"to": "p.rar"}, ConfigError, ["archive of this kind", ".tar.gz"]),
        ({"to": "taken.zip"}, OutputError, ["something here already"]),
        ({"to": "no/where"}, OutputError, ["is not there"]),
    ],
)
def test_what_cannot_be_shared(
    reference: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[AtlasError],
    words: list[str],
    listing: Listing,
) -> None:
    store = _store(reference)
    if options.get("embedding") == "wide":
        store.write_embedding("wide", np.zeros((store.n_obs, 7), np.float32), {})
    if options.get("embedding") == "nudged":
        z = store.embedding("scvi")
        z[:, 1] += 0.3 * z.std()
        store.write_embedding("nudged", z, {})
    (tmp_path / "taken.zip").write_bytes(b"mine")
    to = tmp_path / options.pop("to", "p")
    with pytest.raises(error) as raised:
        atlas.share(store, reference / "scvi", to, **options)
    for word in words:
        assert word in str(raised.value)
    assert listing(tmp_path) == {"taken.zip"}
    assert (tmp_path / "taken.zip").read_bytes() == b"mine"


def test_a_model_of_other_studies(reference: Path, tmp_path: Path) -> None:
    model = atlas.load_model(reference / "scvi")
    with pytest.raises(ModelError, match="no cell of a study that the model knows"):
        atlas.share(
            _store(reference), dataclasses.replace(model, studies=("x", "y")), tmp_path / "p"
        )


@pytest.mark.parametrize("to", ["p", "p.tar.gz", "p.zip"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_full_disk_or_ctrl_c_while_sharing_leaves_nothing(
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listing: Listing,
    to: str,
    error: BaseException,
) -> None:
    shipment = prepare_share(_store(reference), reference / "scvi")
    for n in range(50):
        with monkeypatch.context() as patch:
            failing(patch, n, error)
            try:
                shipment.write(tmp_path / to)
                break
            except (OutputError, KeyboardInterrupt) as raised:
                said = str(raised)
        assert ("nothing is left of it\n  found: [Errno 28]" in said) == (said != "")
        assert listing(tmp_path) == set(), n
    assert n >= 8
    assert (tmp_path / to).exists()


def test_a_damaged_model_is_not_shared(reference: Path, tmp_path: Path, listing: Listing) -> None:
    """What was written is read again before it has its name."""
    shipment = prepare_share(_store(reference), reference / "scvi")
    z = shipment.embedding.copy()
    z[3, 1] = np.nan
    with pytest.raises(PackageError, match="not of finite float32"):
        dataclasses.replace(shipment, embedding=z).write(tmp_path / "p")
    assert listing(tmp_path) == set()
