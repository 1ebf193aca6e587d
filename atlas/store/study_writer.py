"""Writing one study: rows sorted by their hash, out of core, with statistics of its genes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr
from tqdm import tqdm

from atlas import files
from atlas.config import Profile
from atlas.ingest import CountsSource
from atlas.store.arrays import write_part
from atlas.store.kernels import hash_rows
from atlas.store.manifest import SCRATCH
from atlas.store.matrix_writer import CSRRows, write_matrix
from atlas.store.schema import Part
from atlas.store.spill import RowSorter
from atlas.store.statistics import gene_statistics
from atlas.store.zarr_study import CSRMatrix, create_group, write_tables

_SORT_BYTES = 192 * 2**20
"""Memory for the rows that wait to be sorted; more goes to disk."""


def _hash64(prefix: str, names: pd.Index[Any]) -> npt.NDArray[np.uint64]:
    start = hashlib.blake2b(prefix.encode() + b"\0", digest_size=8)
    out = bytearray()
    for name in names:
        one = start.copy()
        one.update(str(name).encode())
        out += one.digest()
    return np.frombuffer(bytes(out), "<u8").astype(np.uint64)


def _order(hashes: npt.NDArray[np.uint64], names: pd.Index[Any]) -> npt.NDArray[np.int64]:
    """Rows by rising hash, equal hashes (hardly ever) by name: int64 positions."""
    order = np.argsort(hashes, kind="stable")
    if (np.diff(hashes[order]) == 0).any():
        order = np.lexsort((names.to_numpy(str), hashes))
    return order.astype(np.int64, copy=False)


class StudyWriter:
    """Writes one study's folder; a crash in it leaves what no manifest names."""

    def __init__(
        self,
        root: Path,
        study: str,
        folder: str,
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
        self.folder = root / "studies" / folder
        self.nnz = 0

    def write(self, keep_layers: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
        """Sort and write everything; returns the arrays of the index part that follow from it."""
        counts = self.counts
        row_hash = _hash64(self.study, counts.obs.index)
        order = _order(row_hash, counts.obs.index)
        destination = np.empty(counts.n_obs, np.int64)
        destination[order] = np.arange(counts.n_obs)
        self.folder.mkdir(parents=True)
        group = create_group(self.folder)
        write_tables(
            group,
            counts.obs.iloc[order],
            counts.var,
            {name: np.asarray(array)[order] for name, array in counts.obsm.items()},
            counts.uns,
            counts.path,
        )
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
        files.sync_tree(self.folder)
        files.sync_folder(self.folder.parent)
        return {
            "row_hash": row_hash[order],
            "name_hash": _hash64("", counts.obs.index)[order],
            "content_hash": content[order],
            "input_position": order.astype(np.int64),
        }

    def _write_layer(
        self, name: str, group: zarr.Group, destination: npt.NDArray[np.int64]
    ) -> None:
        nnz, dtype = 0, np.dtype(np.float32)
        with self._sorter(destination) as sorter:
            for block in self._shown(self.counts.layer_blocks(name), f"layer {name}"):
                nnz, dtype = nnz + len(block.data), block.data.dtype
                sorter.append(block.indptr, block.indices, block.data)
            write_matrix(
                group.require_group("layers"),
                name,
                sorter.sorted_blocks(),
                shape=(self.counts.n_obs, self.counts.n_vars),
                nnz=nnz,
                dtype=dtype,
                profile=self.profile,
            )

    def _sorter(self, destination: npt.NDArray[np.int64]) -> RowSorter:
        return RowSorter(destination, self.root / SCRATCH, memory=_SORT_BYTES)

    def _shown(self, blocks: Iterable[Any], what: str) -> Iterator[CSRRows]:
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

    def statistics(self, batch_codes: npt.NDArray[np.int32], scheduler: str | None) -> Part:
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
        return write_part(self.root, f"parts/{self.folder.name}/statistics", arrays)
