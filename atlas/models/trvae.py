"""trVAE and CVAE (Lotfollahi et al. 2022, Nature Biotechnology 40, scArches, Methods)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import CvaeConfig, TrvaeConfig
from atlas.errors import ConfigError
from atlas.models.base import Conditions, CountParameters, Inputs, Losses, Model, evaluating
from atlas.models.expression import log_normalized, shares
from atlas.models.layers import (
    Encoder,
    GeneLinear,
    TaperedStack,
    kl_normal,
    log_library,
    log_prior_ratio,
    sample_normal,
)
from atlas.models.likelihood import (
    at_least_float32,
    gaussian_loss,
    heads_loss,
    log_means,
)
from atlas.models.mmd import batch_discrepancy

LOG_VARIANCE = math.log(0.5)
"""Of the Gaussian: its negative log-likelihood is then scArches' squared error and a constant."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the decoder makes of z.

    Attributes
    ----------
    first, h
        Output of its first hidden layer and of the last: (n_cells, n_hidden).
    """

    first: Tensor
    h: Tensor


@dataclass(frozen=True, slots=True)
class TrvaeOutputs:
    """Everything between the counts of a minibatch and their likelihood.

    Attributes
    ----------
    z_mean, z_variance, z
        Posterior of z and the sample of it that was decoded: (n_cells, n_latent).
    decoded
        What the decoder made of z.
    """

    z_mean: Tensor
    z_variance: Tensor
    z: Tensor
    decoded: Decoded


class TRVAE(Model):
    """A conditional autoencoder and, for trVAE, the discrepancy of the batches inside it.

    The batch enters the first layer of encoder and decoder only, and every norm is a LayerNorm
    without weights, so that surgery adds rows to two layers and touches nothing else. trVAE adds
    the maximum mean discrepancy between the batches of each minibatch at the output of the
    decoder's first layer (or at z); the CVAE has none.

    Of counts, the mean is the cell's sum over the genes that its study has, times a softmax over
    these. As in scArches' code, which the paper's text leaves open: each batch has inverse
    dispersions of its own, and the posterior variance is ``exp(·) + 1e-4``. The Gaussian is of
    normalised expression with variance 1/2, which is scArches' squared error; its mean is a
    softplus in place of the ReLU there, under which a gene that starts below zero never learns.
    scArches' code measures the discrepancy at z unless told otherwise; here the paper's place is
    the default.

    Parameters
    ----------
    config
        Architecture; :class:`~atlas.config.CvaeConfig` for the CVAE.
    n_genes, n_batch
        Number of modelled genes and of experimental batches.

    Raises
    ------
    ConfigError
        A trVAE of one batch.
    """

    config: TrvaeConfig | CvaeConfig

    def __init__(self, config: TrvaeConfig | CvaeConfig, n_genes: int, n_batch: int) -> None:
        super().__init__()
        if isinstance(config, TrvaeConfig) and n_batch < 2:
            raise ConfigError(
                "trVAE needs two batches at least",
                found=f"{n_batch} batch",
                do="train cvae or scvi, which may have one, or ingest with another --batch-key",
            )
        self.config = config
        self.n_genes, self.n_batch, self.n_latent = n_genes, n_batch, config.n_latent
        widths = [config.n_hidden] * config.n_layers
        rate = config.dropout_rate
        self.encoder = Encoder(
            TaperedStack(n_genes, widths, n_batch, "layer", rate), config.n_latent
        )
        self.decoder = TaperedStack(config.n_latent, widths, n_batch, "layer", rate)
        # Logits of the genes' shares; of the Gaussian the mean, before the softplus.
        self.scale = GeneLinear(config.n_hidden, n_genes)
        if config.gene_likelihood == "zinb":
            self.zero_inflation = GeneLinear(config.n_hidden, n_genes)
        if self.of_counts:
            self.log_inverse_dispersion = nn.Parameter(torch.randn(n_batch, n_genes))

    @property
    def over_ranks(self) -> bool:
        """Yes for the CVAE; the discrepancy is between all cells of a minibatch."""
        return isinstance(self.config, CvaeConfig)

    @property
    def of_counts(self) -> bool:
        """Whether the likelihood is of counts, not of normalised expression."""
        return self.config.gene_likelihood != "gaussian"

    def forward(self, inputs: Inputs, generator: torch.Generator | None = None) -> TrvaeOutputs:
        """Encode, sample and decode a minibatch; see :meth:`Model.loss` for the generator."""
        z_mean, z_variance = self.encoder(self._features(inputs), inputs.conditions, generator)
        z = sample_normal(z_mean, z_variance, generator)
        decoded = self._decode(z, inputs.conditions, generator)
        return TrvaeOutputs(z_mean=z_mean, z_variance=z_variance, z=z, decoded=decoded)

    def _features(self, inputs: Inputs) -> Tensor:
        """What the encoder sees: (n_cells, n_genes)."""
        return inputs.measured.log1p() if self.of_counts else log_normalized(inputs)

    def _decode(
        self, z: Tensor, conditions: Conditions, generator: torch.Generator | None = None
    ) -> Decoded:
        first = self.decoder.begun(z, conditions, generator)
        return Decoded(first, self.decoder.continued(first, generator))

    def reconstruction_loss(self, inputs: Inputs, decoded: Decoded) -> Tensor:
        """Negative log-likelihood of the counts, or of the normalised expression: (n_cells,)."""
        h, present = decoded.h, inputs.present
        if not self.of_counts:
            mean = F.softplus(at_least_float32(self.scale(h)))
            variance = torch.full((), LOG_VARIANCE, device=mean.device)
            return gaussian_loss(log_normalized(inputs), mean, variance, present)
        library = log_library(inputs.measured)
        theta = F.embedding(inputs.batch, self.log_inverse_dispersion)
        zero_inflation = self.zero_inflation if self.config.gene_likelihood == "zinb" else None
        return heads_loss(inputs.counts, h, self.scale, zero_inflation, library, theta, present)

    def loss(
        self,
        inputs: Inputs,
        kl_weight: Tensor | float = 1.0,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> Losses:
        """Negative evidence lower bound, and β times the discrepancy (trVAE's cost function).

        See :meth:`Model.loss`.
        """
        out = self(inputs, generator)
        reconstruction_loss = self.reconstruction_loss(inputs, out.decoded)
        kl = kl_normal(out.z_mean, out.z_variance, 0.0, 1.0)
        objective = (reconstruction_loss + kl_weight * kl).mean()
        penalty = None
        if isinstance(self.config, TrvaeConfig):
            where = out.z if self.config.mmd_on == "z" else out.decoded.first
            penalty = self.config.mmd_weight * batch_discrepancy(where, inputs.batch)
            objective = objective + penalty
        return Losses(
            reconstruction_loss=reconstruction_loss, kl=kl, objective=objective, penalty=penalty
        )

    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`Model.encode`."""
        mean, variance = self.encoder(self._features(inputs), inputs.conditions)
        return mean, variance

    def decode(self, z: Tensor, conditions: Conditions) -> Tensor:
        """See :meth:`Model.decode`; of a Gaussian, see :func:`atlas.models.expression.shares`."""
        with evaluating(self):
            logits = at_least_float32(self.scale(self._decode(z, conditions).h))
            return logits.softmax(dim=-1) if self.of_counts else shares(F.softplus(logits))

    def count_parameters(self, z: Tensor, inputs: Inputs) -> CountParameters:
        """See :meth:`Model.count_parameters`."""
        if not self.of_counts:
            return super().count_parameters(z, inputs)
        with evaluating(self):
            h, library = self._decode(z, inputs.conditions).h, log_library(inputs.measured)
            dropout = None
            if self.config.gene_likelihood == "zinb":
                dropout = at_least_float32(self.zero_inflation(h)).sigmoid()
            return CountParameters(
                mean=log_means(self.scale(h), library, inputs.present).exp(),
                inverse_dispersion=F.embedding(inputs.batch, self.log_inverse_dispersion).exp(),
                dropout=dropout,
            )

    def log_weight(self, inputs: Inputs, generator: torch.Generator) -> Tensor:
        """See :meth:`Model.log_weight`; of a Gaussian, the density of normalised expression."""
        with evaluating(self):
            out = self(inputs, generator)
            ratio = log_prior_ratio(out.z, out.z_mean, out.z_variance)
            return ratio - self.reconstruction_loss(inputs, out.decoded)
