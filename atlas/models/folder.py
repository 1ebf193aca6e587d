"""The folder of a trained model.

It holds ``weights.safetensors`` (the module's state, and which study measured which gene) and
``model.json`` (everything else, and the digest of the weights). The JSON is written last: a folder
without it, or whose weights have another digest, is not a model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import ValidationError, best_match
from safetensors import SafetensorError
from torch import Tensor

from atlas import files
from atlas.config import ARCHITECTURES
from atlas.errors import CheckpointError
from atlas.models.base import Model
from atlas.models.build import build_model
from atlas.models.columns import NO_COLUMNS, ObsColumns
from atlas.models.labels import LabelTree
from atlas.models.lineage import SCHEMA as SURGERY_SCHEMA

WEIGHTS_NAME = "weights.safetensors"
METADATA_NAME = "model.json"
VERSION = 3
"""2 since models other than scVI, 3 since surgery; earlier ones are read as they were."""

_STATE_PREFIX = "module."
_PRESENCE = "presence"
_NAMES = {"type": "array", "differentTexts": True, "minItems": 1}
_SCHEMA = {
    "type": "object",
    "properties": {
        "schema": {"const": "atlas-model"},
        "version": {"type": "integer", "minimum": 1},
        "model": {"enum": list(ARCHITECTURES)},
        "config": {"type": "object"},
        "genes": _NAMES,
        "gene_ids": {"type": ["array", "null"], "items": {"type": ["string", "null"]}},
        "batches": _NAMES,
        "studies": _NAMES,
        "labels": {
            "type": ["object", "null"],
            "properties": {
                "names": _NAMES,
                "parents": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["names", "parents"],
            "additionalProperties": False,
        },
        "columns": {
            "type": "object",
            "properties": {
                "categorical": {"type": "object", "additionalProperties": _NAMES},
                "continuous": {"type": "array", "items": {"type": "string"}},
                "size_factor": {"type": ["string", "null"]},
                "label": {"type": ["string", "null"]},
                "unlabeled": {"type": "string"},
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
_MAX_ERRORS = 100


def first_wrong(validator: Any, values: Any) -> ValidationError | None:
    """The error to tell of values that a schema refuses, of the first 100; None if there is none.

    A hostile file may have an error in each of millions of values.
    """
    found: ValidationError | None = best_match(islice(validator.iter_errors(values), _MAX_ERRORS))
    return found


def _different_texts(_: Any, __: Any, value: Any, ___: Any) -> Iterator[ValidationError]:
    """Items are texts, no two alike; of mixed types ``uniqueItems`` would compare all pairs."""
    if not isinstance(value, list):
        return
    for i, item in enumerate(value):
        if not isinstance(item, str):
            yield ValidationError(f"{item!r} is not of type 'string'", path=[i])
            return
    if len(set(value)) < len(value):
        twice = next(name for name, n in Counter(value).items() if n > 1)
        yield ValidationError(f"{twice!r} comes twice")


_Validator = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, {"differentTexts": _different_texts}
)
_VALIDATOR = _Validator(_SCHEMA)


def write(
    folder: Path,
    metadata: Mapping[str, Any],
    state: Mapping[str, Tensor],
    presence: npt.NDArray[np.bool_],
) -> None:
    """Write a model: each file is whole and synced before it takes its name, the metadata last.

    The folder is made where it is missing. The digest of the weights is added to the metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _STATE_PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()
    }
    weights = safetensors.torch.save({**tensors, _PRESENCE: torch.from_numpy(presence)})
    document = {**metadata, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    content = json.dumps(document, indent=1, allow_nan=False).encode()
    files.replace_bytes(folder / WEIGHTS_NAME, weights)
    files.replace_bytes(folder / METADATA_NAME, content)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], npt.NDArray[np.bool_]]:
    """Metadata, weights by name, and which study measured which gene, as they were written.

    Raises
    ------
    CheckpointError
        The folder or a file of it is missing, damaged, or from a later version.
    """
    metadata = _read_metadata(folder)
    path = folder / WEIGHTS_NAME
    tensors = _read_weights(path, metadata["weights_sha256"])
    if _PRESENCE not in tensors:
        raise _damaged(path, f"no tensor {_PRESENCE!r}")
    presence = tensors.pop(_PRESENCE).numpy()
    state = {name.removeprefix(_STATE_PREFIX): value for name, value in tensors.items()}
    return metadata, state, presence


def restored(
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
    if (wrong := first_wrong(_VALIDATOR, metadata)) is not None:
        raise _damaged(path, f"{wrong.json_path}: {wrong.message}")
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
