"""An update by a study with a type that the reference lacks; a scANVI's labels beside the votes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from living_helpers import KEYS, SMALL
from workflows_helpers import study as make_study

import atlas
from atlas.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies without ``type_3`` and a scANVI of them kept; ``q.h5ad`` has all four types."""
    folder = tmp_path_factory.mktemp("unseen")
    store = atlas.create_store(folder / "s.atlas")
    for i in (1, 2):
        cells = make_study(i, 500, range(60))
        kind = cells.obs["cell_type"]
        # an Unknown cell may be of the type too: its own ten genes would then be the highest
        own = np.asarray(cells.X)[:, 20:30].mean(axis=1) > 1.5 * np.asarray(cells.X).mean(axis=1)
        store.append(cells[(kind != "type_3") & ~own].copy(), study=f"r_{i}", **KEYS)
    atlas.train(
        store,
        "scanvi",
        out=folder / "run",
        genes=list(store.var.index),
        n_hidden=32,
        n_latent=5,
        classifier_epochs=1,
        max_epochs=40,
        lr=5e-3,
        eps=1e-8,
        **SMALL,
    )
    atlas.keep(store, folder / "run", device="cpu")
    make_study(3, 500, range(60)).write_h5ad(folder / "q.h5ad")
    return folder


@pytest.fixture(scope="module")
def updated(made: Path, tmp_path_factory: pytest.TempPathFactory) -> atlas.CountStore:
    path = Path(shutil.copytree(made / "s.atlas", tmp_path_factory.mktemp("u") / "s.atlas"))
    atlas.update(path, made / "q.h5ad", study="q", model="scanvi", ingest=KEYS, **SMALL)
    return atlas.open_store(path)


def test_cells_of_an_unseen_type_are_unknown_and_form_a_group(updated: atlas.CountStore) -> None:
    obs = updated.obs()
    new = (obs["atlas_study"] == "q").to_numpy()
    assert obs["scanvi_label_group"][~new].isna().all()
    obs = obs[new]
    unseen, unknown = obs["cell_type"] == "type_3", obs["scanvi_label"] == "Unknown"
    assert unknown[unseen].mean() > 0.8
    # 5 % of left-out cells; those of a study that was not trained on lie farther out
    assert unknown[~unseen & (obs["cell_type"] != "Unknown")].mean() < 0.4
    groups = obs["scanvi_label_group"]
    assert groups[~unknown].isna().all()
    largest = groups == "group 1"
    assert largest[unseen & unknown].mean() > 0.8  # they lie together
    assert unseen[largest & (obs["cell_type"] != "Unknown")].mean() > 0.5  # and are most of it
    drift = updated.model_record("scanvi")["drift"]
    assert [one["n_obs"] for one in drift["unseen"]] == groups.value_counts().tolist()
    own = {f"gene{i}" for i in range(20, 30)}  # six times higher in type_3
    assert len(own.intersection(drift["unseen"][0]["markers"])) >= 4
    assert any("perhaps a type that the reference lacks" in one for one in drift["advice"])


def test_the_classifiers_labels_stand_beside_those_of_the_neighbours(
    updated: atlas.CountStore,
) -> None:
    obs = updated.obs()
    new = (obs["atlas_study"] == "q").to_numpy()
    model = atlas.stored_model(updated, "scanvi")
    said = atlas.label(model, updated, name=None, rows=new, device="cpu").table
    for column, kept in (
        ("scanvi", "scanvi_class"),
        ("scanvi_probability", "scanvi_class_probability"),
        ("scanvi_entropy", "scanvi_class_entropy"),
    ):
        assert obs[kept][new].tolist() == said[column].tolist()
        assert obs[kept][~new].isna().all()
    record = updated.model_record("scanvi")
    counts = obs["scanvi_class"][new].value_counts()
    assert record["classes"] == {name: n for name, n in counts.items() if n}
    votes = obs["scanvi_label"][new].value_counts()
    assert record["labels"] == {name: n for name, n in votes.items() if n}
    assert "Unknown" in record["labels"]
    assert "Unknown" not in record["classes"]


def test_what_is_printed(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(made / "s.atlas", tmp_path / "s.atlas")
    query = ["update", str(path), str(made / "q.h5ad"), "--study", "q", "--model", "scanvi"]
    few = ["--max-epochs", "1", "--threads", "1", "--device", "cpu"]
    assert main([*query, "--batch-key", "batch", *few]) == 0
    out = capsys.readouterr().out
    assert "labels by neighbours (scanvi_label):" in out
    assert "labels by the model's classifier (scanvi_class):" in out
    assert "Unknown cells that lie together (scanvi_label_group): group 1, " in out
    assert atlas.open_store(path).models["scanvi"] == 2


def test_without_studies_to_leave_out_the_published_rule_is_taken(
    made: Path, tmp_path: Path
) -> None:
    for name, options in (("published", {"false_unknown": None}), ("calibrated", {})):
        path = shutil.copytree(made / "s.atlas", tmp_path / name)
        atlas.update(path, made / "q.h5ad", study="q", model="scanvi", **options, **SMALL)
        store = atlas.open_store(path)
        new = store.obs_codes["study"] == 2
        again = atlas.transfer_labels(
            store,
            embedding="scanvi",
            reference=~new,
            query=new,
            name=None,
            false_unknown=None if name == "published" else 0.05,
        )
        kept = store.obs()["scanvi_label"][new]
        assert kept.tolist() == again.table["transferred"].tolist()
