"""Whether what a source gives is what its class says, before it is read by address."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from loaders.errors import LoaderError
from loaders.packed import Block, PackedBlock, is_packed
from loaders.selection import Ints


def check_block(block: Block, starts: Ints, stops: Ints, narrow: bool) -> None:
    """Refuse a block that is not what its class says: its arrays are read by address.

    Its columns are looked at when they are copied. Where the source says that it is narrow, the
    block must be, as copies of wider numbers into two bytes would tell nothing.

    Raises
    ------
    LoaderError
        Wrong types or lengths.
    """
    arrays: list[tuple[str, npt.NDArray[Any], type]] = [("indptr", block.indptr, np.int64)]
    if isinstance(block, PackedBlock):
        arrays += [("offsets", block.offsets, np.int64), ("records", block.records, np.uint8)]
    else:
        short = narrow or block.indices.dtype == np.uint16
        arrays += [
            ("indices", block.indices, np.uint16 if short else np.int32),
            ("data", block.data, np.uint16 if short else np.float32),
        ]
    for name, array, dtype in arrays:
        if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            raise LoaderError(
                f"the source gave {name} of another type for {_shown(starts, stops)}",
                found=f"{array.dtype}, {array.ndim} dimensions, strides {array.strides}",
                expected=f"{np.dtype(dtype)}, 1 dimension, contiguous",
            )
    n_rows, indptr = int((stops - starts).sum()), block.indptr
    if isinstance(block, PackedBlock):
        if len(indptr) != n_rows + 1 or len(block.offsets) != n_rows + 1 or not is_packed(block):
            raise LoaderError(
                f"the source gave records that do not fit for {_shown(starts, stops)}",
                found=f"{block.n_rows} rows, {indptr[-1:]} values, offsets up to "
                f"{block.offsets[-1:]} in {len(block.records)} bytes",
                expected=f"{n_rows} rows as loaders.packed says",
            )
    elif len(indptr) != n_rows + 1 or not _is_csr(indptr, len(block.indices), len(block.data)):
        raise LoaderError(
            f"the source gave a block that is no CSR for {_shown(starts, stops)}",
            found=f"{block.n_rows} rows, {len(block.indices)} columns, {len(block.data)} values, "
            f"indptr from {indptr[:1]} to {indptr[-1:]}",
            expected=f"{n_rows} rows, and an indptr that rises from 0 to the number of values",
        )


def _shown(starts: Ints, stops: Ints) -> str:
    some = [f"{a} to {b}" for a, b in zip(starts[:3].tolist(), stops[:3].tolist(), strict=True)]
    return "rows " + ", ".join(some) + (", …" if len(starts) > 3 else "")


@njit(cache=True)  # type: ignore[untyped-decorator]
def _is_csr(indptr: Ints, n_indices: int, n_data: int) -> bool:
    if indptr[0] != 0 or indptr[-1] != n_indices or n_indices != n_data:
        return False
    falls = False
    for row in range(len(indptr) - 1):
        falls |= indptr[row + 1] < indptr[row]
    return not falls
