"""Labels of a scANVI in a store: against its posterior, added up by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from workflows_helpers import Applied, inputs_of

import atlas
from atlas.errors import ConfigError, MissingColumnError, ModelError


@pytest.fixture(scope="module")
def posterior(applied: Applied) -> pd.DataFrame:
    """Probability of each node, from the module itself, in the order of the store."""
    model, store = atlas.load_model(applied.scanvi), applied.open()
    log_p = [model.module.log_probabilities(i) for i in inputs_of(model, store)]
    return pd.DataFrame(torch.cat(log_p).exp().numpy(), columns=list(model.labels.names))


def test_columns_are_the_posterior(applied: Applied, posterior: pd.DataFrame) -> None:
    model, store = atlas.load_model(applied.scanvi), applied.open()
    before = store.number
    made = atlas.label(model, store, name="pred")
    obs = store.obs()
    classes = list(model.labels.classes)
    assert "unobserved 1" in classes
    leaves = posterior[classes]
    entropy = scipy.stats.entropy(leaves.to_numpy(np.float64), axis=1)
    np.testing.assert_allclose(obs["pred_entropy"], entropy, atol=1e-5)
    # the groups of the first level, with the class that has none: their leaves added up
    groups = {"unobserved 1": leaves["unobserved 1"]}
    members = {"unobserved 1": ["unobserved 1"]}
    for root in ("even", "odd"):
        below = model.labels.below[model.labels.names.index(root)]
        members[root] = leaves.columns[below].tolist()
        groups[root] = leaves[members[root]].sum(axis=1)
    coarse = pd.DataFrame(groups)
    agreed = coarse.max(axis=1) - coarse.apply(lambda row: row.nlargest(2).iloc[1], axis=1) > 1e-5
    given = obs["pred_level_0"].astype(str)
    assert given[agreed.to_numpy()].tolist() == coarse.idxmax(axis=1)[agreed].tolist()
    np.testing.assert_allclose(obs["pred_level_0_probability"], coarse.max(axis=1), atol=1e-5)
    best = [row[members[g]].idxmax() for g, (_, row) in zip(given, leaves.iterrows(), strict=True)]
    assert obs["pred"].astype(str).tolist() == best
    at = leaves.to_numpy()[np.arange(len(best)), leaves.columns.get_indexer(best)]
    np.testing.assert_allclose(obs["pred_probability"], at, rtol=1e-5)
    assert obs["pred_level_1"].astype(str).tolist() == obs["pred"].astype(str).tolist()
    assert obs["pred_level_1_probability"].tolist() == obs["pred_probability"].tolist()
    assert made.counts == {c: int((obs["pred"] == c).sum()) for c in classes}
    assert sum(made.counts.values()) == store.n_obs
    assert "pred" not in atlas.open_store(applied.store, number=before).obs().columns
    found = atlas.label_probabilities(model, store)
    np.testing.assert_allclose(found, posterior[found.columns], rtol=1e-4, atol=1e-7)


def test_levels_agree_where_the_most_probable_class_is_of_another_group(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scanvi), applied.open()
    shares = {"odd": 0.5, "even": 0.4, "unobserved 1": 0.1}  # of the roots, then within them
    shares |= {"type_1": 0.4, "type_3": 0.6, "type_2": 0.05, "type_4": 0.95}
    tree = model.labels
    with torch.no_grad():
        for level, logits in enumerate(model.module.classifier.logits):
            logits.weight.zero_()
            of_level = [n for i, n in enumerate(tree.names) if tree.depths[i] == level]
            logits.bias.copy_(torch.tensor([shares[name] for name in of_level]).log())
    found = atlas.label_probabilities(model, store)
    assert (found[list(tree.classes)].idxmax(axis=1) == "type_4").all()  # .38, of even
    table = atlas.label(model, store, name=None).table
    given = ["scanvi", "scanvi_level_0", "scanvi_level_1"]
    assert table[given].drop_duplicates().to_numpy().tolist() == [["type_3", "odd", "type_3"]]
    p = table[[f"{column}_probability" for column in given]]
    np.testing.assert_allclose(p, np.tile([0.3, 0.5, 0.3], (store.n_obs, 1)), rtol=1e-5)


def test_rows_that_are_not_chosen_keep_what_they_had(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scanvi), applied.open()
    made = atlas.label(model, store, name="some", rows="study=study_2")
    start, stop = store.segments[1:]
    obs = store.obs()
    assert len(made.table) == stop - start
    assert obs["some"].iloc[:start].isna().all()
    assert obs["some"].iloc[start:].notna().all()
    whole = atlas.label(model, store, name=None)
    np.testing.assert_array_equal(
        obs["some_probability"].iloc[start:], whole.table["scanvi_probability"].iloc[start:]
    )
    atlas.label(model, store, name="some", rows="study=study_1")
    assert store.obs()["some"].notna().all()
    mask = np.arange(store.n_obs) % 7 == 0
    assert len(atlas.label(model, store, name=None, rows=mask).table) == mask.sum()


def test_wrong_ways(applied: Applied) -> None:
    model, store = atlas.load_model(applied.scanvi), applied.open()
    number = store.number
    with pytest.raises(ModelError, match=r"no classes of cells\n  found: a scvi model"):
        atlas.label(atlas.load_model(applied.scvi), store)
    with pytest.raises(ConfigError, match="obs column 'cell_type' already"):
        atlas.label(model, store, name="cell_type")
    with pytest.raises(ConfigError, match="label column cannot have this name"):
        atlas.label(model, store, name="a b")
    with pytest.raises(ConfigError, match="No cell has this value"):
        atlas.label(model, store, rows="study=study_9")
    with pytest.raises(MissingColumnError, match="no such obs column"):
        atlas.label(model, store, rows="tissue=lung")
    with pytest.raises(ConfigError, match="No cell is chosen"):
        atlas.label(model, store, rows=np.zeros(store.n_obs, bool))
    with pytest.raises(ConfigError, match="mask does not fit the store"):
        atlas.label(model, store, rows=np.zeros(3, bool))
    assert applied.open().number == number
