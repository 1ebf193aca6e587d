"""A trained model with all that is needed to apply it, in memory and on disk.

A folder holds ``weights.safetensors`` (the module's state, and which study measured which gene)
and ``model.json`` (everything else, and the digest of the weights). The JSON is written last: a
folder without it, or whose weights have another digest, is not a model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from atlas import files
from atlas.config import ARCHITECTURES, Architecture, model_name
from atlas.errors import CheckpointError, ConfigError, ModelError
from atlas.models.base import Conditions, Inputs, Model
from atlas.models.build import build_model
from atlas.models.columns import NO_COLUMNS, ObsColumns
from atlas.models.labels import LabelTree
from atlas.models.lineage import SCHEMA as SURGERY_SCHEMA
from atlas.models.lineage import Surgery

WEIGHTS_NAME = "weights.safetensors"
METADATA_NAME = "model.json"
VERSION = 3
"""2 since models other than scVI, 3 since surgery; earlier ones are read as they were."""

_STATE_PREFIX = "module."
_PRESENCE = "presence"
_NAMES = {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "minItems": 1}
_SCHEMA = {
    "type": "object",
    "properties": {
        "schema": {"const": "atlas-model"},
        "version": {"type": "integer", "minimum": 1},
        "model": {"enum": list(ARCHITECTURES)},
        "config": {"type": "object"},
        "genes": _NAMES,
        "gene_ids": {
            "oneOf": [
                {"type": "null"},
                {"type": "array", "items": {"type": ["string", "null"]}},
            ]
        },
        "batches": _NAMES,
        "studies": _NAMES,
        "labels": {
            "oneOf": [
                {"type": "null"},
                {
                    "type": "object",
                    "properties": {
                        "names": _NAMES,
                        "parents": {"type": "array", "items": {"type": "integer"}},
                    },
                    "required": ["names", "parents"],
                    "additionalProperties": False,
                },
            ]
        },
        "columns": {
            "type": "object",
            "properties": {
                "categorical": {"type": "object", "additionalProperties": _NAMES},
                "continuous": {"type": "array", "items": {"type": "string"}},
                "size_factor": {"type": ["string", "null"]},
                "label": {"type": ["string", "null"]},
            },
            "required": ["categorical", "continuous", "size_factor", "label"],
            "additionalProperties": False,
        },
        "surgery": SURGERY_SCHEMA,
        "training": {"type": "object"},
        "weights_sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    },
    "required": [
        "schema",
        "version",
        "model",
        "config",
        "genes",
        "gene_ids",
        "batches",
        "studies",
        "training",
        "weights_sha256",
    ],
    "additionalProperties": False,
}


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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            _STATE_PREFIX + name: value.detach().cpu().contiguous()
            for name, value in self.module.state_dict().items()
        }
        weights = safetensors.torch.save({**state, _PRESENCE: torch.from_numpy(self.presence)})
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
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        document = json.dumps(metadata, indent=1, allow_nan=False).encode()
        files.replace_bytes(folder / WEIGHTS_NAME, weights)
        files.replace_bytes(folder / METADATA_NAME, document)


def load_model(folder: str | PathLike[str]) -> TrainedModel:
    """Load what :meth:`TrainedModel.save` wrote, onto the CPU and in evaluation mode.

    Raises
    ------
    CheckpointError
        The folder or a file of it is missing, damaged, or from a later version.
    """
    folder = Path(folder)
    metadata = _read_metadata(folder)
    tensors = _read_weights(folder / WEIGHTS_NAME, metadata["weights_sha256"])
    try:
        presence = tensors.pop(_PRESENCE).numpy()
        state = {name.removeprefix(_STATE_PREFIX): value for name, value in tensors.items()}
        labels, columns = metadata["labels"], ObsColumns.from_json(metadata["columns"])
        tree = None if labels is None else LabelTree.from_json(labels)
        model = TrainedModel(
            module=_restore(metadata, state, tree, columns, folder / WEIGHTS_NAME),
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


def _restore(
    metadata: dict[str, Any],
    state: dict[str, Tensor],
    labels: LabelTree | None,
    columns: ObsColumns,
    path: Path,
) -> Model:
    """Build the module that the metadata describe and give it its weights."""
    priors = [value for name, value in state.items() if name.endswith("library_prior")]

    def build() -> Model:
        return build_model(
            ARCHITECTURES[metadata["model"]].from_json(metadata["config"]),
            len(metadata["genes"]),
            len(metadata["batches"]),
            seed=0,
            library_prior=priors[0] if priors else None,
            covariates=columns.sizes,
            labels=labels,
        )

    _check_depth(metadata["config"], columns, labels, len(state), path)
    # Shapes first, without memory for them: a file may claim a model of any size.
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found != expected:
        differing = sorted(set(found.items()) ^ set(expected.items()))
        names = sorted({name for name, _ in differing})
        raise CheckpointError(
            "the weights do not have the shapes of the model",
            found=", ".join(f"{name} {found.get(name, 'missing')}" for name in names),
            expected=", ".join(f"{name} {expected.get(name, 'absent')}" for name in names),
            path=path,
        )
    module = build()
    module.load_state_dict(state)
    return module


def _check_depth(
    config: dict[str, Any], columns: ObsColumns, labels: LabelTree | None, n: int, path: Path
) -> None:
    """Refuse more layers than there are tensors, before time is taken to build them."""
    layers = [value for name, value in config.items() if name.endswith("_layers")]
    counts = [*layers, len(columns.categorical), 0 if labels is None else labels.n_levels]
    if most := [count for count in counts if not isinstance(count, int) or count > n]:
        raise CheckpointError(
            "the weights are too few for the layers of the model",
            found=f"{n} tensors",
            expected=f"those of {most[0]!r} layers, covariates or levels of labels",
            path=path,
        )


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA_NAME
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", expected="a trained model", path=folder)
    if not path.is_file():
        raise CheckpointError(
            "the folder holds no finished model",
            found=", ".join(sorted(entry.name for entry in folder.iterdir())) or "an empty folder",
            expected=METADATA_NAME,
            do="let the training finish; `atlas train --resume` goes on where it stopped",
            path=folder,
        )
    try:
        metadata = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    version = metadata.get("version") if isinstance(metadata, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            "the model was written by a later version of Atlas",
            found=f"version {version}",
            expected=f"at most {VERSION}",
            do="update Atlas",
            path=path,
        )
    if version in (1, 2):
        metadata = {"labels": None, "columns": NO_COLUMNS.to_json(), "surgery": [], **metadata}
    try:
        jsonschema.validate(metadata, _SCHEMA)
    except jsonschema.ValidationError as error:
        raise _damaged(path, f"{error.json_path}: {error.message}") from error
    values: dict[str, Any] = metadata
    return values


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError("the weights are missing", expected=WEIGHTS_NAME, path=path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise CheckpointError(
            "the weights are damaged or belong to another model.json",
            found=f"{len(content)} bytes with sha256 {digest}",
            expected=f"sha256 {sha256}",
            do="train again, or fetch the folder again from where it came",
            path=path,
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "the file is damaged",
        found=found,
        do="train again, or fetch the folder again from where it came",
        path=path,
    )
