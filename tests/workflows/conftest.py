"""A store and models for the tests of this folder."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from workflows_helpers import Applied

import atlas


def _study(seed: int, n: int, genes: range) -> AnnData:
    """Cells of four types, each six times higher in ten genes of its own, in two batches."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])
    batch = (rng.random(n) < 0.2).astype(int)
    base = np.random.default_rng(0).gamma(1.0, size=60)
    rate = base * np.where(np.arange(60) // 10 == kind[:, None], 6, 1)
    rate *= np.where(np.arange(60) % 7 == 3 * batch[:, None], 2, 1)
    rate *= rng.lognormal(4, 0.3, (n, 1)) / rate.sum(axis=1, keepdims=True) * 4
    counts = rng.poisson(rate * rng.gamma(2, 0.5, rate.shape))
    label = np.array([f"type_{i + 1}" for i in range(4)], object)[kind]
    label[rng.random(n) < 0.1] = "Unknown"
    obs = pd.DataFrame(
        {"cell_type": label, "batch": [f"batch_{i + 1}" for i in batch]},
        index=[f"c{seed}_{i}" for i in range(n)],
    )
    var = pd.DataFrame(index=[f"gene{i}" for i in range(60)])
    return AnnData(counts.astype(np.float32), obs=obs, var=var)[:, list(genes)].copy()


@pytest.fixture(scope="session")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Applied:
    folder = tmp_path_factory.mktemp("applied")
    made = Applied(folder / "s.atlas", folder / "scvi", folder / "scanvi")
    store = atlas.create_store(made.store)
    keys = {"batch_key": "batch", "label_key": "cell_type"}
    store.append(_study(1, 700, range(60)), study="study_1", **keys)
    store.append(_study(2, 600, range(48)), study="study_2", **keys)
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
