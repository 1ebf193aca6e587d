"""A shared reference on disk: a model, where its cells lie in its latent space, and their labels.

A folder holds ``package.json`` (:mod:`atlas.hub.manifest`), the model's folder, embedding and codes
of the cells (``reference.safetensors``), ``card.md`` and, where they were asked for, counts. Files
of safetensors and JSON cannot run anything. FAISS's files are read by code that trusts them, so of
an index of inverted lists there are centroids and the list of each cell (``index.safetensors``);
an exact index is the embedding itself.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from safetensors import SafetensorError, safe_open

from atlas import files
from atlas.errors import AtlasError, ConfigError, PackageError
from atlas.evaluation.codes import Categories
from atlas.evaluation.exact import Device, import_faiss
from atlas.evaluation.index import NeighborIndex
from atlas.evaluation.index.arrays import ListArrays
from atlas.hub.lists import read_lists
from atlas.hub.manifest import (
    CARD,
    FETCH_AGAIN,
    INDEX,
    MAX_JSON,
    MAX_NAMES,
    MODEL,
    MODEL_FOLDER,
    NAMED,
    PACKAGE,
    REFERENCE,
    About,
    PackageManifest,
    Part,
    ReferenceNames,
    parse_json,
)
from atlas.models import TrainedModel, load_model

_DAMAGE: Final = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)
"""What fails where a file does not hold what it should."""
COLUMN: Final = "obs."
"""Before the name of a further column in ``reference.safetensors``."""


@dataclass(frozen=True, slots=True, eq=False)
class Package:
    """A shared reference: enough to map cells onto it and to carry its labels over.

    Attributes
    ----------
    folder
        Where it is.
    about
        Title, description, licence and citation.
    model
        The trained model, on the CPU.
    embedding
        Of the reference's cells by this model: float32, (n_obs, n_latent).
    studies, batches
        Of these cells.
    labels
        Of these cells, -1 for none; None where no cell has a label.
    obs
        Further obs columns that were shared; rows are the cells, by number.
    card
        The model card, Markdown.
    manifest
        All that ``package.json`` says.
    lists
        Of the index that its owner searches; None where that is exact, or none of lists.
    """

    folder: Path
    about: About
    model: TrainedModel
    embedding: npt.NDArray[np.float32]
    studies: Categories
    batches: Categories
    labels: Categories | None
    obs: pd.DataFrame
    card: str
    manifest: PackageManifest
    lists: ListArrays | None = None

    def index(self, *, device: Device | Literal["auto"] = "auto") -> NeighborIndex | None:
        """The index of the embedding that its owner has, made again of its lists.

        None where search is exact: the owner's is, or is of a kind that is not shared
        (``manifest.index`` says which and why), or FAISS is not installed.
        """
        if self.lists is None or import_faiss() is None:
            return None
        return self.lists.index(self.embedding, device=device)

    @property
    def n_obs(self) -> int:
        """Cells of the reference."""
        return len(self.embedding)

    def counts(self) -> sp.csr_matrix | None:
        """Counts of the model's genes, int32 (n_obs, n_genes); None where they were not shared.

        Raises
        ------
        PackageError
            They are damaged.
        """
        parts = [
            _counts(self.folder, name, self.manifest.parts[name], len(self.model.genes))
            for name in self.manifest.counts
        ]
        if not parts:
            return None
        counts = sp.vstack(parts, format="csr")
        if counts.shape[0] != self.n_obs:
            raise _wrong(f"counts of {counts.shape[0]:,} cells, not {self.n_obs:,}", self.folder)
        return counts


def load_package(folder: str | PathLike[str]) -> Package:
    """Open a shared reference: every part but the counts is read and compared with its digest.

    Parameters
    ----------
    folder
        What :func:`atlas.fetch` or :func:`atlas.share` wrote.

    Raises
    ------
    PackageError
        There is none; a part is missing, is not what was shared, or contradicts another; or it is
        of a newer version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PackageError(
            "There is no such folder",
            expected="a package",
            do="an archive or a URL is fetched first: `atlas fetch`",
            path=folder,
        )
    manifest = PackageManifest.from_bytes(_bytes_of(folder, PACKAGE, None), folder)
    for name, part in manifest.parts.items():
        _check_size(folder, name, part)
    card = _bytes_of(folder, CARD, manifest.parts[CARD])
    _check_model(_bytes_of(folder, MODEL, manifest.parts[MODEL]), folder)
    for name in (name for name in NAMED if name in manifest.parts):
        _check_digest(folder, name, manifest.parts[name])
    try:
        text = card.decode()
        model = load_model(folder / MODEL_FOLDER)
        if model.presence.dtype != np.bool_:
            raise TypeError(f"presence of type {model.presence.dtype}")
        tensors = _tensors(folder / REFERENCE)
        package = _assembled(folder, manifest, model, tensors, text)
        if not manifest.index.has_lists:
            return package
        lists = read_lists(folder / INDEX, manifest.index, package.embedding)
        return replace(package, lists=lists)
    except AtlasError as error:
        raise PackageError(
            "The parts of the package do not fit each other",
            found=str(error.what) + ("" if error.found is None else f": {error.found}"),
            expected=error.expected,
            do=FETCH_AGAIN,
            path=folder,
        ) from error
    except (*_DAMAGE, SafetensorError) as error:
        raise _wrong(f"{type(error).__name__}: {str(error)[:300]}", folder) from error


def _assembled(
    folder: Path,
    manifest: PackageManifest,
    model: TrainedModel,
    tensors: Mapping[str, npt.NDArray[Any]],
    card: str,
) -> Package:
    """The package of its parts, each compared with what the others say."""
    names = manifest.reference
    codes = {name: tensors[name] for name in ("study", "batch", "label")}
    shapes: dict[str, tuple[int, ...]] = {"embedding": (names.n_obs, names.n_latent)}
    shapes |= dict.fromkeys([*codes, *(COLUMN + name for name in names.columns)], (names.n_obs,))
    found = {name: value.shape for name, value in tensors.items()}
    if found != shapes or names.n_latent != model.config.n_latent:
        raise ConfigError(
            "the tensors of the reference are not those of package.json and the model",
            found=f"{found}, a model of {model.config.n_latent} dimensions",
            expected=shapes,
        )
    embedding = tensors["embedding"]
    if embedding.dtype != np.float32 or not np.isfinite(embedding).all():
        raise ConfigError("the embedding is not of finite float32", found=embedding.dtype)
    studies, batches = (
        _categories(codes[what], values, whole=True)
        for what, values in (("study", names.studies), ("batch", names.batches))
    )
    for what, own, known in (
        ("studies", names.studies, model.studies),
        ("batches", names.batches, model.batches),
    ):
        if unknown := set(own) - set(known):
            raise ConfigError(
                f"cells are of {what} that the model does not know",
                found=", ".join(sorted(unknown)[:5]),
            )
    columns: dict[str, Any] = {}
    for name, categories in names.columns.items():
        values = tensors[COLUMN + name]
        if categories is None:
            if values.dtype not in (np.float64, np.int64):
                raise ConfigError(f"column {name!r} is no column of numbers", found=values.dtype)
            columns[name] = values
        else:
            index = pd.Index(categories, dtype=object)
            columns[name] = pd.Categorical.from_codes(_categories(values, categories).codes, index)
    labels = _categories(codes["label"], names.labels)
    return Package(
        folder=folder,
        about=manifest.about,
        model=model,
        embedding=embedding,
        studies=studies,
        batches=batches,
        labels=labels if names.labels else None,
        obs=pd.DataFrame(columns, index=pd.RangeIndex(names.n_obs)),
        card=card,
        manifest=manifest,
    )


def _categories(
    codes: npt.NDArray[Any], names: tuple[str, ...], *, whole: bool = False
) -> Categories:
    if codes.dtype != np.int32:
        raise ConfigError("codes are of another type", found=codes.dtype, expected="int32")
    found = Categories(codes, names)
    if whole and (found.codes < 0).any():
        raise ConfigError("a cell has no study or batch")
    return found


def tensors_of(
    names: ReferenceNames,
    embedding: npt.NDArray[np.float32],
    codes: Mapping[str, npt.NDArray[np.int32]],
    columns: Mapping[str, npt.NDArray[Any]],
) -> dict[str, npt.NDArray[Any]]:
    """What ``reference.safetensors`` holds.

    Parameters
    ----------
    names
        Behind the codes.
    embedding
        float32, (n_obs, n_latent).
    codes
        ``study``, ``batch`` and ``label``: int32, (n_obs,).
    columns
        Codes (int32) or numbers (float64, int64) of each further column: (n_obs,).
    """
    assert set(columns) == set(names.columns)
    further = {COLUMN + name: np.ascontiguousarray(v) for name, v in columns.items()}
    return {"embedding": np.ascontiguousarray(embedding), **codes, **further}


def _check_model(document: bytes, folder: Path) -> None:
    """What :func:`load_model` takes for granted, as its files are mostly one's own."""
    values = parse_json(document, f"{folder}: {MODEL}")
    labels = values.get("labels") if isinstance(values, dict) else None
    names = labels.get("names") if isinstance(labels, dict) else None
    if isinstance(names, list) and len(names) > MAX_NAMES:
        raise _wrong(f"{len(names):,} labels; at most {MAX_NAMES:,} are taken", folder)


def _bytes_of(folder: Path, name: str, part: Part | None) -> bytes:
    """A small file, whole; of ``package.json`` nothing is known yet."""
    path = folder / name
    if not path.is_file() or path.is_symlink():
        raise PackageError(
            "The folder holds no package",
            found=f"no file {name}",
            expected=f"{PACKAGE} and the files that it declares",
            do=FETCH_AGAIN,
            path=folder,
        )
    with path.open("rb") as file:
        data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise _wrong(f"{name} of more than {MAX_JSON:,} bytes", folder)
    if part is not None and hashlib.sha256(data).hexdigest() != part.sha256:
        raise wrong_digest(name, hashlib.sha256(data).hexdigest(), part, folder)
    return data


def _check_size(folder: Path, name: str, part: Part) -> None:
    try:
        about = (folder / name).lstat()
    except OSError:
        raise _wrong(f"{name} is missing", folder) from None
    if not stat.S_ISREG(about.st_mode) or about.st_size != part.bytes:
        raise _wrong(f"{name} is no file of {part.bytes:,} bytes", folder)


def _check_digest(folder: Path, name: str, part: Part) -> None:
    found = files.digest_file(folder / name)
    if found != part.sha256:
        raise wrong_digest(name, found, part, folder)


def wrong_digest(name: str, found: str, part: Part, where: object) -> PackageError:
    """The error of a part that is not what was shared."""
    return PackageError(
        "A part of the package is not what was shared",
        found=f"{name} with SHA-256 {found}",
        expected=f"SHA-256 {part.sha256}",
        do=FETCH_AGAIN,
        path=str(where),
    )


def _tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, npt.NDArray[Any]]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def _counts(folder: Path, name: str, part: Part, n_genes: int) -> sp.csr_matrix:
    _check_size(folder, name, part)
    _check_digest(folder, name, part)
    try:
        tensors = _tensors(folder / name, ("indptr", "indices", "data"))
        indptr, indices, data = tensors["indptr"], tensors["indices"], tensors["data"]
        # scipy's compiled loops believe them
        whole = (
            indptr.dtype == np.int64
            and indices.dtype == data.dtype == np.int32
            and indptr.ndim == indices.ndim == data.ndim == 1
            and len(indptr) > 1
            and indptr[0] == 0
            and indptr[-1] == len(indices) == len(data)
            and bool((np.diff(indptr) >= 0).all())
            and (not len(indices) or (indices.min() >= 0 and indices.max() < n_genes))
            and (not len(data) or data.min() > 0)
        )
    except (*_DAMAGE, SafetensorError) as error:
        raise _wrong(f"{name}: {error}", folder) from error
    if not whole:
        raise _wrong(f"{name} holds no counts of {n_genes:,} genes", folder)
    return sp.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, n_genes))


def _wrong(found: str, where: object) -> PackageError:
    return PackageError(
        "The package is damaged, or is not what it says",
        found=found,
        do=FETCH_AGAIN,
        path=str(where),
    )
