"""From a configuration to a model with its initial weights."""

from __future__ import annotations

import torch
from torch import Tensor

from atlas.config import ScviConfig
from atlas.models.scvi import SCVI


def build_model(
    config: ScviConfig,
    n_genes: int,
    n_batch: int,
    seed: int,
    library_prior: Tensor | None = None,
) -> SCVI:
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

    Raises
    ------
    ModelError
        The prior does not fit the configuration.
    """
    # The layers draw from the CPU's global generator, so it is seeded for the time being.
    # torch.manual_seed would reseed every GPU's generator too, and those are not restored here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return SCVI(config, n_genes, n_batch, library_prior)
