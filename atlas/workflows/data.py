"""Counts in and out: ingest, choose genes, look, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import anndata.io
import numpy as np
import numpy.typing as npt
from anndata import AnnData

from atlas.config import StoreFormat
from atlas.errors import ConfigError
from atlas.hdf5 import create_hdf5
from atlas.ingest import GeneTable
from atlas.store import (
    AppendReport,
    CountStore,
    FilesSource,
    create_store,
    open_store,
    to_anndata,
)
from atlas.store import manifest as manifests
from atlas.store.selection import Flavour, select_from_statistics
from atlas.store.statistics import GeneStatistics
from atlas.workflows.output import replacing
from atlas.workflows.rows import Rows, rows_where
from atlas.workflows.unfinished import unfinished_updates


def ingest(
    path: str | PathLike[str],
    source: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    genes: Sequence[str] | None = None,
    first: bool = False,
    format: StoreFormat | None = None,
    **options: Any,
) -> AppendReport:
    """Append a study to a store, which is made where there is none yet.

    Parameters
    ----------
    path
        The store.
    source
        The file, or several that become one study. A store made for a study that turns out bad is
        removed again.
    genes, first
        Which genes a new store holds for ever; see :func:`atlas.store.create_store`.
    format
        Of a new store; see :func:`atlas.store.create_store`.
    **options
        See :meth:`atlas.store.CountStore.append`.
    """
    root = Path(path)
    if not manifests.is_free(root):
        store = open_store(root)
        if format is not None and format != store.manifest.backend:
            raise ConfigError(
                "The format of a store is fixed when it is made",
                found=f"a store of the format {store.manifest.backend}",
                expected=format,
                do="leave the format out, or make a new store",
                path=root,
            )
        if (genes is not None or first) and not _made_so(store, genes):
            raise ConfigError(
                "The genes of a store are fixed when it is made",
                found="a store that is there already",
                do="leave out --genes and --first, or make a new store",
                path=root,
            )
        return store.append(source, **options)
    store = create_store(root, genes=genes, first=first, format=format or "zarr")
    try:
        return store.append(source, **options)
    except BaseException:
        manifests.remove_unused(root)
        raise


def _made_so(store: CountStore, genes: Sequence[str] | None) -> bool:
    """Whether a store without studies has these genes: that of an ingest that was interrupted."""
    if store.manifest.studies:
        return False
    if genes is None:
        return store.manifest.gene_mode == "first"
    table = GeneTable.of_names(genes)
    return store.manifest.gene_mode == "given" and store.gene_table == table


def select_genes(
    store: CountStore | FilesSource,
    n: int = 2000,
    *,
    flavour: Flavour = "seurat_v3",
    record: bool = True,
) -> list[str]:
    """Choose the genes to model from the statistics kept with the store; of files by two passes.

    Parameters
    ----------
    store
        An open store with at least one study, or files as they are.
    n
        How many; see :func:`atlas.store.selection.select_from_statistics` for the flavours, the
        ties, and when there are more or fewer.
    flavour
        ``"seurat_v3"`` (as scanpy's, by batch) or ``"dispersion"`` (as in the scANVI paper).
    record
        Keep the choice with the store, as :attr:`atlas.store.CountStore.genes`; files keep none.

    Returns
    -------
    list of str
        Gene names in the order of the gene table.
    """
    if not store.n_obs:
        raise ConfigError(
            "There are no cells to choose genes by", do="ingest a study first", path=store.path
        )
    studies = store.statistics() if isinstance(store, FilesSource) else _kept_statistics(store)
    positions = select_from_statistics(studies, len(store.gene_table.names), n, flavour)
    genes = [store.gene_table.names[i] for i in positions]
    if record and isinstance(store, CountStore):
        store.record_genes(genes, flavour, n)
    return genes


def _kept_statistics(store: CountStore) -> list[tuple[GeneStatistics, npt.NDArray[np.int32]]]:
    studies = []
    for entry in store.manifest.studies:
        names = [field.name for field in dataclasses.fields(GeneStatistics)]
        arrays = {name: store.part_array(entry, "statistics", name) for name in names}
        columns = store.part_array(entry, "index", "genes")
        studies.append((GeneStatistics.from_arrays(arrays), columns))
    return studies


def export(
    store: CountStore,
    out: str | PathLike[str],
    *,
    embedding: str | None = None,
    rows: Rows | None = None,
    order: Literal["store", "input"] = "store",
) -> AnnData:
    """Write cells of a store as an h5ad file, whole or not at all; see :func:`to_anndata`.

    ``rows`` chooses cells by an obs column.
    """
    chosen = None if rows is None else rows_where(store, rows)
    adata = to_anndata(store, embedding=embedding, rows=chosen, order=order)
    adata.strings_to_categoricals()
    path = Path(out)
    with replacing(path) as partial, create_hdf5(partial) as writer:
        anndata.io.write_elem(writer.file, "/", adata, dataset_kwargs={"compression": "gzip"})
    return adata


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What `atlas info` shows of a store."""

    path: str
    manifest: int
    n_obs: int
    n_vars: int
    nnz: int
    bytes_on_disk: int
    studies: list[dict[str, Any]]
    batches: list[dict[str, Any]]
    labels: list[dict[str, Any]]
    unlabeled: int
    genes_chosen: int | None
    embeddings: list[dict[str, Any]]
    models: list[dict[str, Any]]
    history: list[str]
    unfinished: list[dict[str, Any]]


def _size(folder: Path) -> int:
    """Bytes of all files; what a writer removes meanwhile does not count."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def info(store: CountStore) -> StoreInfo:
    """Summarise a store."""
    codes = store.obs_codes

    def counted(name: str, names: Sequence[str]) -> list[dict[str, Any]]:
        cells = np.bincount(codes[name][codes[name] >= 0], minlength=len(names))
        return [{"name": n, "cells": int(c)} for n, c in zip(names, cells, strict=True)]

    return StoreInfo(
        path=store.url or str(store.path),
        manifest=store.manifest.number,
        n_obs=store.n_obs,
        n_vars=store.n_vars,
        nnz=sum(study.nnz for study in store.manifest.studies),
        bytes_on_disk=_size(store.path),
        studies=[
            {
                "name": s.name,
                "cells": s.n_obs,
                "nnz": s.nnz,
                "source": s.source,
                "profile": s.profile,
            }
            for s in store.manifest.studies
        ],
        batches=counted("batch", store.batches),
        labels=counted("label", store.labels),
        unlabeled=int((codes["label"] < 0).sum()),
        genes_chosen=None if store.genes is None else len(store.genes),
        embeddings=[
            {"name": name, "n_latent": entry.n_latent}
            for name, entry in store.manifest.embeddings.items()
        ],
        models=[{"name": name, "version": n} for name, n in store.models.items()],
        history=[f"{s.number} {s.created} {s.action}" for s in manifests.history(store.path)],
        unfinished=[one.to_json() for one in unfinished_updates(store)],
    )
