"""scVI (Lopez et al. 2018, Nature Methods 15): a variational autoencoder of raw counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import ScviConfig
from atlas.errors import ModelError
from atlas.models.base import (
    Conditions,
    CountParameters,
    CovariateSizes,
    Inputs,
    Losses,
    Model,
    evaluating,
)
from atlas.models.layers import (
    NO_COVARIATES,
    Encoder,
    GeneLinear,
    HiddenStack,
    kl_normal,
    log_library,
    log_normal,
    log_prior_ratio,
    sample_normal,
)
from atlas.models.likelihood import (
    Link,
    at_least_float32,
    heads_loss,
    log_means,
    log_softplus,
    nb_loss,
    poisson_loss,
    zinb_loss,
)
from atlas.models.sparse import log1p


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the decoder makes of z.

    Attributes
    ----------
    h
        Output of the last hidden layer: (n_cells, n_hidden).
    log_inverse_dispersion
        (n_genes,), or (n_cells, n_genes) where it is per batch; None for the Poisson.
    """

    h: Tensor
    log_inverse_dispersion: Tensor | None


@dataclass(frozen=True, slots=True)
class ScviOutputs:
    """Everything between the counts of a minibatch and their likelihood.

    Attributes
    ----------
    z_mean, z_variance, z
        Posterior of z and the sample of it that was decoded: (n_cells, n_latent).
    library_mean, library_variance
        Posterior of the log library size, (n_cells, 1); None where it is observed or given.
    log_library
        Observed, given or sampled: (n_cells, 1).
    decoded
        What the decoder made of z.
    """

    z_mean: Tensor
    z_variance: Tensor
    z: Tensor
    library_mean: Tensor | None
    library_variance: Tensor | None
    log_library: Tensor
    decoded: Decoded


class SCVI(Model):
    """scVI for studies that need not have measured the same genes.

    Only parameters that the configuration uses exist. Matrix products run in bfloat16 under
    ``torch.autocast``; posteriors, divergences and likelihood are float32 always.

    Parameters
    ----------
    config
        Architecture.
    n_genes
        Number of modelled genes.
    n_batch
        Number of experimental batches.
    library_prior
        Mean and variance of the log library size in each batch, (n_batch, 2); for, and only for, a
        latent library.
    covariates
        Further covariates. Each has weights of its own in every layer of the decoder and, with
        ``encode_covariates``, of the encoder.

    Raises
    ------
    ModelError
        A prior is missing, not asked for, or of another shape.
    """

    takes_sparse = True

    config: ScviConfig
    library_prior: Tensor | None

    def __init__(
        self,
        config: ScviConfig,
        n_genes: int,
        n_batch: int,
        library_prior: Tensor | None = None,
        covariates: CovariateSizes = NO_COVARIATES,
    ) -> None:
        super().__init__()
        self.config = config
        self.n_genes = n_genes
        self.n_batch = n_batch
        self.n_latent = config.n_latent
        self.covariates = covariates
        _check_prior(config, n_batch, library_prior)
        seen = (
            n_batch if config.encode_batch else 0,
            config.norm,
            config.dropout_rate,
            covariates if config.encode_covariates else NO_COVARIATES,
        )

        hidden = HiddenStack(n_genes, config.n_hidden, config.n_layers, *seen)
        self.encoder = Encoder(hidden, config.n_latent)
        if config.library == "latent":
            self.library_encoder = Encoder(HiddenStack(n_genes, config.n_hidden, 1, *seen), 1)
        self.decoder = HiddenStack(
            config.n_latent,
            config.n_hidden,
            config.n_layers,
            n_batch,
            config.norm,
            covariates=covariates,
        )
        self.scale = GeneLinear(config.n_hidden, n_genes)
        if config.gene_likelihood == "zinb":
            self.zero_inflation = GeneLinear(config.n_hidden, n_genes)
        if config.gene_likelihood != "poisson":
            shape = (n_genes,) if config.dispersion == "gene" else (n_batch, n_genes)
            self.log_inverse_dispersion = nn.Parameter(torch.randn(shape))
        self.register_buffer("library_prior", library_prior)

    @property
    def over_ranks(self) -> bool:
        """Yes."""
        return True

    @property
    def link(self) -> Link:
        """How the means of the counts follow from the decoder's output."""
        return "log" if self.config.library == "size-factor" else "softmax"

    def forward(self, inputs: Inputs, generator: torch.Generator | None = None) -> ScviOutputs:
        """Encode, sample and decode a minibatch; see :meth:`Model.loss` for the generator."""
        conditions = inputs.conditions
        counts = inputs.measured
        features = log1p(counts)

        z_mean, z_variance = self.encoder(features, conditions, generator)
        z = sample_normal(z_mean, z_variance, generator)

        library_mean, library_variance = None, None
        if self.config.library == "latent":
            library_mean, library_variance = self.library_encoder(features, conditions, generator)
            log_library = sample_normal(library_mean, library_variance, generator)
        else:
            log_library = self._known_library(counts, inputs)
        return ScviOutputs(
            z_mean=z_mean,
            z_variance=z_variance,
            z=z,
            library_mean=library_mean,
            library_variance=library_variance,
            log_library=log_library,
            decoded=self._decode(z, conditions),
        )

    def _known_library(self, counts: Tensor, inputs: Inputs) -> Tensor:
        """Logarithm of the library size that is observed or given: (n_cells, 1)."""
        if self.config.library == "size-factor":
            assert inputs.size_factor is not None
            return inputs.size_factor.log().unsqueeze(-1)
        return log_library(counts)

    def _decode(self, z: Tensor, conditions: Conditions) -> Decoded:
        log_inverse_dispersion: Tensor | None = None
        if self.config.gene_likelihood != "poisson":
            log_inverse_dispersion = self.log_inverse_dispersion
            if self.config.dispersion == "gene-batch":
                log_inverse_dispersion = F.embedding(conditions.batch, self.log_inverse_dispersion)
        return Decoded(self.decoder(z, conditions), log_inverse_dispersion)

    def _scale_logits(self, h: Tensor) -> Tensor:
        """Logits of the genes' shares, before the softmax: (n_cells, n_genes).

        With a given size factor they are the logarithm of the means, but for it.
        """
        logits: Tensor = self.scale(h)
        return logits if self.link == "softmax" else log_softplus(logits)

    def _dropout_logits(self, h: Tensor) -> Tensor | None:
        """Log-odds of zero inflation, (n_cells, n_genes); None where there is none."""
        return self.zero_inflation(h) if self.config.gene_likelihood == "zinb" else None

    def reconstruction_loss(self, inputs: Inputs, decoded: Decoded, log_library: Tensor) -> Tensor:
        """Negative log-likelihood of the counts: (n_cells,)."""
        counts, h, theta = inputs.counts, decoded.h, decoded.log_inverse_dispersion
        present, link = inputs.present, self.link
        if theta is None:
            return poisson_loss(counts, self._scale_logits(h), log_library, present, link)
        if link == "softmax":
            zero_inflation = self.zero_inflation if self.config.gene_likelihood == "zinb" else None
            return heads_loss(counts, h, self.scale, zero_inflation, log_library, theta, present)
        given = counts, self._scale_logits(h), log_library, theta
        dropout = self._dropout_logits(h)
        if dropout is None:
            return nb_loss(*given, present, link)
        return zinb_loss(*given, dropout, present, link)

    def loss(
        self,
        inputs: Inputs,
        kl_weight: Tensor | float = 1.0,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> Losses:
        """Negative evidence lower bound; the warm-up weighs the divergence of z only.

        See :meth:`Model.loss`.
        """
        out = self(inputs, generator)
        reconstruction_loss = self.reconstruction_loss(inputs, out.decoded, out.log_library)
        kl_z = kl_normal(out.z_mean, out.z_variance, 0.0, 1.0)
        kl = kl_z
        objective = reconstruction_loss + kl_weight * kl_z
        if out.library_mean is not None:
            kl_library = self.library_kl(out, inputs.batch)
            kl = kl_z + kl_library
            objective = objective + kl_library
        return Losses(reconstruction_loss=reconstruction_loss, kl=kl, objective=objective.mean())

    def library_kl(self, out: ScviOutputs, batch: Tensor) -> Tensor:
        """KL(N(m, v) || N(prior of the batch)) of a latent log library size: (n_cells,)."""
        assert out.library_mean is not None
        assert out.library_variance is not None
        return kl_normal(out.library_mean, out.library_variance, *self._prior_of(batch))

    def _prior_of(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the log library size in each cell's batch, each (n_cells, 1)."""
        assert self.library_prior is not None
        mean, variance = F.embedding(batch, self.library_prior).unsqueeze(-1).unbind(dim=1)
        return mean, variance

    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`Model.encode`."""
        mean, variance = self.encoder(log1p(inputs.measured), inputs.conditions)
        return mean, variance

    def library_posterior(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of the log library size, in evaluation mode, without gradient.

        The variance is 0 where the library is observed or given. Each (n_cells, 1).
        """
        with evaluating(self):
            if self.config.library == "latent":
                mean, variance = self.library_encoder(log1p(inputs.measured), inputs.conditions)
                return mean, variance
            known = self._known_library(inputs.measured, inputs)
            return known, torch.zeros_like(known)

    def decode(self, z: Tensor, conditions: Conditions) -> Tensor:
        """See :meth:`Model.decode`."""
        with evaluating(self):
            return at_least_float32(self._scale_logits(self._decode(z, conditions).h)).softmax(
                dim=-1
            )

    def count_parameters(self, z: Tensor, inputs: Inputs) -> CountParameters:
        """See :meth:`Model.count_parameters`."""
        with evaluating(self):
            log_library, _ = self.library_posterior(inputs)
            decoded = self._decode(z, inputs.conditions)
            theta, logits = decoded.log_inverse_dispersion, self._dropout_logits(decoded.h)
            scale = self._scale_logits(decoded.h)
            return CountParameters(
                mean=log_means(scale, log_library, inputs.present, self.link).exp(),
                inverse_dispersion=None if theta is None else theta.exp(),
                dropout=None if logits is None else at_least_float32(logits).sigmoid(),
            )

    def log_weight(self, inputs: Inputs, generator: torch.Generator) -> Tensor:
        """See :meth:`Model.log_weight`."""
        with evaluating(self):
            out = self(inputs, generator)
            return (
                log_prior_ratio(out.z, out.z_mean, out.z_variance)
                - self.reconstruction_loss(inputs, out.decoded, out.log_library)
                + self.library_log_weight(out, inputs.batch)
            )

    def library_log_weight(self, out: ScviOutputs, batch: Tensor) -> Tensor | float:
        """``log p(l) - log q(l | x)`` of a latent log library size, (n_cells,); 0 of a known."""
        if out.library_mean is None or out.library_variance is None:
            return 0.0
        prior = log_normal(out.log_library, *self._prior_of(batch))
        return prior - log_normal(out.log_library, out.library_mean, out.library_variance)


def _check_prior(config: ScviConfig, n_batch: int, library_prior: Tensor | None) -> None:
    expected = f"({n_batch}, 2)" if config.library == "latent" else "none"
    found = "none" if library_prior is None else str(tuple(library_prior.shape))
    if found != expected:
        raise ModelError(
            "the library prior does not fit the model",
            found=found,
            expected=f"{expected}, for a library that is {config.library}",
            do="pass mean and variance of the log library size of each batch for a latent library,"
            " nothing for an observed one",
        )
