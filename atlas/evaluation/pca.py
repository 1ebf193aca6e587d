"""Principal components from moments that are added up minibatch by minibatch, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atlas.errors import ConfigError

Floats = npt.NDArray[np.float64]

MAX_GENES = 5000
"""Above, the covariance alone takes more than 200 MB and its decomposition minutes."""


@dataclass(frozen=True, slots=True)
class Components:
    """Axes of the largest variance.

    Attributes
    ----------
    mean
        Of each gene over the cells of studies that measured it: float64, (G,).
    axes
        Orthonormal rows; the largest entry of each is positive: float64, (n, G).
    variance
        Along each axis, falling: float64, (n,).
    """

    mean: Floats
    axes: Floats
    variance: Floats

    def project(self, values: Tensor, present: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """Coordinates of cells; genes that were not measured count as their mean.

        Parameters
        ----------
        values
            float32, (n_cells, G).
        present
            Genes that the cells' study measured: bool, (G,).
        """
        axes = torch.from_numpy((self.axes * present).astype(np.float32))
        shift = torch.from_numpy((self.axes @ (self.mean * present)).astype(np.float32))
        coordinates: npt.NDArray[np.float32] = (values @ axes.T - shift).numpy()
        return coordinates


class Moments:
    """Sums and products of genes over cells, by study.

    Parameters
    ----------
    presence
        Which study measured which gene: bool, (n_studies, G).

    Raises
    ------
    ConfigError
        More than 5,000 genes.
    """

    def __init__(self, presence: npt.NDArray[np.bool_]) -> None:
        n_genes = presence.shape[1]
        if not 1 <= n_genes <= MAX_GENES:
            raise ConfigError(
                "principal components cannot be made of so many genes",
                found=n_genes,
                expected=f"1 to {MAX_GENES:,}",
                do="choose fewer genes, for instance with `atlas genes --n 2000`",
            )
        self._presence = presence
        self._sums = np.zeros(presence.shape)
        self._cells = np.zeros(len(presence), dtype=np.int64)
        self._products = torch.zeros((n_genes, n_genes), dtype=torch.float64)

    @property
    def n_cells(self) -> int:
        """Cells so far."""
        return int(self._cells.sum())

    def update(self, values: Tensor, study: int) -> None:
        """Take in cells of one study, 0 where a gene was not measured: float32, (n, G)."""
        self._products += values.T @ values
        self._sums[study] += values.sum(dim=0, dtype=torch.float64).numpy()
        self._cells[study] += len(values)

    def components(self, n: int) -> Components:
        """The first ``n`` axes, fewer where there are fewer cells or genes.

        Genes that a study did not measure count as their mean, so they add no variance there.
        """
        cells = self.n_cells
        if cells < 2:
            raise ConfigError("principal components need two cells or more", found=cells)
        measured = self._presence * self._cells[:, None]
        mean = self._sums.sum(axis=0) / np.maximum(measured.sum(axis=0), 1)
        centred = self._products.numpy().copy()
        for sums, n_cells, present in zip(self._sums, self._cells, self._presence, strict=True):
            # Σ (x - μ)(x - μ)ᵀ = Σ x xᵀ - s μᵀ - μ sᵀ + n μ μᵀ, over the genes measured.
            own = mean * present
            cross = np.outer(sums, own)
            centred += n_cells * np.outer(own, own) - cross - cross.T
        n = min(n, cells - 1, len(mean))
        values, vectors = torch.linalg.eigh(torch.from_numpy(centred / (cells - 1)))
        axes = vectors.numpy()[:, ::-1][:, :n].T.copy()
        largest = np.abs(axes).argmax(axis=1)
        axes *= np.sign(axes[np.arange(n), largest])[:, None]
        variance = np.maximum(values.numpy()[::-1][:n], 0)
        return Components(mean, axes, variance.copy())
