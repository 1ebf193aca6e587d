"""DAVAE (Hu, Zhong, Shang: integration by domain-adversarial and variational approximation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import DavaeConfig
from atlas.errors import ConfigError
from atlas.models.base import Conditions, Inputs, Losses, Model, evaluating
from atlas.models.expression import log_normalized, shares
from atlas.models.layers import (
    Encoder,
    GeneLinear,
    TaperedStack,
    kl_normal,
    log_prior_ratio,
    sample_normal,
)
from atlas.models.likelihood import at_least_float32, gaussian_loss

WIDTHS = (128, 64, 32)
"""Of the encoder's hidden layers; the decoder has them in reverse (The non-linear model)."""

HEAD_WIDTH = 16
"""Of the domain classifier's hidden layer (Domain-adversarial regularizer)."""

VARIANCE_SHARE = 0.01
"""Weight of a minibatch in the residual variance, which so is of the last 100 or so."""

VARIANCE_FLOOR = 1e-6
"""The least residual variance, so that expression without any residual can be divided by it."""


@dataclass(frozen=True, slots=True)
class DavaeOutputs:
    """Everything between the counts of a minibatch and their likelihood.

    Attributes
    ----------
    z_mean, z_variance, z
        Posterior of z and the sample of it that was decoded: (n_cells, n_latent).
    observed
        The normalised expression: (n_cells, n_genes).
    expression
        Its mean, f(z, b): (n_cells, n_genes).
    """

    z_mean: Tensor
    z_variance: Tensor
    z: Tensor
    observed: Tensor
    expression: Tensor


class DAVAE(Model):
    r"""A variational autoencoder of expression whose z a classifier shall not tell batches from.

    With x the logarithm of 1 plus the counts per 10,000, q(z | x) normal and b the batch,

    .. math:: x = f(z, b) + E,\quad z \sim N(0, I),\quad E \sim N(0, \sigma^2 I)

    (equations 1 and 2). The domain classifier is trained to tell the batch from z, and the encoder,
    through a layer that reverses the gradient, to prevent it (equations 11 to 15).

    :math:`\sigma^2` is one number for all genes, and where equation 9 is least: the mean squared
    residual over cells *and genes*. Equation 8 lacks that factor 1/p. It is the mean over the
    minibatches seen in training, each a hundredth once a hundred were seen, as BatchNorm keeps
    its variances: a buffer that no gradient reaches. Descending in the other parameters with
    :math:`\sigma^2` at its optimum is to descend in the likelihood maximised over it.

    The paper is followed, not its public code, which multiplies the classifier's loss by the number
    of genes, reconstructs the first dataset only, and shows the encoder the batch by default. The
    paper gives no :math:`\lambda`; see :class:`~atlas.config.DavaeConfig`.

    Parameters
    ----------
    config
        Architecture.
    n_genes, n_batch
        Number of modelled genes and of experimental batches.

    Raises
    ------
    ConfigError
        There is one batch only.
    """

    config: DavaeConfig
    residual_variance: Tensor
    n_minibatches: Tensor

    def __init__(self, config: DavaeConfig, n_genes: int, n_batch: int) -> None:
        super().__init__()
        if n_batch < 2:
            raise ConfigError(
                "DAVAE needs two batches at least",
                found=f"{n_batch} batch",
                do="train cvae or scvi, which may have one, or ingest with another --batch-key",
            )
        self.config = config
        self.n_genes, self.n_batch, self.n_latent = n_genes, n_batch, config.n_latent
        how = (config.norm, config.dropout_rate)
        seen = n_batch if config.encode_batch else 0
        self.encoder = Encoder(TaperedStack(n_genes, WIDTHS, seen, *how), config.n_latent)
        self.decoder = TaperedStack(config.n_latent, WIDTHS[::-1], n_batch, *how)
        self.expression = GeneLinear(WIDTHS[0], n_genes)
        self.domain_classifier = nn.Sequential(
            nn.Linear(config.n_latent, HEAD_WIDTH), nn.ReLU(), nn.Linear(HEAD_WIDTH, n_batch)
        )
        self.variance_is_fixed = False  # surgery leaves the reference's alone
        self.register_buffer("residual_variance", torch.ones(()))
        self.register_buffer("n_minibatches", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Inputs, generator: torch.Generator | None = None) -> DavaeOutputs:
        """Encode, sample and decode a minibatch; see :meth:`Model.loss` for the generator."""
        observed, conditions = log_normalized(inputs), inputs.conditions
        z_mean, z_variance = self.encoder(observed, conditions, generator)
        z = sample_normal(z_mean, z_variance, generator)
        expression = self._decode(z, conditions, generator)
        return DavaeOutputs(z_mean, z_variance, z, observed, expression)

    def _decode(
        self, z: Tensor, conditions: Conditions, generator: torch.Generator | None = None
    ) -> Tensor:
        logits = self.expression(self.decoder(z, conditions, generator))
        return F.softplus(at_least_float32(logits))

    def reconstruction_loss(self, inputs: Inputs, out: DavaeOutputs) -> Tensor:
        """Negative log-likelihood of the normalised expression (equation 7): (n_cells,)."""
        log_variance = self.residual_variance.log()
        return gaussian_loss(out.observed, out.expression, log_variance, inputs.present)

    def loss(
        self,
        inputs: Inputs,
        kl_weight: Tensor | float = 1.0,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> Losses:
        """Negative evidence lower bound, and λ times the classifier's cross-entropy (equation 11).

        λ rises in proportion to ``progress``, over the share ``adversary_ramp`` of the training.
        In training mode the residual variance takes in the minibatch first. See :meth:`Model.loss`.
        """
        out = self(inputs, generator)
        if self.training and not self.variance_is_fixed:
            self._update_variance(inputs, out)
        reconstruction_loss = self.reconstruction_loss(inputs, out)
        kl = kl_normal(out.z_mean, out.z_variance, 0.0, 1.0)

        ramp = self.config.adversary_ramp
        risen = min(1.0, progress / ramp) if ramp > 0 else 1.0
        logits = at_least_float32(self.domain_classifier(reversed_gradient(out.z)))
        penalty = self.config.adversary_weight * risen * F.cross_entropy(logits, inputs.batch)
        return Losses(
            reconstruction_loss=reconstruction_loss,
            kl=kl,
            objective=(reconstruction_loss + kl_weight * kl).mean() + penalty,
            penalty=penalty,
        )

    @torch.no_grad()
    def _update_variance(self, inputs: Inputs, out: DavaeOutputs) -> None:
        """Take in the mean squared residual of a minibatch, where equation 9 is least."""
        squared = (out.observed - out.expression).square()
        if inputs.present is None:
            optimum = squared.mean()
        else:
            n_values = inputs.present.sum().clamp(min=1)
            optimum = squared.masked_fill(~inputs.present, 0.0).sum() / n_values
        self.n_minibatches += 1
        share = (1 / self.n_minibatches).clamp(min=VARIANCE_SHARE)
        self.residual_variance.lerp_(optimum, share).clamp_(min=VARIANCE_FLOOR)

    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`Model.encode`."""
        mean, variance = self.encoder(log_normalized(inputs), inputs.conditions)
        return mean, variance

    def decode(self, z: Tensor, conditions: Conditions) -> Tensor:
        """See :meth:`Model.decode` and :func:`atlas.models.expression.shares`."""
        with evaluating(self):
            return shares(self._decode(z, conditions))

    def log_weight(self, inputs: Inputs, generator: torch.Generator) -> Tensor:
        """See :meth:`Model.log_weight`; of the density of normalised expression."""
        with evaluating(self):
            out = self(inputs, generator)
            ratio = log_prior_ratio(out.z, out.z_mean, out.z_variance)
            return ratio - self.reconstruction_loss(inputs, out)


def reversed_gradient(x: Tensor) -> Tensor:
    """``x`` itself, whose gradient is that of what follows with its sign changed (Ganin 2015)."""
    reversed_: Tensor = _Reversal.apply(x)  # type: ignore[no-untyped-call]
    return reversed_


class _Reversal(torch.autograd.Function):
    """The gradient reversal layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return -grad_output
