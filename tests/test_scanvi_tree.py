"""scANVI's probabilities along a tree whose end points alone are labelled.

scANVI, Xu et al. 2021, Supplementary Figure 15. `benchmarks/bench_tree.py` is the same with more
cells, seeds and models.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import atlas
from atlas.simulate import simulate


@pytest.mark.long
def test_probabilities_fall_with_the_distance_to_the_end_points(tmp_path: Path) -> None:
    (path,) = simulate(
        tmp_path / "cells", 1500, studies=1, batches=1, genes=400, types=4, library=2000.0,
        process="reads", tree=True, seed=0, progress=False,
    )  # fmt: skip
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(path, study="tree", label_key="cell_type")
    model = atlas.train(
        store,
        "scanvi",
        genes=list(store.var.index),
        out=tmp_path / "run",
        max_epochs=40,
        classifier_epochs=10,
        threads=1,
        seed=0,
    )
    ends = list(model.labels.classes)
    assert ends == ["root", "tip_1", "tip_2", "tip_3", "tip_4"]
    obs = store.obs()
    asked = (obs["cell_type"] == "Unknown").to_numpy()
    assert asked.mean() > 0.8
    p = atlas.label_probabilities(model, store)[asked].to_numpy()
    distance = obs.loc[asked, [f"distance_{end}" for end in ends]].to_numpy()
    correlations, means = [], []
    for end, other in itertools.permutations(range(5), 2):
        way = distance[:, end] + distance[:, other]
        path = np.flatnonzero(way < way.min() + 1e-6)  # the cells between the two end points
        path = path[distance[path, end].argsort()]
        correlations.append(spearmanr(p[path, end], -distance[path, end]).statistic)
        means.append([p[part, end].mean() for part in np.array_split(path, 5)])
    assert np.mean(correlations) > 0.85
    assert min(correlations) > 0.7
    assert (np.diff(means, axis=1) < 0).mean() > 0.95
    # from near 1 to near 0 over all paths, by way of what lies between: no step
    along = np.mean(means, axis=0)
    assert along[0] > 0.6
    assert 0.15 < along[2] < 0.6
    assert along[4] < 0.1
