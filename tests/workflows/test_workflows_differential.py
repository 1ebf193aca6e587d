"""Differential expression from a store: against naive loops over cells, draws and batches."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from anndata import AnnData
from workflows_helpers import Applied, inputs_of

import atlas
from atlas.errors import ConfigError, MissingColumnError, ModelError
from atlas.models import Conditions
from atlas.workflows.differential import replaced


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _all_inputs(model: atlas.TrainedModel, store: atlas.CountStore) -> tuple[np.ndarray, ...]:
    """Posterior of all cells, and their counts with NaN where not measured."""
    mean, variance, counts = [], [], []
    for inputs in inputs_of(model, store):
        m, v = model.module.posterior(inputs)
        mean.append(m.numpy())
        variance.append(v.numpy())
        missing = torch.zeros_like(inputs.counts, dtype=torch.bool)
        if inputs.present is not None:
            missing = ~inputs.present
        counts.append(inputs.counts.masked_fill(missing, float("nan")).numpy())
    return tuple(map(np.concatenate, (mean, variance, counts)))


@pytest.mark.parametrize("batches", [None, ["study_2/batch_1", "study_1/batch_2"]])
def test_vanilla_is_the_integral_of_the_paper(applied: Applied, batches: list[str] | None) -> None:
    """Σ_s p(s) P(ρ(z_a, s) > ρ(z_b, s)), each term from 20,000 pairs of its own."""
    model, store = atlas.load_model(applied.scvi), applied.open()
    found = atlas.differential_expression(
        model,
        store,
        group1="cell_type=type_1",
        group2="cell_type=type_2",
        mode="vanilla",
        batches=batches,
        n_pairs=20_000,
    )
    mean, variance, _ = _all_inputs(model, store)
    labels = store.obs()["cell_type"].astype(str).to_numpy()
    cells = store.obs_codes["batch"]
    share = {name: (cells == i).mean() for i, name in enumerate(store.batches)}
    if batches is not None:
        share = dict.fromkeys(batches, 0.5)
    rng = np.random.default_rng(9)
    p, scale = np.zeros(len(model.genes)), np.zeros(len(model.genes))
    for name, weight in share.items():
        shares = []
        for group in ("type_1", "type_2"):
            rows = rng.choice(np.flatnonzero(labels == group), 20_000)
            z = rng.normal(mean[rows], np.sqrt(variance[rows])).astype(np.float32)
            there = Conditions(torch.full((20_000,), model.batches.index(name)))
            shares.append(model.module.decode(torch.from_numpy(z), there).numpy())
        p += weight * (shares[0] > shares[1]).mean(axis=0)
        scale += weight * shares[0].mean(axis=0)
    found = found.loc[list(model.genes)]
    np.testing.assert_allclose(found["proba_m1"], p, atol=0.02)
    np.testing.assert_allclose(found["scale1"], scale, rtol=0.05)
    assert found["bayes_factor"].max() > 1
    called = found["is_de_fdr_0.05"]
    assert called.any()
    assert not called.all()
    assert (np.sign(found["lfc_median"][called]) == np.sign(found["bayes_factor"][called])).all()


def test_both_of_a_pair_are_decoded_for_a_batch_drawn_by_its_frequency(
    applied: Applied, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    decode, seen, encoded = model.module.decode, [], []
    posterior = model.module.posterior

    def watched(z: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        seen.append(conditions.batch)
        return decode(z, conditions)

    def counting(inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append(inputs)
        return posterior(inputs)

    monkeypatch.setattr(model.module, "decode", watched)
    monkeypatch.setattr(model.module, "posterior", counting)
    atlas.differential_expression(model, store, by="cell_type", mode="vanilla", n_pairs=1000)
    assert len(encoded) == 4  # minibatches of the store, for four comparisons
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(one, other)
    # twice a pair, and pairs twice: for their shares, and for their fold changes
    n = torch.bincount(torch.cat(seen), minlength=len(model.batches)).numpy() / 16
    share = np.bincount(store.obs_codes["batch"], minlength=len(store.batches)) / store.n_obs
    assert np.abs(n - 1000 * share).max() <= 1
    assert share.max() > 2 * share.min()


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_what_was_counted(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    labels = store.obs()["cell_type"].astype(object)
    unlabeled = (labels == "Unknown").to_numpy()
    told = f"{unlabeled.sum()} cells are left out: .*'cell_type', or 'Unknown'"
    with pytest.warns(UserWarning, match=told):
        found = atlas.differential_expression(model, store, by="cell_type", n_pairs=200)
    _, _, counts = _all_inputs(model, store)
    labels = labels.where(~unlabeled)
    groups = sorted(labels.dropna().unique())
    assert found["comparison"].unique().tolist() == [f"{g} vs Rest" for g in groups]
    assert len(found) == len(groups) * len(model.genes)
    totals = np.nansum(counts, axis=1, keepdims=True)
    for group in groups:
        table = found[found["group1"] == group].loc[list(model.genes)]
        sides = (labels == group), (labels != group) & labels.notna()
        for i, mask in enumerate(sides, start=1):
            mine = counts[mask.to_numpy()]
            assert (table[f"n_cells{i}"] == mask.sum()).all()
            np.testing.assert_allclose(table[f"raw_mean{i}"], np.nanmean(mine, 0), rtol=1e-5)
            there = np.where(np.isnan(mine), np.nan, mine > 0)
            np.testing.assert_allclose(
                table[f"non_zeros_proportion{i}"], np.nanmean(there, 0), rtol=1e-5
            )
            scaled = mine * (1e4 / np.maximum(totals[mask.to_numpy()], 1))
            np.testing.assert_allclose(
                table[f"raw_normalized_mean{i}"], np.nanmean(scaled, 0), rtol=1e-4
            )
    assert (found.groupby("group1", sort=False)["proba_de"].diff().dropna() <= 0).any()


def test_cells_without_a_label_are_in_no_group_unless_asked_for(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    texts = store.obs()["cell_type"].astype(str)
    n = {name: int((texts == name).sum()) for name in ("type_1", "Unknown")}
    rest = store.n_obs - sum(n.values())

    def cells(**options: object) -> tuple[float, float]:
        found = atlas.differential_expression(model, store, n_pairs=50, **options)
        assert found["n_cells1"].nunique() == found["n_cells2"].nunique() == 1
        return found["n_cells1"].iloc[0], found["n_cells2"].iloc[0]

    for column in ("cell_type", "label"):  # the codes, too: -1 there, a word here
        with pytest.warns(UserWarning, match=f"^{n['Unknown']} cells are left out"):
            assert cells(group1=f"{column}=type_1") == (n["type_1"], rest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = cells(group1="cell_type=type_1", group2="cell_type=Unknown")
        assert named == (n["type_1"], n["Unknown"])
        assert cells(group1="cell_type=Unknown") == (n["Unknown"], store.n_obs - n["Unknown"])
        everyone = cells(group1="cell_type=type_1", unlabeled="no such word")
        assert everyone == (n["type_1"], store.n_obs - n["type_1"])


def test_cautions(applied: Applied, tmp_path: Path) -> None:
    store = atlas.open_store(shutil.copytree(applied.store, tmp_path / "s.atlas"))
    model = atlas.load_model(applied.scvi)
    index, odd = store.obs([]).index, np.arange(store.n_obs) < 3
    store.annotate(pd.DataFrame({"few": np.where(odd, "some", "many")}, index=index))
    with pytest.warns(UserWarning, match=r"Groups of few cells.*: few=some \(3\)$"):
        atlas.differential_expression(model, store, group1="few=some", n_pairs=50)
    apart = {"group1": "atlas_batch=study_1/batch_1", "group2": "atlas_batch=study_2/batch_2"}
    with pytest.warns(UserWarning, match="No batch has cells of both groups: .*study_2/batch_2. "):
        atlas.differential_expression(model, store, n_pairs=50, **apart)
    with pytest.warns(UserWarning, match="both groups: study_1 vs Rest, study_2 vs Rest. What"):
        atlas.differential_expression(model, store, by="study", n_pairs=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = {"group1": "cell_type=type_1", "group2": "cell_type=type_2"}
        atlas.differential_expression(model, store, n_pairs=50, **shared)


def test_pairwise_rows_and_the_other_way_round(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    options = {"n_pairs": 3000, "rows": "study=study_1"}
    found = atlas.differential_expression(model, store, by="label", pairwise=True, **options)
    names = sorted(set(store.obs()["atlas_label"].iloc[: store.segments[1]].dropna().astype(str)))
    expected = [f"{a} vs {b}" for i, a in enumerate(names) for b in names[i + 1 :]]
    assert found["comparison"].unique().tolist() == expected
    one = atlas.differential_expression(
        model, store, group1=f"label={names[0]}", group2=f"label={names[1]}", **options
    ).loc[list(model.genes)]
    back = atlas.differential_expression(
        model, store, group1=f"label={names[1]}", group2=f"label={names[0]}", seed=1, **options
    ).loc[list(model.genes)]
    assert np.corrcoef(one["lfc_mean"], -back["lfc_mean"])[0, 1] > 0.99
    np.testing.assert_allclose(one["raw_mean1"], back["raw_mean2"])
    # at another column, by a mask, and from the same seed: the same
    mask = store.obs_codes["study"] == 0
    again = atlas.differential_expression(
        model,
        store,
        group1=f"cell_type={names[0]}",
        group2={"cell_type": [names[1]]},
        rows=mask,
        n_pairs=3000,
    ).loc[list(model.genes)]
    pd.testing.assert_frame_equal(
        again.drop(columns=["comparison", "group1", "group2"]),
        one.drop(columns=["comparison", "group1", "group2"]),
    )


def test_halves_of_one_group_differ_in_nothing(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    half = np.where(np.random.default_rng(0).random(store.n_obs) < 0.5, "a", "b")
    store.annotate(pd.DataFrame({"half": half}, index=store.obs([]).index))
    options = {"group1": "half=a", "rows": "cell_type=type_1"}
    change = atlas.differential_expression(model, store, **options)
    assert not change["is_de_fdr_0.05"].any()
    assert change["lfc_median"].abs().max() < 0.25
    vanilla = atlas.differential_expression(model, store, mode="vanilla", **options)
    assert vanilla["bayes_factor"].abs().max() < 1
    types = {"group1": "cell_type=type_1", "group2": "cell_type=type_2"}
    assert atlas.differential_expression(model, store, **types)["is_de_fdr_0.05"].sum() > 10


def test_the_scanvi_form_draws_from_the_prior_of_the_class(applied: Applied) -> None:
    """Shares of z ~ p(z | u, c), u from q(u | z, c) of cells weighted by q(c | x), naively."""
    model, store = atlas.load_model(applied.scanvi), applied.open()
    module, tree = model.module, model.labels
    with torch.no_grad():  # so that what u and the class are tells in the shares
        module.z_decoder.mean.weight *= 5
        module.u_encoder.mean.bias += torch.tensor([2.0, -2.0, 1.0])
    n = 20_000
    names = [c for c in tree.classes if c.startswith("type")][:2]
    found = atlas.differential_expression(
        model,
        store,
        group1=names[0],
        group2=names[1],
        scanvi=True,
        mode="vanilla",
        n_pairs=n,
        batches=[model.batches[0]],
    ).loc[list(model.genes)]
    inputs = list(inputs_of(model, store))
    q = torch.cat([module.log_probabilities(i) for i in inputs]).exp()[:, list(tree.leaves)]
    mean, variance, counts = _all_inputs(model, store)
    shares = []
    for name in names:
        c = tree.classes.index(name)
        rows = torch.multinomial(q[:, c], n, replacement=True, generator=_generator(c)).numpy()
        noise = np.random.default_rng(c).normal(size=(n, 3))
        z = torch.from_numpy((mean[rows] + np.sqrt(variance[rows]) * noise).astype(np.float32))
        classes = torch.full((n,), c)
        u_mean, u_variance = module.u_posterior(z, classes)
        u = u_mean + u_variance.sqrt() * torch.randn(n, 3, generator=_generator(50 + c))
        z = module.sample_class(u, classes, _generator(70 + c))
        shares.append(module.decode(z, Conditions(torch.zeros(n, dtype=torch.int64))).numpy())
        weights = np.where(np.isnan(counts), 0, q[:, [c]].numpy())
        expected = (weights * np.nan_to_num(counts)).sum(0) / weights.sum(0)
        column = f"raw_mean{len(shares)}"
        np.testing.assert_allclose(found[column], expected, rtol=1e-4)
    p = (shares[0] > shares[1]).mean(axis=0)
    np.testing.assert_allclose(found["proba_m1"], p, atol=0.02)
    np.testing.assert_allclose(found["scale2"], shares[1].mean(axis=0), rtol=0.05)
    every = atlas.differential_expression(model, store, scanvi=True, n_pairs=100)
    assert every["group1"].unique().tolist() == list(tree.classes)
    groups = atlas.differential_expression(model, store, group1="odd", scanvi=True, n_pairs=100)
    assert groups["comparison"].unique().tolist() == ["odd vs Rest"]


def test_a_reservoir_holds_cells_by_their_weights() -> None:
    rng = np.random.default_rng(0)
    weights = rng.gamma(0.3, size=30)
    weights[3] = 0
    mass, held = np.zeros(2), np.full(40_000, -1)
    for start, stop in ((0, 7), (7, 8), (8, 8), (8, 30)):
        slots, drawn = replaced(mass, 1, weights[start:stop], len(held), rng)
        held[slots] = start + drawn
    assert mass.tolist() == [0.0, pytest.approx(weights.sum())]
    count = np.bincount(held, minlength=30)
    assert count[3] == 0
    kept = weights > 0
    expected = weights[kept] / weights.sum() * len(held)
    assert scipy.stats.chisquare(count[kept], expected).pvalue > 1e-3


def test_wrong_ways(applied: Applied, tmp_path: Path) -> None:
    model, store = atlas.load_model(applied.scvi), applied.open()
    scanvi = atlas.load_model(applied.scanvi)

    def refused(kind: type[Exception], match: str, model: object = model, **options: object):
        with pytest.raises(kind, match=match):
            atlas.differential_expression(model, store, **options)

    refused(ConfigError, "Groups are given by group1")
    refused(ConfigError, "Groups are given by group1", by="label", group1="label=type_1")
    refused(ConfigError, "The groups overlap\n  found: .* cells in both", group1="label=type_1",
            group2="cell_type=type_1,type_2")  # fmt: skip
    refused(ConfigError, "No cell has this value", group1="cell_type=type_9")
    refused(MissingColumnError, "no such obs column", group1="tissue=lung")
    refused(ConfigError, "no cell in group1", group1="study=study_1", rows="study=study_2")
    refused(ConfigError, "no cell in group2", group1="study=study_1,study_2")
    refused(ConfigError, "not two groups.*\n  found: 1 value", by="study", rows="study=study_1")
    refused(ConfigError, "Pairwise comparisons", group1="label=type_1", pairwise=True)
    store.annotate(pd.DataFrame({"score": [0.5, *range(store.n_obs - 1)]}, store.obs([]).index))
    refused(ConfigError, "'score' holds measurements.*\n  found: 1,300 different", by="score")
    refused(ModelError, "no such batch\n  found: 'b9'", group1="label=type_1", batches=["b9"])
    refused(ConfigError, "mode is not offered", group1="label=type_1", mode="wilcoxon")
    refused(ConfigError, "Mode vanilla.*\n  found: delta=0.25, sides='two'", group1="label=type_1",
            mode="vanilla", delta=0.25, sides="two")  # fmt: skip
    refused(ConfigError, "sides is not offered", group1="label=type_1", sides="one")
    refused(ConfigError, "delta is out of range", group1="label=type_1", delta=-1)
    refused(ConfigError, "n_pairs is out of range", group1="label=type_1", n_pairs=0)
    refused(ConfigError, "fdr is out of range", group1="label=type_1", fdr=5)
    refused(ConfigError, "CSV or TSV", group1="label=type_1", out=tmp_path / "de.xlsx")
    refused(ModelError, "no classes of cells", group1="type_1", scanvi=True)
    refused(ModelError, r"not trained on this label\n  found: 'typ_1'\n  expected: one of .*type_1",
            scanvi, group1="typ_1", scanvi=True)  # fmt: skip
    refused(ConfigError, "overlap.*\n.*type_1 in both", scanvi, group1="type_1",
            group2="type_1,type_2", scanvi=True)  # fmt: skip
    refused(ConfigError, "labels of the model", scanvi, by="cell_type", scanvi=True)
    assert list(tmp_path.iterdir()) == []


def test_covariates_are_drawn_like_the_batch(
    tmp_path: Path, make_study: Callable[..., AnnData]
) -> None:
    """The covariate tells the groups: cells that differ in nothing else are not called."""
    rng = np.random.default_rng(0)
    adata = make_study(n=400, genes=25)
    adata.obs["chemistry"] = rng.choice(["v2", "v3"], 400)
    v3 = (adata.obs["chemistry"] == "v3").to_numpy()
    dense = adata.X.toarray()
    dense[v3, 0] += 30
    adata.X = dense
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(adata, study="one", batch_key="batch")
    options = {"genes": list(store.var.index), "max_epochs": 30, "n_hidden": 16, "n_layers": 1}
    model = atlas.train(
        store,
        out=tmp_path / "run",
        categorical_covariates=["chemistry"],
        encode_covariates=True,
        minibatch_size=32,
        **options,
    )
    found = atlas.differential_expression(model, store, group1="chemistry=v3")
    assert found.loc["gene0", "raw_mean1"] > 20 + found.loc["gene0", "raw_mean2"]
    plain = atlas.train(store, out=tmp_path / "plain", minibatch_size=32, **options)
    seen = atlas.differential_expression(plain, store, group1="chemistry=v3")
    assert abs(found.loc["gene0", "lfc_median"]) < 0.5 * abs(seen.loc["gene0", "lfc_median"])


@pytest.mark.long
def test_interferon_genes_come_out_on_top(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    """Kang's control against stimulated cells; donors are the batches, so that both are in each."""
    store = atlas.create_store(tmp_path / "s.atlas")
    path = real_data("kang_ifnb_pbmc.h5ad")
    store.append(path, study="kang", batch_key="donor", label_key="cell_type")
    wanted = ["ISG15", "IFI6", "IFIT1", "IFIT3", "ISG20", "MX1"]
    # IFI6 and MX1 are not among the genes that vary most within donors
    genes = list(dict.fromkeys([*atlas.select_genes(store, 600), *wanted]))
    model = atlas.train(
        store,
        out=tmp_path / "run",
        genes=genes,
        max_epochs=20,
        n_layers=1,
        lr=3e-3,
        eps=1e-8,
        average_steps=100,
    )
    found = atlas.differential_expression(model, store, group1="batch=stim", group2="batch=ctrl")
    assert found.loc[wanted, "is_de_fdr_0.05"].all()
    assert max(found.index.get_loc(gene) for gene in wanted) < 20
    assert (found.loc[wanted, "lfc_median"] > 1).all()
    vanilla = atlas.differential_expression(
        model, store, group1="batch=stim", group2="batch=ctrl", mode="vanilla"
    )
    assert max(vanilla.index.get_loc(gene) for gene in wanted) < 20
    assert (vanilla.loc[wanted, "bayes_factor"] > 2).all()
    rng = np.random.default_rng(0)
    half = pd.Series(np.where(rng.random(store.n_obs) < 0.5, "a", "b"), store.obs([]).index)
    store.annotate(half.to_frame("half"))
    null = atlas.differential_expression(model, store, group1="half=a", rows="batch=stim")
    assert not null["is_de_fdr_0.05"].any()
