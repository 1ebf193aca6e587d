"""What the tests of this folder share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import atlas
from atlas.models import Conditions, Inputs, Losses, Model
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


class Gaussian(Model):
    """A model of normalised expression, as far as applying it goes."""

    def __init__(self, n_genes: int, n_batch: int) -> None:
        super().__init__()
        self.n_genes, self.n_batch, self.n_latent = n_genes, n_batch, 2
        self.encoder = torch.nn.Linear(n_genes, 2)
        self.decoder = torch.nn.Linear(2, n_genes)

    def loss(self, inputs: Inputs, *_: object, **__: object) -> Losses:
        raise NotImplementedError

    def posterior(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean = self.encoder(inputs.measured.log1p())
        return mean, torch.ones_like(mean)

    def decode(self, z: Tensor, conditions: Conditions) -> Tensor:
        with torch.no_grad():
            return self.decoder(z).softmax(dim=-1)

    def log_weight(self, inputs: Inputs, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


def gaussian(model: atlas.TrainedModel) -> atlas.TrainedModel:
    """The same genes and batches with a model that is not one of counts."""
    module = Gaussian(len(model.genes), len(model.batches))
    module.config = model.config
    return dataclasses.replace(model, module=module)


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
