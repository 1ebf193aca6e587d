"""Where the training of a model of counts starts: at the mean profile of the cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from atlas.models.base import Model
from atlas.models.scanvi import SCANVI
from atlas.models.scvi import SCVI
from atlas.models.trvae import TRVAE

_PSEUDO_COUNT: Final = 0.5
_LEAST_THETA, _MOST_THETA = 1.0, 50.0


@dataclass(frozen=True, slots=True)
class GeneProfile:
    """Moments of each gene over cells.

    Attributes
    ----------
    share
        Of the gene in the counts of a cell, over the cells whose study measured it: float64,
        (n_genes,), above 0.
    inverse_dispersion
        Of a negative binomial with the variance of the gene's counts, scaled to cells of equal
        size: float64, (n_genes,), between 1 and 50. A gene that varies more than 1 allows is one
        by which types differ: how it varies within a type is not known yet, and a likelihood that
        takes all of it for noise would hardly ask z for it (benchmarks/LOG.md).
    """

    share: npt.NDArray[np.float64]
    inverse_dispersion: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls,
        counts: sparse.csr_matrix,
        study: npt.NDArray[np.int32],
        presence: npt.NDArray[np.bool_],
    ) -> GeneProfile:
        """The profile of some cells.

        Parameters
        ----------
        counts
            (n_cells, n_genes).
        study
            Code of the study of each cell: int32, (n_cells,).
        presence
            Which study measured which gene: bool, (n_studies, n_genes).
        """
        counts = counts.astype(np.float64)
        n_genes, n_studies = counts.shape[1], len(presence)
        library = np.maximum(counts.sum(axis=1).A1, 1.0)
        size = library.mean()
        # over the cells whose study measured the gene
        n_cells = np.maximum(np.bincount(study, minlength=n_studies) @ presence, 1)
        total = np.maximum(np.bincount(study, library, n_studies) @ presence, 1.0)
        scaled = sparse.diags(size / library) @ counts
        mean = scaled.sum(axis=0).A1 / n_cells
        variance = scaled.power(2).sum(axis=0).A1 / n_cells - mean**2
        # a Poisson count scaled to cells of mean size varies more in small ones
        excess = variance - mean * size * (1 / library).mean()
        theta = np.full(n_genes, _MOST_THETA)
        np.divide(mean**2, excess, out=theta, where=excess > 0)
        return cls(
            share=(counts.sum(axis=0).A1 + _PSEUDO_COUNT) / total,
            inverse_dispersion=np.clip(theta, _LEAST_THETA, _MOST_THETA),
        )


def start_at(model: Model, profile: GeneProfile) -> None:
    """Let a model of counts that is not trained yet decode every z to about the mean profile.

    The papers leave the initial weights open, and public code draws them all at random. Then the
    output has to learn the mean of every gene first, and z is noise meanwhile. With two layers and
    LayerNorm the posterior then falls to the prior in some trainings of few steps and stays there;
    not from here (benchmarks/LOG.md, "Where training starts"). So the biases of the
    last layer begin at the logarithm of the mean profile, dispersions at those of the counts. Other
    models are left as they are.
    """
    if isinstance(model, SCANVI):
        model = model.scvi
    if not isinstance(model, SCVI | TRVAE) or (isinstance(model, TRVAE) and not model.of_counts):
        return
    share = torch.from_numpy(profile.share)
    if isinstance(model, SCVI) and model.link == "log":
        return  # means are per given size factor, whose unit is the user's
    with torch.no_grad():
        logits = share.log()
        model.scale.bias.copy_(logits - logits.mean())
        if isinstance(model, TRVAE) or model.config.gene_likelihood != "poisson":
            theta = torch.from_numpy(profile.inverse_dispersion)
            model.log_inverse_dispersion.copy_(theta.log().expand_as(model.log_inverse_dispersion))
