"""Some of a model's conditions, and where a model's tables have their rows.

A study is mapped as if those that were mapped before were not there: only conditions that the model
had before any surgery take part, and later ones that the study's own cells have. So what a study
gets does not depend on which others came first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atlas.config import Architecture
from atlas.models.base import CovariateSizes, Model
from atlas.models.build import build_model
from atlas.models.labels import LabelTree
from atlas.models.layers import NO_COVARIATES

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Table:
    """What the rows of a table of weights are: a row for each condition of a kind.

    Attributes
    ----------
    kind
        Batches, categories of a covariate, classes (leaves of the tree of labels), or nodes of a
        level of that tree.
    number
        Of the covariate or level; 0 for the other two.
    """

    kind: Literal["batch", "category", "class", "level"]
    number: int = 0

    @classmethod
    def named(cls, name: str) -> Table:
        """The table that a tensor of a model's state is, given that it is one."""
        if ".category_weights." in f".{name}":
            return cls("category", int(name.rsplit(".", 1)[-1]))
        if name.startswith("classifier."):
            return cls("level", int(name.split(".")[2]))
        return cls("class" if name.startswith(("u_encoder.", "z_decoder.")) else "batch")


@dataclass(frozen=True, slots=True)
class Part:
    """Conditions of a model that take part, by their numbers in it, ascending: int64.

    Attributes
    ----------
    batches
        Batches.
    categories
        Categories of each categorical covariate.
    nodes
        Nodes of the tree of labels; with a node all above it.
    labels
        That tree, whole; None for a model without.
    """

    batches: Numbers
    categories: tuple[Numbers, ...]
    nodes: Numbers
    labels: LabelTree | None

    @property
    def tree(self) -> LabelTree | None:
        """The tree of the nodes that take part."""
        if self.labels is None:
            return None
        number = {-1: -1} | {int(node): i for i, node in enumerate(self.nodes)}
        names, parents = self.labels.names, self.labels.parents
        return LabelTree(
            tuple(names[i] for i in self.nodes), tuple(number[parents[i]] for i in self.nodes)
        )

    def rows(self, table: Table) -> Numbers:
        """Which rows of a table are of conditions that take part."""
        if table.kind == "batch":
            return self.batches
        if table.kind == "category":
            return self.categories[table.number]
        assert self.labels is not None
        if table.kind == "class":
            among = np.array(self.labels.leaves)
        else:
            among = np.flatnonzero(np.array(self.labels.depths) == table.number)
        return np.flatnonzero(np.isin(among, self.nodes))


def renumbered(codes: npt.NDArray[np.int32], own: Numbers, n: int) -> npt.NDArray[np.int32]:
    """Codes of conditions by their numbers in a part, and after it for those that a model lacks.

    Parameters
    ----------
    codes
        Of conditions of the model, from 0 to below ``n``, and new ones from ``n`` on; negative
        ones stay.
    own, n
        Numbers of those that take part, and how many the model has. Others become 0.
    """
    out = np.where(codes >= n, codes - n + len(own), np.minimum(codes, 0))
    known = (codes >= 0) & (codes < n)
    place = np.zeros(n, np.int32)
    place[own] = np.arange(len(own))
    out[known] = place[codes[known]]
    return out.astype(np.int32)


@dataclass(frozen=True)
class Growth:
    """What a reference grows by.

    Attributes
    ----------
    batches
        New batches.
    categories
        New categories of each categorical covariate.
    labels
        New labels, which become classes at the root; for a model with labels only.
    library_prior
        Mean and variance of the log library size in each new batch, (n_new_batches, 2); for, and
        only for, a latent library.
    """

    batches: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...] = ()
    labels: tuple[str, ...] = ()
    library_prior: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    """The model that grows.

    Attributes
    ----------
    module
        The trained model.
    n_batch, covariates, labels
        Its conditions.
    """

    module: Model
    n_batch: int
    covariates: CovariateSizes
    labels: LabelTree | None


def part_of(reference: Reference, part: Part) -> Reference:
    """The reference with some of its conditions alone: of a table, their rows."""
    n_categories = tuple(map(len, part.categories))
    covariates = CovariateSizes(n_categories, reference.covariates.n_continuous)
    smaller = Reference(reference.module, len(part.batches), covariates, part.tree)
    if smaller == reference:
        return reference
    config, whole = reference.module.config, reference.module.state_dict()
    prior = None
    if getattr(config, "library", None) == "latent":
        prior = _library_prior(reference.module)[torch.from_numpy(part.batches)]
    module = build_model(
        config,
        reference.module.n_genes,
        smaller.n_batch,
        0,
        prior,
        smaller.covariates,
        smaller.labels,
    )
    state = {}
    for name, value in module.state_dict().items():
        state[name] = whole[name]
        if whole[name].shape != value.shape:
            state[name] = whole[name][torch.from_numpy(part.rows(Table.named(name)))]
    module.load_state_dict(state)
    return dataclasses.replace(smaller, module=module.eval())


def put_back(extended: Model, reference: Reference, part: Part, growth: Growth) -> Model:
    """A part of a reference that grew, as the reference with what grew.

    Parameters
    ----------
    extended
        What came of :func:`part_of` and :func:`merged`.
    reference, part
        The whole reference, and which part of it that was.
    growth
        What it grew by.
    """
    plain = build_grown(reference, growth, reference.module.config)
    whole, found = reference.module.state_dict(), extended.state_dict()
    state = {}
    for name, value in plain.state_dict().items():
        state[name] = found[name]
        if found[name].shape != value.shape:
            rows = torch.from_numpy(part.rows(Table.named(name)))
            table = torch.cat([whole[name], found[name][len(rows) :]])
            table[rows] = found[name][: len(rows)]
            state[name] = table
    plain.load_state_dict(state)
    return plain.eval()


def build_grown(reference: Reference, growth: Growth, config: Architecture) -> Model:
    """A model of the size of the reference and what it grows by, with any weights."""
    own = reference.covariates
    added = growth.categories or ((),) * len(own.n_categories)
    covariates = NO_COVARIATES
    if own != NO_COVARIATES:
        sizes = tuple(n + len(new) for n, new in zip(own.n_categories, added, strict=True))
        covariates = CovariateSizes(sizes, own.n_continuous)
    prior = None
    if growth.library_prior is not None:
        trained = _library_prior(reference.module)
        prior = torch.cat([trained, growth.library_prior.to(trained)])
    n_batch = reference.n_batch + len(growth.batches)
    labels = None if reference.labels is None else reference.labels.with_roots(growth.labels)
    return build_model(config, reference.module.n_genes, n_batch, 0, prior, covariates, labels)


def _library_prior(module: Model) -> Tensor:
    return next(value for name, value in module.named_buffers() if name.endswith("library_prior"))
