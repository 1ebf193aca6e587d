"""What every model takes and gives, so that one training loop serves them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Inputs:
    """One minibatch on the model's device.

    Attributes
    ----------
    counts
        Raw counts of the modelled genes: float32, (n_cells, n_genes).
    batch
        Code of the experimental batch of each cell: int64, (n_cells,).
    present
        Which genes the study of each cell measured: bool, (n_cells, n_genes); None where every
        study measured every modelled gene. What ``counts`` holds for an absent gene is not looked
        at.
    """

    counts: Tensor
    batch: Tensor
    present: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Losses:
    """The loss of a minibatch and its parts, in nats.

    Attributes
    ----------
    reconstruction_loss
        Negative log-likelihood of each cell's counts given one sample of z: float32, (n_cells,).
    kl
        Kullback-Leibler divergence of the posterior (of z, and of the library size where it is
        latent) from the prior, unweighted: float32, (n_cells,).
    objective
        The scalar to minimise, with the KL weight applied.
    """

    reconstruction_loss: Tensor
    kl: Tensor
    objective: Tensor

    @property
    def negative_bound(self) -> Tensor:
        """Negative evidence lower bound of each cell, whatever the KL weight: (n_cells,)."""
        return self.reconstruction_loss + self.kl


class Model(nn.Module, ABC):
    """A model of counts with a latent space.

    No method draws from torch's global generator: noise and dropout masks come from the generator
    that is passed, which must be on the model's device.
    """

    n_genes: int
    n_batch: int
    n_latent: int

    @abstractmethod
    def loss(
        self,
        inputs: Inputs,
        kl_weight: Tensor | float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """Loss of a minibatch.

        Parameters
        ----------
        inputs
            The minibatch.
        kl_weight
            Weight of the divergence of z, for warm-up; a tensor on the device costs no
            synchronisation.
        generator
            Source of the noise of z and of the dropout masks. Without one z is the posterior mean
            and nothing is dropped.
        """

    @abstractmethod
    def embed(self, inputs: Inputs) -> Tensor:
        """Posterior mean of z in evaluation mode, without gradient: float32, (n_cells, n_latent).

        The training flags of the module are as before afterwards.
        """

    @abstractmethod
    def decode(self, z: Tensor, batch: Tensor) -> Tensor:
        """Expected share of each gene in a cell's counts, in evaluation mode, without gradient.

        The shares are over all modelled genes, also those that the cell's own study lacks.

        Parameters
        ----------
        z
            (n_cells, n_latent).
        batch
            The batch to decode for, which need not be the one the cell came from: int64,
            (n_cells,).

        Returns
        -------
        float32, (n_cells, n_genes); each row sums to 1.
        """


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; every training flag as before after it."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in flags:
            part.training = training
