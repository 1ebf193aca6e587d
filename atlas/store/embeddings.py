"""Embeddings: a part beside each study, listed in the manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atlas.errors import StoreError
from atlas.store import manifest as manifests
from atlas.store.arrays import (
    checked_folder,
    copy_part,
    read_array,
    read_details,
    write_part,
)
from atlas.store.options import check_name
from atlas.store.schema import EmbeddingEntry, Manifest

IN_MEMORY = 256 * 2**20
"""Bytes above which an embedding is mapped from a file."""


def read(root: Path, manifest: Manifest, name: str) -> npt.NDArray[np.float32]:
    """An embedding: float32 (n_obs, n_latent), in the order of the store.

    Above 256 MiB it is put together in a temporary file without a name and mapped from there, so
    that memory need not hold it.

    Raises
    ------
    StoreError
        There is none of this name, or a study was appended after it was made.
    """
    entry = _entry(root, manifest, name)
    shape = (manifest.n_obs, entry.n_latent)
    if 4 * shape[0] * shape[1] > IN_MEMORY:
        with tempfile.TemporaryFile() as file:
            z: npt.NDArray[np.float32] = np.memmap(file, np.float32, "w+", shape=shape)
    else:
        z = np.empty(shape, np.float32)
    start = 0
    for study in manifest.studies:
        if f"embedding:{name}" not in study.parts:
            raise StoreError(
                f"The embedding {name!r} does not cover study {study.name!r}",
                found="a study that was appended later",
                do=f"run `{_maker(root, manifest, name)}` again",
                path=root,
            )
        z[start : start + study.n_obs] = read_array(root, study.parts[f"embedding:{name}"], "z")
        start += study.n_obs
    return z


def details(root: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    """How an embedding was made."""
    return read_details(root, _entry(root, manifest, name).details)


def index_folder(root: Path, manifest: Manifest, name: str) -> Path | None:
    """Folder of the index of an embedding, checked against its digests; None where it has none."""
    index = _entry(root, manifest, name).index
    return None if index is None else checked_folder(root, index, f"the index of {name!r}")


def _maker(root: Path, manifest: Manifest, name: str) -> str:
    """The command that made an embedding: a baseline has a method and no training."""
    about = details(root, manifest, name)
    model = about.get("model", {})
    if model.get("name") not in ("pca", "harmony") or "training" in about:
        return f"atlas embed RUN {root} --name {name}"
    per_batch = " --per-batch" if model.get("per_batch") else ""
    return f"atlas baseline {root} --method {model['name']}{per_batch} --name {name}"


def _entry(root: Path, manifest: Manifest, name: str) -> EmbeddingEntry:
    if name not in manifest.embeddings:
        raise StoreError(
            "The store has no such embedding",
            found=name,
            expected=f"one of {', '.join(manifest.embeddings) or '(there are none)'}",
            do="make one with `atlas embed` or `atlas baseline`",
            path=root,
        )
    return manifest.embeddings[name]


def _check_finite(root: Path, name: str, study: str, z: npt.NDArray[Any]) -> None:
    """Refuse values that are not finite: nothing could be made of such an embedding."""
    bad = ~np.isfinite(z)
    if bad.any():
        first = int(bad.any(axis=1).argmax())
        raise StoreError(
            f"The embedding {name!r} has values that are not finite and is not kept",
            found=f"{int(bad.sum()):,} of {z.size:,} values, the first in row {first:,} of study "
            f"{study!r}",
            expected="finite values",
            do="look at what made it; a model whose loss diverged has to be trained again",
            path=root,
        )


def write(
    root: Path, seen: Manifest, name: str, z: npt.NDArray[np.float32], how: Mapping[str, Any]
) -> Manifest:
    """Write an embedding of the studies of ``seen`` and commit it; returns the new state.

    A study appended meanwhile by another process is left without it.

    Raises
    ------
    StoreError
        It is not of the cells of ``seen``, or has values that are not finite.
    """
    check_name(name, "embedding")
    if z.ndim != 2 or len(z) != seen.n_obs:
        raise StoreError(
            "The embedding does not fit the store",
            found=f"shape {z.shape}",
            expected=f"({seen.n_obs}, n_latent)",
            path=root,
        )
    bounds = np.cumsum([0, *(study.n_obs for study in seen.studies)])
    rows = pairwise(bounds)
    mine = {s.name: z[a:b] for s, (a, b) in zip(seen.studies, rows, strict=True)}
    with manifests.writer(root, f"embed {name}") as newest:
        changes = put(root, newest, name, mine, how)
        return manifests.commit(root, newest, f"embed {name}", **changes)


def put(
    root: Path,
    newest: Manifest,
    name: str,
    rows: Mapping[str, npt.NDArray[np.float32]],
    how: Mapping[str, Any],
    *,
    keep: bool = False,
    index: Path | None = None,
) -> dict[str, Any]:
    """Write rows of an embedding; the caller, who holds the lock, commits what is returned.

    Parameters
    ----------
    root, newest
        The store and its newest state.
    name
        Of the embedding.
    rows
        By study: float32, (n_obs, n_latent).
    how
        How it was made, plain JSON.
    keep
        Other studies keep the rows they have; otherwise they are left without.
    index
        Folder of an index of neighbours of all rows as they are then, which is copied; without one
        the embedding has none.
    """
    for study_name, values in rows.items():
        _check_finite(root, name, study_name, values)
    number = newest.number + 1
    part, studies, widths = f"embedding:{name}", [], set()
    for study in newest.studies:
        parts = {k: v for k, v in study.parts.items() if keep or k != part}
        if study.name in rows:
            z = np.ascontiguousarray(rows[study.name], np.float32)
            widths.add(z.shape[1])
            path = f"parts/{study.name}/embedding-{name}-{number:06d}"
            parts[part] = write_part(root, path, {"z": z})
        studies.append(replace(study, parts=parts))
    if keep and name in newest.embeddings:
        widths.add(newest.embeddings[name].n_latent)
    if len(widths) > 1:
        raise StoreError(
            f"The rows do not fit the embedding {name!r}",
            found=" and ".join(map(str, sorted(widths))) + " dimensions",
            expected="the same number for all cells",
            path=root,
        )
    about = write_part(root, f"parts/.embeddings/{name}-{number:06d}", {}, how)
    copied = None
    if index is not None:
        copied = copy_part(root, f"parts/.indexes/{name}-{number:06d}", index)
    entry = EmbeddingEntry(widths.pop() if widths else 0, about, copied)
    return {"studies": tuple(studies), "embeddings": {**newest.embeddings, name: entry}}
