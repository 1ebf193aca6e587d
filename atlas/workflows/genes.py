"""The genes of a model in a store that need not have all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from atlas.errors import ModelError
from atlas.models import TrainedModel
from atlas.store import CountStore, CountView, FilesSource


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
    """

    names: tuple[str, ...]
    absent: frozenset[str]

    @classmethod
    def of(cls, model: TrainedModel, store: CountStore | FilesSource) -> Self:
        """Look the genes up."""
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
