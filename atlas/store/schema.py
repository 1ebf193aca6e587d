"""What a manifest holds: frozen dataclasses, and the JSON schema they are checked against."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from atlas.errors import CorruptStoreError, FormatError

FORMAT = "atlas-store"
VERSION = 2
"""2 since stores keep models; those of version 1 are read as they are."""

_DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_COUNT = {"type": "integer", "minimum": 0}
_NAMES = {"type": "array", "items": {"type": "string"}}
_PART = {
    "type": "object",
    "required": ["path", "files"],
    "additionalProperties": False,
    "properties": {
        "path": {"type": "string"},
        "files": {"type": "object", "additionalProperties": _DIGEST},
    },
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [
        "format",
        "version",
        "number",
        "created",
        "written_by",
        "action",
        "command",
        "backend",
        "gene_mode",
        "genes",
        "studies",
        "batches",
        "labels",
        "embeddings",
        "gene_selection",
    ],
    "additionalProperties": False,
    "properties": {
        "format": {"const": FORMAT},
        "version": {"enum": [1, VERSION]},
        "number": {"type": "integer", "minimum": 1},
        "created": {"type": "string"},
        "written_by": {"type": "string"},
        "action": {"type": "string"},
        "command": {"type": "string"},
        "backend": {"enum": ["zarr", "tiledb"]},
        "gene_mode": {"enum": ["union", "first", "given"]},
        "genes": {
            "type": "object",
            "required": ["path", "sha256", "n_vars"],
            "additionalProperties": False,
            "properties": {"path": {"type": "string"}, "sha256": _DIGEST, "n_vars": _COUNT},
        },
        "studies": {
            "type": "array",
            "items": {
                "type": "object",
                "required": [
                    "name",
                    "path",
                    "n_obs",
                    "nnz",
                    "profile",
                    "source",
                    "digests",
                    "parts",
                ],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "path": {"type": "string"},
                    "n_obs": _COUNT,
                    "nnz": _COUNT,
                    "profile": {"type": "string"},
                    "source": {"type": "string"},
                    "digests": {
                        "type": "object",
                        "required": ["metadata", "obs", "indptr"],
                        "additionalProperties": _DIGEST,
                    },
                    "parts": {"type": "object", "additionalProperties": _PART},
                },
            },
        },
        "batches": _NAMES,
        "labels": _NAMES,
        "embeddings": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["n_latent", "details"],
                "additionalProperties": False,
                "properties": {
                    "n_latent": _COUNT,
                    "details": _PART,
                    "index": {"anyOf": [_PART, {"type": "null"}]},
                },
            },
        },
        "models": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["version", "part"],
                "additionalProperties": False,
                "properties": {"version": {"type": "integer", "minimum": 1}, "part": _PART},
            },
        },
        "gene_selection": {
            "type": ["object", "null"],
            "required": ["flavour", "n", "genes"],
            "additionalProperties": False,
            "properties": {"flavour": {"type": "string"}, "n": _COUNT, "genes": _NAMES},
        },
    },
}

_VALIDATOR = Draft202012Validator(SCHEMA)


@dataclass(frozen=True, slots=True)
class Part:
    """A folder of ``.npy`` and JSON files that belongs to a study or an embedding.

    Attributes
    ----------
    path
        Relative to the store.
    files
        SHA-256 of each file, by its name.
    """

    path: str
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StudyEntry:
    """One study: written once, whole, and never changed.

    Attributes
    ----------
    name, path
        Its name, and its folder relative to the store: an AnnData in Zarr.
    n_obs, nnz
        Rows and non-zero counts.
    profile
        How its chunks are compressed.
    source
        What it was read from.
    digests
        SHA-256 of its ``metadata`` (all zarr.json and the small tables), ``obs`` and ``indptr``.
    parts
        What lies beside it: ``index``, ``statistics``, ``embedding:NAME``, and ``obs``, the columns
        annotated since.
    """

    name: str
    path: str
    n_obs: int
    nnz: int
    profile: str
    source: str
    digests: Mapping[str, str]
    parts: Mapping[str, Part] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenesFile:
    """Where the gene table lies; the table only grows, so positions never change."""

    path: str
    sha256: str
    n_vars: int


@dataclass(frozen=True, slots=True)
class EmbeddingEntry:
    """An embedding of the store: its width, a part that says how it was made, and its index.

    The index of neighbours is of the rows of all studies, in the order of the state; None where
    there is none. Whatever changes the rows or the studies takes it away or brings its own.
    """

    n_latent: int
    details: Part
    index: Part | None = None


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """The newest version of a model kept with the store: its number, and its files.

    ``details.json`` among them is its record: which version it came from, by which studies and
    settings. Older versions are named by older manifests.
    """

    version: int
    part: Part


@dataclass(frozen=True, slots=True)
class GeneSelection:
    """The genes chosen to be modelled, in the order of the gene table."""

    flavour: str
    n: int
    genes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole state of a store at one commit.

    Attributes
    ----------
    number
        1, 2, …: the name of its file.
    created
        UTC, ISO 8601.
    written_by
        Version of Atlas.
    action, command
        What the commit did, and the command line that did it, for the history.
    backend
        ``"zarr"``.
    gene_mode
        ``"union"``: new genes are added; ``"first"``, ``"given"``: the table is fixed.
    genes, studies, embeddings, models, gene_selection
        See their classes.
    batches, labels
        Names of the training codes 0, 1, …; append-only. A batch is named ``study/batch``.
    """

    number: int
    created: str
    written_by: str
    action: str
    command: str
    backend: str
    gene_mode: str
    genes: GenesFile
    studies: tuple[StudyEntry, ...] = ()
    batches: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    embeddings: Mapping[str, EmbeddingEntry] = field(default_factory=dict)
    gene_selection: GeneSelection | None = None
    models: Mapping[str, ModelEntry] = field(default_factory=dict)

    @property
    def n_obs(self) -> int:
        """Rows of all studies."""
        return sum(study.n_obs for study in self.studies)

    @property
    def paths(self) -> set[str]:
        """All folders and files that belong to it, relative to the store."""
        parts = [part for study in self.studies for part in study.parts.values()]
        parts += [embedding.details for embedding in self.embeddings.values()]
        parts += [one.index for one in self.embeddings.values() if one.index is not None]
        parts += [model.part for model in self.models.values()]
        studies = {study.path for study in self.studies}
        return {self.genes.path} | studies | {part.path for part in parts}

    def to_bytes(self) -> bytes:
        """JSON, as written to ``manifests/NNNNNN.json``."""
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(values, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> Self:
        """Parse and check a manifest.

        Raises
        ------
        FormatError
            It was written in a newer format.
        CorruptStoreError
            It is no JSON, or does not follow the schema.
        """
        try:
            values = json.loads(data)
        except ValueError as error:
            raise CorruptStoreError(
                "The manifest is not JSON",
                found=str(error),
                do="restore it from a copy; older manifests of the store are still whole",
                path=path,
            ) from None
        version = values.get("version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise FormatError(
                "The store was written in a newer format",
                found=f"format version {version}",
                expected=f"at most {VERSION}",
                do="install a newer atlas-trainer",
                path=path,
            )
        if wrong := best_match(_VALIDATOR.iter_errors(values)):
            raise CorruptStoreError(
                "The manifest does not follow its schema",
                found=f"{wrong.json_path}: {wrong.message[:200]}",
                expected=f"{FORMAT} version {VERSION}",
                do="restore it from a copy; older manifests of the store are still whole",
                path=path,
            )
        del values["format"], values["version"]
        values["genes"] = GenesFile(**values["genes"])
        values["studies"] = tuple(
            StudyEntry(**{**s, "parts": {k: Part(**p) for k, p in s["parts"].items()}})
            for s in values["studies"]
        )
        values["batches"] = tuple(values["batches"])
        values["labels"] = tuple(values["labels"])
        values["embeddings"] = {
            name: EmbeddingEntry(
                e["n_latent"],
                Part(**e["details"]),
                None if e.get("index") is None else Part(**e["index"]),
            )
            for name, e in values["embeddings"].items()
        }
        values["models"] = {
            name: ModelEntry(e["version"], Part(**e["part"]))
            for name, e in values.get("models", {}).items()
        }
        if values["gene_selection"] is not None:
            chosen = values["gene_selection"]
            values["gene_selection"] = GeneSelection(
                chosen["flavour"], chosen["n"], tuple(chosen["genes"])
            )
        return cls(**values)
