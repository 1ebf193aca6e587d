"""What the tests of this folder share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import atlas
from atlas.config import Architecture
from atlas.models import Inputs, build_model
from atlas.workflows.streaming import CellStream


@dataclass(frozen=True)
class Applied:
    """A store of two studies, the second without a fifth of the genes, and models of it."""

    store: Path
    scvi: Path
    scanvi: Path

    def open(self) -> atlas.CountStore:
        """The store as it is now."""
        return atlas.open_store(self.store)


def another(model: atlas.TrainedModel, config: Architecture) -> atlas.TrainedModel:
    """A model of another kind with initial weights, of the same genes and batches."""
    module = build_model(config, len(model.genes), len(model.batches), seed=0)
    return dataclasses.replace(model, module=module.eval(), labels=None)


def inputs_of(
    model: atlas.TrainedModel, store: atlas.CountStore, **options: object
) -> Iterator[Inputs]:
    """The inputs of each study's cells, without padding."""
    for cells in CellStream(model, store, device="cpu", **options):
        n = cells.n_cells
        values = {
            field.name: getattr(cells.inputs, field.name)
            for field in dataclasses.fields(cells.inputs)
        }
        yield Inputs(**{k: None if v is None else v[:n] for k, v in values.items()})
