"""One model a batch: the batches' own embeddings, which kNN purity compares a joint one with."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atlas.config import ARCHITECTURES
from atlas.errors import ConfigError
from atlas.models import TrainedModel
from atlas.store import CountStore
from atlas.store.options import check_name
from atlas.training.run import check_run_folder
from atlas.workflows.embedding import check_writable, embedded, how_made
from atlas.workflows.modelling import train
from atlas.workflows.streaming import CellStream

LEAST_CELLS = 2
_OF_ONE_BATCH = {"scvi": "scvi", "scanvi": "scvi", "cvae": "cvae", "trvae": "cvae"}
"""What a model is without labels of other batches, and without another batch to come close to."""


def embed_per_batch(
    model: TrainedModel,
    store: CountStore,
    *,
    out: str | PathLike[str],
    name: str | None = "",
    max_epochs: int | None = None,
    resume: bool = False,
    device: str = "auto",
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Train the model anew on each batch alone, and embed the batch's cells by it.

    What kNN purity and k-means conservation compare with in the scANVI paper (Xu et al. 2021,
    Methods): the latent space of each batch by itself. Coordinates of different batches have
    nothing to do with each other. Genes, architecture, training options and seed are those of the
    model, so a small batch takes fewer steps. For a scANVI each batch's model is the scVI within
    it, as in the paper: labels of other batches have no part in a batch by itself. For a trVAE it
    is the cvae: there are no batches to bring together. A DAVAE is nothing without them, and is
    refused. A batch of one cell cannot be trained on and stays at the origin.

    Parameters
    ----------
    model
        Trained from scratch: not imported, nor extended by surgery.
    store
        An open store; its batches need not be those of the model.
    out
        A folder for the runs, one in it for each batch.
    name
        Keep the embedding under this name, ``"scvi_batch"`` for a model ``"scvi"`` without; None
        does not keep it.
    max_epochs
        Passes over the cells of each batch; the model's without.
    resume
        Go on with the runs in ``out``, wherever they were interrupted.
    device, progress
        As in :func:`atlas.embed`.

    Returns
    -------
    float32, (n_obs, n_latent), in the order of the store.

    Raises
    ------
    ConfigError
        The model was not trained here from scratch or is a DAVAE, or no batch has two cells.
    CheckpointError
        ``out`` holds other runs, or some and ``resume`` is False.
    ModelError
        The store lacks a gene of the model.
    """
    if name == "":
        name = f"{model.name}_batch"
    if name is not None:
        check_name(name, "embedding")
        check_writable(store, f"name={name!r}")
    options = _options(model, device, max_epochs)
    folder = Path(out)
    check_run_folder(folder, resume=resume)
    codes = store.obs_codes["batch"]
    kind = _OF_ONE_BATCH[model.name]
    embedding = np.zeros((store.n_obs, model.config.n_latent), np.float32)
    told: dict[str, Any] = {}
    for code in np.unique(codes):
        batch, mine = store.batches[code], codes == code
        told[batch] = {"n_obs": int(mine.sum()), "validation_bound": None}
        if mine.sum() < LEAST_CELLS:
            continue
        own = train(
            store,
            kind,
            out=folder / folder_name(batch),
            genes=model.genes,
            rows=mine,
            resume=resume,
            progress=progress,
            **options,
        )
        told[batch]["validation_bound"] = own.training["history"][-1]["validation_bound"]
        stream = CellStream(own, store, rows=mine, device=device, sparse=True)
        embedding[mine] = embedded(own, stream)
    if all(each["n_obs"] < LEAST_CELLS for each in told.values()):
        raise ConfigError(
            "no batch can be trained on", found="batches of one cell", expected="two cells or more"
        )
    if name is not None:
        store.write_embedding(name, embedding, {**how_made(model), "per_batch": told})
    return embedding


def folder_name(batch: str) -> str:
    """A name for the run of a batch, whatever the batch is called."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", batch)[:40]
    return f"{readable}-{hashlib.sha256(batch.encode()).hexdigest()[:8]}"


def _options(model: TrainedModel, device: str, max_epochs: int | None) -> dict[str, Any]:
    """Architecture and training of the model, as :func:`train` takes them."""
    if model.name not in _OF_ONE_BATCH:
        raise ConfigError(
            f"There is no {model.name} of one batch",
            expected="one of " + ", ".join(_OF_ONE_BATCH),
            do="compare with `atlas baseline --per-batch`",
        )
    training = model.training.get("config")
    if training is None or model.surgery:
        raise ConfigError(
            "the settings of this model's training cannot be followed batch by batch",
            found="a model extended by surgery" if model.surgery else "a model trained elsewhere",
            expected="a model that `atlas train` trained from scratch",
            do="give the reference that was extended"
            if model.surgery
            else "train one with the same options, or compare with `atlas baseline --per-batch`",
        )
    own = model.config.to_json()
    fields = dataclasses.fields(ARCHITECTURES[_OF_ONE_BATCH[model.name]])
    architecture = {field.name: own[field.name] for field in fields}
    columns = model.columns
    options = {**architecture, **training, "project": False}
    if device != "auto":
        options["device"] = device
    if max_epochs is not None:
        options["max_epochs"] = max_epochs
    if columns.categorical:
        options["categorical_covariates"] = [column for column, _ in columns.categorical]
    if columns.continuous:
        options["continuous_covariates"] = columns.continuous
    if columns.size_factor is not None:
        options["size_factor"] = columns.size_factor
    return options
