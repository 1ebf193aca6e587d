"""From a configuration to a model with its initial weights."""

from __future__ import annotations

import torch
from torch import Tensor

from atlas.config import Architecture, CvaeConfig, DavaeConfig, ScanviConfig, TrvaeConfig
from atlas.models.base import CovariateSizes, Model
from atlas.models.davae import DAVAE
from atlas.models.labels import LabelTree
from atlas.models.layers import NO_COVARIATES
from atlas.models.scanvi import SCANVI
from atlas.models.scvi import SCVI
from atlas.models.trvae import TRVAE


def build_model(
    config: Architecture,
    n_genes: int,
    n_batch: int,
    seed: int,
    library_prior: Tensor | None = None,
    covariates: CovariateSizes = NO_COVARIATES,
    labels: LabelTree | None = None,
) -> Model:
    """Build a model on the CPU; the same arguments give the same weights, bit for bit.

    Parameters
    ----------
    config
        Architecture; its type chooses the model.
    n_genes, n_batch
        Number of modelled genes and of experimental batches.
    seed
        Of the initial weights. Torch's global generator is left as it was.
    library_prior
        float32, (n_batch, 2); see :class:`~atlas.models.SCVI`.
    covariates
        Further covariates; scVI and scANVI only.
    labels
        The classes; for, and only for, scANVI.

    Raises
    ------
    ModelError, ConfigError
        The prior does not fit the configuration, or the model cannot take what was given: one
        batch for trVAE or DAVAE, no labels for scANVI.
    """
    # The layers draw from the CPU's global generator, so it is seeded for the time being.
    # torch.manual_seed would reseed every GPU's generator too, and those are not restored here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if isinstance(config, ScanviConfig):
            return SCANVI(config, n_genes, n_batch, labels, library_prior, covariates)
        if isinstance(config, TrvaeConfig | CvaeConfig):
            return TRVAE(config, n_genes, n_batch)
        if isinstance(config, DavaeConfig):
            return DAVAE(config, n_genes, n_batch)
        return SCVI(config, n_genes, n_batch, library_prior, covariates)
