"""The rows of one matrix of an AnnData in Zarr, sparse or dense, by the fastest path there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import zarr

from atlas.codecs.chunks import ChunkedArray
from atlas.codecs.zarr_arrays import GenericArray, codec_names, why_not_fast
from atlas.errors import CorruptStoreError, FormatError

FAST = "fast: chunks decoded by Atlas's own kernels"

_Column: TypeAlias = ChunkedArray | GenericArray


class SparseRows:
    """A csr_matrix group."""

    def __init__(self, group: zarr.Group, folder: Path, name: str) -> None:
        self.path = folder
        n_obs, n_vars = cast("Sequence[int]", group.attrs.asdict()["shape"])
        self.shape = (int(n_obs), int(n_vars))
        arrays = {part: cast("zarr.Array[Any]", group[part]) for part in ("indices", "data")}
        pointers = GenericArray(cast("zarr.Array[Any]", group["indptr"]), folder / "indptr")
        self.indptr = pointers.read(0, len(pointers)).astype(np.int64)
        self._indices: _Column
        self._data: _Column
        reasons = [_why_not(folder / part, f"{name}/{part}") for part in arrays]
        why = next((reason for reason in reasons if reason), None)
        if why is None:
            self._indices = ChunkedArray(folder / "indices")
            self._data = ChunkedArray(folder / "data")
            self.reading = FAST
        else:
            self._indices = GenericArray(arrays["indices"], folder / "indices")
            self._data = GenericArray(arrays["data"], folder / "data")
            self.reading = f"generic: through zarr-python, because {why}"
        self.dtype = np.dtype(self._data.dtype)
        self.overhead = 2 * sum(
            int(array.chunks[0]) * np.dtype(array.dtype).itemsize for array in arrays.values()
        )
        lengths = {len(self._indices), len(self._data), int(self.indptr[-1])}
        if (
            len(self.indptr) != self.shape[0] + 1
            or self.indptr[0] != 0
            or (np.diff(self.indptr) < 0).any()
            or len(lengths) > 1
        ):
            raise CorruptStoreError(
                "The row pointers do not fit the matrix",
                found=f"{len(self.indptr)} pointers, from {self.indptr[0]} to "
                f"{self.indptr[-1]}; {len(self._indices)} indices, {len(self._data)} values",
                expected=f"{self.shape[0] + 1} that rise from 0 to the number of values",
                path=folder,
            )

    def count(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        return self.indptr[stops] - self.indptr[starts]

    def read(
        self, start: int, stop: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]:
        indptr = self.indptr[start : stop + 1]
        low, high = int(indptr[0]), int(indptr[-1])
        return indptr - low, self._indices.read(low, high), self._data.read(low, high)


class DenseRows:
    """A dense array, read in strips of the rows that lie together."""

    def __init__(self, array: zarr.Array[Any], folder: Path, name: str) -> None:
        self.path = folder
        self._array = GenericArray(array, folder)
        if len(self._array.shape) != 2:
            raise FormatError(f"{name} is no matrix", found=array.shape, path=folder)
        self.shape = self._array.shape
        self.dtype = self._array.dtype
        self.reading = f"generic: through zarr-python, because {name} is dense"
        self.rows_at_once = self._array.rows_at_once
        self.overhead = 3 * self._array.rows_at_once * self.shape[1] * self.dtype.itemsize

    def count(
        self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        return (stops - starts) * self.shape[1]

    def read(
        self, start: int, stop: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]]:
        strip = self._array.rows_at_once
        counts, columns, values = [np.zeros(1, np.int64)], [], []
        for low in range(start, stop, strip):
            dense = self._array.read(low, min(stop, low + strip))
            filled = dense != 0
            counts.append(np.count_nonzero(filled, axis=1))
            columns.append(np.nonzero(filled)[1].astype(np.int32))
            values.append(dense[filled])
        return (
            np.cumsum(np.concatenate(counts)),
            np.concatenate([np.empty(0, np.int32), *columns]),
            np.concatenate([np.empty(0, self.dtype), *values]),
        )


def _why_not(folder: Path, name: str) -> str | None:
    """Why an array goes the generic path; None where it need not."""
    if why := why_not_fast(folder):
        return f"{name} {why}"
    try:
        ChunkedArray(folder)
    except FormatError:
        return f"{name} has codecs {codec_names(folder)}"
    return None
