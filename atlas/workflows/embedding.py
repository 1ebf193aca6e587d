"""From a model and a store to an embedding."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from atlas.errors import ConfigError
from atlas.models import TrainedModel
from atlas.models.base import evaluating
from atlas.models.threads import as_they_come
from atlas.provenance import command, versions
from atlas.store import CountStore, FilesSource
from atlas.store.options import check_name
from atlas.training.environment import resolve_device
from atlas.training.ranks import first_rank, joined
from atlas.workflows.starting import weights_digest
from atlas.workflows.streaming import Cells, CellStream


def embed(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    name: str | None = "",
    device: str = "auto",
    projection: str | PathLike[str] | None = None,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Embed all cells of a store, streaming, in its row order.

    Each minibatch lies in one study and has the same number of rows, the last one padded with
    empty cells, so that the embedding of a cell does not depend on what else is in the store.
    Started by ``torchrun``, each process embeds a share of the cells and returns all of them; the
    first keeps them.

    Parameters
    ----------
    model
        A trained model; all its genes must be in the store, all batches of the store in it.
    store
        An open store.
    name
        Keep the embedding with the store under this name, by default the model's, such as
        ``"scvi"``; None does not keep it.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, …
    projection
        Read the counts from this projection of the store to the model's genes
        (:func:`atlas.project`), which is quicker; the embedding is the same.
    progress
        Show cells/s and the time left on stderr.

    Returns
    -------
    float32, (n_obs, n_latent): posterior means of z.

    Raises
    ------
    ModelError
        The store lacks a gene of the model, or has a batch that the model does not know.
    ConfigError, StoreError
        The projection is of other genes, or of another state of the store.
    """
    if name == "":
        name = model.name
    if name is not None:
        check_name(name, "embedding")
        check_writable(store, f"name={name!r}")
    with joined(device) as ranks:
        start, stop = (store.n_obs * (ranks.rank + i) // ranks.world_size for i in (0, 1))
        mine = np.zeros(store.n_obs, bool)
        mine[start:stop] = True
        showing = "embedding" if progress and ranks.first else None
        out = np.zeros((store.n_obs, model.config.n_latent), np.float32)
        if stop > start or ranks.alone:
            stream = CellStream(
                model,
                store,
                rows=None if ranks.alone else mine,
                device=device,
                progress=showing,
                sparse=True,
                projection=projection,
            )
            out[start:stop] = embedded(model, stream)
        if not ranks.alone:  # each row is 0 but on one of them
            whole = torch.from_numpy(out).to(resolve_device(device))
            out = ranks.add_up(whole).cpu().numpy()
    if name is not None and isinstance(store, CountStore) and first_rank():
        store.write_embedding(name, out, how_made(model))
    return out


def embedded(model: TrainedModel, stream: CellStream) -> npt.NDArray[np.float32]:
    """The cells of a stream, in its order: float32, (n_cells, n_latent)."""
    out = np.empty((len(stream.chosen), model.config.n_latent), np.float32)

    def embed_cells(cells: Cells) -> None:
        out[cells.place] = model.embed(cells.inputs)[: cells.n_cells].cpu().numpy()

    with evaluating(model.module):  # before threads do, whose calls leave all flags as they are
        if stream.device.type == "cpu":
            as_they_come(stream, embed_cells)
        else:
            for cells in stream:
                embed_cells(cells)
    return out


def how_made(model: TrainedModel) -> dict[str, Any]:
    """What is kept with an embedding of how it was made."""
    return {
        "model": {"name": model.name, **model.config.to_json()},
        "genes": list(model.genes),
        "weights": weights_digest(model.module),
        "strategies": [one.strategy for one in model.surgery],
        "training": model.training,
        "versions": versions(),
        "command": command(),
    }


def embed_study(
    model: TrainedModel,
    store: CountStore,
    study: str,
    *,
    device: str = "auto",
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Embed the cells of one study: the rows that :func:`embed` gives them, bit for bit.

    Returns
    -------
    float32, (n_obs of the study, n_latent).
    """
    mine = store.obs_codes["study"] == store.studies.index(study)
    progressing = f"embedding {study}" if progress else None
    stream = CellStream(model, store, rows=mine, device=device, progress=progressing, sparse=True)
    return embedded(model, stream)


def check_writable(store: CountStore | FilesSource, found: str) -> None:
    """Refuse what can only be read.

    Raises
    ------
    ConfigError
        The counts are files as they are, or a store by URL.
    """
    if not isinstance(store, CountStore):
        raise ConfigError(
            "Only a store keeps what is computed",
            found=repr(store),
            do="give name=None and keep what is returned, or ingest the files",
            path=store.path,
        )
    if store.url is not None:
        raise ConfigError(
            "A store by URL can only be read",
            found=found,
            do="give name=None and keep what is returned",
            path=store.url,
        )
