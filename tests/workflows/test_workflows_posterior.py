"""Latent variables and likelihoods of cells: against exact integrals and scipy's distributions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from anndata import AnnData
from workflows_helpers import Applied, another, inputs_of

import atlas
from atlas.config import Architecture, CvaeConfig, DavaeConfig, ScviConfig, TrvaeConfig
from atlas.errors import ConfigError, ModelError, OutputError
from atlas.models import TrainedModel, build_model
from atlas.workflows.streaming import CellStream


@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson"])
def test_importance_weights_converge_to_the_integral_over_z(
    tmp_path: Path, gene_likelihood: str
) -> None:
    """One latent dimension, five genes: ∫ p(x | z) N(z) dz on a grid, p(x | z) from scipy."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1, 4, (40, 5))).astype(np.float32)
    adata = AnnData(counts)
    adata.obs_names, adata.var_names = [f"c{i}" for i in range(40)], [f"g{i}" for i in range(5)]
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(adata, study="one")
    config = ScviConfig(n_latent=1, n_hidden=8, n_layers=1, gene_likelihood=gene_likelihood)
    module = build_model(config, 5, 1, seed=3)
    model = TrainedModel(module, tuple(adata.var_names), ("one",), ("one",), np.ones((1, 5), bool))
    found = atlas.likelihood(model, store, n_samples=3000)

    grid = np.linspace(-9, 9, 3001)
    prior = scipy.stats.norm.logpdf(grid)
    (inputs,) = inputs_of(model, store)
    expected = []
    for row in range(40):
        x = inputs.counts[row].numpy()
        z = torch.from_numpy(grid[:, None].astype(np.float32))
        many = type(inputs)(inputs.counts[row].expand(len(grid), -1), inputs.batch[:1].expand(3001))
        p = module.count_parameters(z, many)
        mu = p.mean.double().numpy()
        if p.inverse_dispersion is None:
            log_p = scipy.stats.poisson.logpmf(x, mu)
        else:
            theta = p.inverse_dispersion.double().detach().numpy()
            log_p = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mu))
        if p.dropout is not None:
            pi = p.dropout.double().numpy()
            log_p = np.log(pi * (x == 0) + (1 - pi) * np.exp(log_p))
        expected.append(np.logaddexp.reduce(log_p.sum(axis=1) + prior) + np.log(grid[1] - grid[0]))
    error = found.cells["log_likelihood"].to_numpy() - expected
    assert np.abs(error).max() < 0.2
    assert abs(error.mean()) < 0.02
    few = atlas.likelihood(model, store, n_samples=1, seed=1)
    assert few.mean["log_likelihood"] < found.mean["log_likelihood"] - 0.01
    assert found.mean["elbo"] < found.mean["log_likelihood"]


def test_means_are_over_cells_not_over_minibatches(applied: Applied, tmp_path: Path) -> None:
    """Minibatches of 512 and 188 cells of one study, 512 and 88 of the other."""
    model, store = atlas.load_model(applied.scvi), applied.open()
    found = atlas.likelihood(model, store, n_samples=3, out=tmp_path / "cells.tsv")
    assert found.cells.index.tolist() == store.obs([]).index.tolist()
    table = pd.read_csv(tmp_path / "cells.tsv", sep="\t", index_col="cell")
    for name, value in found.mean.items():
        assert value == pytest.approx(table[name].sum() / 1300, rel=1e-9)
        error = table[name].std() / np.sqrt(1300)
        assert found.standard_error[name] == pytest.approx(error, rel=1e-9)
    # a selection, by itself, says what the whole says of it, but for the draws
    some = atlas.likelihood(model, store, n_samples=3, rows="study=study_2")
    mine = found.cells.iloc[store.segments[1] :]
    assert some.cells.index.equals(mine.index)
    for name in mine:
        assert abs(some.mean[name] - mine[name].mean()) < 0.5
    bounds = atlas.likelihood(model, store, n_samples=0)
    assert list(bounds.cells) == ["reconstruction_error", "elbo"]


@pytest.mark.parametrize("which", ["scvi", "scanvi"])
def test_bounds_lie_in_order(applied: Applied, which: str) -> None:
    model, store = atlas.load_model(getattr(applied, which)), applied.open()
    found = atlas.likelihood(model, store, n_samples=30).mean
    assert -found["reconstruction_error"] > found["elbo"]
    assert found["elbo"] < found["log_likelihood"]
    less = atlas.likelihood(model, store, n_samples=2).mean
    assert found["elbo"] < less["log_likelihood"] < found["log_likelihood"]


def test_latent_mean_variance_and_samples(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scanvi), applied.open()
    found = atlas.latent_posterior(model, store, n_samples=300, rows="study=study_2")
    z = atlas.embed(model, store, name=None)
    assert found.rows.tolist() == list(range(*store.segments[1:]))
    np.testing.assert_array_equal(found.mean, z[found.rows])
    scores = (found.samples - found.mean) / np.sqrt(found.variance)
    assert scipy.stats.kstest(scores[:, :40].ravel(), "norm").pvalue > 1e-3
    again = atlas.latent_posterior(model, store, n_samples=300, rows="study=study_2")
    np.testing.assert_array_equal(again.samples, found.samples)


def test_library_observed_and_latent(applied: Applied, tmp_path: Path) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    found = atlas.library_posterior(model, store)
    totals = np.asarray(atlas.to_anndata(store).X.sum(axis=1)).ravel()
    np.testing.assert_allclose(found["mean"], np.log(np.maximum(totals, 1)), rtol=1e-5)
    assert (found["variance"] == 0).all()
    assert found.index.equals(store.obs([]).index)
    latent = atlas.train(
        store,
        out=tmp_path / "run",
        genes=list(model.genes),
        max_epochs=16,
        library="latent",
        lr=1e-2,
        minibatch_size=64,
    )
    found = atlas.library_posterior(latent, store)
    expected = [torch.cat(latent.module.library_posterior(i), 1) for i in inputs_of(latent, store)]
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), rtol=1e-4)
    assert (found["variance"] > 0).all()
    assert np.corrcoef(found["mean"], np.log(totals))[0, 1] > 0.5


@pytest.mark.parametrize(
    "config",
    [
        TrvaeConfig(n_hidden=16),
        CvaeConfig(n_hidden=16, gene_likelihood="zinb"),
        TrvaeConfig(n_hidden=16, gene_likelihood="gaussian"),
        DavaeConfig(),
    ],
    ids=["trvae", "cvae", "trvae of expression", "davae"],
)
def test_every_model_can_be_applied(applied: Applied, config: Architecture) -> None:
    store = applied.open()
    model = another(atlas.load_model(applied.scvi), config)
    found = atlas.likelihood(model, store, n_samples=5)
    assert np.isfinite(found.cells).all(axis=None)
    table = atlas.differential_expression(model, store, group1="cell_type=type_1", n_pairs=600)
    assert np.isfinite(table[["lfc_mean", "lfc_std", "bayes_factor"]]).all(axis=None)
    shares = atlas.normalized(model, store, batch="average").X
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-4)
    # like to like: a state of the generator for each, and nothing kept from one to the next
    again = atlas.likelihood(model, store, n_samples=5)
    pd.testing.assert_frame_equal(again.cells, found.cells)


def test_outputs_are_tried_before_cells_are_read(
    applied: Applied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    monkeypatch.setattr(CellStream, "__iter__", lambda _: pytest.fail("cells were read"))
    (tmp_path / "o.csv").mkdir()
    for out, found in ((tmp_path / "no" / "o.csv", "no folder"), (tmp_path / "o.csv", "a folder")):
        with pytest.raises(OutputError, match=f"cannot be written\n  found: {found}"):
            atlas.likelihood(model, store, n_samples=0, out=out)
        with pytest.raises(OutputError, match=f"cannot be written\n  found: {found}"):
            atlas.differential_expression(model, store, by="cell_type", out=out)
    with pytest.raises(OutputError, match="cannot be written\n  found: no folder"):
        atlas.normalized(model, store, out=tmp_path / "no" / "such" / "n.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["o.csv"]


def test_wrong_ways(applied: Applied, tmp_path: Path) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    with pytest.raises(ConfigError, match="n_samples is out of range"):
        atlas.likelihood(model, store, n_samples=-1)
    with pytest.raises(ConfigError, match=r"CSV or TSV\n  found: o\.xlsx"):
        atlas.likelihood(model, store, out=tmp_path / "o.xlsx")
    with pytest.raises(ModelError, match="no library size"):
        atlas.library_posterior(another(model, CvaeConfig()), store)
    with pytest.raises(ConfigError, match="No cell has this value"):
        atlas.latent_posterior(model, store, rows="study=study_9")
    assert list(tmp_path.iterdir()) == []
