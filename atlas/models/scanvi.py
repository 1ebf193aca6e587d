"""scANVI (Xu et al. 2021, Molecular Systems Biology 17): scVI with classes of cells above z.

``c`` is the class of a cell and ``u`` what varies within the class; z is drawn from both, and the
counts from z as in scVI. q(z, c, u | x) = q(z | x) q(c | z) q(u | z, c).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from atlas.config import ScanviConfig
from atlas.errors import ConfigError
from atlas.models.base import (
    Conditions,
    CountParameters,
    CovariateSizes,
    Inputs,
    Losses,
    Model,
    evaluating,
)
from atlas.models.classifier import TreeClassifier
from atlas.models.labels import LabelTree
from atlas.models.layers import (
    NO_COVARIATES,
    Encoder,
    HiddenStack,
    kl_normal,
    log_normal,
    log_prior_ratio,
    sample_normal,
)
from atlas.models.scvi import SCVI, ScviOutputs


@dataclass(frozen=True, slots=True)
class ClassTerms:
    """Terms of the bound for each class that a cell could be of, each (n_cells, n_classes).

    Attributes
    ----------
    log_q
        log q(c | z).
    z_divergence
        log q(z | x) - log p(z | u, c), at the draws of z and u.
    u_divergence
        KL(q(u | z, c) || p(u)).
    """

    log_q: Tensor
    z_divergence: Tensor
    u_divergence: Tensor


class SCANVI(Model):
    """scANVI with labels at any level of a tree.

    A cell's label restricts the classes that it can be of: to one, where it is a leaf of the tree;
    to those below, where it is a group; not at all, where the cell has none. With S the classes
    left and q_S(c) the classifier's q(c | z) renormalised over them, the bound of a cell is

    E[log p(x | z, l)] - KL(l) - Σ_{c ∈ S} q_S(c) [log q(z | x) - log p(z | u, c)
    + KL(q(u | z, c) || p(u)) + log q_S(c) - log p(c)]

    which is the paper's ℒ where S is one class, and 𝒰 where it is all (Supplementary Note 6).
    p(c) is uniform (Online Methods).

    Parameters
    ----------
    config
        Architecture.
    n_genes, n_batch, library_prior, covariates
        See :class:`~atlas.models.SCVI`.
    labels
        The tree of labels; a code of it for each cell is in ``Inputs.label``.

    Raises
    ------
    ConfigError
        There are fewer than two classes.
    """

    takes_sparse = True

    config: ScanviConfig
    below: Tensor

    def __init__(
        self,
        config: ScanviConfig,
        n_genes: int,
        n_batch: int,
        labels: LabelTree | None,
        library_prior: Tensor | None = None,
        covariates: CovariateSizes = NO_COVARIATES,
    ) -> None:
        super().__init__()
        n_classes = 0 if labels is None else len(labels.leaves)
        if labels is None or n_classes < 2:
            raise ConfigError(
                "scANVI needs two classes of cells at least",
                found="no labels" if labels is None else f"one class, {labels.classes[0]!r}",
                do="give labels of two types, or --unobserved-classes for types without a label",
            )
        self.config = config
        self.labels = labels
        self.n_genes, self.n_batch, self.n_latent = n_genes, n_batch, config.n_latent
        self.n_classes = n_classes
        self.scvi = SCVI(config, n_genes, n_batch, library_prior, covariates)
        shape = (config.n_latent, config.n_hidden, config.n_layers, n_classes, config.norm)
        self.u_encoder = Encoder(HiddenStack(*shape, config.dropout_rate), config.n_latent)
        self.z_decoder = Encoder(HiddenStack(*shape), config.n_latent)
        self.classifier = TreeClassifier(labels, config)
        # Alternating training has an optimiser of its own for them (atlas.training.alternation).
        self.classifier.requires_grad_(config.training != "alternating")
        # Row -1, of cells without a label, allows all classes.
        allowed = torch.tensor(labels.below)
        every = torch.ones(1, n_classes, dtype=torch.bool)
        self.register_buffer("below", torch.cat([allowed, every]), persistent=False)

    def loss(
        self,
        inputs: Inputs,
        kl_weight: Tensor | float = 1.0,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> Losses:
        """Negative bound and, with joint training, the cross-entropy of the labelled cells.

        The warm-up weighs all divergences but that of the library; in scvi-tools' form it leaves
        that of z alone and weighs that of the library, as its ``SCANVAE.loss`` does.
        Without labels no cell has one. The classifier drops nothing here, only in a turn of its own
        (:mod:`atlas.training.alternation`). See :meth:`Model.loss`.
        """
        none = torch.full_like(inputs.batch, -1)
        known = none if inputs.label is None else inputs.label
        out: ScviOutputs = self.scvi(inputs, generator)
        terms = self.class_terms(out, generator)
        reconstruction_loss = self.scvi.reconstruction_loss(inputs, out.decoded, out.log_library)
        kl_library: Tensor | float = 0.0
        if out.library_mean is not None:
            kl_library = self.scvi.library_kl(out, inputs.batch)

        theirs = self.config.training == "scvi-tools"
        log_share = self._restrict(terms.log_q, none if theirs else known)
        share = log_share.exp()
        kl_z = (share * terms.z_divergence).sum(dim=-1)
        kl_u = (share * terms.u_divergence).sum(dim=-1)
        kl_c = (share * log_share).sum(dim=-1) + math.log(self.n_classes)
        if theirs:
            objective = reconstruction_loss + kl_z + kl_weight * (kl_u + kl_c + kl_library)
        else:
            objective = reconstruction_loss + kl_weight * (kl_z + kl_u + kl_c) + kl_library
        objective = objective.mean()
        penalty = None
        if self.config.training != "alternating":
            z = out.z_mean if theirs else out.z
            penalty = self.config.classification_weight * self.cross_entropy(z, known)
            objective = objective + penalty
        return Losses(
            reconstruction_loss=reconstruction_loss,
            kl=kl_z + kl_u + kl_c + kl_library,
            objective=objective,
            penalty=penalty,
        )

    def class_terms(self, out: ScviOutputs, generator: torch.Generator | None) -> ClassTerms:
        """The terms of the bound for each class, whatever the cells' labels."""
        z = out.z
        n_cells, n_classes = len(z), self.n_classes
        # One row for each cell and class; the first layers add the class's weights to these.
        rows = z.repeat_interleave(n_classes, dim=0)
        classes = Conditions(torch.arange(n_classes, device=z.device).repeat(n_cells))
        u_mean, u_variance = self.u_encoder(rows, classes, generator)
        u = sample_normal(u_mean, u_variance, generator)
        z_mean, z_variance = self.z_decoder(u, classes, generator)
        shape = (n_cells, n_classes)
        log_prior = log_normal(rows, z_mean, z_variance).view(shape)
        log_posterior = log_normal(z, out.z_mean, out.z_variance).unsqueeze(-1)
        return ClassTerms(
            log_q=self.classifier.log_classes(z),
            z_divergence=log_posterior - log_prior,
            u_divergence=kl_normal(u_mean, u_variance, 0.0, 1.0).view(shape),
        )

    def _restrict(self, log_q: Tensor, label: Tensor) -> Tensor:
        """``log q_S(c)``: a very low number, whose exponential is 0, for the classes not in S."""
        # The lowest finite number instead of -inf: 0 times it is 0.
        lowest = torch.finfo(log_q.dtype).min
        return log_q.masked_fill(~self.below[label], lowest).log_softmax(dim=-1)

    def cross_entropy(self, z: Tensor, label: Tensor) -> Tensor:
        """``-log q(label | z)``, mean over the labelled cells; 0 where there are none: a scalar."""
        labelled = label >= 0
        log_q: Tensor = self.classifier(z)
        log_q = log_q.gather(-1, label.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -(log_q * labelled).sum() / labelled.sum().clamp(min=1)

    def log_probabilities(self, inputs: Inputs) -> Tensor:
        """Log-probability of each node of the tree at the posterior mean of z.

        In evaluation mode, without gradient. Probabilities of siblings sum to that of their parent,
        and those of the roots to 1 (Supplementary Note 5).

        Returns
        -------
        float32, (n_cells, n_nodes), in the order of ``labels.names``.
        """
        z, _ = self.posterior(inputs)
        with evaluating(self):
            log_q: Tensor = self.classifier(z)
        return log_q

    def sample_class(self, u: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        """z drawn from p(z | u, c), in evaluation mode, without gradient.

        Parameters
        ----------
        u
            (n_cells, n_latent).
        classes
            Numbers of classes, in the order of ``labels.leaves``: int64, (n_cells,).
        """
        with evaluating(self):
            mean, variance = self.z_decoder(u, Conditions(classes))
            return sample_normal(mean, variance, generator)

    def u_posterior(self, z: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(u | z, c), in evaluation mode, without gradient."""
        with evaluating(self):
            mean, variance = self.u_encoder(z, Conditions(classes))
            return mean, variance

    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :meth:`Model.encode`."""
        return self.scvi.encode(inputs)

    def decode(self, z: Tensor, conditions: Conditions) -> Tensor:
        """See :meth:`Model.decode`."""
        return self.scvi.decode(z, conditions)

    def count_parameters(self, z: Tensor, inputs: Inputs) -> CountParameters:
        """See :meth:`Model.count_parameters`."""
        return self.scvi.count_parameters(z, inputs)

    def log_weight(self, inputs: Inputs, generator: torch.Generator) -> Tensor:
        """See :meth:`Model.log_weight`; of the counts alone, whatever the label.

        p(z) is a sum over all classes, each with a draw of u from q(u | z, c).
        """
        with evaluating(self):
            out: ScviOutputs = self.scvi(inputs, generator)
            z, n_cells = out.z, len(out.z)
            rows = z.repeat_interleave(self.n_classes, dim=0)
            classes = Conditions(torch.arange(self.n_classes, device=z.device).repeat(n_cells))
            mean, variance = self.u_encoder(rows, classes)
            u = sample_normal(mean, variance, generator)
            log_joint = log_normal(rows, *self.z_decoder(u, classes)) + log_prior_ratio(
                u, mean, variance
            )
            log_prior = log_joint.view(n_cells, -1).logsumexp(dim=-1) - math.log(self.n_classes)
            return (
                log_prior
                - log_normal(z, out.z_mean, out.z_variance)
                - self.scvi.reconstruction_loss(inputs, out.decoded, out.log_library)
                + self.scvi.library_log_weight(out, inputs.batch)
            )
