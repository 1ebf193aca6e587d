"""A small living atlas for tests: two studies, a model kept with them, a study to add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anndata import AnnData
from workflows_helpers import study as make_study

import atlas
from atlas.workflows import living

KEYS = {"batch_key": "batch", "label_key": "cell_type"}
SMALL: dict[str, Any] = {"minibatch_size": 64, "average_steps": 4, "threads": 1, "device": "cpu"}


def train_small(store: atlas.CountStore, out: Path, **options: Any) -> Path:
    settings = {"n_hidden": 16, "n_latent": 3, "max_epochs": 2, "lr": 1e-2, **SMALL, **options}
    atlas.train(store, "scvi", out=out, genes=list(store.var.index), **settings)
    return out


def living_atlas(folder: Path) -> Path:
    """``s.atlas`` of two studies with a model kept, its run, and a study to add: ``q.h5ad``."""
    store = atlas.create_store(folder / "s.atlas")
    for i in (1, 2):
        store.append(make_study(i, 300, range(60)), study=f"reference_{i}", **KEYS)
    atlas.keep(store, train_small(store, folder / "run"), device="cpu")
    make_study(3, 200, range(60)).write_h5ad(folder / "q.h5ad")
    return folder


def update(store: Path, source: Path | AnnData, **options: Any) -> living.UpdateReport:
    chosen = {"study": "kang", "model": "scvi", "ingest": KEYS, "max_epochs": 2, **SMALL}
    return atlas.update(store, source, **{**chosen, **options})


def files_of(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.name != "writer.lock"
    }


def index_of(store: atlas.CountStore) -> atlas.NeighborIndex:
    """The index of the embedding ``scvi``, which is of its rows."""
    folder = store.index_folder("scvi")
    assert folder is not None
    return atlas.NeighborIndex.load(folder, embedding=store.embedding("scvi"))
