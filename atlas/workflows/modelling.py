"""From a store to a trained model, and from a model to an embedding."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from atlas.config import ScviConfig, TrainConfig
from atlas.errors import ConfigError, ModelError
from atlas.evaluation.codes import Categories
from atlas.evaluation.confounding import confounding
from atlas.models import TrainedModel, build_model
from atlas.provenance import command, versions
from atlas.store import CountStore, CountView, FilesSource
from atlas.store.options import check_name
from atlas.store.split import Split, ranges_of
from atlas.training.environment import resolve_device
from atlas.training.loop import fit
from atlas.training.run import check_run_folder
from atlas.workflows.projecting import advice, project
from atlas.workflows.rows import Rows, rows_where
from loaders import RowSource, SequentialLoader

_EMBED_MINIBATCH = 512


def default_epochs(n_obs: int) -> int:
    """scvi-tools' rule: 400 passes, fewer above 20,000 cells, but always one."""
    return max(1, min(400, round(8e6 / max(1, n_obs))))


def train(
    store: CountStore | FilesSource,
    model: str = "scvi",
    *,
    out: str | PathLike[str],
    genes: Sequence[str] | None = None,
    max_epochs: int | None = None,
    seed: int = 0,
    hold_out: Rows | None = None,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> TrainedModel:
    """Train a model on all studies of a store.

    Parameters
    ----------
    store
        An open store, or files as they are (:func:`atlas.open_files`).
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
    hold_out
        Cells to validate on and never to train on, by an obs column, such as ``"donor=D3"``; by
        default a share of the cells by their hash.
    resume
        Go on with the run in ``out``, wherever it was interrupted; start it where there is none.
    progress
        Show loss, cells/s and the time left on stderr, and whether ``project`` would pay.
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
    epochs = default_epochs(store.n_obs) if max_epochs is None else max_epochs
    architecture, training = _configs({**options, "seed": seed, "max_epochs": epochs})
    genes = store.genes if genes is None else tuple(map(str, genes))
    if genes is None:
        raise ConfigError(
            "No genes are chosen",
            do="choose them with `atlas genes` (atlas.select_genes), or give genes=",
            path=store.path,
        )
    if training.project and not isinstance(store, CountStore):
        raise ConfigError(
            "Only a store can be projected",
            found=repr(store),
            do="leave out project, or ingest the files",
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
    projected = folder / "projected"
    if not training.project and progress and (line := advice(view, epochs, folder)):
        print(line, file=sys.stderr)
    reading: Callable[[RowSource], RowSource] | None = None
    if training.project and isinstance(store, CountStore):
        reading = partial(_projected, store, genes, projected, progress)
    presence = view.presence
    if hold_out is None:
        split = store.split(training.validation_share)
    else:
        held_out = rows_where(store, hold_out)
        if held_out.all():
            raise ConfigError(
                "All cells are held out, so none is left to train on",
                found=f"hold_out={hold_out!r}",
                expected="some of the cells",
                do="hold out fewer values of the column",
                path=store.path,
            )
        split = Split(ranges_of(~held_out), ranges_of(held_out), [])
    record = fit(
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
        reading=reading,
    )
    shutil.rmtree(projected, ignore_errors=True)  # an earlier part of the run may have written it
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
            "history": record.to_json(),
            "store": str(store.path),
            "manifest": store.number,
            "versions": versions(),
            "command": command(),
        },
    )
    trained.save(folder)
    return trained


def _projected(
    store: CountStore, genes: Sequence[str], path: Path, progress: bool, _: RowSource
) -> RowSource:
    return project(store, genes, path, progress=progress)


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


def _library_prior(view: CountView | FilesSource, n_batches: int) -> torch.Tensor:
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
    store: CountStore | FilesSource,
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
    if name is not None:
        check_name(name, "embedding")
        if not isinstance(store, CountStore):
            raise ConfigError(
                "Only a store keeps an embedding",
                found=repr(store),
                do="give name=None and keep what is returned, or ingest the files",
                path=store.path,
            )
        if store.url is not None:
            raise ConfigError(
                "A store by URL can only be read",
                found=f"name={name!r}",
                do="give name=None and keep what is returned",
                path=store.url,
            )
    missing = sorted(set(model.genes) - set(store.gene_table.names))
    if missing:
        raise ModelError(
            "The model was trained on genes that the store does not have",
            found=f"{len(missing)} of {len(model.genes)} missing, e.g. {', '.join(missing[:5])}",
            expected="a store with all genes of the model",
            path=store.path,
        )
    batch_of = _batch_codes(model, store)
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
    if name is not None and isinstance(store, CountStore):
        how = {
            "model": {"name": "scvi", **model.config.to_json()},
            "genes": list(model.genes),
            "training": model.training,
            "versions": versions(),
            "command": command(),
        }
        store.write_embedding(name, out, how)
    return out


def _batch_codes(model: TrainedModel, store: CountStore | FilesSource) -> npt.NDArray[np.int64]:
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
