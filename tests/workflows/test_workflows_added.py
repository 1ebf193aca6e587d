"""What the report tells of studies that updates added."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
from living_helpers import update
from workflows_helpers import study as make_study

import atlas
from atlas.workflows.added import added_studies


def test_the_report_tells_what_an_update_did(living_store: Path, tmp_path: Path) -> None:
    assert added_studies(atlas.open_store(living_store), "scvi") == ()
    report = update(living_store, make_study(3, 200, range(60)))
    store = atlas.open_store(living_store)
    (added,) = added_studies(store, "scvi")
    assert (added.name, added.version, added.cells) == ("kang", 2, 200)
    assert {one.name: one.cells for one in added.labels} == report.labels
    assert added.unknown_share == report.drift.unknown_share
    assert added.bound_after == report.drift.bound_after

    obs = store.study("kang").obs()
    means = obs.groupby(obs["scvi_label"].astype(str))["scvi_label_uncertainty"].mean()
    for one in added.labels:
        np.testing.assert_allclose(one.uncertainty, means[one.name])
    own = np.array([*store.labels, None], object)[store.obs_codes["label"][-200:]]
    expected = pd.crosstab(own, obs["scvi_label"].astype(str).to_numpy())
    assert added.confusion is not None
    found = pd.DataFrame(added.confusion.counts, added.confusion.truth, added.confusion.predicted)
    pd.testing.assert_frame_equal(
        found.sort_index(), expected, check_names=False, check_index_type=False, check_dtype=False
    )

    out = atlas.report(store, embedding="scvi", out=tmp_path / "r.html", queries=50)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", out.read_text()))
    assert "Studies that were added" in text
    assert f"{report.drift.bound_before:.3f}" in text
    for label, cells in report.labels.items():
        assert f"{label} {cells}" in text

    store.drop("kang")
    assert added_studies(atlas.open_store(living_store), "scvi") == ()
