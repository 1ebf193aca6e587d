"""What a projection's JSON files hold, and how they are checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from atlas.errors import CorruptStoreError, FormatError
from atlas.files import digest_tree

FORMAT = "atlas-projection"
VERSION = 2
"""1 had all matrices in CSR form."""
BEGUN, WHOLE, STUDY = "begun.json", "projection.json", "study.json"
REMAKE = "remove the projection and write it again with `atlas project`"

_COUNT = {"type": "integer", "minimum": 0}
_DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_STUDY: dict[str, Any] = {
    "type": "object",
    "required": ["n_obs", "nnz", "digest", "shards"],
    "additionalProperties": False,
    "properties": {
        "n_obs": _COUNT,
        "nnz": _COUNT,
        "digest": _DIGEST,
        "shards": {
            "type": "object",
            "oneOf": [{"required": ["records"]}, {"required": ["indices", "data"]}],
            "propertyNames": {"enum": ["records", "indices", "data"]},
            "additionalProperties": {
                "type": "array",
                "items": {"type": "array", "items": _COUNT, "minItems": 2, "maxItems": 2},
            },
        },
    },
}
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [
        "format",
        "version",
        "written_by",
        "fingerprint",
        "genes",
        "segments",
        "studies",
        "matrices",
    ],
    "additionalProperties": False,
    "properties": {
        "format": {"const": FORMAT},
        "version": {"enum": [1, VERSION]},
        "written_by": {"type": "string"},
        "fingerprint": _DIGEST,
        "genes": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "segments": {"type": "array", "items": _COUNT, "minItems": 1},
        "studies": {"type": "array", "items": {"type": "string"}},
        "matrices": {"type": "array", "items": _STUDY},
    },
}
_VALIDATOR = Draft202012Validator(_SCHEMA)


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """One study of a projection, as written.

    Attributes
    ----------
    n_obs, nnz
        Rows and values.
    digest
        SHA-256 of its row pointers and of all zarr.json.
    shards
        Of ``records``, or of ``indices`` and ``data``: bytes and crc32c of each shard, in order.
    """

    n_obs: int
    nnz: int
    digest: str
    shards: Mapping[str, Sequence[Sequence[int]]]

    @property
    def packed(self) -> bool:
        """Whether its rows are records, see :mod:`loaders.packed`."""
        return "records" in self.shards


def digest_small(folder: Path, arrays: Iterable[str]) -> str:
    """SHA-256 of the row pointers of a matrix and of all its metadata, given its long arrays."""
    arrays = set(arrays)
    whole = {"zarr.json", "indptr"} | ({"offsets"} if "records" in arrays else set())
    small = [*(folder / name for name in whole), *(folder / a / "zarr.json" for a in arrays)]
    return digest_tree(small, folder)


def check_version(values: Any, path: Path) -> None:
    """Refuse what a file says of a projection, whole or begun, if its format is a newer one.

    Raises
    ------
    FormatError
        It is.
    """
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise FormatError(
            "The projection was written in a newer format",
            found=f"format version {version}",
            expected=f"at most {VERSION}",
            do="install a newer atlas-trainer, or write the projection again",
            path=path,
        )


def read_record(path: Path) -> dict[str, Any]:
    """Read and check ``projection.json``.

    Raises
    ------
    FormatError
        It was written in a newer format.
    CorruptStoreError
        It is no JSON, or does not follow the schema.
    """
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptStoreError(
            "The description of the projection is not JSON", found=error, do=REMAKE, path=path
        ) from None
    check_version(values, path)
    wrong = best_match(_VALIDATOR.iter_errors(values))
    if wrong is not None:
        raise CorruptStoreError(
            "The description of the projection does not follow its schema",
            found=f"{wrong.json_path}: {wrong.message[:200]}",
            expected=f"{FORMAT} version 1 or {VERSION}",
            do=REMAKE,
            path=path,
        )
    return dict(values)
