"""What a trained model says of cells, beside scvi-tools with the same weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import atlas
from atlas.evaluation import differential as maths
from atlas.evaluation.differential import GroupCounts

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

GROUPS = ("CD14 Mono", "B")


@dataclass(frozen=True)
class Both:
    """A model there, the same here, and a store of its cells; ``order`` takes rows there."""

    theirs: Any
    ours: atlas.TrainedModel
    store: atlas.CountStore
    order: np.ndarray


@pytest.fixture(scope="module", params=["zinb", "nb, latent library"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    path = Path(__file__).parents[2].parent / "shared" / "data" / "pbmc_4batch_3study.h5ad"
    if not path.is_file():
        pytest.skip(f"real counts are not here: {path}")
    adata = ad.read_h5ad(path)[::12]
    counts = adata.X.toarray()
    adata = adata[:, np.argsort(-counts.var(axis=0))[60:210]].copy()
    adata.X = adata.X.astype(np.float32).toarray()
    options: dict[str, Any] = {}
    if request.param != "zinb":
        options = {"gene_likelihood": "nb", "use_observed_lib_size": False}
    scvi.settings.seed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        model = scvi.model.SCVI(adata, n_latent=4, n_hidden=32, **options)
        model.train(
            max_epochs=40,
            plan_kwargs={"lr": 1e-2, "eps": 1e-8, "n_epochs_kl_warmup": 10},
            enable_progress_bar=False,
            accelerator="cpu",
            logger=False,
        )
    folder = tmp_path_factory.mktemp("both")
    model.save(folder / "theirs")
    names = {name: f"pbmc/{name}" for name in adata.obs["batch"].unique()}
    ours = atlas.import_scvi(folder / "theirs", batches=names)
    store = atlas.create_store(folder / "s.atlas")
    store.append(adata, study="pbmc", batch_key="batch", label_key="cell_type")
    return Both(model, ours, store, store.index_array("input_position"))


def test_shares(both: Both) -> None:
    z = torch.from_numpy(both.theirs.get_latent_representation())
    mapping = both.theirs.adata_manager.get_state_registry("batch").categorical_mapping
    expected = {}
    for code, name in enumerate(mapping):
        batch = torch.full((len(z), 1), code)
        with torch.no_grad():
            px = both.theirs.module.generative(z, torch.zeros(len(z), 1), batch)["px"]
        expected[name] = px.scale.numpy()[both.order]
        found = atlas.normalized(both.ours, both.store, batch=f"pbmc/{name}")
        np.testing.assert_allclose(found.X, expected[name], rtol=1e-3, atol=1e-7)
    share = both.theirs.adata.obs["batch"].value_counts(normalize=True)
    average = sum(share[name] * values for name, values in expected.items())
    found = atlas.normalized(both.ours, both.store, batch="average", library=1e4)
    np.testing.assert_allclose(found.X, 1e4 * average, rtol=1e-3, atol=1e-3)


def _close(ours: list[np.ndarray], theirs: list[np.ndarray], atol: float) -> None:
    """Means over cells agree, up to 5 standard errors of the draws."""
    differences = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    noise = np.sqrt(np.var(ours, axis=0) / len(ours) + np.var(theirs, axis=0) / len(theirs))
    error = np.sqrt(np.square(noise).sum()) / len(differences)
    assert abs(differences.mean()) < 5 * error + atol, (differences.mean(), error)
    assert error < 0.1


def test_bound_and_reconstruction_error(both: Both) -> None:
    seeds = range(12)
    ours = [atlas.likelihood(both.ours, both.store, n_samples=0, seed=s).cells for s in seeds]
    theirs = [both.theirs.get_elbo(return_mean=False).numpy()[both.order] for _ in seeds]
    # their get_elbo is the negative bound; in 1.4 it comes with the sign turned
    theirs = [np.sign(t.mean()) * -t for t in theirs]
    _close([o["elbo"].to_numpy() for o in ours], theirs, 1e-3)
    theirs = [
        both.theirs.get_reconstruction_error(return_mean=False)["reconstruction_loss"]
        for _ in seeds
    ]
    theirs = [np.abs(np.asarray(t))[both.order] for t in theirs]
    _close([o["reconstruction_error"].to_numpy() for o in ours], theirs, 1e-3)


def test_log_likelihood(both: Both) -> None:
    ours = atlas.likelihood(both.ours, both.store, n_samples=200).cells["log_likelihood"]
    scvi.settings.seed = 1
    theirs = both.theirs.get_marginal_ll(
        n_mc_samples=200, n_mc_samples_per_pass=10, return_mean=False
    )
    difference = ours.to_numpy() - theirs.numpy()[both.order]
    error = difference.std() / np.sqrt(len(difference))
    assert abs(difference.mean()) < 4 * error + 0.02
    assert difference.std() < 2.5


def test_change_and_vanilla_of_the_same_shares(both: Both) -> None:
    """Their DifferentialComputation with the shares of our pairs, column by column."""
    computation = pytest.importorskip("scvi.model.base._differential")
    core = pytest.importorskip("scvi.model.base._de_core")
    adata = both.theirs.adata
    rng = np.random.default_rng(0)
    z = torch.from_numpy(both.theirs.get_latent_representation())
    labels = adata.obs["cell_type"].to_numpy()
    masks = [labels == group for group in GROUPS]
    n = 600
    batch = torch.zeros(n, dtype=torch.int64)
    shares = [both.ours.decode(z[rng.choice(np.flatnonzero(m), n)], batch).numpy() for m in masks]
    given = iter([*shares, *shares])
    theirs = computation.DifferentialComputation(
        lambda *_, **__: next(given), None, both.theirs.adata_manager
    )
    options = {"batchid1": ["zheng2017_facs"], "batchid2": ["zheng2017_facs"]}
    change = theirs.get_bayes_factors(*masks, mode="change", delta=0.25, **options)
    vanilla = theirs.get_bayes_factors(*masks, mode="vanilla", **options)

    def pairs():
        yield from ((shares[0][a : a + 128], shares[1][a : a + 128]) for a in range(0, n, 128))

    scales = maths.summarise(pairs)
    means = [adata.X[mask].mean(axis=0) for mask in masks]
    offset = maths.pseudocount_of(scales, *(GroupCounts(1, m, m, m) for m in means))
    found = maths.change(pairs, scales, pseudocount=offset)
    for name, values in change.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-4, atol=2e-5, err_msg=name)
    found_vanilla = maths.vanilla(pairs, scales, pseudocount=offset)
    for name in ("lfc_mean", "lfc_median", "lfc_std", "lfc_min", "lfc_max"):
        assert found_vanilla[name].equals(found[name])
    for name, values in vanilla.items():
        np.testing.assert_allclose(found_vanilla[name], values, rtol=1e-4, err_msg=name)
    called = core._fdr_de_prediction(pd.Series(change["proba_de"]), fdr=0.05)
    assert called.sum() > 5
    assert found["is_de_fdr_0.05"].tolist() == called.tolist()


def test_from_the_cells_on(both: Both) -> None:
    theirs = both.theirs.differential_expression(
        groupby="cell_type",
        group1=[GROUPS[0]],
        group2=GROUPS[1],
        mode="change",
        batch_correction=True,
        n_samples_overall=4000,
        silent=True,
    )
    ours = atlas.differential_expression(
        both.ours,
        both.store,
        group1=f"cell_type={GROUPS[0]}",
        group2=f"cell_type={GROUPS[1]}",
        batches=list(both.ours.batches),  # each equally often, as there
    ).loc[theirs.index]
    for i in (1, 2):
        for name in ("raw_mean", "non_zeros_proportion", "raw_normalized_mean"):
            np.testing.assert_allclose(ours[f"{name}{i}"], theirs[f"{name}{i}"], rtol=1e-4)
        np.testing.assert_allclose(ours[f"scale{i}"], theirs[f"scale{i}"], rtol=0.3)
    assert ours["lfc_median"].corr(theirs["lfc_median"], method="spearman") > 0.99
    assert np.abs(ours["proba_de"] - theirs["proba_de"]).max() < 0.06
