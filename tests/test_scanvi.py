"""scANVI from a store to labels, through the public names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

import atlas
from atlas.errors import AtlasError, CheckpointError, ConfigError, ModelError
from atlas.models import Inputs
from atlas.workflows.hierarchy import read_hierarchy
from atlas.workflows.streaming import CellStream

OPTIONS = {
    "n_hidden": 32,
    "n_latent": 6,
    "threads": 1,
    "seed": 0,
    "lr": 5e-3,
    "minibatch_size": 64,
    "average_steps": 50,
}
ALTERNATING = {**OPTIONS, "classifier_epochs": 10}
GROUPS = {"type_1": "left", "type_2": "left", "type_3": "right", "type_4": "right"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> atlas.CountStore:
    """Two studies of four types; the labels of the second are hidden in ``seen``."""
    folder = tmp_path_factory.mktemp("scanvi")
    store = atlas.create_store(folder / "s.atlas")
    rng = np.random.default_rng(0)
    means = rng.gamma(0.5, 2.0, (4, 150))
    for study in (1, 2):
        kind = rng.integers(0, 4, 700)
        batch_effect = np.exp(rng.normal(0, 0.5, 150))
        cells = AnnData(rng.poisson(0.3 * means[kind] * batch_effect).astype(np.float32))
        cells.obs["cell_type"] = [f"type_{k + 1}" for k in kind]
        cells.write_h5ad(folder / f"{study}.h5ad")
        store.append(folder / f"{study}.h5ad", study=f"study_{study}", label_key="cell_type")
    atlas.select_genes(store, 150)
    obs = store.obs()
    table = pd.DataFrame(index=obs.index)
    table["atlas_study"] = obs["atlas_study"].astype(str)
    table["truth"] = obs["atlas_label"].astype(object)
    table["seen"] = table["truth"].where(table["atlas_study"] == "study_1")
    table["coarse"] = table["seen"].map(GROUPS)
    table["depth"] = np.random.default_rng(0).gamma(5, 0.2, len(table))
    table["lane"] = np.random.default_rng(1).choice(["x", "y", "z"], len(table))
    table["same"], table["negative"] = "T", -1.0
    table["none"] = pd.Series([None] * len(table), dtype=object, index=table.index)
    store.annotate(table)
    return atlas.open_store(store.path)


def share_right(
    model: atlas.TrainedModel, store: atlas.CountStore, study: str, groups: bool = False
) -> float:
    """Share of a study's cells given their true type, of types that study 1 has labels of."""
    obs = store.obs(["truth", "seen", "atlas_study"])
    truth, found = obs["truth"].astype(object), pd.Series(predicted(model, store), obs.index)
    asked = truth.isin(obs["seen"].dropna().unique()) & (obs["atlas_study"] == study)
    assert asked.sum() > 250
    if groups:
        truth, found = truth.map(GROUPS), found.map(GROUPS)
    return float((truth == found)[asked].mean())


def predicted(model: atlas.TrainedModel, store: atlas.CountStore) -> np.ndarray:
    """Name of the class of highest probability, of each cell."""
    return atlas.label(model, store, name=None).table["scanvi"].astype(object).to_numpy()


@pytest.fixture(scope="module")
def scanvi(store: atlas.CountStore) -> atlas.TrainedModel:
    return atlas.train(
        store,
        "scanvi",
        label_key="seen",
        max_epochs=15,
        out=store.path.parent / "run",
        **ALTERNATING,
    )


def test_labels_carry_over_to_the_other_study(
    store: atlas.CountStore, scanvi: atlas.TrainedModel
) -> None:
    assert share_right(scanvi, store, "study_2") > 0.9
    assert share_right(scanvi, store, "study_1") > 0.9
    assert scanvi.labels.classes == tuple(sorted(set(store.obs(["seen"])["seen"].dropna())))


def test_a_model_of_labels_is_saved_and_loaded(
    store: atlas.CountStore, scanvi: atlas.TrainedModel
) -> None:
    loaded = atlas.load_model(store.path.parent / "run")
    assert loaded.name == "scanvi"
    assert loaded.labels == scanvi.labels
    assert loaded.columns == scanvi.columns
    np.testing.assert_array_equal(predicted(loaded, store), predicted(scanvi, store))
    z = atlas.embed(loaded, store)
    assert "scanvi" in store.embeddings
    np.testing.assert_array_equal(z, store.embedding("scanvi"))


def test_the_classifier_kept_is_trained_on_the_encoder_kept(
    store: atlas.CountStore, scanvi: atlas.TrainedModel, tmp_path: Path
) -> None:
    """Resuming a finished run gives the same model again, its last turn included."""
    again = atlas.train(
        store,
        "scanvi",
        label_key="seen",
        max_epochs=15,
        out=store.path.parent / "run",
        resume=True,
        **ALTERNATING,
    )
    for name, value in again.module.state_dict().items():
        assert torch.equal(value, scanvi.module.state_dict()[name]), name


@pytest.mark.parametrize("training", ["joint", "scvi-tools"])
def test_joint_forms_train_too(store: atlas.CountStore, tmp_path: Path, training: str) -> None:
    model = atlas.train(
        store,
        "scanvi",
        label_key="seen",
        training=training,
        balance="label",
        max_epochs=12,
        out=tmp_path / "run",
        **OPTIONS,
    )
    assert share_right(model, store, "study_2") > 0.9
    assert model.training["history"][-1]["penalty"] > 0


def test_groups_guide_types(store: atlas.CountStore, tmp_path: Path) -> None:
    """Study 1 has labels of groups but for 5 cells a type; the tree joins both."""
    obs = store.obs(["seen", "coarse", "atlas_study"])
    mixed = obs["coarse"].astype(object).copy()
    rng = np.random.default_rng(0)
    for name in obs["seen"].dropna().unique():
        chosen = rng.choice(np.flatnonzero(obs["seen"] == name), 5, replace=False)
        mixed.iloc[chosen] = name
    table = pd.DataFrame({"mixed": mixed, "atlas_study": obs["atlas_study"].astype(str)})
    store.annotate(table)
    path = tmp_path / "tree.csv"
    path.write_text("child,parent\n" + "".join(f"{c},{p}\n" for c, p in GROUPS.items()))
    model = atlas.train(
        store,
        "scanvi",
        label_key="mixed",
        hierarchy=path,
        max_epochs=15,
        out=tmp_path / "run",
        **ALTERNATING,
    )
    assert share_right(model, store, "study_2", groups=True) > 0.9
    assert share_right(model, store, "study_2") > 0.7


def test_it_goes_on_from_a_trained_scvi(store: atlas.CountStore, tmp_path: Path) -> None:
    scvi = atlas.train(store, "scvi", max_epochs=2, out=tmp_path / "scvi", **OPTIONS)
    begun = atlas.train(
        store,
        "scanvi",
        label_key="seen",
        start_from=tmp_path / "scvi",
        max_epochs=1,
        out=tmp_path / "run",
        **{**OPTIONS, "lr": 1e-12, "average_steps": 0},
    )
    for name, value in scvi.module.state_dict().items():
        torch.testing.assert_close(
            begun.module.scvi.state_dict()[name], value, atol=1e-6, rtol=1e-5
        )
    with pytest.raises(ModelError, match=r"does not fit[\s\S]*n_hidden: 32[\s\S]*n_hidden: 16"):
        atlas.train(
            store,
            "scanvi",
            label_key="seen",
            start_from=scvi,
            max_epochs=1,
            out=tmp_path / "other",
            **{**OPTIONS, "n_hidden": 16},
        )


def test_covariates_and_size_factors(store: atlas.CountStore, tmp_path: Path) -> None:
    model = atlas.train(
        store,
        "scvi",
        categorical_covariates=["lane"],
        continuous_covariates=["depth"],
        size_factor="depth",
        encode_covariates=True,
        max_epochs=2,
        out=tmp_path / "run",
        **OPTIONS,
    )
    loaded = atlas.load_model(tmp_path / "run")
    assert loaded.columns.categorical == (("lane", ("x", "y", "z")),)
    assert len(loaded.module.decoder.linears[0].category_weights) == 1
    z = atlas.embed(loaded, store, name=None)
    np.testing.assert_array_equal(z, atlas.embed(model, store, name=None))
    cells = next(iter(CellStream(loaded, store)))
    inputs = cells.inputs
    moved = Inputs(
        inputs.counts,
        inputs.batch,
        categories=(inputs.categories + 1) % 3,
        continuous=inputs.continuous,
        size_factor=inputs.size_factor,
    )
    assert not torch.equal(model.embed(inputs), model.embed(moved))
    # The means are the size factor times a softplus, so they scale with it.
    twice = Inputs(
        inputs.counts,
        inputs.batch,
        categories=inputs.categories,
        continuous=inputs.continuous,
        size_factor=2 * inputs.size_factor,
    )
    latent = model.embed(inputs)
    first, second = (model.module.count_parameters(latent, i).mean for i in (inputs, twice))
    torch.testing.assert_close(2 * first, second)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"label_key": "nowhere"}, AtlasError, "nowhere"),
        ({"label_key": "none"}, ConfigError, "needs cells with a label"),
        (
            {"label_key": "same"},
            ConfigError,
            r"two classes[\s\S]*one class, 'T', in obs column 'same'",
        ),
        (
            {"label_key": "seen", "hierarchy": {**GROUPS, "left": "type_1"}},
            ConfigError,
            r"cycle\n  found: type_1 → left → type_1[\s\S]*what to do: take one",
        ),
        ({"label_key": "seen", "hierarchy": {"type_1": "a"}}, ConfigError, "all labels"),
        (
            {"model": "scvi", "label_key": "seen"},
            ConfigError,
            r"scvi does not take[\s\S]*label_key",
        ),
        ({"model": "scvi", "size_factor": "lane"}, ConfigError, "not a number for each cell"),
        ({"model": "scvi", "size_factor": "negative"}, ConfigError, "not above 0"),
        ({"model": "trvae", "size_factor": "depth"}, ConfigError, "does not take these"),
        ({"model": "scvi", "categorical_covariates": ["none"]}, ConfigError, "has no value"),
        ({"label_key": "seen", "classifier_epoch": 3}, ConfigError, "no such options"),
        ({"label_key": "seen", "hold_out": "atlas_study=study_1"}, ConfigError, "has a label"),
    ],
)
def test_wrong_ways(
    store: atlas.CountStore,
    tmp_path: Path,
    arguments: dict[str, object],
    error: type[AtlasError],
    says: str,
) -> None:
    arguments = {"model": "scanvi", **arguments}
    with pytest.raises(error, match=says):
        atlas.train(store, max_epochs=1, out=tmp_path / "run", **OPTIONS, **arguments)
    assert not list((tmp_path / "run").glob("model.json"))


LINES = "".join(f"{child},{parent}\n" for child, parent in GROUPS.items())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "child,parent\n" + LINES),
        ("t.csv", "\ufeffChild, Parent\r\n\r\n" + LINES.replace(",", " , ")),
        ("t.tsv", "parent\tchild\n" + "".join(f"{g}\t{t}\n" for t, g in GROUPS.items())),
        ("t.csv", 'child;parent\n"type_1";left\n' + LINES.replace(",", ";")),
        ("t.json", json.dumps(GROUPS)),
    ],
)
def test_a_hierarchy_is_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_hierarchy(tmp_path / name) == GROUPS


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", LINES, "first line 'type_1,left'"),
        ("t.csv", "label,group\n" + LINES, r"first line 'label,group'[\s\S]*child,parent"),
        ("t.csv", "", "an empty file"),
        ("t.csv", " \n\n", "an empty file"),
        ("t.csv", "child,parent\n", "no lines of child and parent"),
        ("t.csv", b"child,parent\nT,\xff\n", "not text in UTF-8"),
        ("t.csv", "child,parent\n" + LINES + "a,b,c\n", "3 columns in line 6"),
        ("t.csv", "child\nT\n", "1 columns in line 1"),
        ("t.csv", 'child,parent\n"T,b\n', r"line 2: unexpected end of data"),
        ("t.csv", "child,parent\nT, \n", r"lacks a name\n  found: child 'T', parent ''"),
        ("t.csv", "child,parent\n" + LINES + "type_1,right\n", "type_1: left and right"),
        ("t.csv", "child,parent\n" + LINES + "left,type_1\n", "cycle"),
        ("t.csv", "child,parent\ntype_1,type_1\n", "type_1 → type_1"),
        ("t.csv", "child,parent\ntype_1,left\n", r"all labels of the cells\n  found: type_2"),
        ("t.json", '{"type_1": "a", "type_1": "b"}', "type_1: a and b"),
        ("t.json", '["type_1"]', "cannot be read"),
        ("t.json", '{"type_1": {"a": "b"}}', "lacks a name"),
        ("t.json", "{}", "no lines of child and parent"),
    ],
)
def test_a_bad_hierarchy_is_refused_with_its_path(
    store: atlas.CountStore, tmp_path: Path, name: str, text: str | bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AtlasError, match=says) as error:
        atlas.train(store, "scanvi", label_key="seen", hierarchy=path, out=tmp_path / "run")
    assert error.value.path == path
    assert error.value.do
    assert not (tmp_path / "run").exists()


def test_another_label_column_is_another_run(
    store: atlas.CountStore, scanvi: atlas.TrainedModel
) -> None:
    with pytest.raises(CheckpointError, match="not the one asked for"):
        atlas.train(
            store,
            "scanvi",
            label_key="truth",
            max_epochs=15,
            out=store.path.parent / "run",
            resume=True,
            **OPTIONS,
        )
