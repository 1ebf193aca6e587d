"""Models kept with the store, and studies added to store, model and embedding in one state."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from living_helpers import KEYS, SMALL, files_of, train_small, update
from workflows_helpers import study as make_study

import atlas
from atlas.cli import main
from atlas.errors import (
    CorruptStoreError,
    LockedError,
    ModelError,
    OutputError,
    StoreError,
)
from atlas.workflows import living


def test_a_model_is_kept_with_its_embedding_and_record(living_folder: Path) -> None:
    store = atlas.open_store(living_folder / "s.atlas")
    assert dict(store.models) == {"scvi": 1}
    record = store.model_record("scvi")
    assert record["parent"] is None
    assert record["studies"] == ["reference_1", "reference_2"]
    kept = atlas.stored_model(store, "scvi")
    run = atlas.load_model(living_folder / "run")
    own = kept.module.state_dict()
    assert all((own[name] == value).all() for name, value in run.module.state_dict().items())
    z = atlas.embed(run, store, name=None, device="cpu")
    np.testing.assert_array_equal(store.embedding("scvi"), z)
    with pytest.raises(StoreError, match=r"no such version\n  found: 7\n  expected: one of 1"):
        store.model_folder("scvi", 7)
    with pytest.raises(StoreError, match=r"no such model\n  found: none"):
        store.model_folder("none")


def test_an_update_is_one_state_and_leaves_the_reference(
    living_folder: Path, updated_atlas: Path
) -> None:
    before, after = atlas.open_store(living_folder / "s.atlas"), atlas.open_store(updated_atlas)
    assert after.number == before.number + 1
    assert after.studies == (*before.studies, "kang")
    assert dict(after.models) == {"scvi": 2}
    assert not list(updated_atlas.glob(".update-*"))
    old = before.manifest.studies
    assert after.manifest.studies[:2] == old  # the very same parts, embedding included
    assert after.manifest.genes == before.manifest.genes
    z = after.embedding("scvi")
    np.testing.assert_array_equal(z[: before.n_obs], before.embedding("scvi"))
    # what the new model gives for all cells, computed anew, is what was kept in two parts
    model = atlas.stored_model(after, "scvi")
    np.testing.assert_array_equal(z, atlas.embed(model, after, name=None, device="cpu"))
    assert model.training["store"] == str(updated_atlas)
    assert model.training["manifest"] == after.number
    record = after.model_record("scvi")
    assert (record["parent"], record["study"]) == (1, "kang")
    assert record["studies"] == ["reference_1", "reference_2", "kang"]
    assert atlas.verify(updated_atlas).whole
    assert sorted(p.name for p in updated_atlas.glob("parts/kang/*")) == [
        "embedding-scvi-000005",
        "index",
        "obs-000005",
        "statistics",
    ]


def test_labels_are_those_of_the_neighbours_in_the_embedding(updated_atlas: Path) -> None:
    store = atlas.open_store(updated_atlas)
    new = store.obs_codes["study"] == 2
    z, codes = store.embedding("scvi"), store.obs_codes["label"]
    voting = np.flatnonzero(~new & (codes >= 0))
    obs = store.obs()
    assert obs["scvi_label"][~new].isna().all()
    for row in np.flatnonzero(new)[::20]:
        distance = np.linalg.norm(z[voting].astype(np.float64) - z[row], axis=1)
        near = np.argsort(distance, kind="stable")[:50]
        weights = np.exp(-(distance[near] ** 2) / (2 * (distance[near] ** 2).mean()))
        p = np.bincount(codes[voting][near], weights) / weights.sum()
        assert obs["scvi_label_uncertainty"].iloc[row] == pytest.approx(1 - p.max(), abs=1e-4)
        expected = "Unknown" if p.max() < 0.5 else store.labels[p.argmax()]
        assert obs["scvi_label"].iloc[row] == expected
    found = obs["scvi_label"][new].value_counts()
    assert store.model_record("scvi")["labels"] == {k: v for k, v in found.items() if v}


def test_drift_is_what_can_be_counted(updated_atlas: Path) -> None:
    store = atlas.open_store(updated_atlas)
    drift = store.model_record("scvi")["drift"]
    new = store.obs_codes["study"] == 2
    z = store.embedding("scvi").astype(np.float64)
    entropies = []
    for row in np.flatnonzero(new):
        distance = np.linalg.norm(z - z[row], axis=1)
        distance[row] = np.inf
        share = new[np.argsort(distance)[:50]].mean()
        entropies.append(-sum(p * np.log(p) for p in (share, 1 - share) if p > 0))
    assert drift["entropy"] == pytest.approx(np.mean(entropies), abs=1e-4)
    unknown = (store.obs()["scvi_label"][new] == "Unknown").mean()
    assert drift["unknown_share"] == pytest.approx(unknown)
    assert drift["added_share"] == pytest.approx(200 / 800)
    assert set(drift["nearest"]) == {"kang/batch_1", "kang/batch_2"}
    assert set(drift["nearest"].values()) <= set(atlas.stored_model(store, "scvi", 1).batches)
    assert drift["bound_before"] < 0 > drift["bound_after"]


@pytest.mark.parametrize(
    ("figures", "advice"),
    [
        ({}, []),
        ({"unknown_share": 0.4}, ["40% of the cells are Unknown"]),
        ({"unknown_share": None, "entropy": 0.05}, ["hardly mix"]),
        ({"bound_after": -110.0, "added_share": 0.6}, ["less likely", "60% of the cells came"]),
    ],
)
def test_drift_comes_with_advice(figures: dict[str, Any], advice: list[str]) -> None:
    from atlas.workflows.drift import Drift, _advice

    well = {
        "unknown_share": 0.01,
        "entropy": 0.4,
        "entropy_ceiling": 0.5,
        "bound_before": -100.0,
        "bound_after": -90.0,
        "nearest": {},
        "added_share": 0.1,
    }
    said = _advice(Drift(**{**well, **figures}))
    assert len(said) == len(advice)
    assert all(part in whole for part, whole in zip(advice, said, strict=True))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_killed_at_any_step_it_goes_on_to_the_same_bytes(
    living_folder: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("living_kills.py")
    subprocess.run(
        [sys.executable, script, living_folder / "s.atlas", living_folder / "q.h5ad", tmp_path],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=580,
    )
    found = json.loads((tmp_path / "found.json").read_text())
    straight = atlas.open_store(tmp_path / "undisturbed")
    assert found.pop("undisturbed") == {
        "killed": None,
        "manifests": [f"00000{i}.json" for i in range(1, 5)],
        "notes": [],
    }
    assert len(found) == 15
    for name, outcome in found.items():
        assert outcome["killed"], name
        last = name == "at-the-end"
        assert len(outcome["manifests"]) == (5 if last else 4), name  # the old state until the end
        gone_on = ["going on with the update that was interrupted"]
        expected = ["the update was whole already"] if last else gone_on
        begun = name != "after-the-fork"
        if name == "ingest":
            expected = [*gone_on, "going on with the ingest that was interrupted"]
        assert outcome["notes"] == (expected if begun else []), name
        store = atlas.open_store(tmp_path / name)
        assert store.number == straight.number == 5
        for version in (1, 2):
            weights = [
                (one.model_folder("scvi", version) / "weights.safetensors").read_bytes()
                for one in (store, straight)
            ]
            assert weights[0] == weights[1], name
        np.testing.assert_array_equal(store.embedding("scvi"), straight.embedding("scvi"))
        index, whole = (one.manifest.embeddings["scvi"].index for one in (store, straight))
        assert index == whole is not None, name  # the same path and digests
        assert store.obs().equals(straight.obs()), name
        records = [one.model_record("scvi") for one in (store, straight)]
        assert records[0]["drift"] == records[1]["drift"], name
        assert store.fingerprint == straight.fingerprint
        assert atlas.verify(tmp_path / name).whole
        assert {p.name for p in store.path.iterdir()} == {p.name for p in straight.path.iterdir()}


def test_the_store_is_locked_and_as_it_was_until_the_end(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(*arguments: Any, **options: Any) -> Any:
        reader = atlas.open_store(living_store)
        seen.append((reader.number, reader.studies, reader.models["scvi"]))
        with pytest.raises(LockedError, match="update kang"):
            reader.drop("reference_1")
        return measure(*arguments, **options)

    measure = living.measure_drift
    monkeypatch.setattr(living, "measure_drift", look)
    update(living_store, living_folder / "q.h5ad")
    assert seen == [(4, ("reference_1", "reference_2"), 1)]


def test_another_request_or_state_starts_anew(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(living, "extend_reference", stop)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            update(living_store, living_folder / "q.h5ad")
        with pytest.raises(KeyboardInterrupt):
            update(living_store, living_folder / "q.h5ad", max_epochs=1)
    atlas.open_store(living_store).record_genes(["gene1", "gene2"], "given", 2)
    report = update(living_store, living_folder / "q.h5ad", max_epochs=1)
    assert report.notes == (
        "an interrupted update was not gone on with: it was of another manifest",
    )
    opened = atlas.open_store(living_store)
    assert opened.genes == ("gene1", "gene2")
    assert (opened.number, opened.models["scvi"]) == (6, 2)


def test_the_counts_of_the_reference_are_not_needed(
    living_folder: Path, updated_atlas: Path, living_store: Path
) -> None:
    for array in ("data", "indices"):
        for i in (1, 2):
            shutil.rmtree(living_store / f"studies/reference_{i}/X/{array}/c")
    update(living_store, living_folder / "q.h5ad", false_unknown=None)
    one, other = (atlas.open_store(path) for path in (living_store, updated_atlas))
    np.testing.assert_array_equal(one.embedding("scvi"), other.embedding("scvi"))
    assert one.obs().equals(other.obs())


def test_studies_follow_one_another_and_lineage_is_kept(
    living_folder: Path, updated_atlas: Path
) -> None:
    store = updated_atlas.with_name("more.atlas")
    shutil.copytree(updated_atlas, store)
    before = atlas.open_store(store).embedding("scvi")
    more = make_study(4, 150, range(60))[:, :50].copy()
    more.var_names = [*more.var_names[:48], "new_1", "new_2"]
    made_report = update(store, more, study="stim", max_epochs=1)
    assert (made_report.version, made_report.manifest) == (3, 6)
    opened = atlas.open_store(store)
    assert opened.n_vars == 62
    assert [opened.model_record("scvi", v)["parent"] for v in (1, 2, 3)] == [None, 1, 2]
    np.testing.assert_array_equal(opened.embedding("scvi")[:800], before)
    assert atlas.verify(store).whole
    # numbers of parts go on without collision
    opened.annotate(opened.obs()[["cell_type"]].rename(columns={"cell_type": "copy"}))
    assert atlas.verify(store).whole
    for number, n in ((4, 600), (5, 800), (6, 950)):
        assert atlas.open_store(store, number=number).embedding("scvi").shape == (n, 3)
    states, models = atlas.history(opened)
    assert [s["action"] for s in states][3:6] == [
        "keep scvi 1",
        "update kang: model scvi 2",
        "update stim: model scvi 3",
    ]
    assert [(m["version"], m.get("study")) for m in models] == [(1, None), (2, "kang"), (3, "stim")]
    report = opened.drop("kang")
    assert report.models == ("scvi 2", "scvi 3")
    assert report.embeddings == ("scvi",)
    assert opened.embedding("scvi").shape == (750, 3)
    with pytest.raises(ModelError, match="knows a study of this name, which was dropped"):
        update(store, living_folder / "q.h5ad")


def test_a_run_behind_the_lineage_is_refused(
    living_folder: Path, updated_atlas: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(updated_atlas, tmp_path / "s.atlas"))
    opened = atlas.open_store(store)
    with pytest.raises(ModelError, match=r"not come after[\s\S]*found: the model of version 1"):
        atlas.keep(opened, living_folder / "run")
    with pytest.raises(ModelError, match="found: the model of version 2"):
        atlas.keep(opened, opened.model_folder("scvi"))
    opened.append(make_study(5, 100, range(60)), study="late", **KEYS)
    few = {"max_epochs": 1, **SMALL}
    behind, after = tmp_path / "behind", tmp_path / "after"
    studies = ["kang", "late"]
    atlas.extend_reference(living_folder / "run", opened, studies, out=behind, **few)
    with pytest.raises(ModelError, match="found: another model extended"):
        atlas.keep(opened, behind, "scvi", device="cpu")
    with pytest.raises(ModelError, match=r"do not cover the store\n  found: no embedding of late"):
        update(store, living_folder / "q.h5ad", study="again")
    before = opened.manifest.studies
    atlas.extend_reference(opened.model_folder("scvi"), opened, ["late"], out=after, **few)
    assert atlas.keep(opened, after, device="cpu") == 3
    assert opened.model_record("scvi")["parent"] == 2
    for old, new in zip(before[:3], opened.manifest.studies[:3], strict=True):
        assert old == new  # rows of the embedding were left where they are
    assert opened.embedding("scvi").shape == (900, 3)
    assert atlas.keep(opened, behind, "other", device="cpu") == 1  # a name of its own
    anew = train_small(opened, tmp_path / "anew", max_epochs=1)
    assert atlas.keep(opened, anew, device="cpu") == 4
    assert opened.model_record("scvi")["parent"] is None
    z = atlas.embed(atlas.load_model(anew), opened, name=None, device="cpu")
    np.testing.assert_array_equal(opened.embedding("scvi"), z)
    assert atlas.verify(store).whole


def test_a_damaged_model_is_found(living_store: Path) -> None:
    weights = living_store / "models" / "scvi" / "1" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="not what was written"):
        atlas.open_store(living_store).model_folder("scvi")
    (finding,) = atlas.verify(living_store).findings
    assert finding.path == str(weights)
    assert f"atlas keep {living_store} RUN --name scvi" in finding.do


def test_stores_of_the_version_before_are_read(living_folder: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(living_folder / "s.atlas", tmp_path / "s.atlas"))
    (store / "manifests" / "000004.json").unlink()
    path = store / "manifests" / "000003.json"
    values = json.loads(path.read_bytes())
    values["version"] = 1
    del values["models"]
    path.write_text(json.dumps(values))
    opened = atlas.open_store(store)
    assert dict(opened.models) == {}
    assert atlas.keep(opened, living_folder / "run", "mine", device="cpu") == 1


def test_an_earlier_state_is_checked_out_by_links(updated_atlas: Path, tmp_path: Path) -> None:
    before = files_of(updated_atlas)
    made = atlas.checkout(updated_atlas, 4, tmp_path / "old.atlas")
    assert (made.number, made.studies) == (4, ("reference_1", "reference_2"))
    assert dict(made.models) == {"scvi": 1}
    assert all(p.is_symlink() for p in (tmp_path / "old.atlas").glob("*/*") if not p.is_dir())
    assert atlas.verify(tmp_path / "old.atlas").whole
    np.testing.assert_array_equal(
        made.embedding("scvi"), atlas.open_store(updated_atlas).embedding("scvi")[:600]
    )
    made.annotate(made.obs()[["cell_type"]].rename(columns={"cell_type": "copy"}))
    made.drop("reference_2", purge=True)
    assert files_of(updated_atlas) == before
    with pytest.raises(OutputError, match="something here already"):
        atlas.checkout(updated_atlas, 4, tmp_path / "old.atlas")
    with pytest.raises(StoreError, match="no manifest of this number"):
        atlas.checkout(updated_atlas, 9, tmp_path / "other.atlas")


def test_the_commands(
    living_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(shutil.copytree(living_folder / "s.atlas", tmp_path / "s.atlas"))
    few = ["--max-epochs", "1", "--threads", "1", "--device", "cpu"]
    keys = ["--batch-key", "batch", "--label-key", "cell_type"]
    query = ["update", store, str(living_folder / "q.h5ad"), "--study", "kang"]
    assert (
        main(["keep", store, str(living_folder / "run"), "--name", "second", "--device", "cpu"])
        == 0
    )
    assert "model second 1 and its embedding kept; manifest 5" in capsys.readouterr().out
    assert main([*query, "--model", "second", *keys, *few]) == 0
    out = capsys.readouterr().out
    assert "kang: 200 cells added, model second 2, manifest 6" in out
    assert "before and" in out
    trained = atlas.stored_model(atlas.open_store(store), "second").surgery[-1].n_trained
    assert f"scvi + kang: {trained:,} of " in out
    assert "parameters trained (conditions, nearest)" in out
    assert main([*query, "--model", "second", *keys, *few]) == 2
    assert "The study is in the store already" in capsys.readouterr().err
    assert main(["history", store]) == 0
    out = capsys.readouterr().out
    assert "update kang: model second 2" in out
    assert "second 2: from second 1, knows reference_1, reference_2, kang" in out
    assert main(["history", store, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 3
    assert main(["checkout", store, "5", "--to", str(tmp_path / "old")]) == 0
    assert main(["info", str(tmp_path / "old")]) == 0
    assert "models: scvi 1, second 1" in capsys.readouterr().out
    assert main(["drop", store, "kang"]) == 0
    out = capsys.readouterr().out
    assert "models that know it, and stay as they are: second 2" in out
    assert "embeddings, now without its cells: second" in out


def test_a_model_is_shared_by_the_name_it_is_kept_under(
    updated_atlas: Path, tmp_path: Path
) -> None:
    store = atlas.open_store(updated_atlas)
    atlas.share(store, "scvi", tmp_path / "package")
    package = atlas.load_package(tmp_path / "package")
    np.testing.assert_array_equal(package.embedding, store.embedding("scvi"))
    assert package.studies.names == ("reference_1", "reference_2", "kang")
