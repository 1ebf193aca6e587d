"""Proteins kept in obsm, from a store to the common neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from workflows_helpers import study

import atlas
from atlas.cli import main
from atlas.errors import ConfigError
from atlas.evaluation.proteins import centred_log_ratio
from atlas.workflows.proteins import proteins_of


def make(folder: Path) -> atlas.CountStore:
    """A study with proteins that follow the cell type, one without."""
    store = atlas.create_store(folder / "s.atlas")
    rng = np.random.default_rng(4)
    for name, n, has in (("cite", 300, True), ("rna", 100, False)):
        adata = study(len(name), n, range(60))
        kind = adata.obs["cell_type"].astype("category").cat.codes.to_numpy()
        if has:
            means = rng.gamma(2, 10, (kind.max() + 1, 8))
            adata.obsm["adt"] = rng.poisson(means[kind]).astype(np.int32)
            adata.obsm["normalised"] = rng.standard_normal((n, 3))
        store.append(adata, study=name, batch_key="batch", label_key="cell_type")
    return store


def test_counts_become_log_ratios_in_the_order_of_the_store(tmp_path: Path) -> None:
    store = make(tmp_path)
    proteins = proteins_of(store, "adt")
    assert proteins.dtype == np.float32
    assert proteins.shape == (store.n_obs, 8)
    of_rna = store.obs_codes["study"] == store.studies.index("rna")
    assert np.isnan(proteins[of_rna]).all()
    counts = store.study("cite").table("obsm")["adt"]
    np.testing.assert_array_equal(proteins[~of_rna], centred_log_ratio(counts))
    values = store.study("cite").table("obsm")["normalised"]
    np.testing.assert_allclose(proteins_of(store, "normalised")[~of_rna], values, rtol=1e-6)


def test_measured_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make(tmp_path)
    path = str(tmp_path / "s.atlas")
    rng = np.random.default_rng(0)
    z = rng.standard_normal((store.n_obs, 3)).astype(np.float32)
    store.write_embedding("noise", z, {})
    store.write_embedding("types", z + 9 * store.obs_codes["label"][:, None], {})
    metrics = atlas.evaluate(store, embedding="types", protein="adt")
    assert metrics["protein_overlap_k100"].n == 300
    assert metrics["protein_fold_enrichment_k100"].value > 1.3
    assert main(["evaluate", path, "--embedding", "types", "--protein", "adt"]) == 0
    assert "Common neighbours with proteins" in capsys.readouterr().out
    compared = atlas.compare(store, ["types", "noise"], protein="adt")
    found = {d.name: d.favours for d in compared.differences}
    assert found["protein_spearman_k100"] == "types"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    store = make(tmp_path)
    with pytest.raises(ConfigError, match=r"in obsm\n.*prot\n.*adt, normalised"):
        proteins_of(store, "prot")
    other = study(9, 50, range(60))
    other.obsm["adt"] = np.ones((50, 5))
    store.append(other, study="other", batch_key="batch", label_key="cell_type")
    with pytest.raises(ConfigError, match=r"different proteins\n.*cite: 8, other: 5"):
        proteins_of(store, "adt")
