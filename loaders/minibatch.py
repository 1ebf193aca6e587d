"""What the loaders hand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Minibatch:
    """Rows of one training step in CSR form. The arrays are its own: nothing changes them later.

    Attributes
    ----------
    indptr
        int64, (n_rows + 1,), starting at 0.
    indices
        Column of each value: int32, or uint16 from a narrow loader, (nnz,), in the order in which
        the source gave them.
    data
        Counts: float32, or uint16 from a narrow loader, (nnz,). Arithmetic on uint16 overflows
        silently: widen first.
    rows
        Position of each row in the source: int64, (n_rows,).
    obs
        Integer codes of each row by name, int32 (n_rows,) each; -1 stands for none.
    n_vars
        Number of columns: that of the source, whatever columns occur.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[Any]
    data: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]
    obs: dict[str, npt.NDArray[np.int32]]
    n_vars: int

    def __repr__(self) -> str:
        return (
            f"Minibatch({self.n_rows:,} rows × {self.n_vars:,} columns, {len(self.data):,} values, "
            f"{self.indices.dtype}/{self.data.dtype}, obs {', '.join(self.obs) or 'none'})"
        )

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        own = self.indptr.nbytes + self.indices.nbytes + self.data.nbytes + self.rows.nbytes
        return own + sum(codes.nbytes for codes in self.obs.values())

    def to_scipy(self) -> csr_matrix:
        """The counts as float32 ``csr_matrix`` (n_rows, n_vars), with sorted columns.

        A copy: sorting the columns leaves the minibatch as it is.
        """
        shape = (self.n_rows, self.n_vars)
        indices, data = self.indices.astype(np.int32), self.data.astype(np.float32)
        matrix = csr_matrix((data, indices, self.indptr), shape=shape, copy=True)
        matrix.sort_indices()
        return matrix

    def to_torch(self, device: torch.device | str = "cpu", dense: bool = True) -> torch.Tensor:
        """The counts on a device.

        Parameters
        ----------
        device
            Where the tensor goes. Only the sparse parts travel, narrow ones as they are; they are
            widened, and dense rows are made, there.
        dense
            Whether to return a dense tensor, or one in ``torch.sparse_csr`` layout.

        Returns
        -------
        float32, (n_rows, n_vars).
        """
        # Torch takes seconds to import, and whoever reads rows with scipy does without it.
        from loaders.device import DeviceFeed

        return DeviceFeed(device, slots=1)(self, dense=dense)
