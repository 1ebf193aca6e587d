"""Models kept with a store that a study was dropped from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from living_helpers import train_small

import atlas
from atlas.cli import main
from atlas.errors import ModelError, StoreError


@pytest.fixture
def updated(updated_atlas: Path, tmp_path: Path) -> Path:
    """A copy of the store after an update, to write to."""
    return Path(shutil.copytree(updated_atlas, tmp_path / "u.atlas"))


def test_a_purge_tells_which_versions_went_with_the_states(
    updated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drop", str(updated), "reference_1"]) == 0
    out = capsys.readouterr().out
    assert "models that know it, and stay as they are: scvi 1, scvi 2\n" in out
    assert "gone" not in out

    assert main(["drop", str(updated), "reference_1", "--purge"]) == 0
    out = capsys.readouterr().out
    assert "versions of models gone with these states: scvi 1\n" in out
    assert "models that know it, and stay as they are: scvi 2\n" in out
    assert [path.name for path in updated.glob("models/scvi/*")] == ["2"]
    store = atlas.open_store(updated)
    atlas.stored_model(store, "scvi", 2)
    with pytest.raises(StoreError, match=r"no such version\n  found: 1\n  expected: one of 2\n"):
        atlas.stored_model(store, "scvi", 1)


def test_a_purge_of_what_came_last_takes_no_version(updated: Path) -> None:
    report = atlas.open_store(updated).drop("kang", purge=True)
    assert report.removed_states == (5,)
    assert (report.models, report.removed_models) == (("scvi 2",), ())
    store = atlas.open_store(updated)
    assert [atlas.stored_model(store, "scvi", version).name for version in (1, 2)] == ["scvi"] * 2


def test_a_model_trained_anew_on_what_is_left_is_kept(updated: Path, tmp_path: Path) -> None:
    store = atlas.open_store(updated)
    earlier = atlas.open_store(updated, number=4)
    anew = train_small(earlier, tmp_path / "anew", seed=5)
    with pytest.raises(ModelError, match="a model without kang\n"):
        atlas.keep(store, anew, device="cpu")
    store.drop("kang")

    fewer = atlas.open_store(shutil.copytree(updated, tmp_path / "fewer.atlas"))
    fewer.drop("reference_1")
    less = train_small(fewer, tmp_path / "less")
    with pytest.raises(ModelError) as raised:
        atlas.keep(store, less, device="cpu")
    assert "a model without reference_1\n" in str(raised.value)
    assert "trained anew on reference_1, reference_2\n" in str(raised.value)

    assert atlas.keep(store, anew, device="cpu") == 3
    assert store.model_record("scvi")["parent"] is None
    assert store.embedding("scvi").shape == (600, 3)
    assert atlas.verify(updated).whole
