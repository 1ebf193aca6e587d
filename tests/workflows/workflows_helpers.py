"""What the tests of this folder share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

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


def study(seed: int, n: int, genes: range) -> AnnData:
    """Cells of four types, each six times higher in ten genes of its own, in two batches."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])
    batch = (rng.random(n) < 0.2).astype(int)
    base = np.random.default_rng(0).gamma(1.0, size=60)
    rate = base * np.where(np.arange(60) // 10 == kind[:, None], 6, 1)
    rate *= np.where(np.arange(60) % 7 == 3 * batch[:, None], 2, 1)
    rate *= rng.lognormal(4, 0.3, (n, 1)) / rate.sum(axis=1, keepdims=True) * 4
    counts = rng.poisson(rate * rng.gamma(2, 0.5, rate.shape))
    label = np.array([f"type_{i + 1}" for i in range(4)], object)[kind]
    label[rng.random(n) < 0.1] = "Unknown"
    obs = pd.DataFrame(
        {"cell_type": label, "batch": [f"batch_{i + 1}" for i in batch]},
        index=[f"c{seed}_{i}" for i in range(n)],
    )
    var = pd.DataFrame(index=[f"gene{i}" for i in range(60)])
    return AnnData(counts.astype(np.float32), obs=obs, var=var)[:, list(genes)].copy()
