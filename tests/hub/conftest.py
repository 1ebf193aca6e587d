"""A reference to share: a store of two studies, a scvi and a scanvi with their embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hub_helpers import made_up

import atlas


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``study_1.h5ad`` to ``study_3.h5ad``; of the first two ``ref.atlas``, ``scvi``, ``scanvi``.

    The last study is a stranger's.
    """
    folder = tmp_path_factory.mktemp("reference")
    store = atlas.create_store(folder / "ref.atlas")
    for i in (1, 2, 3):
        adata = made_up(i)
        adata.write_h5ad(folder / f"study_{i}.h5ad")
        if i == 3:
            break
        rng = np.random.default_rng(i)
        adata.obs["donor"] = rng.choice([f"Jane-Doe-{i}", f"John-Roe-{i}"], adata.n_obs)
        adata.obs["age"] = rng.integers(20, 80, adata.n_obs)
        adata.obs["mito"] = rng.random(adata.n_obs)
        adata.obs["fine"] = adata.obs["cell_type"].astype(str) + "+"
        keys = {"batch_key": "batch", "label_key": "cell_type"}
        store.append(adata, study=f"study_{i}", **keys)
    genes = atlas.select_genes(store, 50)
    options = {"n_hidden": 32, "n_latent": 4, "max_epochs": 10, "lr": 1e-2, "minibatch_size": 64}
    options |= {"threads": 1, "device": "cpu"}
    for name, more in (("scvi", {}), ("scanvi", {"classifier_epochs": 2})):
        model = atlas.train(store, name, genes=genes, out=folder / name, **options, **more)
        atlas.embed(model, store, device="cpu")
    return folder


@pytest.fixture(scope="session")
def package(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scvi, shared as a folder."""
    to = tmp_path_factory.mktemp("package") / "pbmc"
    atlas.share(atlas.open_store(reference / "ref.atlas"), reference / "scvi", to)
    return to


@pytest.fixture
def listing() -> Callable[[Path], set[str]]:
    """Everything below a folder, hidden names too."""
    return lambda folder: {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
