"""The genes of a model in a store that need not have all of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Self

import numpy as np

from atlas.errors import ModelError
from atlas.ingest.orthologs import Orthologs, another_species
from atlas.models import TrainedModel
from atlas.store import CountStore, CountView, FilesSource

FEW_GENES = 0.8
"""Share of the model's genes below which a study is warned of."""

TOO_FEW_GENES = 0.5
"""Share below which it is refused."""


@dataclass(frozen=True, slots=True)
class GenesInStore:
    """Where the genes of a model are in a store.

    Attributes
    ----------
    names
        The store's name of each gene of the model, found by its accession, else by its name; the
        model's own where the store has no such gene.
    absent
        Those of ``names`` that the store does not have.
    orthologs
        The store's gene and the model's gene that it is taken for; empty within one species.
    """

    names: tuple[str, ...]
    absent: frozenset[str]
    orthologs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, model: TrainedModel, store: CountStore | FilesSource) -> Self:
        """Look the genes up: as they are, or as orthologs where a surgery recorded some.

        A store is of the species by whose names most genes are found in it.
        """
        ways = [cls._directly(model, store)]
        ways += [
            cls._by_partners(model, store, dict(one.orthologs))
            for one in model.surgery
            if one.orthologs
        ]
        return min(ways, key=lambda way: len(way.absent))

    @classmethod
    def of_orthologs(
        cls, model: TrainedModel, store: CountStore | FilesSource, table: Orthologs
    ) -> Self:
        """Look the genes up in a store of another species, by a table alone.

        A gene of the model's own name in the store is another species' gene, and is not taken.
        """
        names, ids = store.gene_table.names, store.gene_table.ids
        partners, _ = table.renamed(names, ids)
        pairs = zip(names, partners, strict=True)
        return cls._by_partners(model, store, {own: it for own, it in pairs if it is not None})

    @classmethod
    def _by_partners(
        cls, model: TrainedModel, store: CountStore | FilesSource, partner_of: Mapping[str, str]
    ) -> Self:
        there = set(store.gene_table.names)
        own = {partner: name for name, partner in partner_of.items() if name in there}
        ids = model.gene_ids or (None,) * len(model.genes)
        found = [
            own.get(gene_id or gene, own.get(gene))
            for gene, gene_id in zip(model.genes, ids, strict=True)
        ]
        # a name that no gene of the store has: columns without counts have names too
        names = [
            name if name is not None else f"{gene} of the model"
            for gene, name in zip(model.genes, found, strict=True)
        ]
        absent = frozenset(name for name, one in zip(names, found, strict=True) if one is None)
        used = tuple(
            (name, gene) for name, gene in zip(found, model.genes, strict=True) if name is not None
        )
        return cls(tuple(names), absent, used)

    @classmethod
    def _directly(cls, model: TrainedModel, store: CountStore | FilesSource) -> Self:
        table = store.gene_table
        there = set(table.names)
        by_id = {i: name for i, name in zip(table.ids, table.names, strict=True) if i is not None}
        ids = model.gene_ids or (None,) * len(model.genes)
        names: list[str] = []
        taken: set[str] = set()
        for gene, gene_id in zip(model.genes, ids, strict=True):
            name = gene if gene_id is None else by_id.get(gene_id, gene)
            names.append(gene if name in taken else name)
            taken.add(names[-1])
        absent = frozenset(name for name in names if name not in there)
        return cls(tuple(names), absent)

    def select(self, store: CountStore | FilesSource) -> CountView | FilesSource:
        """The store's rows over the model's genes; columns without counts for the absent."""
        if isinstance(store, CountStore):
            return store.select(self.names, absent=self.absent)
        return store.select(self.names)

    def missing(self, model: TrainedModel, store: CountStore | FilesSource) -> ModelError:
        """The error where all genes are needed."""
        some = ", ".join(sorted(self.absent)[:5])
        return ModelError(
            "The model was trained on genes that the store does not have",
            found=f"{len(self.absent)} of {len(model.genes)} missing, e.g. {some}",
            expected="a store with all genes of the model",
            do="add the store's studies to the model with `atlas extend`, which needs half of them",
            path=store.path,
        )


def check_overlap(
    model: TrainedModel,
    shares: dict[str, float],
    store: CountStore,
    orthologs: str | PathLike[str] | None,
    force: bool,
) -> None:
    """Warn of, or refuse, studies that lack genes of the model.

    ``force`` is for too few of them: genes of another species are refused all the same, and so is
    a study that has none.
    """
    n_genes = len(model.genes)
    if orthologs is None and not GenesInStore.of(model, store).orthologs:
        for name in shares:  # by no table, neither given now nor kept with the model
            _check_species(model, store, name)
    said = {name: f"{name} has {share:.0%} of {n_genes:,}" for name, share in shares.items()}
    kind = (
        "ingest it with gene names or accessions of the reference's kind; of another species, with "
        "a table of orthologs (--orthologs TABLE)"
    )
    if none := [said[n] for n, share in shares.items() if not share]:
        raise ModelError(
            "A study has none of the model's genes",
            found="; ".join(none),
            expected=f"{TOO_FEW_GENES:.0%} at least, and some with force (--force)",
            do=kind,
            path=store.path,
        )
    if not force and (few := [said[n] for n, share in shares.items() if share < TOO_FEW_GENES]):
        raise ModelError(
            "A study has too few of the model's genes",
            found="; ".join(few),
            expected=f"{TOO_FEW_GENES:.0%} at least",
            do=f"{kind}; or add it all the same with force (--force)",
            path=store.path,
        )
    if some := [said[n] for n, share in shares.items() if share < FEW_GENES]:
        warnings.warn(
            f"Genes of the model are missing: {'; '.join(some)}", UserWarning, stacklevel=3
        )


def _check_species(model: TrainedModel, store: CountStore, study: str) -> None:
    """Refuse genes that look like another species'."""
    measured = store.presence()[store.studies.index(study)]
    table = store.gene_table
    own = [table.names[i] for i in np.flatnonzero(measured)]
    ids = [table.ids[i] for i in np.flatnonzero(measured)]
    told = another_species((own, ids), (model.genes, model.gene_ids or ()))
    if told is not None:
        raise ModelError(
            f"The genes of {study} look like those of another species than the model's",
            found=told,
            expected="genes of the model, or a table of orthologs",
            do="give the table with --orthologs TABLE: query gene and reference gene, two columns; "
            "force (--force) is for too few genes of the same species",
            path=store.path,
        )
