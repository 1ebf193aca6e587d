"""What every model takes and gives, so that one training loop serves them all."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from atlas.config import Architecture
from atlas.errors import ModelError
from atlas.models.sparse import masked

Held = TypeVar("Held", "Conditions", "Inputs")


@dataclass(frozen=True, slots=True)
class CovariateSizes:
    """How many covariates a model sees besides the batch.

    Attributes
    ----------
    n_categories
        Number of categories of each categorical covariate.
    n_continuous
        Number of continuous covariates.
    """

    n_categories: tuple[int, ...] = ()
    n_continuous: int = 0


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a cell is conditioned on.

    Attributes
    ----------
    batch
        Code of the experimental batch: int64, (n_cells,).
    categories
        Codes of the categorical covariates: int64, (n_cells, n_covariates); None where there are
        none.
    continuous
        Continuous covariates: float32, (n_cells, n_covariates); None where there are none.
    """

    batch: Tensor
    categories: Tensor | None = None
    continuous: Tensor | None = None

    def to(self, device: torch.device) -> Conditions:
        """The same on a device."""
        return _to(self, device)


@dataclass(frozen=True, slots=True)
class Inputs:
    """One minibatch on the model's device.

    Attributes
    ----------
    counts
        Raw counts of the modelled genes: float32, (n_cells, n_genes). In ``torch.sparse_csr``
        layout they are taken by the loss and the posterior of a model that says so
        (:attr:`Model.takes_sparse`).
    batch
        Code of the experimental batch of each cell: int64, (n_cells,).
    present
        Which genes the study of each cell measured: bool, (n_cells, n_genes); None where every
        study measured every modelled gene. What ``counts`` holds for an absent gene is not looked
        at.
    label
        Class of each cell, -1 where it has none: int64, (n_cells,); None for a model that looks at
        none.
    categories, continuous
        Further covariates; see :class:`Conditions`.
    size_factor
        Given size factor of each cell, above 0: float32, (n_cells,); None where there is none.
    """

    counts: Tensor
    batch: Tensor
    present: Tensor | None = None
    label: Tensor | None = None
    categories: Tensor | None = None
    continuous: Tensor | None = None
    size_factor: Tensor | None = None

    def to(self, device: torch.device) -> Inputs:
        """The same on a device."""
        return _to(self, device)

    def first(self, n: int) -> Inputs:
        """The first n cells."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fewer = {name: value[:n] for name, value in values.items() if value is not None}
        return dataclasses.replace(self, **fewer)

    @property
    def conditions(self) -> Conditions:
        """What the cells are conditioned on."""
        return Conditions(self.batch, self.categories, self.continuous)

    @property
    def measured(self) -> Tensor:
        """The counts, 0 where a gene was not measured: (n_cells, n_genes), sparse as they are."""
        return self.counts if self.present is None else masked(self.counts, self.present)


@dataclass(frozen=True, slots=True)
class Losses:
    """The loss of a minibatch and its parts, in nats.

    Attributes
    ----------
    reconstruction_loss
        Negative log-likelihood of each cell's counts given one sample of z: float32, (n_cells,).
    kl
        Kullback-Leibler divergence of the posterior (of z, and of the other latent variables a
        model has) from the prior, unweighted: float32, (n_cells,).
    objective
        The scalar to minimise, with the KL weight applied.
    penalty
        What the objective holds besides (classification, discrepancy of batches, adversary), with
        its weight: a scalar; None where there is nothing.
    """

    reconstruction_loss: Tensor
    kl: Tensor
    objective: Tensor
    penalty: Tensor | None = None

    @property
    def negative_bound(self) -> Tensor:
        """Negative evidence lower bound of each cell, whatever the KL weight: (n_cells,)."""
        return self.reconstruction_loss + self.kl


@dataclass(frozen=True, slots=True)
class CountParameters:
    """Distribution of the counts of cells, given z.

    Attributes
    ----------
    mean
        Of the counts before zero inflation: (n_cells, n_genes); 0 for genes that are not present.
    inverse_dispersion
        (n_genes,) or (n_cells, n_genes); None for the Poisson.
    dropout
        Probability of zero inflation: (n_cells, n_genes); None where there is none.
    """

    mean: Tensor
    inverse_dispersion: Tensor | None
    dropout: Tensor | None

    @property
    def expected(self) -> Tensor:
        """Expected counts, zero inflation included: (n_cells, n_genes)."""
        return self.mean if self.dropout is None else self.mean * (1 - self.dropout)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Counts drawn from the distribution: float32, (n_cells, n_genes)."""
        rate = self.mean
        if self.inverse_dispersion is not None:
            theta = self.inverse_dispersion.expand_as(rate)
            # torch has no public gamma sampler that takes a generator; this one does.
            rate = torch._standard_gamma(theta, generator=generator) * (rate / theta)
        counts = torch.poisson(rate, generator=generator)
        if self.dropout is not None:
            uniform = torch.rand(
                rate.shape, generator=generator, device=rate.device, dtype=rate.dtype
            )
            counts = counts * (uniform >= self.dropout)
        return counts


class Model(nn.Module, ABC):
    """A model of counts with a latent space.

    No method draws from torch's global generator: noise and dropout masks come from the generator
    that is passed, which must be on the model's device.

    Attributes
    ----------
    takes_sparse
        Whether :meth:`loss` and :meth:`posterior` take counts in ``torch.sparse_csr`` layout.
    """

    takes_sparse: ClassVar[bool] = False

    config: Architecture
    n_genes: int
    n_batch: int
    n_latent: int

    @abstractmethod
    def loss(
        self,
        inputs: Inputs,
        kl_weight: Tensor | float = 1.0,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
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
        progress
            Share of the training's steps that are done, for what rises with it.
        """

    @abstractmethod
    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z | x), with gradient; nothing is dropped.

        Returns
        -------
        Each float32, (n_cells, n_latent).
        """

    def posterior(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """As :meth:`encode`, in evaluation mode, without gradient.

        The training flags of the module are as before afterwards.
        """
        with evaluating(self):
            return self.encode(inputs)

    @abstractmethod
    def decode(self, z: Tensor, conditions: Conditions) -> Tensor:
        """Expected share of each gene in a cell's counts, in evaluation mode, without gradient.

        The shares are over all modelled genes, also those that the cell's own study lacks.

        Parameters
        ----------
        z
            (n_cells, n_latent).
        conditions
            What to decode for, which need not be where the cells came from.

        Returns
        -------
        float32, (n_cells, n_genes); each row sums to 1.
        """

    @abstractmethod
    def log_weight(self, inputs: Inputs, generator: torch.Generator) -> Tensor:
        """Log importance weight ``log p(x, z) - log q(z | x)`` at one draw of the latent variables.

        Its mean over draws bounds the log-likelihood of a cell from below; the log of the mean of
        its exponential converges to it. In evaluation mode, without gradient.

        Returns
        -------
        float32, (n_cells,), in nats.
        """

    def count_parameters(self, z: Tensor, inputs: Inputs) -> CountParameters:
        """Distribution of the cells' counts given z, in evaluation mode, without gradient.

        A latent library size is at its posterior mean. z is (n_cells, n_latent).

        Raises
        ------
        ModelError
            The model is not one of counts.
        """
        raise ModelError(
            "The model has no distribution of counts",
            found=f"{type(self).__name__}, a model of normalised expression",
            expected="a model of counts",
            do="train scvi or scanvi, or trvae or cvae with --gene-likelihood nb",
        )

    @property
    def over_ranks(self) -> bool:
        """Whether several processes can share a minibatch.

        They can where the objective is a mean over cells and noise is drawn cell by cell.
        """
        return False

    def embed(self, inputs: Inputs) -> Tensor:
        """Posterior mean of z: float32, (n_cells, n_latent)."""
        return self.posterior(inputs)[0]


def _to(held: Held, device: torch.device) -> Held:
    """The same dataclass with its tensors on a device."""
    values = {field.name: getattr(held, field.name) for field in dataclasses.fields(held)}
    moved = {name: value.to(device) for name, value in values.items() if value is not None}
    return dataclasses.replace(held, **moved)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; every training flag as before after it."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
