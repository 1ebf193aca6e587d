"""Atlas: train on single-cell atlases that do not fit in memory."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas.evaluation.index import NeighborIndex
    from atlas.evaluation.metrics import Comparison, Metrics
    from atlas.hub import Package, export_scvi, fetch, import_scvi, load_package
    from atlas.hub.scvi_data import ScviDataModule
    from atlas.models import TrainedModel, load_model
    from atlas.store import (
        CountStore,
        convert_store,
        create_store,
        open_files,
        open_store,
        to_anndata,
    )
    from atlas.workflows import (
        baseline,
        bench,
        checkout,
        compare,
        differential_expression,
        discard_update,
        dropout_probability,
        embed,
        embed_per_batch,
        evaluate,
        extend_reference,
        history,
        impute,
        keep,
        label,
        label_probabilities,
        latent_posterior,
        library_posterior,
        likelihood,
        normalized,
        posterior_predictive,
        project,
        report,
        seed_labels,
        select_genes,
        share,
        stored_model,
        train,
        transfer_labels,
        unfinished_updates,
        update,
        verify,
    )

# Threads of OpenMP (torch, FAISS, scikit-learn) that wait are to sleep, not to spin: spinning keeps
# the loader's threads, and whatever else runs, off the cores. Beside one other busy process on two
# cores, training went from 155 to 5,900 cells/s. Read when these libraries are first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOME = {
    "Comparison": "atlas.evaluation.metrics",
    "CountStore": "atlas.store",
    "Metrics": "atlas.evaluation.metrics",
    "NeighborIndex": "atlas.evaluation.index",
    "Package": "atlas.hub",
    "ScviDataModule": "atlas.hub.scvi_data",
    "TrainedModel": "atlas.models",
    "baseline": "atlas.workflows",
    "bench": "atlas.workflows",
    "checkout": "atlas.workflows",
    "compare": "atlas.workflows",
    "convert_store": "atlas.store",
    "create_store": "atlas.store",
    "differential_expression": "atlas.workflows",
    "discard_update": "atlas.workflows",
    "dropout_probability": "atlas.workflows",
    "embed": "atlas.workflows",
    "embed_per_batch": "atlas.workflows",
    "evaluate": "atlas.workflows",
    "export_scvi": "atlas.hub",
    "extend_reference": "atlas.workflows",
    "fetch": "atlas.hub",
    "history": "atlas.workflows",
    "import_scvi": "atlas.hub",
    "impute": "atlas.workflows",
    "keep": "atlas.workflows",
    "label": "atlas.workflows",
    "label_probabilities": "atlas.workflows",
    "latent_posterior": "atlas.workflows",
    "library_posterior": "atlas.workflows",
    "likelihood": "atlas.workflows",
    "load_model": "atlas.models",
    "load_package": "atlas.hub",
    "normalized": "atlas.workflows",
    "open_files": "atlas.store",
    "open_store": "atlas.store",
    "posterior_predictive": "atlas.workflows",
    "project": "atlas.workflows",
    "report": "atlas.workflows",
    "seed_labels": "atlas.workflows",
    "select_genes": "atlas.workflows",
    "share": "atlas.workflows",
    "stored_model": "atlas.workflows",
    "to_anndata": "atlas.store",
    "train": "atlas.workflows",
    "transfer_labels": "atlas.workflows",
    "unfinished_updates": "atlas.workflows",
    "update": "atlas.workflows",
    "verify": "atlas.workflows",
}

__all__ = [
    "Comparison",
    "CountStore",
    "Metrics",
    "NeighborIndex",
    "Package",
    "ScviDataModule",
    "TrainedModel",
    "baseline",
    "bench",
    "checkout",
    "compare",
    "convert_store",
    "create_store",
    "differential_expression",
    "discard_update",
    "dropout_probability",
    "embed",
    "embed_per_batch",
    "evaluate",
    "export_scvi",
    "extend_reference",
    "fetch",
    "history",
    "import_scvi",
    "impute",
    "keep",
    "label",
    "label_probabilities",
    "latent_posterior",
    "library_posterior",
    "likelihood",
    "load_model",
    "load_package",
    "normalized",
    "open_files",
    "open_store",
    "posterior_predictive",
    "project",
    "report",
    "seed_labels",
    "select_genes",
    "share",
    "stored_model",
    "to_anndata",
    "train",
    "transfer_labels",
    "unfinished_updates",
    "update",
    "verify",
]


def __getattr__(name: str) -> Any:
    # torch and zarr take seconds to import; a name costs them when it is first used
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'atlas' has no attribute {name!r}")
