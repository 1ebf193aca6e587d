"""The cells of a store as inputs of a trained model, minibatch after minibatch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from atlas.errors import ConfigError, ModelError
from atlas.models import Inputs, TrainedModel
from atlas.store import CountStore, CountView, FilesSource
from atlas.store.projection import Projection, open_projection
from atlas.training.environment import resolve_device
from atlas.training.inputs import sparse_counts
from atlas.workflows.columns import cell_columns
from atlas.workflows.genes import GenesInStore
from atlas.workflows.rows import Rows, mask_of
from loaders import Minibatch, RowSource, SequentialLoader

MINIBATCH = 512


@dataclass(frozen=True, slots=True)
class Cells:
    """A minibatch of cells of one study.

    Attributes
    ----------
    rows
        Their row numbers in the store: int64, (n_cells,).
    place
        Where they are among the cells chosen.
    inputs
        Their inputs on the model's device, padded with empty cells to as many rows as every
        minibatch has: what is computed for the first ``n_cells`` counts.
    """

    rows: npt.NDArray[np.int64]
    place: slice
    inputs: Inputs

    @property
    def n_cells(self) -> int:
        """How many cells there are."""
        return len(self.rows)


class CellStream:
    """Cells of a store for a trained model, in row order.

    Each minibatch lies in one study and has the same number of rows, the last one padded with
    empty cells, so that what is computed for a cell does not depend on what else is in the store.
    The model is moved to the device. Iterating again reads again.

    Parameters
    ----------
    model
        A trained model; all its genes must be in the store, but for those that the cells' studies
        lacked when they were added to it by surgery; and all batches of the cells in it if its
        encoder sees the batch.
    store
        An open store, or files as they are.
    rows
        Which cells: chosen by an obs column, or a mask (n_obs,); all when None.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, …
    progress
        What to show on stderr beside cells/s and the time left; nothing when None.
    minibatch_size
        Rows of a minibatch.
    own_batch
        Cells are to be decoded for their own batch, so that the model must know it even if its
        encoder does not see it.
    sparse
        Leave the counts sparse on the CPU, where the model takes them so: for what encodes only.
    projection
        Read the counts from this projection of the store to the model's genes.

    Attributes
    ----------
    chosen
        Row numbers of the cells: int64, (n_cells,).
    columns
        What the model is told of all cells of the store besides counts and batch.
    device
        Where the inputs are.

    Raises
    ------
    ModelError
        The store lacks a gene of the model, or the cells are of a batch that it does not know.
    ConfigError
        ``rows`` chooses no cell, or the projection is of other genes.
    """

    def __init__(
        self,
        model: TrainedModel,
        store: CountStore | FilesSource,
        *,
        rows: Rows | npt.NDArray[np.bool_] | None = None,
        device: str = "auto",
        progress: str | None = None,
        minibatch_size: int = MINIBATCH,
        own_batch: bool = False,
        sparse: bool = False,
        projection: str | PathLike[str] | None = None,
    ) -> None:
        mask = mask_of(store, rows)
        genes = GenesInStore.of(model, store)
        met = np.unique(store.obs_codes["study"][mask])
        added = {study for one in model.surgery for study in one.studies}
        if genes.absent and not added.issuperset(store.studies[i] for i in met):
            raise genes.missing(model, store)
        self.chosen = np.flatnonzero(mask)
        if rows is not None and not len(self.chosen):
            raise ConfigError(
                "No cell is chosen",
                found="rows that choose none of the cells",
                expected=f"some of {store.n_obs:,} cells",
                path=store.path,
            )
        self._mask = mask
        self._batch_of = _batch_codes(model, store, mask, model.encodes_batch or own_batch)
        self.columns = cell_columns(store, model.columns, None, mask)
        view = genes.select(store)
        self._source: RowSource = view
        if projection is not None:
            self._source = _projected(store, view, projection)
        presence = view.presence
        presence[[name in model.zero_filled for name in store.studies]] = True
        self._presence = torch.from_numpy(presence)
        self._complete = np.asarray(presence.all(axis=1))
        self._progress = progress
        self._size = minibatch_size
        self.device = resolve_device(device)
        self._sparse = sparse and model.module.takes_sparse and self.device.type == "cpu"
        model.module.to(self.device)

    def __iter__(self) -> Iterator[Cells]:
        """Go through the cells."""
        with tqdm(
            total=len(self.chosen),
            desc=self._progress,
            unit=" cells",
            unit_scale=True,
            disable=self._progress is None,
        ) as bar:
            if not len(self.chosen):
                return
            start = 0
            for minibatch in SequentialLoader(self._source, self._size, rows=self._mask):
                rows = np.asarray(minibatch.rows, np.int64)
                study = int(minibatch.obs["study"][0])
                present = None
                if not self._complete[study]:
                    present = self._presence[study].expand(self._size, -1).to(self.device)
                columns = self.columns
                inputs = Inputs(
                    self._counts(minibatch),
                    self._padded(self._batch_of[minibatch.obs["batch"]]),
                    present,
                    categories=self._rows_of(columns.categories, rows),
                    continuous=self._rows_of(columns.continuous, rows),
                    size_factor=self._rows_of(columns.size_factor, rows, filling=1),
                )
                yield Cells(rows, slice(start, start + len(rows)), inputs)
                start += len(rows)
                bar.update(len(rows))

    def _counts(self, minibatch: Minibatch) -> Tensor:
        """The counts of a minibatch, and empty cells."""
        if self._sparse:
            return sparse_counts(minibatch, self._size)
        counts = torch.zeros(self._size, minibatch.n_vars, device=self.device)
        counts[: minibatch.n_rows] = minibatch.to_torch(self.device, dense=True)
        return counts

    def _rows_of(
        self, values: npt.NDArray[Any] | None, rows: npt.NDArray[np.int64], filling: int = 0
    ) -> Tensor | None:
        return None if values is None else self._padded(values[rows], filling)

    def _padded(self, values: npt.NDArray[Any], filling: int = 0) -> Tensor:
        """Values of cells on the device, with as many rows as every minibatch has."""
        kind = np.int64 if values.dtype.kind == "i" else values.dtype
        out = np.full((self._size, *values.shape[1:]), filling, kind)
        out[: len(values)] = values
        return torch.from_numpy(out).to(self.device)


def _projected(
    store: CountStore | FilesSource, view: CountView | FilesSource, path: str | PathLike[str]
) -> Projection:
    """A projection of a store, open, if it has the same columns as a selection of it."""
    if not isinstance(store, CountStore):
        raise ConfigError(
            "Only a store has projections",
            found="files as they are",
            do="leave the projection out, or ingest the files",
            path=path,
        )
    projection = open_projection(path, store)
    if projection.fingerprint != view.fingerprint:
        raise ConfigError(
            "The projection is of other genes than the model's",
            found=f"{len(projection.genes):,} genes, such as {', '.join(projection.genes[:5])}",
            expected="the model's genes, in their order",
            do="leave it out, or write one of the model's genes: atlas.project(store, model.genes, "
            "path)",
            path=path,
        )
    return projection


def _batch_codes(
    model: TrainedModel,
    store: CountStore | FilesSource,
    mask: npt.NDArray[np.bool_],
    needed: bool,
) -> npt.NDArray[np.int64]:
    """The model's code of each of the store's batches; 0 where unknown and not needed."""
    code = {name: i for i, name in enumerate(model.batches)}
    codes = np.array([code.get(name, -1) for name in store.batches], np.int64)
    if not needed:
        return np.maximum(codes, 0)
    own = store.obs_codes["batch"]
    met = np.unique(own[mask])
    if unknown := [store.batches[i] for i in met if codes[i] < 0]:
        of_study = store.obs_codes["study"]
        new = np.unique(of_study[mask & (codes[own] < 0)])
        known = [store.studies[i] for i in np.unique(of_study[mask]) if i not in new]
        rest = f"; or leave them out: --rows atlas_study={','.join(known)}" if known else ""
        raise ModelError(
            "The store has batches that the model was not trained on",
            found=", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else ""),
            expected=f"some of {', '.join(model.batches[:8])}",
            do="add their studies to the model with `atlas extend`, or train one on all" + rest,
            path=store.path,
        )
    return np.maximum(codes, 0)
