"""A store and models for the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from living_helpers import living_atlas, update
from workflows_helpers import Applied, study

import atlas


@pytest.fixture(scope="session")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Applied:
    folder = tmp_path_factory.mktemp("applied")
    made = Applied(folder / "s.atlas", folder / "scvi", folder / "scanvi")
    store = atlas.create_store(made.store)
    keys = {"batch_key": "batch", "label_key": "cell_type"}
    store.append(study(1, 700, range(60)), study="study_1", **keys)
    store.append(study(2, 600, range(48)), study="study_2", **keys)
    options = {
        "genes": list(store.var.index),
        "max_epochs": 20,
        "lr": 1e-2,
        "eps": 1e-8,
        "minibatch_size": 64,
        "average_steps": 20,
        "n_hidden": 16,
        "n_layers": 1,
        "n_latent": 3,
        "threads": 1,
    }
    atlas.train(store, out=made.scvi, **options)
    parents = {name: "even" if i % 2 else "odd" for i, name in enumerate(sorted(store.labels))}
    atlas.train(
        store,
        "scanvi",
        out=made.scanvi,
        classifier_epochs=2,
        unobserved_classes=1,
        hierarchy=parents,
        **options,
    )
    return made


@pytest.fixture(scope="session")
def living_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``s.atlas`` with a model kept, its run, and ``q.h5ad``; tests do not write to it."""
    return living_atlas(tmp_path_factory.mktemp("living"))


@pytest.fixture(scope="session")
def updated_atlas(living_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store after one update; tests do not write to it."""
    path = tmp_path_factory.mktemp("updated") / "s.atlas"
    shutil.copytree(living_folder / "s.atlas", path)
    update(path, living_folder / "q.h5ad", false_unknown=None)
    return path


@pytest.fixture
def living_store(living_folder: Path, tmp_path: Path) -> Path:
    """A copy of the store to write to."""
    return Path(shutil.copytree(living_folder / "s.atlas", tmp_path / "s.atlas"))
