"""Training starts at the mean profile of the cells."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from atlas.config import (
    Architecture,
    CvaeConfig,
    DavaeConfig,
    ScanviConfig,
    ScviConfig,
    TrvaeConfig,
)
from atlas.models import LabelTree, build_model
from atlas.models.base import Conditions
from atlas.models.start import GeneProfile, start_at

N_GENES = 40


def cells(n_cells: int, n_genes: int = N_GENES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Negative binomial counts of unequal cells; shares and inverse dispersions of the genes."""
    random = np.random.default_rng(0)
    share = random.dirichlet(np.full(n_genes, 0.7))
    theta = np.exp(random.uniform(-1, 2, n_genes))
    library = np.exp(random.normal(8, 0.4, n_cells))
    mean = library[:, None] * share
    counts = random.poisson(random.gamma(theta, mean / theta)).astype(np.float32)
    return counts, share, theta


def test_shares_and_dispersions_are_those_of_the_cells() -> None:
    # many genes, as the noise of one is in the size of its cell too
    counts, share, theta = cells(4000, 500)
    study, presence = np.zeros(4000, np.int32), np.ones((1, 500), bool)
    found = GeneProfile.of(sp.csr_matrix(counts), study, presence)
    frequent = share > 0.001
    np.testing.assert_allclose(found.share[frequent], share[frequent], rtol=0.1)
    ratio = found.inverse_dispersion[frequent] / theta[frequent].clip(1, 50)
    assert 0.8 < np.median(ratio) < 1.25
    assert ((ratio > 0.5) & (ratio < 2)).all()
    assert (found.share > 0).all()


def test_genes_count_over_the_cells_that_have_them() -> None:
    counts, *_ = cells(400)
    study = np.repeat(np.array([0, 1], np.int32), 200)
    presence = np.ones((3, N_GENES), bool)
    presence[1, :10] = False
    counts[200:, :10] = 0
    found = GeneProfile.of(sp.csr_matrix(counts), study, presence)
    library = counts.sum(axis=1)
    alone = (counts[:200, :10].sum(axis=0) + 0.5) / library[:200].sum()
    np.testing.assert_allclose(found.share[:10], alone, rtol=1e-6)
    both = (counts[:, 10:].sum(axis=0) + 0.5) / library.sum()
    np.testing.assert_allclose(found.share[10:], both, rtol=1e-6)


def test_empty_cells_and_genes_are_finite() -> None:
    counts = sp.csr_matrix((3, N_GENES), dtype=np.float32)
    found = GeneProfile.of(counts, np.zeros(3, np.int32), np.zeros((1, N_GENES), bool))
    assert np.isfinite(found.share).all()
    assert (found.share > 0).all()
    assert (found.inverse_dispersion == 50.0).all()


COUNT_MODELS: dict[str, Architecture] = {
    "scvi": ScviConfig(n_hidden=16),
    "scvi, batch dispersions": ScviConfig(n_hidden=16, dispersion="gene-batch"),
    "scvi, poisson": ScviConfig(n_hidden=16, gene_likelihood="poisson"),
    "scanvi": ScanviConfig(n_hidden=16),
    "trvae": TrvaeConfig(n_hidden=16),
    "cvae": CvaeConfig(n_hidden=16),
}


@pytest.mark.parametrize("name", COUNT_MODELS)
def test_every_z_is_decoded_to_about_the_profile(name: str) -> None:
    counts, *_ = cells(500)
    profile = GeneProfile.of(
        sp.csr_matrix(counts), np.zeros(500, np.int32), np.ones((1, N_GENES), bool)
    )
    config = COUNT_MODELS[name]
    labels = LabelTree.make(["a", "b"], None, 0) if isinstance(config, ScanviConfig) else None
    model = build_model(config, N_GENES, 2, seed=0, labels=labels)
    conditions = Conditions(torch.tensor([0, 1, 0]))
    z = torch.randn(3, model.n_latent, generator=torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start_at(model, profile)
    wanted = profile.share / profile.share.sum()
    for decoded in model.decode(z, conditions).double().numpy():
        assert np.corrcoef(np.log(decoded), np.log(wanted))[0, 1] > 0.95
    changed = {key for key, value in model.state_dict().items() if not before[key].equal(value)}
    expected = {"scale.bias"} | ({"log_inverse_dispersion"} if "poisson" not in name else set())
    assert {key.removeprefix("scvi.") for key in changed} == expected


@pytest.mark.parametrize(
    "config",
    [DavaeConfig(), TrvaeConfig(n_hidden=16, gene_likelihood="gaussian")],
)
def test_models_of_normalised_expression_are_left_as_they_are(config: Architecture) -> None:
    counts, *_ = cells(50)
    profile = GeneProfile.of(
        sp.csr_matrix(counts), np.zeros(50, np.int32), np.ones((1, N_GENES), bool)
    )
    model = build_model(config, N_GENES, 2, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start_at(model, profile)
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
