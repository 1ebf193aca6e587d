"""Dense values of cells: against the module's own, and what is on disk afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
import zarr
from anndata import AnnData
from workflows_helpers import Applied, another, inputs_of

import atlas
from atlas.config import DavaeConfig
from atlas.errors import ConfigError, ModelError, OutputError
from atlas.workflows import dense


def test_shares_of_any_batch_and_their_average(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    inputs = list(inputs_of(model, store))
    z = torch.cat([model.embed(i) for i in inputs])
    own = torch.cat([i.batch for i in inputs])
    found = atlas.normalized(model, store)
    assert found.obs_names.tolist() == store.obs([]).index.tolist()
    assert found.var_names.tolist() == list(model.genes)
    np.testing.assert_allclose(found.X, model.decode(z, own), rtol=1e-4)
    total = np.zeros(found.shape)
    shares = np.bincount(store.obs_codes["batch"]) / store.n_obs
    assert shares.min() < 0.9 * shares.max()
    for name, share in zip(store.batches, shares, strict=True):
        there = torch.full((store.n_obs,), model.batches.index(name))
        expected = model.decode(z, there).numpy()
        total += share * expected
        one = atlas.normalized(model, store, batch=name, library=1e4, genes=["gene7", "gene3"])
        np.testing.assert_allclose(one.X, 1e4 * expected[:, [7, 3]], rtol=1e-4)
    average = atlas.normalized(model, store, batch="average")
    np.testing.assert_allclose(average.X, total, rtol=1e-4)
    np.testing.assert_allclose(average.X.sum(axis=1), 1, rtol=1e-5)
    # of some cells the same, though the frequencies are of all
    some = atlas.normalized(model, store, batch="average", rows="study=study_2")
    np.testing.assert_array_equal(some.X, average.X[store.segments[1] :])


def test_draws_average_to_the_integral(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    mask = np.zeros(store.n_obs, bool)
    mask[[3, 650, 1000]] = True
    found = atlas.normalized(model, store, rows=mask, n_samples=1500, batch=model.batches[0])
    z = atlas.latent_posterior(model, store, rows=mask)
    rng = np.random.default_rng(1)
    draws = rng.normal(z.mean, np.sqrt(z.variance), (1500, *z.mean.shape)).astype(np.float32)
    zeros = torch.zeros(4500, dtype=torch.int64)
    shares = model.decode(torch.from_numpy(draws.reshape(4500, -1)), zeros).numpy()
    shares = shares.reshape(1500, 3, -1)
    error = shares.std(axis=0) / np.sqrt(750)
    assert (np.abs(found.X - shares.mean(axis=0)) < 5 * error + 1e-7).all()


@pytest.mark.parametrize("chunk", [(1024, 1024), (100, 7)])
def test_the_file_is_what_is_returned(
    applied: Applied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: tuple[int, int]
) -> None:
    monkeypatch.setattr(dense, "CHUNK", chunk)
    model, store = atlas.load_model(applied.scvi), applied.open()
    out = atlas.normalized(model, store, batch="average", out=tmp_path / "rho.zarr")
    array = zarr.open_array(out / "X", mode="r")
    assert array.dtype == np.float32
    assert array.chunks == (min(1300, chunk[0]), min(60, chunk[1]))
    expected = atlas.normalized(model, store, batch="average")
    found = anndata.read_zarr(out)
    np.testing.assert_array_equal(found.X, expected.X)
    assert found.obs["cell_type"].astype(str).tolist() == expected.obs["cell_type"].tolist()
    assert found.uns["atlas"]["batch"] == "average"
    assert found.var_names.tolist() == list(model.genes)
    lazy = anndata.experimental.read_lazy(out)
    np.testing.assert_array_equal(lazy.X[5:9].compute(), expected.X[5:9])
    assert [p.name for p in tmp_path.iterdir()] == ["rho.zarr"]
    with pytest.raises(OutputError, match="something here already"):
        atlas.normalized(model, store, out=out)


def test_a_failure_on_the_way_leaves_nothing(
    applied: Applied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    decode, calls = model.module.decode, []

    def failing(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return decode(*arguments)

    monkeypatch.setattr(dense, "CHUNK", (64, 64))
    monkeypatch.setattr(model.module, "decode", failing)
    with pytest.raises(OutputError, match=r"could not be written\n  found: .*No space left"):
        atlas.normalized(model, store, out=tmp_path / "rho.zarr")
    assert list(tmp_path.iterdir()) == []


def test_expected_counts_also_of_genes_not_measured(applied: Applied) -> None:
    """μ_g = library · ρ_g / Σ_present ρ, with ρ of the public decoder."""
    model, store = atlas.load_model(applied.scvi), applied.open()
    found = atlas.impute(model, store, n_samples=0)
    start = 0
    for inputs in inputs_of(model, store):
        stop = start + len(inputs.counts)
        rho = model.decode(model.embed(inputs), inputs.batch).double()
        there = torch.ones_like(rho, dtype=torch.bool) if inputs.present is None else inputs.present
        library = inputs.counts.double().sum(dim=1, keepdim=True)
        expected = library * rho / (rho * there).sum(dim=1, keepdim=True)
        np.testing.assert_allclose(found.X[start:stop], expected.numpy(), rtol=2e-4)
        start = stop
    assert (found.X[store.segments[1] :, 48:] > 0).all()
    inflated = atlas.impute(model, store, n_samples=0, zero_inflation=True)
    dropout = atlas.dropout_probability(model, store)
    np.testing.assert_allclose(inflated.X, found.X * (1 - dropout.X), rtol=1e-4)
    assert dropout.X.min() > 0
    assert dropout.X.max() < 1


def test_predictive_counts_have_the_mean_and_zeros_of_the_model(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    draws = np.stack([atlas.posterior_predictive(model, store, seed=i).X for i in range(12)])
    assert (draws == draws.round()).all()
    assert (draws >= 0).all()
    expected = atlas.impute(model, store, n_samples=50, zero_inflation=True).X
    error = draws.std(axis=(0, 1)) / np.sqrt(12 * 1300)
    assert (np.abs(draws.mean(axis=(0, 1)) - expected.mean(axis=0)) < 5 * error).all()
    zeros = []
    for inputs in list(inputs_of(model, store)):
        if inputs.present is None:
            p = model.module.count_parameters(model.embed(inputs), inputs)
            theta, mu = p.inverse_dispersion, p.mean
            zeros.append((p.dropout + (1 - p.dropout) * (theta / (theta + mu)) ** theta).detach())
    found = (draws[:, : store.segments[1]] == 0).mean(axis=(0, 1))
    # these at the mean of z, the counts at draws of it
    assert np.abs(found - torch.cat(zeros).mean(dim=0).numpy()).max() < 0.05
    again = atlas.posterior_predictive(model, store, seed=3)
    np.testing.assert_array_equal(again.X, draws[3])


def test_wrong_ways(applied: Applied, tmp_path: Path) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    out = tmp_path / "o.zarr"
    with pytest.raises(ModelError, match=r"no such batch\n  found: 'batch_1'\n.*study_1/batch_1"):
        atlas.normalized(model, store, batch="batch_1", out=out)
    with pytest.raises(ModelError, match=r"no such genes\n  found: CD3E"):
        atlas.normalized(model, store, genes=["gene1", "CD3E"], out=out)
    with pytest.raises(ConfigError, match="given twice"):
        atlas.impute(model, store, genes=["gene1", "gene1"], out=out)
    with pytest.raises(ConfigError, match="library is out of range"):
        atlas.normalized(model, store, library=0, out=out)
    with pytest.raises(ConfigError, match="n_samples is out of range"):
        atlas.impute(model, store, n_samples=-1, out=out)
    with pytest.raises(ConfigError, match="AnnData in Zarr, a folder"):
        atlas.normalized(model, store, out=tmp_path / "o.h5ad")
    other = another(model, DavaeConfig())
    for function in (atlas.impute, atlas.posterior_predictive, atlas.dropout_probability):
        with pytest.raises(ModelError, match="no distribution of counts"):
            function(other, store, out=out)
    assert atlas.normalized(other, store).shape == (1300, 60)
    plain = atlas.train(
        store, out=tmp_path / "nb", genes=list(model.genes), max_epochs=1, gene_likelihood="nb"
    )
    with pytest.raises(ModelError, match=r"no zero inflation\n  found: a nb model"):
        atlas.dropout_probability(plain, store, out=out)
    assert [p.name for p in tmp_path.iterdir()] == ["nb"]


def test_a_batch_that_only_the_decoder_sees_must_be_known(applied: Applied, tmp_path: Path) -> None:
    """An encoder without the batch takes cells of new ones; the decoder cannot, as their own."""
    store = applied.open()
    one = atlas.create_store(tmp_path / "one.atlas")
    cells = atlas.to_anndata(store, rows=np.arange(300))
    one.append(AnnData(cells.X, obs=cells.obs[["cell_type"]], var=cells.var[[]]), study="new")
    model = atlas.train(
        store,
        out=tmp_path / "run",
        genes=list(store.var.index),
        max_epochs=1,
        encode_batch=False,
    )
    assert atlas.embed(model, one, name=None).shape == (300, 10)
    for function in (atlas.normalized, atlas.impute, atlas.likelihood):
        with pytest.raises(ModelError, match="batches that the model was not trained on"):
            function(model, one)
    there = atlas.normalized(model, one, batch="study_1/batch_1")
    assert there.shape == (300, 60)
    # beside studies that it knows: the advice names them, and works
    both = atlas.open_store(shutil.copytree(applied.store, tmp_path / "both.atlas"))
    both.append(AnnData(cells.X, obs=cells.obs[["cell_type"]], var=cells.var[[]]), study="new")
    with pytest.raises(ModelError, match="atlas_study=study_1,study_2\n") as refused:
        atlas.normalized(model, both)
    rows = str(refused.value.do).partition("--rows ")[2]
    assert atlas.normalized(model, both, rows=rows).shape == (1300, 60)
    with pytest.raises(ModelError, match="no frequencies"):
        atlas.normalized(model, one, batch="average")


def test_files_as_they_are_give_the_same(applied: Applied, tmp_path: Path) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    cells = atlas.to_anndata(store, rows=np.arange(store.segments[1]))
    cells = AnnData(cells.X, obs=cells.obs[["cell_type", "batch"]], var=cells.var[[]])
    cells.write_h5ad(tmp_path / "study_1.h5ad")
    files = atlas.open_files([tmp_path / "study_1.h5ad"], batch_key="batch")
    expected = atlas.normalized(model, store, rows="study=study_1")
    found = atlas.normalized(model, files)
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-5)
    table = atlas.differential_expression(model, files, group1="cell_type=type_1", n_pairs=500)
    assert table["raw_mean1"].notna().all()
