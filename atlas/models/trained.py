"""A trained model with all that is needed to apply it."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atlas.config import Architecture, model_name
from atlas.errors import CheckpointError, ConfigError, ModelError
from atlas.models.base import Conditions, Inputs, Model
from atlas.models.columns import NO_COLUMNS, ObsColumns
from atlas.models.folder import VERSION, WEIGHTS_NAME, read, restored, write
from atlas.models.labels import LabelTree
from atlas.models.lineage import Surgery, check_lineage


@dataclass(frozen=True)
class TrainedModel:
    """A model and the genes, batches and studies that it knows.

    Parameters
    ----------
    module
        The model.
    genes
        Names of the modelled genes, in the order of the model's columns.
    batches
        Names of the batches, ``study/batch``, by code.
    studies
        Names of the studies, in the order of the rows of ``presence``.
    presence
        Which study measured which modelled gene: bool, (n_studies, n_genes).
    gene_ids
        Accession of each gene (None where unknown), or None for none at all.
    labels
        The classes of a model that has some.
    columns
        Columns of obs that it takes besides the batch.
    surgery
        Studies that were added to it by surgery, first to last.
    training
        How it was trained: plain JSON values.

    Raises
    ------
    ModelError
        The parts do not fit each other.
    """

    module: Model
    genes: tuple[str, ...]
    batches: tuple[str, ...]
    studies: tuple[str, ...]
    presence: npt.NDArray[np.bool_]
    gene_ids: tuple[str | None, ...] | None = None
    labels: LabelTree | None = None
    columns: ObsColumns = NO_COLUMNS
    surgery: tuple[Surgery, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_gene_ids = len(self.genes) if self.gene_ids is None else len(self.gene_ids)
        found = (len(self.genes), n_gene_ids, len(self.batches), self.presence.shape)
        shape = (len(self.studies), self.module.n_genes)
        expected = (self.module.n_genes, self.module.n_genes, self.module.n_batch, shape)
        if found != expected:
            raise ModelError(
                "genes, gene ids, batches and presence do not fit the model",
                found=found,
                expected=expected,
            )
        names = () if self.labels is None else self.labels.names
        check_lineage(self.surgery, self.batches, names, self.columns.sizes.n_categories)

    @property
    def config(self) -> Architecture:
        """The architecture."""
        return self.module.config

    @property
    def name(self) -> str:
        """Name of the model, such as ``"scvi"``."""
        return model_name(self.config)

    @property
    def encodes_batch(self) -> bool:
        """Whether the encoder sees the batch."""
        return bool(getattr(self.config, "encode_batch", True))

    @property
    def zero_filled(self) -> frozenset[str]:
        """Studies whose absent genes are taken as measured and zero."""
        return frozenset(name for one in self.surgery if one.zero_filled for name in one.studies)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.module.parameters()).device

    def embed(self, inputs: Inputs) -> Tensor:
        """Posterior mean of z of cells.

        Parameters
        ----------
        inputs
            Raw counts of the modelled genes and what the model is told of each cell, on any device.

        Returns
        -------
        float32, (n_cells, n_latent), on the model's device.

        Raises
        ------
        ModelError
            The counts are of another number of genes, or a batch is unknown to the model.
        """
        counts = inputs.counts
        if counts.dim() != 2 or counts.shape[1] != self.module.n_genes:
            raise ModelError(
                "the counts are not of the model's genes",
                found=tuple(counts.shape),
                expected=f"(n_cells, {self.module.n_genes})",
            )
        self._check_batch(inputs.batch)
        return self.module.embed(inputs.to(self.device))

    def decode(self, z: Tensor, conditions: Conditions | Tensor) -> Tensor:
        """Expected share of every modelled gene, for cells ``z`` as if measured elsewhere.

        Parameters
        ----------
        z
            float32, (n_cells, n_latent).
        conditions
            What to decode for; or batch codes alone, int64, (n_cells,), of a model without further
            covariates.

        Returns
        -------
        float32, (n_cells, n_genes), on the model's device; each row sums to 1.

        Raises
        ------
        ModelError
            A batch is unknown to the model.
        """
        if isinstance(conditions, Tensor):
            conditions = Conditions(conditions)
        self._check_batch(conditions.batch)
        return self.module.decode(z.to(self.device), conditions.to(self.device))

    def _check_batch(self, batch: Tensor) -> None:
        if batch.numel() and not 0 <= int(batch.min()) <= int(batch.max()) < self.module.n_batch:
            raise ModelError(
                "a batch is unknown to the model",
                found=f"codes {int(batch.min())} to {int(batch.max())}",
                expected=f"0 to {self.module.n_batch - 1}",
            )

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the model to a folder, which is made where it is missing.

        Each file is whole and synced before it takes its name, the metadata last. A crash leaves a
        folder that loads as it did before, or one that :func:`load_model` refuses.
        """
        metadata = {
            "schema": "atlas-model",
            "version": VERSION,
            "model": self.name,
            "config": self.config.to_json(),
            "genes": list(self.genes),
            "gene_ids": None if self.gene_ids is None else list(self.gene_ids),
            "batches": list(self.batches),
            "studies": list(self.studies),
            "labels": None if self.labels is None else self.labels.to_json(),
            "columns": self.columns.to_json(),
            "surgery": [one.to_json() for one in self.surgery],
            "training": self.training,
        }
        write(Path(folder), metadata, self.module.state_dict(), self.presence)


def load_model(folder: str | PathLike[str]) -> TrainedModel:
    """Load what :meth:`TrainedModel.save` wrote, onto the CPU and in evaluation mode.

    Raises
    ------
    CheckpointError
        The folder or a file of it is missing, damaged, or from a later version.
    """
    folder = Path(folder)
    metadata, state, presence = read(folder)
    try:
        labels, columns = metadata["labels"], ObsColumns.from_json(metadata["columns"])
        tree = None if labels is None else LabelTree.from_json(labels)
        model = TrainedModel(
            module=restored(metadata, state, tree, columns, folder / WEIGHTS_NAME),
            genes=tuple(metadata["genes"]),
            batches=tuple(metadata["batches"]),
            studies=tuple(metadata["studies"]),
            presence=presence,
            gene_ids=None if metadata["gene_ids"] is None else tuple(metadata["gene_ids"]),
            labels=tree,
            columns=columns,
            surgery=tuple(Surgery.from_json(one) for one in metadata["surgery"]),
            training=metadata["training"],
        )
    except (ConfigError, ModelError, KeyError) as error:
        raise CheckpointError(
            "model.json and the weights do not make a model",
            found=str(error),
            do="train again, or fetch the folder again from where it came",
            path=folder,
        ) from error
    model.module.eval()
    return model
