"""trVAE and DAVAE mix two simulated batches and keep types apart; measured by scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import entropy
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from atlas.config import Architecture, CvaeConfig, DavaeConfig, TrvaeConfig
from atlas.models import Inputs, build_model

N_CELLS, N_GENES, N_TYPES, K = 1200, 60, 4, 30
STEPS, MINIBATCH = 500, 128


@dataclass(frozen=True)
class Simulated:
    """Cells of four types in two batches, with a factor of each gene between these."""

    counts: npt.NDArray[np.float32]
    batch: npt.NDArray[np.int64]
    types: npt.NDArray[np.int64]

    def mixing(self, z: npt.NDArray[np.floating]) -> tuple[float, float]:
        """Mean entropy of the batches, and share of the own type, among K neighbours."""
        model = NearestNeighbors(n_neighbors=K + 1).fit(z)
        found = model.kneighbors(z, return_distance=False)[:, 1:]
        share = self.batch[found].mean(axis=1)
        purity = (self.types[found] == self.types[:, None]).mean()
        return float(entropy(np.stack([share, 1 - share])).mean()), float(purity)


@pytest.fixture(scope="module")
def cells() -> Simulated:
    rng = np.random.default_rng(0)
    profiles = rng.gamma(0.6, 1.0, (N_TYPES, N_GENES)) + 0.05
    per_batch = np.stack([profiles, profiles * np.exp(rng.normal(0, 0.6, N_GENES))])
    per_batch /= per_batch.sum(axis=-1, keepdims=True)
    types, batch = rng.integers(0, N_TYPES, N_CELLS), rng.integers(0, 2, N_CELLS)
    mean = per_batch[batch, types] * rng.lognormal(6.0, 0.3, (N_CELLS, 1))
    counts = rng.poisson(rng.gamma(3.0, mean / 3.0)).astype(np.float32)
    return Simulated(counts, batch, types)


@pytest.mark.parametrize(
    "config",
    [
        TrvaeConfig(n_hidden=32, n_latent=6),
        TrvaeConfig(n_hidden=32, n_latent=6, mmd_on="z", gene_likelihood="zinb"),
        TrvaeConfig(n_hidden=32, n_latent=6, gene_likelihood="gaussian"),
        CvaeConfig(n_hidden=32, n_latent=6),
        DavaeConfig(n_latent=6),
        DavaeConfig(n_latent=6, norm="layer", encode_batch=True, adversary_ramp=0.0),
    ],
    ids=lambda config: (
        f"{type(config).__name__}-{getattr(config, 'gene_likelihood', config.n_latent)}"
    ),
)
def test_the_loss_falls_and_the_batches_mix(cells: Simulated, config: Architecture) -> None:
    expression = np.log1p(1e4 * cells.counts / cells.counts.sum(axis=1, keepdims=True))
    before, _ = cells.mixing(PCA(6, random_state=0).fit_transform(expression))

    inputs = Inputs(torch.from_numpy(cells.counts), torch.from_numpy(cells.batch))
    model = build_model(config, N_GENES, 2, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, eps=0.01)
    generator = torch.Generator().manual_seed(0)
    losses_of_cells = []
    for step in range(STEPS):
        rows = torch.randperm(N_CELLS, generator=generator)[:MINIBATCH]
        minibatch = Inputs(inputs.counts[rows], inputs.batch[rows])
        losses = model.loss(minibatch, min(1.0, 2 * step / STEPS), generator, step / STEPS)
        optimizer.zero_grad()
        losses.objective.backward()
        optimizer.step()
        losses_of_cells.append(losses.reconstruction_loss.mean().item())
    assert np.mean(losses_of_cells[-20:]) < 0.97 * np.mean(losses_of_cells[:20])
    after, purity = cells.mixing(model.embed(inputs).numpy())
    assert before < 0.3
    assert after > before + 0.25
    assert purity > 0.9
