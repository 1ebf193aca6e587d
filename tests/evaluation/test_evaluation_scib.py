"""The measures that scib-metrics has too: the same to 1e-3 on the same cells and neighbours."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scib_cells import measured_cells, scib_cells

from atlas.evaluation.metrics import Metrics
from atlas.evaluation.neighbours import nearest

HERE = Path(__file__).parent
SIDE = HERE.parents[1] / "benchmarks" / "peers" / "scib_side.py"
PEER = Path(os.environ.get("ATLAS_PEERS", Path.home() / ".cache" / "atlas-peers")) / "scib"

NAMES = {
    "ilisi": "ilisi",
    "clisi": "clisi",
    "kbet": "kbet",
    "graph_connectivity": "graph_connectivity",
    "silhouette_label": "silhouette_label",
    "silhouette_batch": "silhouette_batch",
    "isolated_labels": "isolated_labels",
    "bras": "bras",
    "pcr_batch": "pcr_batch",
    "pcr_comparison": "pcr_comparison",
    "nmi_kmeans": "kmeans_nmi",
    "ari_kmeans": "kmeans_ari",
    "nmi_leiden": "leiden_nmi",
    "ari_leiden": "leiden_ari",
}


@pytest.fixture(scope="module")
def ours() -> Metrics:
    return measured_cells()


@pytest.mark.parametrize("name", NAMES)
def test_as_scib_metrics(name: str, ours: Metrics) -> None:
    reference: dict[str, Any] = json.loads((HERE / "scib_reference.json").read_text())
    assert reference["version"] == "0.5.10"
    measure = ours[name]
    if "leiden" in name:
        pytest.importorskip("igraph", reason="the extra leiden is not installed")
    assert measure.value == pytest.approx(reference["values"][NAMES[name]], abs=1e-3)
    assert measure.low is not None
    assert measure.high is not None
    assert measure.low <= measure.value <= measure.high


def test_the_neighbours_are_the_same() -> None:
    cells = scib_cells()
    found = nearest(cells["z"], cells["z"], 89, np.arange(len(cells["z"])))
    np.testing.assert_array_equal(found.indices, cells["indices"][:, 1:])


@pytest.mark.long
def test_scib_metrics_still_says_so(tmp_path: Path, ours: Metrics) -> None:
    python = PEER / "bin" / "python"
    if not python.exists():
        pytest.skip(f"scib-metrics is not here: {PEER}")
    np.savez(tmp_path / "cells.npz", **scib_cells())
    out = tmp_path / "values.json"
    works = ["ilisi", "clisi", "kbet", "graph_connectivity", "silhouette_label", "pcr_comparison"]
    works.append("leiden")
    command = [str(python), str(SIDE), str(tmp_path / "cells.npz"), str(out), *works]
    subprocess.run(command, check=True, capture_output=True)
    values = json.loads(out.read_text())["values"]
    for name, theirs in NAMES.items():
        if theirs in values and ours[name].value is not None:
            assert ours[name].value == pytest.approx(values[theirs], abs=1e-3)
    assert len(values) == len(works) + 1  # NMI and ARI of Leiden
