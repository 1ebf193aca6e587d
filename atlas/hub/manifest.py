"""What ``package.json`` says: whose a shared reference is, what its cells have, and its parts.

Nothing in it is believed before it is checked: names of parts are of the few forms below, so that
none leads out of the folder, and sizes are known before a byte of them is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from jsonschema import Draft202012Validator

from atlas.errors import PackageError
from atlas.evaluation.index.arrays import MAX_LISTS
from atlas.evaluation.index.choice import KINDS
from atlas.models.folder import first_wrong

SCHEMA_NAME: Final = "atlas-package"
VERSION: Final = 2
"""2 since there is an index in it; packages of version 1 are read as they are."""
PACKAGE: Final = "package.json"
MODEL_FOLDER: Final = "model"
MODEL: Final = "model/model.json"
WEIGHTS: Final = "model/weights.safetensors"
REFERENCE: Final = "reference.safetensors"
INDEX: Final = "index.safetensors"
CARD: Final = "card.md"
REQUIRED: Final = (MODEL, WEIGHTS, REFERENCE, CARD)
NAMED: Final = (*REQUIRED, INDEX)

MAX_JSON: Final = 64 * 2**20
"""Bytes of one JSON file or card: a million names fit."""
MAX_NAMES: Final = 10_000
"""Labels, which a model holds a table of by pairs."""
_MAX_COUNTS: Final = 10_000
_COUNTS: Final = r"counts/[0-9]{6}\.safetensors"
FETCH_AGAIN: Final = "fetch it again; if that does not help, tell whoever shares it"

_TEXT: Final = {"type": ["string", "null"], "maxLength": 100_000}
_NAMES: Final = {"type": "array", "items": {"type": "string"}, "maxItems": 2_000_000}
_LISTS: Final = {"type": "integer", "minimum": 0, "maximum": MAX_LISTS}
_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "schema": {"const": SCHEMA_NAME},
        "version": {"enum": [1, VERSION]},
        "created": {"type": "string", "maxLength": 100},
        "written_by": {"type": "string", "maxLength": 100},
        "title": {"type": "string", "maxLength": 1000},
        **dict.fromkeys(("description", "licence", "citation"), _TEXT),
        "reference": {
            "type": "object",
            "properties": {
                "n_obs": {"type": "integer", "minimum": 1},
                "n_latent": {"type": "integer", "minimum": 1},
                "studies": {**_NAMES, "minItems": 1},
                "batches": {**_NAMES, "minItems": 1},
                "labels": {**_NAMES, "maxItems": MAX_NAMES},
                "label_key": {"type": ["string", "null"]},
                "columns": {
                    "type": "object",
                    "maxProperties": 1000,
                    "additionalProperties": {**_NAMES, "type": ["array", "null"]},
                },
            },
            "required": [
                "n_obs",
                "n_latent",
                "studies",
                "batches",
                "labels",
                "label_key",
                "columns",
            ],
            "additionalProperties": False,
        },
        "index": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["none", *KINDS]},
                "why": {"type": "string", "maxLength": 1000},
                **dict.fromkeys(("n_lists", "breadth"), _LISTS),
                "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
                "recall_target": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                "recall": {
                    "type": ["object", "null"],
                    "properties": {
                        "k": {"type": "integer", "minimum": 1, "maximum": 2**31},
                        "value": {"type": "number", "minimum": 0, "maximum": 1},
                        "standard_error": {"type": "number", "minimum": 0, "maximum": 1},
                        "n_queries": {"type": "integer", "minimum": 0, "maximum": 2**31},
                    },
                    "required": ["k", "value", "standard_error", "n_queries"],
                    "additionalProperties": False,
                },
            },
            "required": [
                *("kind", "why", "n_lists", "breadth", "seed", "recall_target", "recall"),
            ],
            "additionalProperties": False,
        },
        "parts": {
            "type": "object",
            "required": list(REQUIRED),
            "maxProperties": len(NAMED) + _MAX_COUNTS,
            "propertyNames": {"pattern": rf"^({'|'.join(map(re.escape, NAMED))}|{_COUNTS})\Z"},
            "additionalProperties": {
                "type": "object",
                "properties": {
                    "bytes": {"type": "integer", "minimum": 0, "maximum": 2**50},
                    "sha256": {"type": "string", "pattern": r"^[0-9a-f]{64}\Z"},
                },
                "required": ["bytes", "sha256"],
                "additionalProperties": False,
            },
        },
    },
    "required": [
        "schema",
        "version",
        "created",
        "written_by",
        "title",
        "description",
        "licence",
        "citation",
        "reference",
        "parts",
    ],
    "additionalProperties": False,
}
_VALIDATOR: Final = Draft202012Validator(_SCHEMA)


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a package: how long it is, and its SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class About:
    """What people are told of a shared reference.

    Attributes
    ----------
    title
        One line.
    description
        What it is of and for; Markdown.
    licence
        Under which others may use it, such as ``CC-BY-4.0``.
    citation
        What to cite.
    """

    title: str
    description: str | None = None
    licence: str | None = None
    citation: str | None = None


@dataclass(frozen=True, slots=True)
class ReferenceNames:
    """The names behind the codes of the reference's cells.

    Attributes
    ----------
    n_obs, n_latent
        Cells, and dimensions of their embedding.
    studies, batches, labels
        Names by code; no labels where no cell has one.
    label_key
        The obs column that the labels came from; None for the store's own.
    columns
        Further obs columns: names by code, or None for a column of numbers.
    """

    n_obs: int
    n_latent: int
    studies: tuple[str, ...]
    batches: tuple[str, ...]
    labels: tuple[str, ...] = ()
    label_key: str | None = None
    columns: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RecallAbout:
    """What share of the ``k`` true neighbours the sharer's index found of some of its rows."""

    k: int
    value: float
    standard_error: float
    n_queries: int


@dataclass(frozen=True, slots=True)
class IndexAbout:
    """The index of the embedding that the sharer has, and what of it is in the package.

    Attributes
    ----------
    kind
        ``"none"``, or one of :data:`atlas.evaluation.index.Kind`. Lists are in the package for
        ``"ivf"`` and ``"disk"``; an exact index is the embedding itself; of ``"hnsw"`` there is
        nothing but FAISS's own file, which is read by code that trusts it.
    why
        In words.
    n_lists, breadth, seed, recall_target
        As in :class:`atlas.evaluation.index.arrays.ListArrays`; 0, and 1, without lists.
    recall
        What the sharer measured, which is measured again where it is used.
    """

    kind: str = "none"
    why: str = "the package is of a version that had no index"
    n_lists: int = 0
    breadth: int = 0
    seed: int = 0
    recall_target: float = 1.0
    recall: RecallAbout | None = None

    @property
    def has_lists(self) -> bool:
        """Whether lists are in the package."""
        return self.kind in ("ivf", "disk")


@dataclass(frozen=True, slots=True)
class PackageManifest:
    """All that ``package.json`` says.

    Attributes
    ----------
    about, reference, index
        For people, for the codes of the cells, and for the search of neighbours.
    parts
        Every other file, by its name.
    created, written_by
        When, and by which version of Atlas.
    """

    about: About
    reference: ReferenceNames
    parts: Mapping[str, Part]
    created: str
    written_by: str
    index: IndexAbout = IndexAbout()

    @property
    def n_bytes(self) -> int:
        """Of all parts."""
        return sum(part.bytes for part in self.parts.values())

    @property
    def counts(self) -> tuple[str, ...]:
        """Names of the parts with counts, in the order of their cells."""
        return tuple(sorted(name for name in self.parts if name not in NAMED))

    def to_bytes(self) -> bytes:
        """As JSON."""
        values = {
            "schema": SCHEMA_NAME,
            "version": VERSION,
            "created": self.created,
            "written_by": self.written_by,
            **dataclasses.asdict(self.about),
            "reference": dataclasses.asdict(self.reference),
            "index": dataclasses.asdict(self.index),
            "parts": {name: dataclasses.asdict(part) for name, part in self.parts.items()},
        }
        return json.dumps(values, indent=1, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes, path: object) -> PackageManifest:
        """The inverse of :meth:`to_bytes`, checked; ``path`` is for messages.

        Raises
        ------
        PackageError
            It is damaged, of a newer version, or contradicts itself.
        """
        values = parse_json(data, f"{path}: {PACKAGE}")
        version = values.get("version") if isinstance(values, dict) else None
        if type(version) is int and version > VERSION:
            raise PackageError(
                "The package was written by a newer version of Atlas",
                found=f"version {version} of its form",
                expected=f"at most {VERSION}",
                do="update Atlas",
                path=str(path),
            )
        if (error := first_wrong(_VALIDATOR, values)) is not None:
            raise _damaged(f"{error.json_path}: {error.message:.300}", path)
        reference = values["reference"]
        columns = {
            name: None if names is None else tuple(names)
            for name, names in reference.pop("columns").items()
        }
        reference = {k: tuple(v) if isinstance(v, list) else v for k, v in reference.items()}
        # 3.0 is an integer of JSON
        reference |= {k: int(reference[k]) for k in ("n_obs", "n_latent")}
        of = {"study": reference["studies"], "batch": reference["batches"], "label": ()}
        of |= {"label": reference["labels"], **{k: v or () for k, v in columns.items()}}
        if twice := [what for what, names in of.items() if len(set(names)) < len(names)]:
            raise _damaged(f"a name comes twice in {twice[0]}", path)
        about = About(**{f.name: values[f.name] for f in dataclasses.fields(About)})
        parts = {
            name: Part(int(part["bytes"]), part["sha256"]) for name, part in values["parts"].items()
        }
        for name in (MODEL, CARD):
            if parts[name].bytes > MAX_JSON:
                raise _damaged(f"{name} of {parts[name].bytes:,} bytes", path)
        return cls(
            about,
            ReferenceNames(**reference, columns=columns),
            parts,
            values["created"],
            values["written_by"],
            _index_of(values, path),
        )


def _index_of(values: dict[str, Any], path: object) -> IndexAbout:
    """What is said of the index, which the parts and the version do not contradict."""
    said = values.get("index")
    if (said is None) != (values["version"] == 1):
        has = "no index" if said is None else "an index"
        raise _damaged(f"{has} in version {values['version']}", path)
    index = IndexAbout()
    if said is not None:
        whole = {name: int(said[name]) for name in ("n_lists", "breadth", "seed")}
        recall = said["recall"]
        if recall is not None:
            recall |= {name: int(recall[name]) for name in ("k", "n_queries")}
            recall = RecallAbout(**recall)
        index = IndexAbout(**{**said, **whole, "recall": recall})
    if index.has_lists != (INDEX in values["parts"]):
        has = "with" if INDEX in values["parts"] else "without"
        raise _damaged(f"an index of kind {index.kind!r} {has} {INDEX}", path)
    if index.has_lists != (index.n_lists > 0) or not (
        min(1, index.n_lists) <= index.breadth <= index.n_lists
    ):
        found = f"{index.n_lists} lists and a breadth of {index.breadth}"
        raise _damaged(f"an index of kind {index.kind!r} with {found}", path)
    return index


def parse_json(data: bytes, path: str) -> Any:
    """JSON from a stranger.

    Raises
    ------
    PackageError
        It is none, or nested as no file of ours is.
    """
    try:
        return json.loads(data, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise PackageError(
            "A file of the package is not JSON as it should be",
            found=str(error),
            do=FETCH_AGAIN,
            path=path,
        ) from None


def _no_constant(name: str) -> float:
    raise ValueError(f"the value {name}")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the value {text:.40}")
    return value


def _damaged(found: str, path: object) -> PackageError:
    return PackageError(
        "The package is damaged, or is none of Atlas",
        found=found,
        expected=f"a {PACKAGE} as `atlas share` writes it",
        do=FETCH_AGAIN,
        path=str(path),
    )
