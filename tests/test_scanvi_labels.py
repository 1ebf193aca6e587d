"""Which cells have a label for scANVI, and what is said of labels that nothing is learnt of."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import atlas
from atlas.cli import main
from atlas.errors import ConfigError, MissingColumnError
from atlas.workflows import modelling, surgery

OPTIONS: dict[str, Any] = {
    "max_epochs": 1, "n_hidden": 8, "n_latent": 2, "n_layers": 1, "minibatch_size": 64,
    "threads": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[atlas.CountStore, atlas.CountStore]:
    """A store at its state of one study, and at that of two.

    ``kind`` has B and T, ``none`` for no label, and NK in lane 2 only, Mono in study two.
    """
    states = []
    store = atlas.create_store(tmp_path_factory.mktemp("labels") / "s.atlas")
    rng = np.random.default_rng(0)
    for study in ("one", "two"):
        adata = AnnData(rng.poisson(1.0, (160, 20)).astype(np.float32))
        adata.obs_names = [f"{study}{i}" for i in range(160)]
        adata.var_names = [f"g{i}" for i in range(20)]
        lane = np.where(np.arange(160) < 12, 2, 1)
        kind = rng.choice(["B", "T", "none"], 160).astype(object)
        kind[:7] = "NK"
        adata.obs["lane"] = lane.astype(str)
        adata.obs["kind"] = kind if study == "one" else np.where(kind == "NK", "Mono", kind)
        adata.obs["score"] = rng.normal(size=160)
        adata.obs["cluster"] = np.where(np.arange(160) % 9 == 0, np.nan, np.arange(160) % 4)
        adata.obs["place"] = pd.Categorical(rng.choice(["x", "y"], 160))
        store.append(adata, study=study, batch_key="place")
        if study == "one":
            store.record_genes(list(store.var.index), "all", 20)
        states.append(atlas.open_store(store.path))
    return states[0], states[1]


@pytest.fixture
def first(stores: tuple[atlas.CountStore, atlas.CountStore]) -> atlas.CountStore:
    return stores[0]


@pytest.fixture
def store(stores: tuple[atlas.CountStore, atlas.CountStore]) -> atlas.CountStore:
    return stores[1]


def train(store: atlas.CountStore, out: Path, **changes: Any) -> atlas.TrainedModel:
    given = {"label_key": "kind", "unlabeled": "none", **changes}
    return atlas.train(store, "scanvi", out=out, **OPTIONS, classifier_epochs=1, **given)


def test_labels_whose_cells_are_all_held_out_are_named(
    first: atlas.CountStore, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"No cell of these labels is trained on: NK \(of 7\)\. "):
        train(first, tmp_path / "held", hold_out="lane=2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = train(first, tmp_path / "whole", validation_share=0.0)
    assert model.labels.classes == ("B", "NK", "T")


def test_surgery_names_them_too(
    first: atlas.CountStore, store: atlas.CountStore, tmp_path: Path
) -> None:
    """Of the labels it adds: the others were learnt from the reference's cells."""
    train(first, tmp_path / "reference")
    table = pd.DataFrame(index=store.obs([]).index)
    table["atlas_study"] = store.obs(["atlas_study"])["atlas_study"].astype(str)
    start = store.split(0.5).validation[-1][0]
    assert start >= store.segments[1]
    names = np.full(store.n_obs, "none", object)
    names[start] = "rare"
    names[start + 1] = "B"
    table["few"] = names
    store.annotate(table)
    again = atlas.open_store(store.path)
    given = {"label_key": "few", "max_epochs": 1, "threads": 1, "device": "cpu"}
    with pytest.warns(UserWarning, match=r"is trained on: rare \(of 1\)\. They"):
        extended = atlas.extend_reference(
            tmp_path / "reference", again, ["two"], out=tmp_path / "run", **given,
            validation_share=0.5,
        )  # fmt: skip
    assert extended.labels.names == ("B", "NK", "T", "rare")


def _query(**obs: Any) -> AnnData:
    """A study of a stranger, of the same genes."""
    adata = AnnData(np.random.default_rng(1).poisson(1.0, (80, 20)).astype(np.float32))
    adata.obs_names = [f"q{i}" for i in range(80)]
    adata.var_names = [f"g{i}" for i in range(20)]
    adata.obs = adata.obs.assign(lane="new", **obs)
    return adata


def _extend(reference: Path, store: atlas.CountStore, **options: Any) -> atlas.TrainedModel:
    given = {"max_epochs": 1, "threads": 1, "device": "cpu", **options}
    return atlas.extend_reference(reference, store, **given)


def test_a_store_without_the_models_column_has_no_labels(
    first: atlas.CountStore, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    before = train(first, tmp_path / "reference")
    alone = atlas.create_store(tmp_path / "a.atlas")
    alone.append(_query(), study="mine", batch_key="lane")
    made = _extend(tmp_path / "reference", alone, out=tmp_path / "run")
    assert made.labels == before.labels
    assert made.surgery[0].labels == ()
    assert made.columns == before.columns
    assert not [one for one in recwarn if "label" in str(one.message)]
    assert atlas.embed(made, alone, name=None, device="cpu").shape == (80, 2)
    found = atlas.label(made, alone, name=None, device="cpu").table["scanvi"]
    assert found.isin(["B", "NK", "T"]).all()
    for named in ("typo", "kind"):  # which was asked for
        with pytest.raises(MissingColumnError, match=rf"no such obs column[\s\S]*'{named}'"):
            _extend(tmp_path / "reference", alone, out=tmp_path / named, label_key=named)
        assert not (tmp_path / named).exists()


@pytest.mark.parametrize("kept", [False, True])
def test_labels_that_are_passed_over_are_told_of(
    first: atlas.CountStore, tmp_path: Path, kept: bool
) -> None:
    """Whether the store has the model's column, or not; what is taken is the store's own."""
    train(first, tmp_path / "reference")
    alone = atlas.create_store(tmp_path / "a.atlas")
    own = np.array(["B", "none", "Mono", "Unknown"] * 20, object)
    # A column of the name that the store's labels have, as in a file that a store was exported to.
    query = _query(ct=own, atlas_label="other", **({"kind": "none"} if kept else {}))
    alone.append(query, study="mine", batch_key="lane", label_key="ct")
    with pytest.warns(UserWarning, match=r"'kind'[\s\S]* 60 cells [\s\S]*'atlas_label'"):
        made = _extend(tmp_path / "reference", alone, out=tmp_path / "run")
    assert made.surgery[0].labels == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = _extend(
            tmp_path / "reference", alone, out=tmp_path / "again", label_key="atlas_label"
        )
    assert made.surgery[0].labels == ("Mono",)  # "none" stands for no label
    assert made.columns.label is None


def test_the_value_for_no_label_is_named_and_remembered(
    first: atlas.CountStore,
    store: atlas.CountStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}
    for module in (modelling, surgery):
        real = module.fit

        def spy(*args: Any, real: Any = real, **given: Any) -> Any:
            seen["label"] = given["columns"].label
            return real(*args, **given)

        monkeypatch.setattr(module, "fit", spy)
    kind = store.obs(["kind"])["kind"].to_numpy(object)
    study = store.obs(["atlas_study"])["atlas_study"].to_numpy(object)
    model = train(first, tmp_path / "run")
    assert model.labels.classes == ("B", "NK", "T")
    named = np.array([*model.labels.names, "none"], object)[seen["label"]]
    assert (named == kind[:160]).all()
    assert atlas.load_model(tmp_path / "run").columns.unlabeled == "none"
    extended = atlas.extend_reference(
        tmp_path / "run", store, ["two"], out=tmp_path / "more", max_epochs=1, threads=1,
        device="cpu",
    )  # fmt: skip
    assert extended.labels.names == ("B", "NK", "T", "Mono")
    named = np.array([*extended.labels.names, "none"], object)[seen["label"]]
    assert (named == np.where(study == "two", kind, "none")).all()
    # Without it the value is a class like others, and the model's file is what it always was.
    usual = train(first, tmp_path / "usual", unlabeled="Unknown")
    assert usual.labels.classes == ("B", "NK", "T", "none")
    assert "unlabeled" not in json.loads((tmp_path / "usual" / "model.json").read_text())["columns"]


def test_a_package_leaves_them_without_a_label(store: atlas.CountStore, tmp_path: Path) -> None:
    model = train(store, tmp_path / "run")
    atlas.embed(model, store, name="shared", device="cpu")
    shipment = atlas.workflows.sharing.prepare_share(store, model, embedding="shared")
    assert shipment.labels is not None
    assert list(shipment.labels.names) == ["B", "Mono", "NK", "T"]
    none = store.obs(["kind"])["kind"].to_numpy(object) == "none"
    assert ((shipment.labels.codes < 0) == none).all()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"label_key": "score", "unlabeled": "Unknown"},
            r"'score' holds measurements[\s\S]*320 different numbers",
        ),
        ({"unlabeled": "nnoe"}, r"No cell has the value[\s\S]*'nnoe'[\s\S]*B, Mono, NK, T, none"),
        ({"label_key": None}, r"unlabeled is of a column of labels"),
    ],
)
def test_wrong_ways(
    store: atlas.CountStore, tmp_path: Path, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        train(store, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_clusters_with_gaps_are_labels(store: atlas.CountStore, tmp_path: Path) -> None:
    """Whole numbers that have become floats for want of some."""
    model = train(store, tmp_path / "run", label_key="cluster", unlabeled="Unknown")
    assert model.labels.classes == ("0", "1", "2", "3")


def test_the_commands(
    store: atlas.CountStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = atlas.create_store(tmp_path / "a.atlas")
    adata = atlas.to_anndata(store)
    for study in ("one", "two"):
        part = adata[adata.obs["atlas_study"] == study].copy()
        part.obs = part.obs[["kind", "place"]].astype(str)
        alone.append(part, study=study, batch_key="place")
        if study == "one":
            alone.record_genes(list(alone.var.index), "all", 20)
            tree = tmp_path / "tree.csv"
            tree.write_text("child,parent\nB,lymphoid\nT,lymphoid\nNK,lymphoid\n")
            run = ["train", str(alone.path), "--model", "scanvi", "--out", str(tmp_path / "run")]
            run += ["--label-key", "kind", "--unlabeled", "none", "--hierarchy", str(tree)]
            run += ["--epochs", "1", "--n-hidden", "8", "--classifier-epochs", "1"]
            assert main([*run, "--threads", "1"]) == 0, capsys.readouterr().err
    model = atlas.load_model(tmp_path / "run")
    assert model.labels.names == ("lymphoid", "B", "NK", "T")
    extend = ["extend", str(tmp_path / "run"), str(alone.path), "--out", str(tmp_path / "more")]
    assert main([*extend, "--max-epochs", "1", "--threads", "1"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "new classes: Mono\nthey stand at the root, in none of the groups" in said
