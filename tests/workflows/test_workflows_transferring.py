"""Transferred labels in a store: columns, levels that agree, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from workflows_helpers import study

import atlas
from atlas.cli import main
from atlas.errors import ConfigError, MissingColumnError, StoreError
from atlas.evaluation.calibration import leave_out
from atlas.evaluation.codes import Categories
from atlas.evaluation.knn_labels import KnnLabels
from atlas.models import LabelTree

PARENTS = {"type_1": "odd", "type_3": "odd", "type_2": "even", "type_4": "even"}
KEYS = {"batch_key": "batch", "label_key": "cell_type"}
ASKED = {"embedding": "z", "reference": "study=a,b", "query": "study=c"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three studies with an embedding; the third has a type of its own, type_4 of the first too."""
    path = tmp_path_factory.mktemp("transfer") / "s.atlas"
    store = atlas.create_store(path)
    for i, name in enumerate("abc"):
        cells = study(i + 1, 300, range(60))
        label = cells.obs["cell_type"].to_numpy(object)
        if name == "b":
            label[label == "type_4"] = "type_1"
        cells.obs["fine"] = np.where((label == "type_1") & (name == "b"), "odd", label)
        if name == "c":
            label[label == "type_2"] = "type_5"
        cells.obs["cell_type"] = label
        store.append(cells, study=name, **KEYS)
    rng = np.random.default_rng(0)
    names = [*store.labels, "Unknown"]
    centres = rng.normal(0, 1.2, (len(names), 4))
    z = centres[store.obs_codes["label"]] + rng.normal(size=(store.n_obs, 4))
    store.write_embedding("z", z.astype(np.float32), {})
    return path


def test_columns_are_what_the_reference_says(path: Path) -> None:
    store = atlas.open_store(path)
    before = store.obs()
    made = atlas.transfer_labels(
        store, **ASKED, name="carried", k=20, false_unknown=0.1, sets=0.8, seed=3
    )
    obs = store.obs()
    query = (obs["atlas_study"] == "c").to_numpy()
    labels = np.array([*store.labels, ""], object)[store.obs_codes["label"]]
    voting = ~query & (labels != "")
    tree = LabelTree.make(sorted(set(labels[voting])))
    nodes, z = tree.codes(labels[voting]).astype(np.int64), store.embedding("z")
    answer = KnnLabels(z[voting], nodes, tree, k=20, seed=3).ask(z[query])
    studies = Categories(store.obs_codes["study"][voting], store.studies)
    left_out = leave_out(z[voting], nodes, studies, tree, k=20, seed=3)
    rule = left_out.unknown_rule(0.1)
    unknown = rule.applies(answer.uncertainty, answer.distance)
    expected = np.where(unknown, "Unknown", np.array(tree.names, object)[answer.label])
    assert obs["carried"][query].tolist() == expected.tolist()
    assert 0 < unknown.sum() < len(unknown)
    np.testing.assert_array_equal(obs["carried_uncertainty"][query], answer.uncertainty)
    np.testing.assert_array_equal(obs["carried_distance"][query], answer.distance)
    inside = left_out.set_rule(0.8, False).sets(answer, tree)
    for text, row in zip(obs["carried_set"][query], inside, strict=True):
        assert text.split("; ") == [
            name for name, held in zip(tree.names, row, strict=True) if held
        ]
    assert obs.loc[~query, list(made.table.columns)].isna().all(axis=None)
    pd.testing.assert_frame_equal(obs[before.columns], before)
    assert list(made.table.index) == list(obs.index[query])
    assert sum(made.counts.values()) == query.sum()
    assert made.counts["Unknown"] == unknown.sum()
    assert made.rule == rule
    assert [fold.name for fold in made.folds] == ["a", "b"]
    assert made.folds[0].n_unseen == (labels[obs["atlas_study"] == "a"] == "type_4").sum()
    assert made.n_reference == voting.sum()


def test_figures_of_the_query_and_their_json(path: Path) -> None:
    store = atlas.open_store(path)
    made = atlas.transfer_labels(store, **ASKED, name=None, k=20, sets=0.9)
    assert store.number == atlas.open_store(path).number
    obs = store.obs()
    query = (obs["atlas_study"] == "c").to_numpy()
    own = obs["cell_type"][query].astype(str).to_numpy()
    given = made.table["transferred"].astype(str).to_numpy()
    labelled, lost = own != "Unknown", own == "type_5"
    score = made.score
    assert score.unseen_labels == ("type_5",)
    assert (score.n_known, score.n_unseen) == ((labelled & ~lost).sum(), lost.sum())
    known = labelled & ~lost
    assert score.accuracy.accuracy == pytest.approx((given == own)[known].mean())
    assert score.unseen_unknown == pytest.approx((given == "Unknown")[lost].mean())
    table = pd.crosstab(own[labelled], given[labelled])
    counts = pd.DataFrame(score.confusion.counts, score.confusion.truth, score.confusion.predicted)
    np.testing.assert_array_equal(counts.loc[table.index, table.columns], table)
    u = made.table["transferred_uncertainty"].to_numpy()
    assert score.uncertainty_unseen == pytest.approx(u[lost].mean())
    inside = [
        own in text.split("; ")
        for own, text in zip(own, made.table["transferred_set"], strict=True)
    ]
    assert score.covered == pytest.approx(np.array(inside)[known].mean())
    assert made.rule.uncertainty_above == 0.5
    assert made.counts["Unknown"] == (u > 0.5).sum()
    stored = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert stored["schema"] == "atlas.label_transfer"
    assert stored["unknown_above"] == {"uncertainty": 0.5, "distance": None}
    assert stored["score"]["confusion"]["counts"] == score.confusion.counts.tolist()
    assert stored["folds"][1]["name"] == "b"


def test_levels_agree_and_groups_of_the_reference_vote(path: Path) -> None:
    store = atlas.open_store(path)
    options: dict[str, Any] = {**ASKED, "k": 30, "label_key": "fine"}
    parents = {**PARENTS, "type_5": "even", "type_9": "nowhere", "nowhere": "even"}
    made = atlas.transfer_labels(store, **options, name="deep", hierarchy=parents)
    obs = store.obs()[(store.obs()["atlas_study"] == "c").to_numpy()]
    levels = obs[["deep_level_0", "deep_level_1"]].astype(str)
    assert (obs["deep"].astype(str) == levels["deep_level_1"]).all()
    assert set(made.table["deep_level_0"].cat.categories) == {"even", "odd", "Unknown"}
    assert "type_9" not in made.table["deep"].cat.categories
    sure = levels["deep_level_1"] != "Unknown"
    assert (
        levels["deep_level_1"][sure].map(PARENTS).tolist() == levels["deep_level_0"][sure].tolist()
    )
    assert 0 < sure.sum() < (levels["deep_level_0"] != "Unknown").sum()
    u = obs[["deep_level_0_uncertainty", "deep_level_1_uncertainty"]].to_numpy()
    assert (u[:, 0] <= u[:, 1] + 1e-12).all()
    own = obs["fine"].astype(str)
    right = (levels["deep_level_0"] == own.map(PARENTS))[own != "Unknown"]
    assert made.score.levels[0].accuracy == pytest.approx(right.mean())
    flat = atlas.transfer_labels(store, **options, name=None)
    assert "odd" in flat.table["transferred"].cat.categories
    assert flat.score.levels == ()


def test_cells_that_are_not_asked_keep_what_they_had(path: Path) -> None:
    store = atlas.open_store(path)
    atlas.transfer_labels(store, **{**ASKED, "query": "study=c"}, name="kept", k=10)
    first = store.obs()["kept"].copy()
    mask = np.zeros(store.n_obs, bool)
    mask[store.segments[2] :: 2] = True
    atlas.transfer_labels(store, **{**ASKED, "query": mask}, name="kept", k=60)
    second = store.obs()["kept"]
    assert second[~mask].equals(first[~mask])
    assert not second[mask].equals(first[mask])
    every = atlas.transfer_labels(store, embedding="z", reference="study=a", name=None, k=10)
    assert len(every.table) == store.n_obs - store.segments[1]


def test_batches_can_be_left_out_and_types_of_few_cells_are_told(path: Path) -> None:
    store = atlas.open_store(path)
    one = {"embedding": "z", "reference": "study=a", "query": "study=c", "name": None, "k": 20}
    with pytest.raises(ConfigError, match="one study only"):
        atlas.transfer_labels(store, **one, sets=0.9)
    made = atlas.transfer_labels(store, **one, sets=0.9, calibrate_by="batch", per_label=True)
    assert [fold.name for fold in made.folds] == ["batch_1", "batch_2"]
    assert made.few_cells == {}
    wide = atlas.transfer_labels(store, **{**one, "k": 100})
    n = int((store.obs()["cell_type"][: store.segments[1]] == "type_4").sum())
    assert wide.few_cells == {"type_4": n}
    assert "type_4" not in wide.counts or wide.counts["type_4"] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query": "study=b,c"}, ConfigError, r"share cells\n  found: 300 cells in both"),
        ({"reference": "study=d"}, ConfigError, "No cell has this value"),
        ({"reference": "cell_type=Unknown"}, ConfigError, "reference has no labelled cell"),
        ({"k": 10_000}, ConfigError, r"k does not fit the reference\n  found: k = 10000, and"),
        ({"k": 0}, ConfigError, "k does not fit"),
        ({"sets": 1.0}, ConfigError, r"sets is out of range\n  found: 1.0"),
        ({"false_unknown": 0}, ConfigError, "false_unknown is out of range"),
        ({"name": "lane"}, ConfigError, "obs column 'cell_type' already"),
        ({"embedding": "pca"}, StoreError, "no such embedding"),
        ({"label_key": "tissue"}, MissingColumnError, "no such obs column"),
        ({"calibrate_by": "tissue", "sets": 0.9}, MissingColumnError, "no such obs column"),
        ({"hierarchy": {"type_1": "odd"}}, ConfigError, "does not have all labels"),
        ({"hierarchy": {**PARENTS, "odd": "type_1"}}, ConfigError, "has a cycle"),
        ({"query": np.zeros(900, bool)}, ConfigError, "no cell in the query"),
        ({"query": np.zeros(3, bool)}, ConfigError, "mask does not fit"),
        ({"reference": None}, ConfigError, "No cells are given"),
    ],
)
def test_wrong_ways(
    path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    store = atlas.open_store(path)
    given = {**ASKED, "name": "wrong", **options}
    if given["name"] == "lane":
        given["name"] = "cell_type"
    if options.get("reference") == "cell_type=Unknown":
        given["query"] = "cell_type=type_1"
    with pytest.raises(error, match=message):
        atlas.transfer_labels(store, **given)
    assert atlas.open_store(path).number == store.number


def test_the_command(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree.csv").write_text(
        "child,parent\n" + "".join(f"{child},{parent}\n" for child, parent in PARENTS.items())
    )
    cells = ["--embedding", "z", "--reference", "study=a,b", "--query", "study=c", "--k", "20"]
    out = tmp_path / "figures.json"
    arguments = ["transfer-labels", str(path), *cells, "--name", "cli", "--false-unknown", "0.1"]
    arguments += ["--sets", "0.9", "--hierarchy", str(tmp_path / "tree.csv"), "--json", str(out)]
    assert main(arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    figures = json.loads(out.read_text())
    obs = atlas.open_store(path).obs()
    assert figures["counts"]["type_1"] == (obs["cli"] == "type_1").sum()
    assert f"{figures['counts']['type_1']} cells" in said
    for words in ("300 cells labelled by", "left out a:", "in the set", "type_5", "AUROC",
                  "cli_level_1_uncertainty"):  # fmt: skip
        assert words in said, said
    assert main(["transfer-labels", str(path), *cells[:4], "--query", "study=a,c"]) == 2
    error = capsys.readouterr().err
    assert "share cells" in error
    assert "Traceback" not in error


def with_type_5(number: int, name: str) -> AnnData:
    """A study of :func:`hidden`: ``c`` has type_5, the others neither that nor type_2."""
    cells = study(number, 1600 if name == "c" else 400, range(60))
    kind = cells.obs["cell_type"].to_numpy(object)
    if name == "c":
        kind[kind == "type_2"] = "type_5"
    keep = np.ones(len(kind), bool) if name == "c" else kind != "type_2"
    cells.obs["cell_type"] = kind
    return cells[keep & (kind != "Unknown")].copy()


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference lacks type_5, which the embedding lays into type_1."""
    path = tmp_path_factory.mktemp("hidden") / "s.atlas"
    store = atlas.create_store(path)
    for i, name in enumerate("abc"):
        store.append(with_type_5(i + 1, name), study=name, **KEYS)
    rng = np.random.default_rng(0)
    names = list(store.labels)
    centres = 8 * np.eye(len(names), 6)
    centres[names.index("type_5")] = centres[names.index("type_1")]
    z = centres[store.obs_codes["label"]] + rng.normal(size=(store.n_obs, 6))
    z[:, 5] += 2 * (store.obs_codes["label"] == names.index("type_5"))
    z[:, 5] *= 1 - 0.6 * (store.obs_codes["study"] == 2)  # on the edge of type_1, within it
    store.write_embedding("z", z.astype(np.float32), {"genes": list(store.var.index)})
    return path


def test_counts_tell_a_type_that_the_embedding_lays_among_others(
    hidden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = atlas.open_store(hidden)
    made = atlas.transfer_labels(store, **ASKED, name=None, k=20, misfit=True)
    assert made.score.unseen_labels == ("type_5",)
    assert made.score.misfit_auroc > 0.85
    assert made.score.misfit_auroc > made.score.distance_auroc + 0.1
    asked = ["--embedding", "z", "--reference", "study=a,b", "--query", "study=c", "--k", "20"]
    assert main(["transfer-labels", str(hidden), *asked, "--misfit", "--name", "m"]) in (0, None)
    assert f"{made.score.misfit_auroc:.3f} of the misfit" in capsys.readouterr().out
    kept = atlas.open_store(hidden).obs()
    query = (kept["atlas_study"] == "c").to_numpy()
    np.testing.assert_allclose(kept["m_misfit"][query], made.table["transferred_misfit"])
    plain = atlas.transfer_labels(store, **ASKED, name=None, k=20)
    pd.testing.assert_frame_equal(plain.table, made.table.drop(columns="transferred_misfit"))
    assert plain.score.misfit_auroc is None


def test_the_misfit_does_not_depend_on_the_order_of_studies(hidden: Path, tmp_path: Path) -> None:
    store = atlas.open_store(hidden)
    z = dict(zip("abc", np.split(store.embedding("z"), store.segments[1:-1]), strict=True))
    other = atlas.create_store(tmp_path / "o.atlas")
    for name in "cab":
        other.append(with_type_5("abc".index(name) + 1, name), study=name, **KEYS)
    other.write_embedding(
        "z", np.concatenate([z[name] for name in "cab"]), {"genes": list(store.var.index)}
    )
    made = [
        atlas.transfer_labels(one, **ASKED, name=None, k=20, misfit=True).table
        for one in (store, other)
    ]
    assert made[0].index.tolist() == made[1].index.tolist()
    np.testing.assert_allclose(made[0]["transferred_misfit"], made[1]["transferred_misfit"])
    assert (made[0]["transferred_misfit"] > 0).all()


def test_the_misfit_needs_counts_and_genes(path: Path) -> None:
    store = atlas.open_store(path)
    with pytest.raises(StoreError, match="which genes"):
        atlas.transfer_labels(store, **ASKED, name=None, k=20, misfit=True)


def test_too_few_left_out_cells_for_a_line_are_told_of(path: Path) -> None:
    store = atlas.open_store(path)
    with pytest.warns(UserWarning, match=r"no cell is called Unknown: of [\d,]+ left-out cells"):
        made = atlas.transfer_labels(store, **ASKED, name=None, k=20, false_unknown=1e-6)
    assert "Unknown" not in made.counts or made.counts["Unknown"] == 0
