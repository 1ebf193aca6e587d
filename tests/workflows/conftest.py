"""A store and models for the tests of this folder."""

from __future__ import annotations

import pytest
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
