"""scVI (Lopez et al. 2018, Nature Methods 15): a variational autoencoder of raw counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import ScviConfig
from atlas.errors import ModelError
from atlas.models.base import Inputs, Losses, Model, evaluating
from atlas.models.layers import Encoder, HiddenStack, sample_normal
from atlas.models.likelihood import at_least_float32, nb_loss, zinb_loss


@dataclass(frozen=True, slots=True)
class ScviOutputs:
    """Everything between the counts of a minibatch and their likelihood.

    Attributes
    ----------
    z_mean, z_variance, z
        Posterior of z and the sample of it that was decoded: (n_cells, n_latent).
    library_mean, library_variance
        Posterior of the log library size, (n_cells, 1); None where it is observed.
    log_library
        Observed or sampled: (n_cells, 1).
    scale_logits
        Logits of the genes' shares, before the softmax: (n_cells, n_genes).
    dropout_logits
        Log-odds of zero inflation, (n_cells, n_genes); None for the negative binomial.
    log_inverse_dispersion
        (n_genes,), or (n_cells, n_genes) where it is per batch.
    """

    z_mean: Tensor
    z_variance: Tensor
    z: Tensor
    library_mean: Tensor | None
    library_variance: Tensor | None
    log_library: Tensor
    scale_logits: Tensor
    dropout_logits: Tensor | None
    log_inverse_dispersion: Tensor


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

    Raises
    ------
    ModelError
        A prior is missing, not asked for, or of another shape.
    """

    library_prior: Tensor | None

    def __init__(
        self,
        config: ScviConfig,
        n_genes: int,
        n_batch: int,
        library_prior: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.n_genes = n_genes
        self.n_batch = n_batch
        self.n_latent = config.n_latent
        _check_prior(config, n_batch, library_prior)
        encoder_batches = n_batch if config.encode_batch else 0

        self.encoder = Encoder(
            n_genes,
            config.n_latent,
            config.n_hidden,
            config.n_layers,
            encoder_batches,
            config.norm,
            config.dropout_rate,
        )
        if config.library == "latent":
            self.library_encoder = Encoder(
                n_genes, 1, config.n_hidden, 1, encoder_batches, config.norm, config.dropout_rate
            )
        self.decoder = HiddenStack(
            config.n_latent, config.n_hidden, config.n_layers, n_batch, config.norm
        )
        self.scale = nn.Linear(config.n_hidden, n_genes)
        if config.gene_likelihood == "zinb":
            self.zero_inflation = nn.Linear(config.n_hidden, n_genes)
        shape = (n_genes,) if config.dispersion == "gene" else (n_batch, n_genes)
        self.log_inverse_dispersion = nn.Parameter(torch.randn(shape))
        self.register_buffer("library_prior", library_prior)

    def forward(self, inputs: Inputs, generator: torch.Generator | None = None) -> ScviOutputs:
        """Encode, sample and decode a minibatch; see :meth:`Model.loss` for the generator."""
        config, batch = self.config, inputs.batch
        counts = inputs.counts
        if inputs.present is not None:
            counts = counts.masked_fill(~inputs.present, 0.0)
        features = counts.log1p()

        z_mean, z_variance = self.encoder(features, batch, generator)
        z = sample_normal(z_mean, z_variance, generator)

        library_mean, library_variance = None, None
        if config.library == "latent":
            library_mean, library_variance = self.library_encoder(features, batch, generator)
            log_library = sample_normal(library_mean, library_variance, generator)
        else:
            # An empty cell counts as one of a single count: its log must be finite, and a mean
            # of one count over all genes explains zeros as well as any.
            log_library = counts.sum(dim=-1, keepdim=True).clamp_(min=1.0).log_()

        h = self.decoder(z, batch)
        log_inverse_dispersion: Tensor = self.log_inverse_dispersion
        if config.dispersion == "gene-batch":
            log_inverse_dispersion = F.embedding(batch, log_inverse_dispersion)
        return ScviOutputs(
            z_mean=z_mean,
            z_variance=z_variance,
            z=z,
            library_mean=library_mean,
            library_variance=library_variance,
            log_library=log_library,
            scale_logits=self.scale(h),
            dropout_logits=self.zero_inflation(h) if config.gene_likelihood == "zinb" else None,
            log_inverse_dispersion=log_inverse_dispersion,
        )

    def loss(
        self,
        inputs: Inputs,
        kl_weight: Tensor | float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """Negative evidence lower bound; the warm-up weighs the divergence of z only.

        See :meth:`Model.loss`.
        """
        out = self(inputs, generator)
        arguments = (
            inputs.counts,
            out.scale_logits,
            out.log_library,
            out.log_inverse_dispersion,
        )
        if out.dropout_logits is None:
            reconstruction_loss = nb_loss(*arguments, present=inputs.present)
        else:
            reconstruction_loss = zinb_loss(*arguments, out.dropout_logits, present=inputs.present)

        # KL(N(m, v) || N(0, 1))
        kl_z = 0.5 * (out.z_mean.square() + out.z_variance - 1 - out.z_variance.log()).sum(dim=-1)
        kl = kl_z
        objective = reconstruction_loss + kl_weight * kl_z
        if out.library_mean is not None:
            kl_library = self._library_kl(out, inputs.batch)
            kl = kl_z + kl_library
            objective = objective + kl_library
        return Losses(reconstruction_loss=reconstruction_loss, kl=kl, objective=objective.mean())

    def _library_kl(self, out: ScviOutputs, batch: Tensor) -> Tensor:
        """KL(N(m, v) || N(prior of the batch)): (n_cells,)."""
        assert self.library_prior is not None
        assert out.library_mean is not None
        assert out.library_variance is not None
        mean, variance = F.embedding(batch, self.library_prior).unsqueeze(-1).unbind(dim=1)
        ratio = out.library_variance / variance
        distance = (out.library_mean - mean).square() / variance
        return 0.5 * (ratio + distance - 1 - ratio.log()).squeeze(-1)

    def embed(self, inputs: Inputs) -> Tensor:
        """See :meth:`Model.embed`."""
        counts = inputs.counts
        if inputs.present is not None:
            counts = counts.masked_fill(~inputs.present, 0.0)
        with evaluating(self):
            z_mean, _ = self.encoder(counts.log1p(), inputs.batch)
        embedding: Tensor = z_mean
        return embedding

    def decode(self, z: Tensor, batch: Tensor) -> Tensor:
        """See :meth:`Model.decode`."""
        with evaluating(self):
            return at_least_float32(self.scale(self.decoder(z, batch))).softmax(dim=-1)


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
