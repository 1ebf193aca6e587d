"""The steps of the main job, each a function from stores and folders to stores and folders.

This is the only place where stores, models, training and evaluation are wired together.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from atlas.config import ScviConfig, TrainConfig
from atlas.errors import ConfigError, MissingColumnError, ModelError
from atlas.evaluation.codes import Categories
from atlas.evaluation.confounding import confounding
from atlas.evaluation.measures import evaluate_embedding
from atlas.evaluation.metrics import Metrics
from atlas.models import TrainedModel, build_model, load_model
from atlas.store import AppendReport, CountStore, CountView, create_store, open_store
from atlas.store.selection import Flavour, select_from_statistics
from atlas.store.statistics import GeneStatistics
from atlas.training.environment import resolve_device
from atlas.training.loop import fit
from atlas.training.run import check_run_folder
from loaders import SequentialLoader

Rows = str | Mapping[str, Sequence[str]]
"""Cells chosen by an obs column: ``"study=zheng,pbmc3k"`` or ``{"study": ["zheng", "pbmc3k"]}``."""

_EMBED_MINIBATCH = 512


def ingest(path: str | PathLike[str], source: str | PathLike[str], **options: Any) -> AppendReport:
    """Append a study to a store, which is made where there is none yet.

    Parameters
    ----------
    path
        The store.
    source
        The file; see :meth:`atlas.store.CountStore.append` for the options. A store made for a
        study that turns out bad is removed again.
    """
    root = Path(path)
    if root.exists():
        return open_store(root).append(source, **options)
    store = create_store(root)
    try:
        return store.append(source, **options)
    except BaseException:
        shutil.rmtree(root)
        raise


def select_genes(
    store: CountStore, n: int = 2000, *, flavour: Flavour = "seurat_v3", record: bool = True
) -> list[str]:
    """Choose the genes to model from the statistics kept with the store.

    Parameters
    ----------
    store
        An open store with at least one study.
    n
        How many; see :func:`atlas.store.selection.select_from_statistics` for the flavours, the
        ties, and when there are more or fewer.
    flavour
        ``"seurat_v3"`` (as scanpy's, by batch) or ``"dispersion"`` (as in the scANVI paper).
    record
        Keep the choice with the store, as :attr:`atlas.store.CountStore.genes`.

    Returns
    -------
    list of str
        Gene names in the order of the gene table.
    """
    if not store.n_obs:
        raise ConfigError(
            "There are no cells to choose genes by", do="ingest a study first", path=store.path
        )
    studies = []
    for entry in store.manifest.studies:
        names = [field.name for field in dataclasses.fields(GeneStatistics)]
        arrays = {name: store.part_array(entry, "statistics", name) for name in names}
        columns = store.part_array(entry, "index", "genes")
        studies.append((GeneStatistics.from_arrays(arrays), columns))
    positions = select_from_statistics(studies, store.n_vars, n, flavour)
    genes = [store.gene_table.names[i] for i in positions]
    if record:
        store.record_genes(genes, flavour, n)
    return genes


def default_epochs(n_obs: int) -> int:
    """scvi-tools' rule: 400 passes, fewer above 20,000 cells, but always one."""
    return max(1, min(400, round(8e6 / max(1, n_obs))))


def train(
    store: CountStore,
    model: str = "scvi",
    *,
    out: str | PathLike[str],
    genes: Sequence[str] | None = None,
    max_epochs: int | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> TrainedModel:
    """Train a model on all studies of a store.

    Parameters
    ----------
    store
        An open store.
    model
        ``"scvi"``.
    out
        The run folder: log, checkpoints, and at the end the model.
    genes
        The genes to model; those recorded by :func:`select_genes` when None.
    max_epochs
        Passes over the cells; by default as scvi-tools (:func:`default_epochs`).
    seed
        Of weights, noise and order.
    resume
        Go on with the run in ``out``, wherever it was interrupted; start it where there is none.
    progress
        Show loss, cells/s and the time left on stderr.
    **options
        Fields of :class:`atlas.config.ScviConfig` and :class:`atlas.config.TrainConfig`.

    Returns
    -------
    TrainedModel
        Also kept in ``out``; :func:`load_model` reads it.

    Raises
    ------
    ConfigError
        An option that is not there or is out of range.
    CheckpointError
        ``out`` holds another run, or one and ``resume`` is False.
    """
    folder = Path(out)
    if model != "scvi":
        raise ConfigError("There is no such model", found=repr(model), expected="'scvi'")
    architecture, training = _configs(
        {**options, "seed": seed, "max_epochs": max_epochs or default_epochs(store.n_obs)}
    )
    genes = genes if genes is not None else store.genes
    if genes is None:
        raise ConfigError(
            "No genes are chosen",
            do="choose them with `atlas genes` (atlas.select_genes), or give genes=",
            path=store.path,
        )
    check_run_folder(folder, resume=resume)
    view = store.select(genes)
    batches = Categories(store.obs_codes["batch"], store.batches)
    if caution := confounding(batches, Categories(store.obs_codes["label"], store.labels)):
        warnings.warn(caution, UserWarning, stacklevel=2)
    prior = None
    if architecture.library == "latent":
        prior = _library_prior(view, len(store.batches))
    module = build_model(
        architecture, view.n_vars, len(store.batches), seed=seed, library_prior=prior
    )
    presence = view.presence
    split = store.split(training.validation_share)
    history = fit(
        module,
        view,
        train_rows=split.train,
        validation_rows=split.validation,
        presence=None if presence.all() else presence,
        config=training,
        out=folder,
        resume=resume,
        describe={
            "model": {"name": model, **architecture.to_json()},
            "genes": list(genes),
            "batches": list(store.batches),
        },
        progress=progress,
    )
    ids = store.var["gene_id"].reindex(list(genes))
    trained = TrainedModel(
        module=module,
        genes=tuple(genes),
        batches=store.batches,
        studies=store.studies,
        presence=presence,
        gene_ids=tuple(
            None if missing else str(i) for i, missing in zip(ids, ids.isna(), strict=True)
        ),
        training={
            "config": training.to_json(),
            "history": history.to_json(),
            "store": str(store.path),
            "manifest": store.manifest.number,
            "versions": versions(),
            "command": command(),
        },
    )
    trained.save(folder)
    return trained


def _configs(options: dict[str, Any]) -> tuple[ScviConfig, TrainConfig]:
    """Sort options into the two configurations."""
    sorted_out: list[dict[str, Any]] = []
    for kind in (ScviConfig, TrainConfig):
        names = {field.name for field in dataclasses.fields(kind)}
        sorted_out.append({name: options.pop(name) for name in names & set(options)})
    if options:
        names = {f.name for kind in (ScviConfig, TrainConfig) for f in dataclasses.fields(kind)}
        raise ConfigError(
            "There are no such options",
            found=", ".join(sorted(options)),
            expected="some of " + ", ".join(sorted(names)),
        )
    return ScviConfig(**sorted_out[0]), TrainConfig(**sorted_out[1])


def _library_prior(view: CountView, n_batches: int) -> torch.Tensor:
    """Mean and variance of the log library of each batch: float32, (n_batches, 2).

    Empty cells count as one count; a batch of one cell has variance 0 and is given a small one.
    """
    sums = np.empty(view.n_obs)
    for minibatch in SequentialLoader(view, 4096):
        sums[minibatch.rows] = minibatch.to_scipy().sum(axis=1).A1
    log_library = np.log(np.maximum(sums, 1))
    batch = view.obs_codes["batch"]
    prior = np.tile(np.array([log_library.mean(), 1.0], np.float32), (n_batches, 1))
    for code in np.unique(batch):
        mine = log_library[batch == code]
        prior[code] = mine.mean(), max(mine.var(), 1e-2)
    return torch.from_numpy(prior)


def embed(
    model: TrainedModel,
    store: CountStore,
    *,
    name: str | None = "scvi",
    device: str = "auto",
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Embed all cells of a store, streaming, in its row order.

    Each minibatch lies in one study and has the same number of rows, the last one padded with
    empty cells, so that the embedding of a cell does not depend on what else is in the store.

    Parameters
    ----------
    model
        A trained model; all its genes must be in the store, all batches of the store in it.
    store
        An open store.
    name
        Keep the embedding with the store under this name; None does not keep it.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, …
    progress
        Show cells/s and the time left on stderr.

    Returns
    -------
    float32, (n_obs, n_latent): posterior means of z.

    Raises
    ------
    ModelError
        The store lacks a gene of the model, or has a batch that the model does not know.
    """
    batch_of = _batch_codes(model, store)
    missing = sorted(set(model.genes) - set(store.gene_table.names))
    if missing:
        raise ModelError(
            "The model was trained on genes that the store does not have",
            found=f"{len(missing)} of {len(model.genes)} missing, e.g. {', '.join(missing[:5])}",
            expected="a store with all genes of the model",
            path=store.path,
        )
    view = store.select(model.genes)
    presence = torch.from_numpy(view.presence)
    target = resolve_device(device)
    model.module.to(target)
    out = np.empty((store.n_obs, model.config.n_latent), np.float32)
    with tqdm(
        total=store.n_obs, desc="embedding", unit=" cells", unit_scale=True, disable=not progress
    ) as bar:
        for minibatch in SequentialLoader(view, _EMBED_MINIBATCH):
            n = minibatch.n_rows
            counts = torch.zeros(_EMBED_MINIBATCH, view.n_vars, device=target)
            counts[:n] = minibatch.to_torch(target, dense=True)
            batch = torch.zeros(_EMBED_MINIBATCH, dtype=torch.int64)
            batch[:n] = torch.from_numpy(batch_of[minibatch.obs["batch"]])
            present = presence[int(minibatch.obs["study"][0])]
            z = model.embed_counts(
                counts,
                batch.to(target),
                None if bool(present.all()) else present.expand(_EMBED_MINIBATCH, -1).to(target),
            )
            out[minibatch.rows] = z[:n].cpu().numpy()
            bar.update(n)
    if name is not None:
        how = {
            "model": {"name": "scvi", **model.config.to_json()},
            "genes": list(model.genes),
            "training": model.training,
            "versions": versions(),
            "command": command(),
        }
        store.write_embedding(name, out, how)
    return out


def _batch_codes(model: TrainedModel, store: CountStore) -> npt.NDArray[np.int64]:
    """The model's code of each of the store's batches."""
    if not model.config.encode_batch:
        return np.zeros(len(store.batches), np.int64)
    code = {name: i for i, name in enumerate(model.batches)}
    if unknown := [name for name in store.batches if name not in code]:
        raise ModelError(
            "The store has batches that the model was not trained on",
            found=", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else ""),
            expected=f"some of {', '.join(model.batches[:8])}",
            do="train a model on all studies of the store",
            path=store.path,
        )
    return np.array([code[name] for name in store.batches], np.int64)


def rows_where(store: CountStore, rows: Rows) -> npt.NDArray[np.bool_]:
    """Cells whose obs column has one of some values: bool (n_obs,).

    ``study``, ``batch`` and ``label`` fall back to the store's own where no input has such a
    column.

    Raises
    ------
    ConfigError, MissingColumnError
        The text is not ``column=value,value``; there is no such column; no cell has the value.
    """
    if isinstance(rows, str):
        column, equals, text = rows.partition("=")
        if not equals or not text:
            raise ConfigError(
                "Cells are chosen by an obs column",
                found=repr(rows),
                expected="column=value or column=value,value",
            )
        chosen: dict[str, Sequence[str]] = {column: text.split(",")}
    else:
        chosen = dict(rows)
    out = np.ones(store.n_obs, bool)
    for column, values in chosen.items():
        try:
            found = store.obs([column])[column]
        except MissingColumnError:
            if column not in ("study", "batch", "label"):
                raise
            found = store.obs([f"atlas_{column}"])[f"atlas_{column}"]
        text_values = found.astype(str)
        there = set(text_values)
        if absent := [value for value in values if value not in there]:
            raise ConfigError(
                f"No cell has this value in obs column {column!r}",
                found=", ".join(absent),
                expected="some of " + ", ".join(sorted(there)[:20]),
                path=store.path,
            )
        out &= text_values.isin(list(values)).to_numpy()
    return out


def evaluate(
    store: CountStore,
    *,
    embedding: str,
    reference: Rows | None = None,
    query: Rows | None = None,
    seed: int = 0,
) -> Metrics:
    """Measure an embedding: mixing of batches, label transfer, silhouettes.

    Parameters
    ----------
    store
        An open store.
    embedding
        Name of an embedding kept with it.
    reference, query
        Cells whose labels are carried over, and to which, by an obs column; without them each
        labeled cell is predicted from all others.
    seed
        Of the samples.
    """
    return evaluate_embedding(
        store.embedding(embedding),
        Categories(store.obs_codes["batch"], store.batches),
        Categories(store.obs_codes["label"], store.labels) if store.labels else None,
        reference=None if reference is None else rows_where(store, reference),
        query=None if query is None else rows_where(store, query),
        seed=seed,
    )


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
    history: list[str]


def info(store: CountStore) -> StoreInfo:
    """Summarise a store."""
    from atlas.store.manifest import numbers, read

    codes = store.obs_codes
    states = [read(store.path, number) for number in numbers(store.path)]

    def counted(name: str, names: Sequence[str]) -> list[dict[str, Any]]:
        cells = np.bincount(codes[name][codes[name] >= 0], minlength=len(names))
        return [{"name": n, "cells": int(c)} for n, c in zip(names, cells, strict=True)]

    return StoreInfo(
        path=str(store.path),
        manifest=store.manifest.number,
        n_obs=store.n_obs,
        n_vars=store.n_vars,
        nnz=sum(study.nnz for study in store.manifest.studies),
        bytes_on_disk=sum(p.stat().st_size for p in store.path.rglob("*") if p.is_file()),
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
        history=[f"{s.number} {s.created} {s.action}" for s in states],
    )


def versions() -> dict[str, str]:
    """Versions of Python and of what computes."""
    names = ("atlas-trainer", "torch", "numpy", "scipy", "anndata", "zarr")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def command() -> str:
    """The command that runs, as it could be typed again."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
