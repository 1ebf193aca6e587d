"""Appending a study: read once in blocks, sort out of core, write whole, commit in one step."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData
from tqdm import tqdm

from atlas import files
from atlas.config import Profile
from atlas.errors import ConfigError, InputError, MissingColumnError, StoreError, StudyExistsError
from atlas.ingest import CountsSource, open_counts
from atlas.ingest.genes import align
from atlas.store import manifest as manifests
from atlas.store.arrays import read_array, write_part
from atlas.store.kernels import hash_rows
from atlas.store.schema import Manifest, StudyEntry
from atlas.store.spill import RowSorter
from atlas.store.statistics import gene_statistics
from atlas.store.zarr_study import (
    CSRMatrix,
    CSRRows,
    create_group,
    digests,
    write_matrix,
    write_tables,
)

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
_SORT_BYTES = 192 * 2**20


@dataclass(frozen=True, slots=True)
class Reading:
    """Where in a source the counts are; as the arguments of :func:`atlas.ingest.open_counts`."""

    layer: str | None = None
    use_raw: bool = False
    round_counts: bool = False
    feature_type: str = "Gene Expression"
    keep_layers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AppendReport:
    """What an append did.

    Attributes
    ----------
    study, n_obs, nnz
        Name, cells, non-zero counts.
    new_genes
        Genes that the gene table gained.
    missing_genes
        Genes of the store that the study did not measure.
    same_counts
        For each other study that has some: cells with the very same counts as a cell of this one.
    same_names
        For each other study that has some: cells of the same row name.
    seconds
        Wall time.
    """

    study: str
    n_obs: int
    nnz: int
    new_genes: int
    missing_genes: int
    same_counts: Mapping[str, int]
    same_names: Mapping[str, int]
    seconds: float


def check_name(name: str, what: str) -> None:
    """Names of studies and embeddings are names of folders too."""
    if not _NAME.match(name):
        raise ConfigError(
            f"The {what} cannot have this name",
            found=repr(name),
            expected="1 to 100 letters, digits and ._- , starting with a letter or digit",
        )


def append_study(
    root: Path,
    source: str | PathLike[str] | AnnData,
    *,
    study: str,
    batch_keys: tuple[str, ...],
    label_key: str | None,
    unlabeled: str,
    profile: Profile,
    reading: Reading,
    scheduler: str | None,
    progress: bool,
) -> tuple[Manifest, AppendReport]:
    """Append a study to the store at ``root``; see :meth:`atlas.store.CountStore.append`."""
    started = time.monotonic()
    check_name(study, "study")
    counts = open_counts(
        source,
        layer=reading.layer,
        use_raw=reading.use_raw,
        round_counts=reading.round_counts,
        feature_type=reading.feature_type,
    )
    batch_names = _batches(counts, batch_keys, study)
    label_names = _labels(counts, label_key, unlabeled)
    if unknown := [name for name in reading.keep_layers if name not in counts.layers]:
        raise MissingColumnError(
            "There is no such layer to keep",
            found=", ".join(unknown),
            expected="one of " + (", ".join(counts.layers) or "(there are none)"),
            path=counts.name,
        )
    with manifests.writer(root, f"append {study}"):
        newest = manifests.read(root)
        if study in (entry.name for entry in newest.studies):
            raise StudyExistsError(
                "The study is in the store already",
                found=study,
                expected="a name not among " + ", ".join(entry.name for entry in newest.studies),
                do="choose another name; a study is never changed once written",
                path=root,
            )
        fixed = newest.gene_mode == "given" or (newest.gene_mode == "first" and newest.studies)
        old_table = manifests.read_gene_table(root, newest)
        table, columns = align(old_table, counts.var, mode="fixed" if fixed else "union")
        try:
            number = newest.number + 1
            batches, batch_codes = _extend(newest.batches, batch_names)
            labels, label_codes = _extend(newest.labels, label_names)
            writer = _StudyWriter(root, study, counts, columns, profile, progress)
            index = writer.write(reading.keep_layers)
            order = index["input_position"]
            index |= {"genes": columns, "batch": batch_codes[order], "label": label_codes[order]}
            parts = {
                "index": write_part(root, f"parts/{study}/index", index),
                "statistics": writer.statistics(index["batch"], scheduler),
            }
            entry = StudyEntry(
                name=study,
                path=f"studies/{study}",
                n_obs=counts.n_obs,
                nnz=writer.nnz,
                profile=profile,
                source=counts.name,
                digests=digests(writer.folder),
                parts=parts,
            )
            genes = (
                newest.genes
                if table == old_table
                else manifests.write_gene_table(root, number, table)
            )
            files.sync_tree(writer.folder)
            files.sync_folder(writer.folder.parent)
            state = manifests.commit(
                root,
                newest,
                f"append {study}",
                genes=genes,
                studies=(*newest.studies, entry),
                batches=batches,
                labels=labels,
            )
        except OSError as error:
            manifests.remove_leftovers(root)
            raise StoreError(
                "The study could not be written; the store is as it was",
                found=str(error),
                do="make room or mend the disk, then run the command again",
                path=root,
            ) from error
        except BaseException:
            manifests.remove_leftovers(root)
            raise
    report = AppendReport(
        study,
        counts.n_obs,
        writer.nnz,
        len(table.names) - len(old_table.names),
        len(table.names) - len(np.unique(columns[columns >= 0])),
        _common(root, newest, index["content_hash"], "content_hash"),
        _common(root, newest, index["name_hash"], "name_hash"),
        time.monotonic() - started,
    )
    return state, report


def _column(counts: CountsSource, key: str, what: str) -> pd.Series[Any]:
    if key not in counts.obs:
        raise MissingColumnError(
            f"There is no obs column for the {what}",
            found=repr(key),
            expected="one of " + (", ".join(map(str, counts.obs.columns)) or "(there are none)"),
            do=f"name the column with --{what}-key, or leave it out",
            path=counts.name,
        )
    return counts.obs[key]


def _batches(counts: CountsSource, keys: tuple[str, ...], study: str) -> list[str]:
    """Name of each row's batch, in input order."""
    if not keys:
        return [study] * counts.n_obs
    columns = [_column(counts, key, "batch") for key in keys]
    for key, column in zip(keys, columns, strict=True):
        if missing := int(column.isna().sum()):
            raise InputError(
                "Some cells have no batch",
                found=f"{missing} missing values in obs column {key!r}",
                expected="a batch for every cell",
                do="fill the column in, or drop these cells",
                path=counts.name,
            )
    values = zip(*(column.astype(str) for column in columns), strict=True)
    return [f"{study}/{'|'.join(value)}" for value in values]


def _labels(counts: CountsSource, key: str | None, unlabeled: str) -> list[str | None]:
    """Label of each row in input order, None where it has none."""
    if key is None:
        return [None] * counts.n_obs
    column = _column(counts, key, "label")
    missing = column.isna().to_numpy()
    values = column.astype(str)
    return [
        None if gone or value.strip() == "" or value == unlabeled else value
        for value, gone in zip(values, missing, strict=True)
    ]


def _extend(
    names: tuple[str, ...], values: list[Any]
) -> tuple[tuple[str, ...], npt.NDArray[np.int32]]:
    """Codes of values by append-only names; new names in alphabetical order, None is -1."""
    new = sorted({value for value in values if value is not None} - set(names))
    names = (*names, *new)
    code = {None: -1, **{name: i for i, name in enumerate(names)}}
    return names, np.fromiter((code[value] for value in values), np.int32, len(values))


def _hash64(prefix: str, names: pd.Index[Any]) -> npt.NDArray[np.uint64]:
    start = hashlib.blake2b(prefix.encode() + b"\0", digest_size=8)
    out = bytearray()
    for name in names:
        one = start.copy()
        one.update(str(name).encode())
        out += one.digest()
    return np.frombuffer(bytes(out), "<u8").astype(np.uint64)


class _StudyWriter:
    """Writes one study's folder; a crash in it leaves what no manifest names."""

    def __init__(
        self,
        root: Path,
        study: str,
        counts: CountsSource,
        columns: npt.NDArray[np.int32],
        profile: Profile,
        progress: bool,
    ) -> None:
        self.root = root
        self.study = study
        self.counts = counts
        self.columns = columns
        self.profile = profile
        self.progress = progress
        self.folder = root / "studies" / study
        self.nnz = 0

    def write(self, keep_layers: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
        """Sort and write everything; returns the arrays of the index part that follow from it."""
        counts = self.counts
        row_hash = _hash64(self.study, counts.obs.index)
        order = np.lexsort((counts.obs.index.to_numpy(str), row_hash))
        destination = np.empty(counts.n_obs, np.int64)
        destination[order] = np.arange(counts.n_obs)
        self.folder.mkdir(parents=True)
        group = create_group(self.folder)
        content = np.empty(counts.n_obs, np.uint64)
        largest, row = 0, 0
        with self._sorter(destination) as sorter:
            for block in self._shown(counts.blocks(), "reading"):
                n = len(block.indptr) - 1
                content[row : row + n] = hash_rows(
                    block.indptr, block.indices, block.data, self.columns
                )
                largest = max(largest, int(block.data.max(initial=0)))
                self.nnz += len(block.data)
                sorter.append(block.indptr, block.indices, block.data)
                row += n
            write_matrix(
                group,
                "X",
                self._shown(sorter.sorted_blocks(), "writing"),
                shape=(counts.n_obs, counts.n_vars),
                nnz=self.nnz,
                dtype=np.uint16 if largest < 2**16 else np.uint32,
                profile=self.profile,
            )
        for layer in keep_layers:
            self._write_layer(layer, group, destination)
        write_tables(
            group,
            counts.obs.iloc[order],
            counts.var,
            {name: np.asarray(array)[order] for name, array in counts.obsm.items()},
            counts.uns,
        )
        return {
            "row_hash": row_hash[order],
            "name_hash": _hash64("", counts.obs.index)[order],
            "content_hash": content[order],
            "input_position": order.astype(np.int64),
        }

    def _write_layer(self, name: str, group: Any, destination: npt.NDArray[np.int64]) -> None:
        nnz, dtype = 0, np.dtype(np.float32)
        with self._sorter(destination) as sorter:
            for block in self._shown(self.counts.layer_blocks(name), f"layer {name}"):
                nnz, dtype = nnz + len(block.data), block.data.dtype
                sorter.append(block.indptr, block.indices, block.data)
            write_matrix(
                group["layers"],
                name,
                sorter.sorted_blocks(),
                shape=(self.counts.n_obs, self.counts.n_vars),
                nnz=nnz,
                dtype=dtype,
                profile=self.profile,
            )

    def _sorter(self, destination: npt.NDArray[np.int64]) -> RowSorter:
        return RowSorter(destination, self.root / "scratch", memory=_SORT_BYTES)

    def _shown(self, blocks: Iterator[Any], what: str) -> Iterator[CSRRows]:
        """Pass blocks on, with rows, cells/s and the time left on stderr."""
        with tqdm(
            total=self.counts.n_obs,
            desc=f"{self.study}: {what}",
            unit=" cells",
            unit_scale=True,
            disable=not self.progress,
        ) as bar:
            for block in blocks:
                yield block
                bar.update(len(block.indptr) - 1)

    def statistics(self, batch_codes: npt.NDArray[np.int32], scheduler: str | None) -> Any:
        """Compute and keep means and variances per batch, with the codes of the batches."""
        batches, local = np.unique(batch_codes, return_inverse=True)
        found = gene_statistics(
            CSRMatrix(self.folder / "X").read,
            self.counts.n_obs,
            self.counts.n_vars,
            local.astype(np.int32),
            scheduler=scheduler,
        )
        arrays = {**found.to_arrays(), "batches": batches.astype(np.int32)}
        return write_part(self.root, f"parts/{self.study}/statistics", arrays)


def _common(
    root: Path, manifest: Manifest, hashes: npt.NDArray[np.uint64], name: str
) -> dict[str, int]:
    """How many rows of each study have a hash that is among ``hashes``; 0 (empty cells) aside."""
    mine = np.unique(hashes[hashes != 0])
    out = {}
    for study in manifest.studies:
        theirs = read_array(root, study.parts["index"], name)
        if n := int(np.isin(theirs, mine).sum()):
            out[study.name] = n
    return out
