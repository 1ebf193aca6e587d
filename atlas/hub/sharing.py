"""What leaves the machine with a shared reference: said in full, then written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import scipy.sparse as sp

from atlas import files
from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.index.arrays import ListArrays
from atlas.hub.archive import write_tar, write_zip
from atlas.hub.card import model_card
from atlas.hub.lists import tensors_of_lists
from atlas.hub.manifest import (
    CARD,
    INDEX,
    MAX_NAMES,
    MODEL,
    MODEL_FOLDER,
    PACKAGE,
    REFERENCE,
    WEIGHTS,
    About,
    IndexAbout,
    PackageManifest,
    Part,
    ReferenceNames,
)
from atlas.hub.package import load_package, tensors_of
from atlas.hub.staging import place, staging
from atlas.models import TrainedModel
from atlas.provenance import versions
from atlas.store.manifest import now
from loaders import RowSource, SequentialLoader

COUNT_ROWS: Final = 50_000
"""Cells of one part of the counts, so that a few of them fit in memory."""
_ARCHIVES: Final = {".tar.gz": write_tar, ".tgz": write_tar, ".zip": write_zip}
_OTHERS: Final = (".tar", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_SHOWN: Final = 20
_NO_INDEX: Final = IndexAbout(why="the embedding has none")


@dataclass(frozen=True, slots=True, eq=False)
class Shipment:
    """All that is to be shared; nothing has left yet.

    Attributes
    ----------
    about
        For people.
    model
        Without what its training says of this machine (:func:`public_training`).
    embedding
        Of the reference's cells: float32, (n_obs, n_latent).
    studies, batches, labels
        Of these cells; no labels where None.
    label_key
        The obs column of the labels; None for the store's own.
    columns
        Further obs columns that were named: categories, or numbers (n_obs,).
    counts
        Source and rows of the counts, where they were asked for: the model's genes.
    index, lists
        Of the embedding as its owner has it, and what of it leaves.
    said
        What more is to be said of a line of the listing, by its name.
    """

    about: About
    model: TrainedModel
    embedding: npt.NDArray[np.float32]
    studies: Categories
    batches: Categories
    labels: Categories | None
    label_key: str | None = None
    columns: Mapping[str, Categories | npt.NDArray[Any]] = field(default_factory=dict)
    counts: tuple[RowSource, npt.NDArray[np.bool_]] | None = None
    index: IndexAbout = _NO_INDEX
    lists: ListArrays | None = None
    said: Mapping[str, str] = field(default_factory=dict)

    def listing(self) -> list[tuple[str, str]]:
        """What leaves the machine, in words: a name and what it is, for each thing."""
        model = self.model
        weights = sum(value.numel() * value.element_size() for value in _state(model).values())
        ids = "names" if model.gene_ids is None else "names and accessions"
        lines = [
            ("model", f"{model.name}: weights of {weights / 1e6:,.1f} MB, and its settings"),
            ("genes", f"{ids} of {len(model.genes):,} genes; which study measured which"),
            ("studies", _listed(model.studies)),
            ("batches", _listed(model.batches)),
        ]
        for name, known in model.columns.categorical:
            lines.append((f"covariate {name}", f"of the model, its values: {_listed(known)}"))
        alone = "of the model, the name alone"
        lines += [(f"covariate {name}", alone) for name in model.columns.continuous]
        columns = model.columns
        if named := [name for name in (columns.label, columns.size_factor) if name is not None]:
            lines.append(("column names", f"of the model: {_listed(named)}"))
        if model.labels is not None:
            lines.append(("classes", f"of the model: {_listed(model.labels.names)}"))
        shape = f"{self.embedding.shape[1]} numbers each, {self.embedding.nbytes / 1e6:,.1f} MB"
        lines += [
            ("cells", f"{len(self.embedding):,} of {len(self.studies.present()):,} studies"),
            ("embedding", shape),
            ("of each cell", "study, batch" + (", label" if self.labels is not None else "")),
        ]
        labels = "none"
        if self.labels is not None:
            labels = f"{self._label_source}: {_listed(self.labels.names)}"
        lines += [("labels", labels), ("index", self._index)]
        for name, column in self.columns.items():
            known_as = _listed(column.names) if isinstance(column, Categories) else "numbers"
            lines.append((f"obs column {name}", f"of each cell, as named: {known_as}"))
        n_genes = len(model.genes)
        lines += [
            ("counts", f"of {n_genes:,} genes, of each cell" if self.counts else "none"),
            ("training", "settings, losses and versions; no paths, no commands"),
            ("licence", self.about.licence or "none: others may not use it without one"),
            ("citation", self.about.citation or "none"),
        ]
        more = {name: f"; {what}" for name, what in self.said.items()}
        return [(name, what + more.get(name, "")) for name, what in lines]

    def write(self, to: str | PathLike[str]) -> Shared:
        """Write the package; see :func:`write_package`."""
        return write_package(self, Path(to))

    @property
    def _index(self) -> str:
        if self.lists is None:
            return f"none: {self.index.why}"
        return f"{self.index.n_lists:,} lists, their centroids and the list of each cell"

    @property
    def _label_source(self) -> str:
        return "the store's" if self.label_key is None else f"obs column {self.label_key}"


@dataclass(frozen=True, slots=True)
class Shared:
    """What was written.

    Attributes
    ----------
    path
        The folder or archive.
    sha256
        To be announced with it: of the archive, or of the ``package.json`` of a folder.
    bytes
        Of the archive, or of all files.
    manifest
        What ``package.json`` says.
    """

    path: Path
    sha256: str
    bytes: int
    manifest: PackageManifest


def public_training(training: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's training says, without paths and commands, which tell of the machine."""
    told = ("config", "history", "manifest", "reference_weights", "versions")
    kept = {name: training[name] for name in told if name in training}
    if isinstance(imported := training.get("imported"), dict):
        kept["imported"] = {k: v for k, v in imported.items() if k != "from"}
    if isinstance(reference := training.get("reference"), dict):
        kept["reference"] = public_training(reference)
    return kept


def archive_kind(to: Path) -> str | None:
    """``.tar.gz``, ``.tgz`` or ``.zip`` by the name of what is to be written; None for a folder.

    Raises
    ------
    ConfigError
        It is the name of an archive of another kind.
    """
    name = to.name.lower()
    for ending in _ARCHIVES:
        if name.endswith(ending):
            return ending
    if name.endswith(_OTHERS):
        raise ConfigError(
            "A package is not written as an archive of this kind",
            found=to.name,
            expected=", ".join(_ARCHIVES) + ", or a folder",
            path=to,
        )
    return None


def write_package(shipment: Shipment, to: Path) -> Shared:
    """Write a package, as a folder or an archive by its name; it is there whole or not at all.

    What was written is opened and checked before it gets its name.

    Raises
    ------
    OutputError
        Something is there already, or it could not be written.
    """
    kind, to = archive_kind(to), to.absolute()
    with staging(to) as folder:
        made = folder / "package"
        made.mkdir()
        manifest = _write_parts(shipment, made)
        load_package(made)
        sha256 = files.digest_file(made / PACKAGE)
        n = (made / PACKAGE).stat().st_size + manifest.n_bytes
        if kind is not None:
            names = [PACKAGE, *manifest.parts]
            archive = folder / "archive"
            with archive.open("xb") as file:
                _ARCHIVES[kind](made, names, file)
                file.flush()
                files.write_pieces(file.fileno(), ())  # syncs
            made, sha256, n = archive, files.digest_file(archive), archive.stat().st_size
        place(made, to)
    return Shared(to, sha256, n, manifest)


def _write_parts(shipment: Shipment, folder: Path) -> PackageManifest:
    model = shipment.model
    labels = Categories(np.full(len(shipment.embedding), -1), ())
    labels = shipment.labels or labels
    if len(labels.names) > MAX_NAMES:
        raise ConfigError(
            "There are too many labels to be shared",
            found=f"{len(labels.names):,}",
            expected=f"at most {MAX_NAMES:,}",
        )
    replace(model, training=public_training(model.training)).save(folder / MODEL_FOLDER)
    codes = {
        "study": shipment.studies.codes.astype(np.int32),
        "batch": shipment.batches.codes.astype(np.int32),
        "label": labels.codes.astype(np.int32),
    }
    names = ReferenceNames(
        n_obs=len(shipment.embedding),
        n_latent=shipment.embedding.shape[1],
        studies=shipment.studies.names,
        batches=shipment.batches.names,
        labels=labels.names,
        label_key=shipment.label_key if labels.names else None,
        columns={
            name: column.names if isinstance(column, Categories) else None
            for name, column in shipment.columns.items()
        },
    )
    columns = {
        name: column.codes.astype(np.int32) if isinstance(column, Categories) else column
        for name, column in shipment.columns.items()
    }
    tensors = tensors_of(names, shipment.embedding, codes, columns)
    files.write_bytes(folder / REFERENCE, safetensors.numpy.save(tensors))
    card = model_card(
        shipment.about,
        model,
        shipment.studies,
        shipment.batches,
        shipment.labels,
        list(shipment.columns),
        shipment.counts is not None,
        shipment.index,
    )
    files.write_bytes(folder / CARD, card.encode())
    parts = [MODEL, WEIGHTS, REFERENCE, CARD]
    if shipment.lists is not None:
        parts.append(INDEX)
        lists = safetensors.numpy.save(tensors_of_lists(shipment.lists))
        files.write_bytes(folder / INDEX, lists)
    if shipment.counts is not None:
        (folder / "counts").mkdir()
        for i, counts in enumerate(_chunks(*shipment.counts)):
            parts.append(f"counts/{i:06d}.safetensors")
            files.write_bytes(folder / parts[-1], _counts_as_bytes(counts))
    manifest = PackageManifest(
        about=shipment.about,
        reference=names,
        parts={
            name: Part((folder / name).stat().st_size, files.digest_file(folder / name))
            for name in parts
        },
        created=now(),
        written_by=f"atlas-trainer {versions()['atlas-trainer']}",
        index=shipment.index,
    )
    files.write_bytes(folder / PACKAGE, manifest.to_bytes())
    return manifest


def _chunks(source: RowSource, rows: npt.NDArray[np.bool_]) -> Iterator[sp.csr_matrix]:
    """The counts of chosen rows, some at a time."""
    waiting: list[sp.csr_matrix] = []
    n = 0
    for minibatch in SequentialLoader(source, 4096, rows=rows):
        data = minibatch.data.astype(np.int32), minibatch.indices.astype(np.int32)
        shape = minibatch.n_rows, minibatch.n_vars
        waiting.append(sp.csr_matrix((*data, minibatch.indptr), shape=shape))
        n += waiting[-1].shape[0]
        if n >= COUNT_ROWS:
            yield sp.vstack(waiting, format="csr")
            waiting, n = [], 0
    if waiting:
        yield sp.vstack(waiting, format="csr")


def _counts_as_bytes(counts: sp.csr_matrix) -> bytes:
    counts.eliminate_zeros()
    counts.sort_indices()
    return bytes(
        safetensors.numpy.save(
            {
                "indptr": counts.indptr.astype(np.int64),
                "indices": counts.indices.astype(np.int32),
                "data": counts.data.astype(np.int32),
            }
        )
    )


def _state(model: TrainedModel) -> Mapping[str, Any]:
    return model.module.state_dict()


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", … ({len(names):,} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "none"
